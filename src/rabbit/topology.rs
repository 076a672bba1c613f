//! Every exchange and queue as a value, with every argument said: RabbitMQ's defaults differ
//! from 3.10 to 4.3, and a default that changes under us can lose jobs.
//!
//! ```text
//!  checkout.jobs, checkout.jobs.bulk ── rejected too often ──▶ checkout.dlx ─▶ checkout.dead
//!        ▲  the worker ── needs a longer wait ─▶ checkout.retry ─▶ checkout.retry.<lane>.<delay>
//!        └──────────────────────────── after the delay ────────────────────────────┘
//! ```

use std::time::Duration;

use lapin::options::{
    BasicPublishOptions, ConfirmSelectOptions, ExchangeDeclareOptions, ExchangeDeleteOptions,
    QueueBindOptions, QueueDeclareOptions, QueueDeleteOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Channel, Confirmation, Connection, ExchangeKind};

use super::link::{LinkError, short};
use crate::clock::as_millis;
use crate::job::Lane;

/// Deliveries of one job that may end without an ack before the broker takes it out. A crash
/// counts for the whole prefetch window, so a small number would park innocent jobs.
const DELIVERY_LIMIT: i64 = 20;
/// The same for queues whose messages must never be taken out: people read those.
const NEVER: i64 = 1_000_000;

/// How long the broker may take over a message that is only to show that one may be published.
const PROBE: Duration = Duration::from_secs(10);

/// How long the queue of a shared ledger's workers stays when none of them is left, in milliseconds:
/// longer than all of them need to come back after a broker's restart.
const UNUSED: i64 = 60_000;

/// The delays of the delay queues, shortest first.
pub const DELAYS: [(&str, Duration); 5] = [
    ("1s", Duration::from_secs(1)),
    ("5s", Duration::from_secs(5)),
    ("30s", Duration::from_secs(30)),
    ("2m", Duration::from_mins(2)),
    ("10m", Duration::from_mins(10)),
];

/// The names of everything on the broker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Topology {
    prefix: String,
    /// Where replies without a `reply_to` go.
    pub replies_queue: String,
    /// The exchange for replies; the default exchange where it is empty.
    pub replies_exchange: String,
}

/// A queue and its arguments.
#[derive(Debug, Clone)]
struct Queue {
    name: String,
    arguments: FieldTable,
}

impl Topology {
    /// The names under a prefix; `None` for the usual reply queue, an empty exchange for the
    /// default exchange.
    #[must_use]
    pub fn new(prefix: &str, replies_queue: Option<&str>, replies_exchange: &str) -> Self {
        Self {
            prefix: prefix.to_owned(),
            replies_queue: replies_queue.map_or_else(|| format!("{prefix}.replies"), str::to_owned),
            replies_exchange: replies_exchange.to_owned(),
        }
    }

    /// A lane's job queue.
    #[must_use]
    pub fn jobs(&self, lane: Lane) -> String {
        match lane {
            Lane::Interactive => format!("{}.jobs", self.prefix),
            Lane::Bulk => format!("{}.jobs.bulk", self.prefix),
        }
    }

    /// Parked messages.
    #[must_use]
    pub fn dead(&self) -> String {
        format!("{}.dead", self.prefix)
    }

    /// The exchange of parked messages.
    #[must_use]
    pub fn dead_exchange(&self) -> String {
        format!("{}.dlx", self.prefix)
    }

    /// The exchange of the delay queues.
    #[must_use]
    pub fn retry_exchange(&self) -> String {
        format!("{}.retry", self.prefix)
    }

    /// A delay queue's routing key on [`Topology::retry_exchange`].
    #[must_use]
    pub fn retry_key(lane: Lane, delay: &str) -> String {
        format!("{lane}.{delay}")
    }

    /// The exclusive queue that says that a worker with an embedded ledger serves these queues.
    /// One for all lanes: two workers with two ledgers could give one id a link in each lane.
    #[must_use]
    pub fn guard(&self) -> String {
        format!("{}.run", self.prefix)
    }

    /// Whether replies must never go there: a reply in a job queue would come back as a job.
    #[must_use]
    pub fn denies_replies_to(&self, queue: &str) -> bool {
        Lane::ALL.iter().any(|lane| self.jobs(*lane) == queue)
            || queue == self.guard()
            || queue == self.dead()
            || queue.starts_with(&self.retry_exchange())
    }

