//! Publishing that is known to have arrived: mandatory but for direct replies, confirmed, and every
//! return matched to its own message.
//!
//! Why not simply await lapin's confirm? When publishes overlap, lapin hands a returned message
//! to whichever confirm resolves next (4.12.3, `acknowledgement.rs`): an unroutable reply then
//! looks like an acknowledged one, and the job would be acked with nobody told. The broker sends
//! every return before its own confirm, so once *all* confirms of a batch are in, all of its
//! returns are in as well; they are matched by a header that each publish has for its own. A
//! batch is whatever is waiting, so a lone publish waits for nobody.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use futures::StreamExt as _;
use futures::future::join_all;
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::types::AMQPValue;
use lapin::{Channel, Confirmation, Connection, Event};
use tokio::sync::{Mutex, mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::headers;
use super::link::{self, LinkError, Options, short};
use super::outgoing::Message;
use crate::clock::as_millis;
use crate::retry::{Backoff, backoff};

/// How long the broker may take for the confirms of a batch.
const CONFIRM: Duration = Duration::from_secs(30);
/// How long to wait for a channel that nobody uses any more to be closed.
const CLOSE: Duration = Duration::from_secs(1);
/// How long it may take to open a channel: a node that is losing its neighbours may never answer.
const OPEN: Duration = Duration::from_secs(10);
/// A connection that lived so long was a good one.
const GOOD: Duration = Duration::from_secs(30);

/// What became of a publish.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Published {
    /// A queue has it, durably.
    Routed,
    /// No queue was there to take it.
    Returned(String),
    /// A queue refused it: it is full, or no node leads it at the moment.
    Refused,
}

/// Nobody knows what became of a publish; publishing it again is safe.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the publish was lost with its channel: {0}")]
pub struct Lost(pub String);

/// Which channels a publish goes through. Kept apart, because an error on a channel takes all of
/// its publishes with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// Replies, whose addresses strangers choose.
    Replies,
    /// Delay hops and parked jobs.
    Internal,
}

/// How much goes on at once.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// Most messages in one batch: larger ones only make the first wait for the last.
    batch: usize,
    /// Channels per class. Several, so that one batch's slowest confirm holds up no other batch.
    channels: usize,
}

impl Shape {
    /// For speed.
    pub const WIDE: Self = Self { batch: 64, channels: 4 };
    /// One publish at a time, so that what breaks the connection is known to have broken it.
    pub const SINGLE: Self = Self { batch: 1, channels: 1 };
}

/// How the publishing connection is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// Connecting, or between two tries; the last reason.
    Down(String),
    /// Working.
    Up,
    /// The broker reads nothing from it: a memory or disk alarm.
    Blocked(String),
}

/// Channels that may break in a row, with no publish confirmed in between, before publishing counts
/// as down: the reply exchange may be gone, or the right to write to it.
const BREAKS: u32 = 4;

/// How long after that it is tried again.
const AGAIN: Duration = Duration::from_secs(15);

/// Tells how publishing is.
#[derive(Debug)]
struct Told {
    state: watch::Sender<State>,
    breaks: AtomicU32,
}

impl Told {
    fn say(&self, state: State) {
        self.state.send_replace(state);
    }

    /// Publishing works, or is to be tried again, whatever was said before; but an alarm is over only
    /// when the broker says so, and this may be the confirm of what it read before.
    fn confirmed(&self) {
        self.breaks.store(0, Ordering::Relaxed);
        self.state.send_if_modified(|state| {
            let news = matches!(state, State::Down(_));
            if news {
                *state = State::Up;
            }
            news
        });
    }

    fn is_broken(&self) -> bool {
        self.breaks.load(Ordering::Relaxed) >= BREAKS
    }

    /// A channel broke under its publishes.
    fn broke(&self, error: &LinkError) {
        if self.breaks.fetch_add(1, Ordering::Relaxed) + 1 >= BREAKS {
            self.say(State::Down(format!(
                "publishing breaks its channel again and again: {error}"
            )));
        }
    }
}

/// Why a channel's task is over.
enum Ended {
    /// It broke.
    Broke(LinkError),
    /// A queue refused something, and it is to be replaced. RabbitMQ 3.10.8 goes on refusing, as long as the
    /// channel lives and the node is away, on a channel that first met a queue while that queue's leader had
    /// just died; another one publishes to the new leader.
    Refused,
}

/// A channel that is younger than that is not replaced when it is refused: a queue that is full refuses
/// on the next one, too.
const YOUNG: Duration = Duration::from_secs(1);

struct Order {
    message: Message,
    done: oneshot::Sender<Result<Published, Lost>>,
}

type Orders = Arc<Mutex<mpsc::Receiver<Order>>>;

