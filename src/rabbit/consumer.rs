//! Taking jobs: one connection, one channel per lane, as many unacked deliveries as the lane has
//! permits.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use lapin::message::Delivery as RawDelivery;
use lapin::options::{
    BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicNackOptions, BasicQosOptions,
    QueueDeclareOptions,
};
use lapin::protocol::AMQPSoftError;
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Connection, Consumer};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::compare::may_keep_out;
use super::link::{self, LinkError, Options, refusal, short};
use super::topology::{DELIVERY_LIMIT, Topology, durable, exclusive, shared_guard};
use crate::job::Lane;

/// For any single answer of the broker.
const ANSWER: Duration = Duration::from_secs(15);

/// A message that was delivered and not yet acked.
#[derive(Debug)]
pub struct Delivery {
    /// Where it came from.
    pub lane: Lane,
    /// The body.
    pub body: Arc<[u8]>,
    /// The properties.
    pub properties: BasicProperties,
    /// Whether the broker delivered it before.
    pub redelivered: bool,
    /// When it came: the broker takes back what is held for too long.
    pub arrived: Instant,
    /// Cancelled when the session that delivered it is over: it cannot be acked any more and
    /// will be delivered again. Cancelling it ends the session.
    pub session: CancellationToken,
    raw: RawDelivery,
    /// Kept: lapin closes a channel with its last handle, and a delivery of a closed channel cannot be
    /// acked any more.
    _channel: Arc<Channel>,
}

/// What became of an ack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Acked {
    /// Sent to the broker.
    Sent,
    /// The channel is gone: the message will come again.
    TooLate,
}

impl Delivery {
    /// Whether the broker has counted so many deliveries of it that it had better not be given back: at the
    /// limit it takes the message away.
    #[must_use]
    pub fn nears_its_limit(&self) -> bool {
        is_near_its_limit(self.properties.headers().as_ref())
    }

    /// Tells the broker that the message is dealt with.
    pub async fn ack(&self) -> Acked {
        self.sent(self.raw.acker.ack(BasicAckOptions { multiple: false })).await
    }

    /// Gives the message back, to be delivered again.
    pub async fn give_back(&self) -> Acked {
        self.sent(self.raw.acker.nack(BasicNackOptions { multiple: false, requeue: true })).await
    }

    /// An ack's future resolves when the frame is on its way; on a connection that is gone it may
    /// never do so, and on one that the broker has blocked not for a long time.
    async fn sent(&self, ack: impl Future<Output = lapin::Result<bool>>) -> Acked {
        tokio::select! {
            biased;
            sent = tokio::time::timeout(ANSWER, ack) => match sent {
                Ok(Ok(true)) => Acked::Sent,
                Ok(Ok(false) | Err(_)) => Acked::TooLate,
                Err(_) => {
                    // Left alone, the delivery would keep its place in the prefetch window.
                    tracing::warn!(
                        seconds = ANSWER.as_secs(),
                        "an ack did not go out in time: the session is given up"
                    );
                    self.session.cancel();
                    Acked::TooLate
                }
            },
            () = self.session.cancelled() => Acked::TooLate,
        }
    }
}

/// RabbitMQ counts deliveries of quorum queues in `x-delivery-count`; 4.x counts those alone that came back by
/// themselves.
fn is_near_its_limit(headers: Option<&FieldTable>) -> bool {
    let count = match headers.and_then(|headers| headers.inner().get("x-delivery-count")) {
        Some(AMQPValue::LongLongInt(count)) => *count,
        Some(AMQPValue::LongInt(count)) => i64::from(*count),
        Some(AMQPValue::LongUInt(count)) => i64::from(*count),
        Some(_) | None => 0,
    };
    count >= i64::from(DELIVERY_LIMIT / 2)
}