    fn is_own(&self, name: &str) -> bool {
        name.strip_prefix(&self.prefix).is_some_and(|rest| rest.starts_with('.'))
    }

    fn queues(&self) -> Vec<Queue> {
        let mut queues = vec![
            Queue { name: self.dead(), arguments: kept() },
            Queue { name: self.replies_queue.clone(), arguments: kept() },
        ];
        for lane in Lane::ALL {
            let mut arguments = passed_on(&self.dead_exchange(), &self.dead());
            limit(&mut arguments, DELIVERY_LIMIT);
            queues.push(Queue { name: self.jobs(lane), arguments });
            for (delay, ttl) in DELAYS {
                let mut arguments = passed_on("", &self.jobs(lane));
                limit(&mut arguments, DELIVERY_LIMIT);
                let ttl = as_millis(ttl);
                arguments.insert("x-message-ttl".into(), AMQPValue::LongLongInt(ttl));
                let name = format!("{}.{}", self.retry_exchange(), Self::retry_key(lane, delay));
                queues.push(Queue { name, arguments });
            }
        }
        queues
    }

    fn exchanges(&self) -> Vec<String> {
        let mut exchanges = vec![self.dead_exchange(), self.retry_exchange()];
        if !self.replies_exchange.is_empty() {
            exchanges.push(self.replies_exchange.clone());
        }
        exchanges
    }

    /// Queue, exchange and routing key of every binding.
    fn bindings(&self) -> Vec<(String, String, String)> {
        let mut bindings = vec![(self.dead(), self.dead_exchange(), self.dead())];
        for lane in Lane::ALL {
            for (delay, _) in DELAYS {
                let key = Self::retry_key(lane, delay);
                bindings.push((
                    format!("{}.{key}", self.retry_exchange()),
                    self.retry_exchange(),
                    key,
                ));
            }
        }
        if !self.replies_exchange.is_empty() {
            bindings.push((
                self.replies_queue.clone(),
                self.replies_exchange.clone(),
                self.replies_queue.clone(),
            ));
        }
        bindings
    }

    /// Declares everything. Where something exists with other arguments the broker refuses, and
    /// the error names it.
    ///
    /// # Errors
    /// [`LinkError::Broken`] with the name and what to do.
    pub async fn declare(&self, channel: &Channel) -> Result<(), LinkError> {
        for exchange in self.exchanges() {
            let options = ExchangeDeclareOptions {
                passive: false,
                durable: true,
                auto_delete: false,
                internal: false,
                nowait: false,
            };
            channel
                .exchange_declare(
                    short(&exchange)?,
                    ExchangeKind::Direct,
                    options,
                    FieldTable::default(),
                )
                .await
                .map_err(|error| differs(&exchange, &error))?;
        }
        for queue in self.queues() {
            channel
                .queue_declare(short(&queue.name)?, durable(), queue.arguments)
                .await
                .map_err(|error| differs(&queue.name, &error))?;
        }
        for (queue, exchange, key) in self.bindings() {
            channel
                .queue_bind(
                    short(&queue)?,
                    short(&exchange)?,
                    short(&key)?,
                    QueueBindOptions { nowait: false },
                    FieldTable::default(),
                )
                .await?;
        }
        Ok(())
    }

    /// Deletes every queue and exchange under the prefix, messages included; a reply queue or
    /// exchange of another name may be shared, and stays.
    ///
    /// # Errors
    /// If the broker says no.
    pub async fn delete(&self, connection: &Connection) -> Result<(), LinkError> {
        let channel = connection.create_channel().await?;
        for queue in self.queues().into_iter().filter(|queue| self.is_own(&queue.name)) {
            let options = QueueDeleteOptions { if_unused: false, if_empty: false, nowait: false };
            channel.queue_delete(short(&queue.name)?, options).await?;
        }
        for exchange in self.exchanges().into_iter().filter(|exchange| self.is_own(exchange)) {
            let options = ExchangeDeleteOptions { if_unused: false, nowait: false };
            channel.exchange_delete(short(&exchange)?, options).await?;
        }
        Ok(())
    }