/// The way to the publishing connection.
#[derive(Clone)]
pub struct Publisher {
    replies: mpsc::Sender<Order>,
    internal: mpsc::Sender<Order>,
    state: watch::Receiver<State>,
}

impl std::fmt::Debug for Publisher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Publisher").field("state", &*self.state.borrow()).finish_non_exhaustive()
    }
}

impl Publisher {
    /// A publisher and the task that keeps its connection; the task runs until `stop` is cancelled.
    pub fn new(
        options: Options,
        name: String,
        backoff: Backoff,
        shape: Shape,
        stop: CancellationToken,
    ) -> (Self, impl Future<Output = ()> + Send + 'static) {
        let (replies, reply_orders) = mpsc::channel(1024);
        let (internal, internal_orders) = mpsc::channel(1024);
        let (told, state) = watch::channel(State::Down("not connected yet".to_owned()));
        let told = Arc::new(Told { state: told, breaks: AtomicU32::new(0) });
        let orders = [reply_orders, internal_orders].map(|orders| Arc::new(Mutex::new(orders)));
        let keep = async move {
            let (mut failures, mut blocked) = (0, false);
            loop {
                let began = Instant::now();
                let reason = tokio::select! {
                    reason = generation(&options, &name, &orders, &told, shape, blocked) => reason,
                    () = stop.cancelled() => return,
                };
                // Until a publish goes through again, an alarm is taken to be still on.
                blocked |= matches!(*told.state.borrow(), State::Blocked(_));
                blocked &= !matches!(*told.state.borrow(), State::Up);
                failures = if began.elapsed() > GOOD { 1 } else { failures + 1 };
                let delay = backoff.delay(failures, None, backoff::chance());
                tracing::warn!(connection = name, error = %reason, delay_ms = as_millis(delay), "the publishing connection is down");
                told.say(State::Down(reason.to_string()));
                tokio::select! {
                    () = tokio::time::sleep(delay) => {}
                    () = stop.cancelled() => return,
                }
            }
        };
        (Self { replies, internal, state }, keep)
    }

    /// Publishes and waits until the broker has said what became of it. While there is no
    /// connection, it waits for the next one.
    ///
    /// # Errors
    /// [`Lost`], if the channel broke before the broker said anything.
    pub async fn publish(&self, class: Class, message: Message) -> Result<Published, Lost> {
        let (done, answer) = oneshot::channel();
        let orders = match class {
            Class::Replies => &self.replies,
            Class::Internal => &self.internal,
        };
        let ended = || Lost("the publisher has ended".to_owned());
        orders.send(Order { message, done }).await.map_err(|_| ended())?;
        answer.await.unwrap_or_else(|_| Err(ended()))
    }

    /// How the connection is, and when that changes.
    #[must_use]
    pub fn state(&self) -> watch::Receiver<State> {
        self.state.clone()
    }
}

/// One connection's life; returns why it ended. `blocked` says that the last one ended under an
/// alarm: RabbitMQ tells a new connection only when it publishes, so that is tried first.
async fn generation(
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
    let mut channels = JoinSet::new();
    for class in 0..orders.len() {
        for _ in 0..shape.channels {
            let opened = open(&connection, class, orders, told, shape.batch, &mut channels);
            if let Err(error) = opened.await {
                return error;
            }
        }
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
                Some(Event::Error(error)) => return error.into(),
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
            () = tokio::time::sleep(AGAIN), if told.is_broken() => {
                told.confirmed();
                continue;
            }
        };
        if let Err(error) = reopened {
            return error;
        }
    }
}

async fn open(
    connection: &Connection,
    class: usize,
    orders: &[Orders; 2],
    told: &Arc<Told>,
    batch: usize,
    channels: &mut JoinSet<(usize, Ended)>,
) -> Result<(), LinkError> {
    let channel = confirming(connection).await?;
    let (orders, told) = (orders[class].clone(), told.clone());
    channels.spawn(async move { (class, serve(&channel, &orders, &told, batch).await) });
    Ok(())
}

/// Opens a channel in the place of one on which a queue refused, however long that takes, and publishes on
/// it: a queue in trouble takes no other's connection with it.
fn replace(
    connection: &Arc<Connection>,
    class: usize,
    orders: &[Orders; 2],
    told: &Arc<Told>,
    batch: usize,
    channels: &mut JoinSet<(usize, Ended)>,
) {
    let (connection, orders, told) = (connection.clone(), orders[class].clone(), told.clone());
    channels.spawn(async move {
        loop {
            match confirming(&connection).await {
                Ok(channel) => return (class, serve(&channel, &orders, &told, batch).await),
                Err(error) => {
                    tracing::warn!(%error, "there is no other publishing channel yet; trying again");
                    tokio::time::sleep(YOUNG).await;
                }
            }
        }
    });
}