/// Why a session could not begin.
#[derive(Debug, Clone, thiserror::Error)]
pub enum OpenError {
    /// Others serve these queues, and either they or this worker have an embedded ledger.
    #[error(
        "other workers serve these queues (their queue {0} exists), and they or this one have a ledger of their own: two ledgers would make two links for one request_id. Waiting until they are gone (a shared ledger's, and a minute more); several workers share a postgres:// ledger"
    )]
    Guarded(String),
    /// Somebody consumes a queue that only this worker may serve.
    #[error(
        "{0} has a consumer already, and this worker has a ledger of its own: two ledgers would make two links for one request_id. Waiting until it is gone; several workers share a postgres:// ledger"
    )]
    Consumed(String),
    /// Workers with another ledger serve these queues, or did until a moment ago.
    #[error(
        "workers with another ledger serve these queues ({0} bears its mark); waiting until they are gone, and a minute more: two ledgers would make two links for one request_id. Give all workers the same ledger.url"
    )]
    OtherLedger(String),
    /// The broker is not there, or says no.
    #[error(transparent)]
    Link(#[from] LinkError),
}

/// One connection's life as a consumer.
pub struct Session {
    connection: Connection,
    /// Cancelled when the session is over.
    pub over: CancellationToken,
    /// Keeps workers with another ledger out until the session is over.
    guard: Option<HeldGuard>,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session").field("over", &self.over.is_cancelled()).finish_non_exhaustive()
    }
}

/// What a session needs from the configuration.
#[derive(Debug, Clone)]
pub struct Plan {
    /// How to reach the broker.
    pub options: Options,
    /// Names the connection for operators.
    pub name: String,
    /// What there is on the broker.
    pub topology: Topology,
    /// Whether to declare it.
    pub declare: bool,
    /// Who else may serve these queues.
    pub guard: Guard,
}

/// Which other workers may serve the same queues: two ledgers would make two links for one job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Guard {
    /// Nobody: the ledger is embedded.
    Alone,
    /// Those with the same shared ledger; its mark.
    Sharing(String),
    /// Whoever does, but for a worker with an embedded ledger: this one may declare nothing that would
    /// tell more.
    Nothing,
}

impl Session {
    /// Connects, keeps other workers out if need be, and makes sure that the topology is there.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub async fn open(plan: &Plan) -> Result<Self, OpenError> {
        let connection = link::connect(&plan.options, &plan.name).await?;
        let guard = guard(&connection, &plan.topology, &plan.guard).await?;
        if plan.declare {
            in_time(async {
                let channel = connection.create_channel().await?;
                plan.topology.declare(&channel).await?;
                channel.close(200, "declared".into()).await.map_err(LinkError::from)
            })
            .await?;
        }
        Ok(Self { connection, over: CancellationToken::new(), guard })
    }

    /// Starts to consume a lane with at most `prefetch` unacked deliveries.
    ///
    /// # Errors
    /// If the broker says no.
    pub async fn consume(
        &self,
        topology: &Topology,
        lane: Lane,
        prefetch: u16,
    ) -> Result<Deliveries, LinkError> {
        let queue = topology.jobs(lane);
        in_time(async {
            let channel = Arc::new(self.connection.create_channel().await?);
            channel.basic_qos(prefetch, BasicQosOptions { global: false }).await?;
            let options = BasicConsumeOptions {
                no_local: false,
                no_ack: false,
                exclusive: false,
                nowait: false,
            };
            let consumer = channel
                .basic_consume(short(&queue)?, short("")?, options, FieldTable::default())
                .await?;
            Ok(Deliveries { lane, queue, channel, consumer, over: self.over.clone() })
        })
        .await
    }

    /// Resolves when the guard is gone, because somebody has deleted its queue: from then on workers with
    /// another ledger are kept out no longer.
    pub async fn guard_lost(&self) -> LinkError {
        let Some(kept) = &self.guard else { return std::future::pending().await };
        loop {
            match kept.consumer.lock().await.next().await {
                // Nobody publishes there; whatever comes all the same is no end.
                Some(Ok(_)) => {}
                // Its connection's or its channel's end, which has a reason of its own.
                Some(Err(error)) => return error.into(),
                None => {
                    let text = "the queue that keeps other ledgers' workers out is gone";
                    return LinkError::Broken(text.to_owned());
                }
            }
        }
    }

    /// Says goodbye to the broker, which then gives every unacked delivery to somebody else.
    pub async fn close(&self) {
        self.over.cancel();
        // A broker that does not answer any more loses nothing by our leaving.
        drop(
            tokio::time::timeout(Duration::from_secs(2), self.connection.close(200, "done".into()))
                .await,
        );
    }
}