    /// Compares what is on the broker with what should be, without making anything: queues and
    /// exchanges are compared with their arguments and kinds if `declare` says that the worker may.
    /// With `publish` it is tried whether this user may publish, with a message to each exchange that no
    /// queue should take. Bindings cannot be asked for in AMQP, nor whether a queue may be read.
    ///
    /// # Errors
    /// If the broker cannot be asked.
    pub async fn compare(
        &self,
        connection: &Connection,
        declare: bool,
        publish: bool,
    ) -> Result<Differences, LinkError> {
        let mut found = Differences::default();
        for queue in self.queues() {
            // A failed passive declare closes its channel, so each has its own.
            let channel = connection.create_channel().await?;
            let options = QueueDeclareOptions { passive: true, ..durable() };
            match channel.queue_declare(short(&queue.name)?, options, FieldTable::default()).await {
                Ok(_) if declare => {
                    // Of a queue that is there this changes nothing, and the broker compares.
                    let name = queue.name;
                    let declared = channel.queue_declare(short(&name)?, durable(), queue.arguments);
                    if let Err(error) = declared.await {
                        found.wrong.push(differs(&name, &error).to_string());
                    }
                }
                Ok(_) => {}
                Err(error) => found.note(format!("queue {}", queue.name), error)?,
            }
        }
        for exchange in self.exchanges() {
            let channel = connection.create_channel().await?;
            let asked = ExchangeDeclareOptions {
                passive: true,
                durable: true,
                auto_delete: false,
                internal: false,
                nowait: false,
            };
            let name = short(&exchange)?;
            let direct = |options| {
                let kind = ExchangeKind::Direct;
                channel.exchange_declare(name.clone(), kind, options, FieldTable::default())
            };
            match direct(asked).await {
                Ok(()) => {}
                Err(error) => {
                    found.note(format!("exchange {exchange}"), error)?;
                    continue;
                }
            }
            // Of an exchange that is there this changes nothing, and the broker compares the kind.
            if declare
                && let Err(error) = direct(ExchangeDeclareOptions { passive: false, ..asked }).await
            {
                found.wrong.push(differs(&exchange, &error).to_string());
            } else if publish {
                try_publishing(connection, &exchange, &mut found).await?;
            }
        }
        if publish && self.replies_exchange.is_empty() {
            try_publishing(connection, "", &mut found).await?;
        }
        Ok(found)
    }

    /// How many messages wait in a queue, or `None` if it is not there.
    ///
    /// # Errors
    /// If the broker cannot be asked.
    pub async fn depth(connection: &Connection, queue: &str) -> Result<Option<u32>, LinkError> {
        let channel = connection.create_channel().await?;
        let options = QueueDeclareOptions { passive: true, ..durable() };
        match channel.queue_declare(short(queue)?, options, FieldTable::default()).await {
            Ok(state) => Ok(Some(state.message_count())),
            Err(error) if error.is_amqp_soft_error() => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

/// Publishes a message that no queue should take, and that none keeps: the broker returns it, or says
/// that this user may not.
async fn try_publishing(
    connection: &Connection,
    exchange: &str,
    found: &mut Differences,
) -> Result<(), LinkError> {
    let name = if exchange.is_empty() { "the default exchange" } else { exchange };
    let random = getrandom::u64().unwrap_or(0);
    let key = short(&format!("checkout-worker.check.{random:016x}"))?;
    let exchange = short(exchange)?;
    let sent = async {
        let channel = connection.create_channel().await?;
        channel.confirm_select(ConfirmSelectOptions { nowait: false }).await?;
        let options = BasicPublishOptions { mandatory: true, immediate: false };
        let properties = lapin::BasicProperties::default()
            .with_expiration("0".into())
            .with_type("checkout-worker check".into());
        channel.basic_publish(exchange, key, options, b"?", properties).await?.await
    };
    match tokio::time::timeout(PROBE, sent).await {
        Ok(Ok(Confirmation::Ack(Some(_)) | Confirmation::Nack(Some(_)))) => {}
        Ok(Ok(_)) => found.wrong.push(format!(
            "{name} routes what no queue was bound for: give a direct exchange without an alternate one"
        )),
        Ok(Err(error)) if error.is_amqp_soft_error() => {
            found.wrong.push(format!("publishing to {name}: {error}; give this user write on it"));
        }
        Ok(Err(error)) => return Err(error.into()),
        Err(_) => {
            return Err(LinkError::Broken(
                "the broker confirms nothing: is there a memory or disk alarm?".to_owned(),
            ));
        }
    }
    Ok(())
}

/// How a broker differs from a [`Topology`].
#[derive(Debug, Clone, Default)]
pub struct Differences {
    /// What is not there.
    pub missing: Vec<String>,
    /// What is there and not as it should be, or may not be looked at; a sentence each.
    pub wrong: Vec<String>,
}

impl Differences {
    /// Sorts a broker's "no" to a question after something.
    fn note(&mut self, what: String, error: lapin::Error) -> Result<(), LinkError> {
        if !error.is_amqp_soft_error() {
            return Err(error.into());
        }
        // The broker's code for this is 404; every other one says that it may be there.
        if error.to_string().contains("NOT_FOUND") || error.to_string().contains("NOT-FOUND") {
            self.missing.push(what);
        } else {
            self.wrong.push(format!("{what}: {error}"));
        }
        Ok(())
    }
}

pub(super) fn durable() -> QueueDeclareOptions {
    QueueDeclareOptions {
        passive: false,
        durable: true,
        exclusive: false,
        auto_delete: false,
        nowait: false,
    }
}

fn text(value: &str) -> AMQPValue {
    AMQPValue::LongString(value.into())
}

fn limit(arguments: &mut FieldTable, deliveries: i64) {
    arguments.insert("x-delivery-limit".into(), AMQPValue::LongLongInt(deliveries));
}

/// A quorum queue that refuses what does not fit, rather than dropping what is there.
fn quorum() -> FieldTable {
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), text("quorum"));
    arguments.insert("x-overflow".into(), text("reject-publish"));
    arguments
}

/// A queue whose messages stay until somebody takes them.
fn kept() -> FieldTable {
    let mut arguments = quorum();
    limit(&mut arguments, NEVER);
    arguments
}

/// The queue by which workers of one shared ledger know each other. RabbitMQ compares the arguments
/// that it knows: the mark is in one that never comes to bear, as nothing is published there.
pub(super) fn shared_guard(mark: &str) -> FieldTable {
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), text("quorum"));
    arguments.insert("x-expires".into(), AMQPValue::LongLongInt(UNUSED));
    arguments.insert("x-dead-letter-exchange".into(), text(""));
    arguments.insert("x-dead-letter-routing-key".into(), text(mark));
    arguments
}

