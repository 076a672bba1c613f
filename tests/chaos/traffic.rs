//! What goes in and what comes out, whatever the brokers do meanwhile.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures::StreamExt as _;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, ConfirmSelectOptions,
    QueueDeclareOptions,
};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Channel};
use tokio::sync::Mutex;

use super::amqp::{connect, declared};
use super::oracle::{Books, Message};

/// The first word of all names.
pub(crate) const PREFIX: &str = "chaos";
/// How long a consumer hears nothing before it is made again.
const QUIET: Duration = Duration::from_secs(10);
/// Longest time without a new answer. A broker's dead-letter worker that has published to a queue whose leader
/// died tries again when it has waited for the confirm (15 s, by deploy/rabbitmq/advanced.config), and looks for
/// that as often.
const PATIENCE: Duration = Duration::from_secs(180);

/// What is published.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Load {
    pub(crate) jobs: usize,
    /// Jobs a second, or as fast as the broker takes them.
    pub(crate) per_second: Option<usize>,
}

/// Every so many jobs one is published twice, once into each lane.
pub(crate) const TWICE: usize = 20;

/// Starts publishing and collecting.
pub(crate) fn start(url: &str, load: Load) -> Traffic {
    let traffic =
        Traffic { books: Arc::default(), confirmed: Arc::default(), done: Arc::default() };
    for queue in ["replies", "dead"] {
        tokio::spawn(collect(url.to_owned(), queue, traffic.clone()));
    }
    tokio::spawn(publish_all(url.to_owned(), load, traffic.confirmed.clone()));
    traffic
}

/// The traffic of a run.
#[derive(Clone)]
pub(crate) struct Traffic {
    books: Arc<Mutex<Books>>,
    confirmed: Arc<AtomicUsize>,
    done: Arc<AtomicBool>,
}

impl Traffic {
    pub(crate) async fn answered(&self) -> usize {
        self.books.lock().await.answered()
    }

    /// Ends collecting and gives the books.
    pub(crate) async fn close(self) -> Books {
        self.done.store(true, Ordering::SeqCst);
        let mut books = std::mem::take(&mut *self.books.lock().await);
        books.published = self.confirmed.load(Ordering::SeqCst);
        books
    }
}

/// Notices when no answers come any more.
pub(crate) struct Watch {
    last: usize,
    since: Instant,
}

impl Watch {
    pub(crate) fn new() -> Self {
        Self { last: 0, since: Instant::now() }
    }

    pub(crate) fn see(&mut self, answered: usize, of: usize) {
        if answered > self.last {
            *self = Self { last: answered, since: Instant::now() };
        }
        assert!(
            self.since.elapsed() < PATIENCE,
            "no new answer for {PATIENCE:?} ({answered} of {of})"
        );
    }
}