pub(super) async fn in_time<T>(
    work: impl Future<Output = Result<T, LinkError>>,
) -> Result<T, LinkError> {
    let late = || {
        LinkError::Broken(format!(
            "the broker did not answer within {}",
            humantime::format_duration(ANSWER)
        ))
    };
    tokio::time::timeout(ANSWER, work).await.unwrap_or_else(|_| Err(late()))
}

/// Keeps out workers with another ledger, by a queue of one name. One that is exclusive exists as long as
/// its connection, and nobody else can declare it meanwhile. One that is shared can only be declared
/// again with the same arguments, of which the ledger's mark is one; whoever serves consumes it, so it
/// goes a minute after the last one.
async fn guard(
    connection: &Connection,
    topology: &Topology,
    guard: &Guard,
) -> Result<Option<HeldGuard>, OpenError> {
    let name = topology.guard();
    let (options, arguments) = match guard {
        Guard::Nothing => {
            (QueueDeclareOptions { passive: true, ..durable() }, FieldTable::default())
        }
        Guard::Alone => (exclusive(), FieldTable::default()),
        Guard::Sharing(mark) => (durable(), shared_guard(mark)),
    };
    let declared = in_time(async {
        let channel = connection.create_channel().await?;
        match channel.queue_declare(short(&name)?, options, arguments).await {
            Ok(_) => Ok(Ok(Some(channel))),
            Err(error) => match refusal(&error) {
                Some(AMQPSoftError::RESOURCELOCKED) => Ok(Err(OpenError::Guarded(name.clone()))),
                // It is not there, or not for this user to see.
                Some(_) if *guard == Guard::Nothing => Ok(Ok(None)),
                Some(AMQPSoftError::PRECONDITIONFAILED) => {
                    Ok(Err(OpenError::OtherLedger(name.clone())))
                }
                Some(AMQPSoftError::ACCESSREFUSED) if *guard == Guard::Alone => {
                    Err(LinkError::Denied(format!("{error}; {}", may_keep_out(&name))))
                }
                Some(_) | None => Err(error.into()),
            },
        }
    });
    let Some(channel) = declared.await?? else { return Ok(None) };
    if *guard == Guard::Nothing {
        // That of a shared ledger's workers, which this one cannot tell from its own.
        return Ok(None);
    }
    if *guard == Guard::Alone {
        nobody_else_consumes(connection, topology).await?;
    }
    // Nobody publishes there: replies may not go to it, and jobs do not.
    let consumer = in_time(async {
        let options = BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() };
        let arguments = FieldTable::default();
        let consumed = channel.basic_consume(short(&name)?, short("")?, options, arguments).await;
        consumed.map_err(|error| match refusal(&error) {
            Some(AMQPSoftError::ACCESSREFUSED) => {
                LinkError::Denied(format!("{error}; {}", may_keep_out(&name)))
            }
            Some(_) | None => error.into(),
        })
    });
    let consumer = tokio::sync::Mutex::new(consumer.await?);
    Ok(Some(HeldGuard { _channel: channel, consumer }))
}

/// What the guard hangs on, as long as the session lasts.
struct HeldGuard {
    _channel: Channel,
    consumer: tokio::sync::Mutex<Consumer>,
}