/// A queue that hands messages on, and keeps each until the next queue has confirmed it.
fn passed_on(exchange: &str, key: &str) -> FieldTable {
    let mut arguments = quorum();
    arguments.insert("x-dead-letter-exchange".into(), text(exchange));
    arguments.insert("x-dead-letter-routing-key".into(), text(key));
    arguments.insert("x-dead-letter-strategy".into(), text("at-least-once"));
    arguments
}

fn differs(name: &str, error: &lapin::Error) -> LinkError {
    let text = error.to_string();
    let mend = if text.contains("ACCESS") {
        "give this user configure on it, or set topology.declare = false"
    } else {
        "if it exists with other arguments, empty and delete it, or set topology.declare = false"
    };
    LinkError::Broken(format!("{name} cannot be declared: {text}; {mend}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_never_go_where_jobs_come_from() {
        let topology = Topology::new("checkout", None, "");
        for queue in [
            "checkout.jobs",
            "checkout.jobs.bulk",
            "checkout.dead",
            "checkout.retry",
            "checkout.retry.bulk.1s",
            "checkout.retry.anything",
            "checkout.run",
        ] {
            assert!(topology.denies_replies_to(queue), "{queue}");
        }
        for queue in ["checkout.replies", "checkout.jobs.mine", "amq.gen-x", "my.checkout.dead"] {
            assert!(!topology.denies_replies_to(queue), "{queue}");
        }
    }

    #[test]
    fn a_shared_reply_queue_is_not_the_workers_own() {
        let topology = Topology::new("checkout", Some("shop.replies"), "");
        assert!(topology.is_own("checkout.dead") && !topology.is_own("shop.replies"));
        assert!(!topology.is_own("checkout2.jobs"));
    }

    #[test]
    fn no_queue_can_drop_a_message_silently() {
        for queue in Topology::new("checkout", None, "").queues() {
            let has = |name: &str| queue.arguments.contains_key(name);
            assert!(
                has("x-queue-type") && has("x-overflow") && has("x-delivery-limit"),
                "{}",
                queue.name
            );
            assert_eq!(
                has("x-dead-letter-exchange"),
                has("x-dead-letter-strategy"),
                "{}",
                queue.name
            );
            let kept = ["checkout.dead", "checkout.replies"].contains(&queue.name.as_str());
            assert_eq!(has("x-dead-letter-strategy"), !kept, "{}", queue.name);
        }
    }
}
