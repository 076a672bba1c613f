//! A publishing connection: its channels, and what becomes of each.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use futures::StreamExt as _;
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::{Channel, Connection, Event};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::batch::{Orders, serve};
use super::{Shape, State};
use crate::rabbit::link::{self, LinkError, Options, short};

/// How long to wait for a channel that nobody uses any more to be closed.
pub(super) const CLOSE: Duration = Duration::from_secs(1);

/// How long it may take to open a channel: a node that is losing its neighbours may never answer.
pub(super) const OPEN: Duration = Duration::from_secs(10);

/// How long a channel is tried to be replaced.
pub(super) const REPLACE: Duration = Duration::from_secs(30);

/// A connection that lived so long was a good one.
pub(super) const STABLE_AFTER: Duration = Duration::from_secs(30);

/// Channels that may break in a row, with no publish confirmed in between, before publishing counts
/// as down: the reply exchange may be gone, or the right to write to it.
pub(super) const MAX_BREAKS: u32 = 4;

/// How long after that it is tried again.
pub(super) const RETRY_BROKEN_AFTER: Duration = Duration::from_secs(15);

/// Tells how publishing is.
#[derive(Debug)]
pub(super) struct Told {
    pub(super) state: watch::Sender<State>,
    breaks: AtomicU32,
    /// Batches of this connection that wait for their confirms.
    under_way: watch::Sender<u32>,
    /// Batches that were lost with this connection.
    lost: AtomicU32,
}

impl Told {
    pub(super) fn new(state: watch::Sender<State>) -> Self {
        let (under_way, _) = watch::channel(0);
        Self { state, breaks: AtomicU32::new(0), under_way, lost: AtomicU32::new(0) }
    }

    /// A batch is sent.
    pub(super) fn begun(&self) {
        self.under_way.send_modify(|batches| *batches += 1);
    }

    /// What became of it is known.
    pub(super) fn done(&self, lost: bool) {
        self.lost.fetch_add(u32::from(lost), Ordering::Relaxed);
        self.under_way.send_modify(|batches| *batches = batches.saturating_sub(1));
    }

    /// Waits until each batch of a connection that is closed has learned why.
    async fn all_done(&self) {
        let mut under_way = self.under_way.subscribe();
        drop(tokio::time::timeout(CLOSE, under_way.wait_for(|batches| *batches == 0)).await);
    }

    /// Whether a connection that is over was ended by the only publish on it. Begins the counts of the next one.
    pub(super) fn take_lone_loss(&self, ended: &LinkError, shape: Shape) -> bool {
        let any = self.lost.swap(0, Ordering::Relaxed) > 0;
        self.under_way.send_replace(0);
        any && shape.is_single() && matches!(ended, LinkError::InternalError(_))
    }

    pub(super) fn say(&self, state: State) {
        self.state.send_replace(state);
    }

    /// Publishing works, or is to be tried again, whatever was said before; but an alarm is over only
    /// when the broker says so, and this may be the confirm of what it read before.
    pub(super) fn confirmed(&self) {
        self.breaks.store(0, Ordering::Relaxed);
        self.state.send_if_modified(|state| {
            let news = matches!(state, State::Down(_));
            if news {
                *state = State::Up;
            }
            news
        });
    }

    pub(super) fn is_broken(&self) -> bool {
        self.breaks.load(Ordering::Relaxed) >= MAX_BREAKS
    }

    /// A channel broke under its publishes.
    pub(super) fn broke(&self, error: &LinkError) {
        if self.breaks.fetch_add(1, Ordering::Relaxed) + 1 >= MAX_BREAKS {
            self.say(State::Down(format!(
                "publishing breaks its channel again and again: {error}"
            )));
        }
    }
}

/// Why a channel's task is over.
pub(super) enum Ended {
    /// It broke.
    Broke(LinkError),
    /// A queue refused something, and it is to be replaced. RabbitMQ 3.10.8 goes on refusing, as long as the
    /// channel lives and the node is away, on a channel that first met a queue while that queue's leader had
    /// just died; another one publishes to the new leader.
    Refused,
}

/// A channel that is younger than that is not replaced when it is refused: a queue that is full refuses
/// on the next one, too.
pub(super) const MIN_CHANNEL_AGE: Duration = Duration::from_secs(1);