/// Workers that may declare nothing keep nobody out, but their consumers are seen.
async fn nobody_else_consumes(
    connection: &Connection,
    topology: &Topology,
) -> Result<(), OpenError> {
    for lane in Lane::ALL {
        let queue = topology.jobs(lane);
        let consumers = in_time(async {
            let channel = connection.create_channel().await?;
            let options = QueueDeclareOptions { passive: true, ..durable() };
            match channel.queue_declare(short(&queue)?, options, FieldTable::default()).await {
                Ok(queue) => Ok(queue.consumer_count()),
                Err(error) if refusal(&error).is_some() => Ok(0),
                Err(error) => Err(error.into()),
            }
        });
        if consumers.await? > 0 {
            return Err(OpenError::Consumed(queue));
        }
    }
    Ok(())
}

/// One lane's deliveries. Its channel lives as long as they, and is closed after the last one's ack: what the
/// broker believes to have delivered on it, and never did, then goes to somebody else.
pub struct Deliveries {
    lane: Lane,
    queue: String,
    channel: Arc<Channel>,
    consumer: Consumer,
    over: CancellationToken,
}

impl std::fmt::Debug for Deliveries {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Deliveries").field("queue", &self.queue).finish_non_exhaustive()
    }
}

impl Deliveries {
    /// The next delivery.
    ///
    /// # Errors
    /// When the channel or the connection broke, or the broker ended the consumer (the queue was
    /// deleted).
    pub async fn next(&mut self) -> Result<Delivery, LinkError> {
        match self.consumer.next().await {
            Some(Ok(delivery)) => Ok(self.wrap(delivery)),
            Some(Err(error)) => Err(error.into()),
            None => Err(LinkError::Broken(format!(
                "the broker ended the consumer of {} (was the queue deleted?)",
                self.queue
            ))),
        }
    }

    fn wrap(&self, mut raw: RawDelivery) -> Delivery {
        Delivery {
            lane: self.lane,
            body: std::mem::take(&mut raw.data).into(),
            properties: std::mem::take(&mut raw.properties),
            redelivered: raw.redelivered,
            arrived: Instant::now(),
            session: self.over.clone(),
            raw,
            _channel: self.channel.clone(),
        }
    }

    /// Stops the flow of deliveries; what still came before it ended. Whoever gives something back does it
    /// after that, or the broker would hand it out to us again.
    ///
    /// # Errors
    /// If the broker does not end the consumer: deliveries may come to it that nobody takes, until the
    /// session's end.
    pub async fn end(mut self) -> Result<Vec<Delivery>, LinkError> {
        self.stop().await?;
        let mut rest = Vec::new();
        while let Some(delivery) = self.rest().await {
            rest.push(delivery);
        }
        Ok(rest)
    }

    async fn stop(&self) -> Result<(), LinkError> {
        let tag = self.consumer.tag();
        let cancel = self.channel.basic_cancel(tag, BasicCancelOptions { nowait: false });
        in_time(async { Ok(cancel.await?) }).await
    }

    /// What is buffered still comes, then the stream ends.
    async fn rest(&mut self) -> Option<Delivery> {
        let next = tokio::time::timeout(Duration::from_millis(200), self.consumer.next());
        let Ok(Some(Ok(delivery))) = next.await else { return None };
        Some(self.wrap(delivery))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_near_its_limit_at_half_of_it_however_it_is_counted() {
        let near = |count: AMQPValue| {
            let mut headers = FieldTable::default();
            headers.insert("x-delivery-count".into(), count);
            is_near_its_limit(Some(&headers))
        };
        for (count, expected) in [(0, false), (9, false), (10, true), (21, true)] {
            let kinds = [
                AMQPValue::LongLongInt(count),
                AMQPValue::LongInt(count.try_into().unwrap()),
                AMQPValue::LongUInt(count.try_into().unwrap()),
            ];
            assert_eq!(kinds.map(near), [expected; 3], "{count}");
        }
        assert!(!is_near_its_limit(None) && !is_near_its_limit(Some(&FieldTable::default())));
    }
}