async fn confirming(connection: &Connection) -> Result<Channel, LinkError> {
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
async fn probe(connection: &Connection) -> Result<(), LinkError> {
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

/// Publishes batch after batch on one channel, until it breaks or is refused.
async fn serve(channel: &Channel, orders: &Orders, told: &Told, most: usize) -> Ended {
    let opened = Instant::now();
    loop {
        let mut batch = Vec::new();
        {
            let mut orders = orders.lock().await;
            if orders.recv_many(&mut batch, most).await == 0 {
                // No publisher is left, so nothing will come until the task is stopped.
                std::future::pending::<()>().await;
            }
        }
        // Whoever gave up waiting will publish again when the job is delivered again.
        batch.retain(|order: &Order| !order.done.is_closed());
        let any = !batch.is_empty();
        let refused = match publish_batch(channel, batch).await {
            Ok(refused) => refused,
            Err(error) => return Ended::Broke(error),
        };
        if any {
            told.confirmed();
        }
        if refused && opened.elapsed() >= YOUNG {
            // Nothing is under way on it. A node in trouble may never say that it is closed.
            let close = channel.close(200, short("replaced").unwrap_or_default());
            drop(tokio::time::timeout(CLOSE, close).await);
            return Ended::Refused;
        }
    }
}

/// Whether any of it was refused.
async fn publish_batch(channel: &Channel, batch: Vec<Order>) -> Result<bool, LinkError> {
    let outcome = tokio::time::timeout(CONFIRM, send_and_confirm(channel, &batch)).await;
    let outcome = outcome.unwrap_or_else(|_| {
        Err(LinkError::Broken("the broker did not confirm in time".to_owned()))
    });
    let results = match outcome {
        Ok(results) => results,
        Err(error) => {
            for order in batch {
                give(order, Err(Lost(error.to_string())));
            }
            return Err(error);
        }
    };
    let refused = results.contains(&Published::Refused);
    for (order, result) in batch.into_iter().zip(results) {
        give(order, Ok(result));
    }
    Ok(refused)
}

/// Sends a whole batch, waits for all of its confirms, and only then reads the returns.
async fn send_and_confirm(channel: &Channel, batch: &[Order]) -> Result<Vec<Published>, LinkError> {
    let mut confirms = Vec::with_capacity(batch.len());
    let mut ids = Vec::with_capacity(batch.len());
    for order in batch {
        let (id, sent) = send(channel, &order.message).await?;
        ids.push(id);
        confirms.push(sent);
    }
    let mut returned = HashMap::new();
    let mut acked = Vec::with_capacity(batch.len());
    for confirmation in join_all(confirms).await {
        let confirmation = confirmation?;
        acked.push(matches!(confirmation, Confirmation::Ack(_)));
        if let Some(message) = confirmation.take_message() {
            let headers = message.properties.headers().as_ref();
            if let Some(AMQPValue::LongLongInt(id)) =
                headers.and_then(|headers| headers.inner().get(headers::PUBLISH_ID))
            {
                returned.insert(*id, message.reply_text.to_string());
            }
        }
    }
    let judge = |(id, acked): (i64, bool)| match returned.remove(&id) {
        Some(reason) => Published::Returned(reason),
        None if acked => Published::Routed,
        None => Published::Refused,
    };
    Ok(ids.into_iter().zip(acked).map(judge).collect())
}

async fn send(
    channel: &Channel,
    message: &Message,
) -> Result<(i64, lapin::PublisherConfirm), LinkError> {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let id = NEXT.fetch_add(1, Ordering::Relaxed).cast_signed();
    let mut headers = message.properties.headers().clone().unwrap_or_default();
    headers.insert(headers::PUBLISH_ID.into(), AMQPValue::LongLongInt(id));
    let confirm = channel
        .basic_publish(
            message.exchange.clone(),
            message.routing_key.clone(),
            BasicPublishOptions { mandatory: message.mandatory, immediate: false },
            &message.body,
            message.properties.clone().with_headers(headers),
        )
        .await?;
    Ok((id, confirm))
}

/// Answers; whoever stopped waiting will publish again when the job is delivered again.
fn give(order: Order, result: Result<Published, Lost>) {
    drop(order.done.send(result));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_confirm_of_what_was_read_before_an_alarm_does_not_end_it() {
        let (state, _) = watch::channel(State::Blocked("low on memory".to_owned()));
        let told = Told { state, breaks: AtomicU32::new(0) };
        told.confirmed();
        assert!(matches!(*told.state.borrow(), State::Blocked(_)));
        told.say(State::Down("its channel broke".to_owned()));
        told.confirmed();
        assert_eq!(*told.state.borrow(), State::Up);
    }
}