/// One connection's life; returns why it ended. `blocked` says that the last one ended under an
/// alarm: RabbitMQ tells a new connection only when it publishes, so that is tried first.
pub(super) async fn serve_connection(
    options: &Options,
    name: &str,
    orders: &[Orders; 2],
    told: &Arc<Told>,
    shape: Shape,
    blocked: bool,
) -> LinkError {
    let connection = match link::connect(options, name).await {
        Ok(connection) => Arc::new(connection),
        Err(error) => return error,
    };
    let mut events = connection.events_listener();
    if blocked && let Err(error) = probe(&connection).await {
        return error;
    }
    // All are open before one is used: what is published must not break the opening of the next.
    let mut opened = Vec::new();
    for class in 0..orders.len() {
        for _ in 0..shape.channels {
            match confirming(&connection).await {
                Ok(channel) => opened.push((class, channel)),
                Err(error) => return error,
            }
        }
    }
    let mut channels = JoinSet::new();
    for (class, channel) in opened {
        publish_on(channel, class, orders, told, shape.batch, &mut channels);
    }
    told.say(State::Up);
    tracing::info!(connection = name, "the publishing connection is up");
    loop {
        let reopened = tokio::select! {
            event = events.next() => match event {
                Some(Event::ConnectionBlocked(reason)) => {
                    tracing::warn!(error = reason, "the broker has blocked publishing: a memory or disk alarm");
                    told.say(State::Blocked(reason));
                    continue;
                }
                Some(Event::ConnectionUnblocked) => {
                    tracing::info!("the broker takes messages again");
                    told.say(State::Up);
                    continue;
                }
                // lapin reports a channel's error here as well; its task has it, too.
                Some(Event::Error(_)) if connection.status().connected() => continue,
                Some(Event::Error(error)) => {
                    told.all_done().await;
                    return error.into();
                }
                Some(_) => continue,
                None => return LinkError::Broken("the connection ended".to_owned()),
            },
            ended = channels.join_next() => match ended {
                Some(Ok((class, Ended::Refused))) if connection.status().connected() => {
                    replace(&connection, class, orders, told, shape.batch, &mut channels);
                    continue;
                }
                Some(Ok((class, Ended::Broke(error)))) if connection.status().connected() => {
                    // One publish can take its channel down, but not its neighbours for long.
                    tracing::warn!(%error, "a publishing channel was closed; opening another");
                    told.broke(&error);
                    open(&connection, class, orders, told, shape.batch, &mut channels).await
                }
                Some(Ok((_, Ended::Broke(error)))) => return error,
                Some(Ok((_, Ended::Refused))) => return LinkError::Broken("the connection ended".to_owned()),
                Some(Err(error)) => return LinkError::Broken(format!("a channel's task died: {error}")),
                None => return LinkError::Broken("no channel is left".to_owned()),
            },
            // Nobody may be left whose publish would show that it works again.
            () = tokio::time::sleep(RETRY_BROKEN_AFTER), if told.is_broken() => {
                told.confirmed();
                continue;
            }
        };
        if let Err(error) = reopened {
            return error;
        }
    }
}

pub(super) async fn open(
    connection: &Connection,
    class: usize,
    orders: &[Orders; 2],
    told: &Arc<Told>,
    batch: usize,
    channels: &mut JoinSet<(usize, Ended)>,
) -> Result<(), LinkError> {
    let channel = confirming(connection).await?;
    publish_on(channel, class, orders, told, batch, channels);
    Ok(())
}

fn publish_on(
    channel: Channel,
    class: usize,
    orders: &[Orders; 2],
    told: &Arc<Told>,
    batch: usize,
    channels: &mut JoinSet<(usize, Ended)>,
) {
    let (orders, told) = (orders[class].clone(), told.clone());
    channels.spawn(async move { (class, serve(&channel, &orders, &told, batch).await) });
}

/// Opens a channel in the place of one on which a queue refused, and publishes on it: a queue in trouble
/// takes no other's connection with it. A node that opens none for a while is left for another one.
pub(super) fn replace(
    connection: &Arc<Connection>,
    class: usize,
    orders: &[Orders; 2],
    told: &Arc<Told>,
    batch: usize,
    channels: &mut JoinSet<(usize, Ended)>,
) {
    let (connection, orders, told) = (connection.clone(), orders[class].clone(), told.clone());
    channels.spawn(async move {
        let began = Instant::now();
        loop {
            match confirming(&connection).await {
                Ok(channel) => return (class, serve(&channel, &orders, &told, batch).await),
                Err(error) if began.elapsed() >= REPLACE => {
                    return (class, Ended::Broke(error));
                }
                Err(error) => {
                    tracing::warn!(%error, "there is no other publishing channel yet; trying again");
                    tokio::time::sleep(MIN_CHANNEL_AGE).await;
                }
            }
        }
    });
}

pub(super) async fn confirming(connection: &Connection) -> Result<Channel, LinkError> {
    let opened = async {
        let channel = connection.create_channel().await?;
        channel.confirm_select(ConfirmSelectOptions { nowait: false }).await?;
        Ok::<_, lapin::Error>(channel)
    };
    let late = || LinkError::Broken("the broker did not open a channel in time".to_owned());
    Ok(tokio::time::timeout(OPEN, opened).await.map_err(|_| late())??)
}

/// Publishes a message that no queue takes, and waits for any answer: a broker under an alarm gives
/// none, and one that forbids it gives one as well. It has a body, because RabbitMQ stops reading
/// after a content header (seen on 3.10.8): one without a body is confirmed even under an alarm.
pub(super) async fn probe(connection: &Connection) -> Result<(), LinkError> {
    let channel = confirming(connection).await?;
    let options = BasicPublishOptions { mandatory: false, immediate: false };
    let nobody = short("checkout-worker.probe")?;
    let asked = async {
        let sent = channel
            .basic_publish(short("")?, nobody, options, b"?", lapin::BasicProperties::default())
            .await;
        if let Ok(confirm) = sent {
            // Refused or confirmed: the broker reads.
            drop(confirm.await);
        }
        Ok(())
    };
    let late = || LinkError::Broken("the broker still takes no messages".to_owned());
    tokio::time::timeout(OPEN, asked).await.map_err(|_| late())?
}