/// Waits until the job and delay queues are empty.
pub(crate) async fn drained(url: &str) {
    let started = Instant::now();
    while waiting(url).await != 0 {
        assert!(started.elapsed() < PATIENCE, "messages are left in the queues");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// How many messages wait.
async fn waiting(url: &str) -> u32 {
    let connection = connect(url).await;
    let mut waiting = 0;
    for queue in [
        "jobs",
        "jobs.bulk",
        "retry.interactive.1s",
        "retry.interactive.5s",
        "retry.bulk.1s",
        "retry.bulk.5s",
    ] {
        let channel = connection.create_channel().await.unwrap();
        let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::durable() };
        let name = format!("{PREFIX}.{queue}");
        let state = channel
            .queue_declare(name.as_str().into(), passive, FieldTable::default())
            .await
            .unwrap();
        waiting += state.message_count();
    }
    waiting
}

/// Publishes every job until the broker has confirmed it; lanes alternate.
async fn publish_all(url: String, load: Load, confirmed: Arc<AtomicUsize>) {
    declared(&connect(&url).await, PREFIX).await;
    let copies = (0..load.jobs).step_by(TWICE).map(|job| (job, true));
    let mut left: Vec<(usize, bool)> =
        (0..load.jobs).map(|job| (job, false)).chain(copies).collect();
    left.sort_unstable();
    let started = Instant::now();
    while !left.is_empty() {
        let connection = connect(&url).await;
        let Ok(channel) = connection.create_channel().await else { continue };
        if channel.confirm_select(ConfirmSelectOptions::default()).await.is_err() {
            continue;
        }
        left = publish_some(&channel, left, load, started, &confirmed).await;
    }
}

/// Publishes what it can; returns what was not confirmed.
async fn publish_some(
    channel: &Channel,
    jobs: Vec<(usize, bool)>,
    load: Load,
    started: Instant,
    confirmed: &AtomicUsize,
) -> Vec<(usize, bool)> {
    let mut left = Vec::new();
    // A tenth of a second's jobs at a time.
    let batch = load.per_second.map_or(200, |rate| rate.div_ceil(10));
    for batch in jobs.chunks(batch.max(1)) {
        if let Some(rate) = load.per_second {
            let due = Duration::from_micros(u64::try_from(batch[0].0 * 1_000_000 / rate).unwrap());
            tokio::time::sleep(due.saturating_sub(started.elapsed())).await;
        }
        let mut confirms = Vec::new();
        for &(job, copy) in batch {
            confirms.push(((job, copy), publish(channel, job, copy).await));
        }
        for (job, confirm) in confirms {
            let confirmation = match confirm {
                Some(confirm) => confirm.await.ok(),
                None => None,
            };
            if confirmation.is_some_and(|confirmation| confirmation.is_ack()) {
                confirmed.fetch_add(1, Ordering::SeqCst);
            } else {
                left.push(job);
            }
        }
    }
    left
}

/// Lanes alternate; a copy goes into the other one.
async fn publish(channel: &Channel, job: usize, copy: bool) -> Option<lapin::PublisherConfirm> {
    let lane = if job.is_multiple_of(2) == copy { "jobs.bulk" } else { "jobs" };
    let queue = format!("{PREFIX}.{lane}");
    let body = format!(
        r#"{{"request_id":"job-{job}","product_id":"prod_{}","units":{}}}"#,
        job % 7,
        job % 9 + 1
    );
    let properties = BasicProperties::default()
        .with_delivery_mode(2)
        .with_correlation_id(format!("job-{job}").into());
    let options = BasicPublishOptions { mandatory: true, immediate: false };
    channel
        .basic_publish("".into(), queue.as_str().into(), options, body.as_bytes(), properties)
        .await
        .ok()
}

/// Takes every message of a queue into the books, across restarts of the broker.
async fn collect(url: String, queue: &'static str, traffic: Traffic) {
    while !traffic.done.load(Ordering::SeqCst) {
        let connection = connect(&url).await;
        let Ok(channel) = connection.create_channel().await else { continue };
        let name = format!("{PREFIX}.{queue}");
        let consumer = channel
            .basic_consume(
                name.as_str().into(),
                "".into(),
                BasicConsumeOptions::default(),
                FieldTable::default(),
            )
            .await;
        let Ok(mut consumer) = consumer else {
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        // A consumer that hears nothing may have lost its queue with a node that died: it begins again, and
        // what it had not acked comes once more.
        while let Ok(Some(Ok(delivery))) = tokio::time::timeout(QUIET, consumer.next()).await {
            traffic.books.lock().await.note(Message {
                parked: queue == "dead",
                id: delivery
                    .properties
                    .correlation_id()
                    .as_ref()
                    .map_or_else(String::new, ToString::to_string),
                reply_id: delivery
                    .properties
                    .message_id()
                    .as_ref()
                    .map_or_else(String::new, ToString::to_string),
                body: delivery.data.clone(),
            });
            // Taken first, acked after: what the books have seen twice is counted as a repeat.
            if delivery.ack(BasicAckOptions::default()).await.is_err() {
                break;
            }
        }
    }
}
