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
    ExchangeDeclareOptions, ExchangeDeleteOptions, QueueBindOptions, QueueDeclareOptions,
    QueueDeleteOptions,
};
use lapin::protocol::AMQPSoftError;
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Channel, Connection, ExchangeKind};

use super::link::{LinkError, refusal, short};
use crate::clock::as_millis;
use crate::job::Lane;

/// Deliveries of one job that may end without an ack before the broker takes it out. A crash
/// counts for the whole prefetch window, so a small number would park innocent jobs.
pub const DELIVERY_LIMIT: u32 = 20;
/// The same for queues whose messages must never be taken out: people read those.
const NEVER: i64 = 1_000_000;

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
pub(super) struct Queue {
    pub(super) name: String,
    pub(super) arguments: FieldTable,
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

    /// The queue for the replies of a `bulk` run that is called so.
    #[must_use]
    pub fn run_replies(&self, run: &str) -> String {
        format!("{}.bulk.{run}", self.prefix)
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

    /// The queue that says who serves these queues: exclusive while a worker with an embedded ledger does,
    /// durable and marked with their ledger while workers of a shared one do. One for all lanes: two workers with
    /// two ledgers could give one id a link in each lane.
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

    pub(super) fn queues(&self) -> Vec<Queue> {
        let mut queues = vec![
            Queue { name: self.dead(), arguments: kept() },
            Queue { name: self.replies_queue.clone(), arguments: kept() },
        ];
        for lane in Lane::ALL {
            let mut arguments = passed_on(&self.dead_exchange(), &self.dead());
            limit(&mut arguments, i64::from(DELIVERY_LIMIT));
            queues.push(Queue { name: self.jobs(lane), arguments });
            for (delay, ttl) in DELAYS {
                let mut arguments = passed_on("", &self.jobs(lane));
                limit(&mut arguments, i64::from(DELIVERY_LIMIT));
                let ttl = as_millis(ttl);
                arguments.insert("x-message-ttl".into(), AMQPValue::LongLongInt(ttl));
                let name = format!("{}.{}", self.retry_exchange(), Self::retry_key(lane, delay));
                queues.push(Queue { name, arguments });
            }
        }
        queues
    }

    pub(super) fn exchanges(&self) -> Vec<String> {
        let mut exchanges = vec![self.dead_exchange(), self.retry_exchange()];
        if !self.replies_exchange.is_empty() {
            exchanges.push(self.replies_exchange.clone());
        }
        exchanges
    }

    /// Queue, exchange and routing key of every binding.
    pub(super) fn bindings(&self) -> Vec<(String, String, String)> {
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

/// A queue that is gone with its connection, and nobody else's meanwhile.
pub(super) fn exclusive() -> QueueDeclareOptions {
    QueueDeclareOptions {
        passive: false,
        durable: false,
        exclusive: true,
        auto_delete: true,
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

pub(super) fn differs(name: &str, error: &lapin::Error) -> LinkError {
    let mend = if refusal(error) == Some(AMQPSoftError::ACCESSREFUSED) {
        "give this user configure on it, or set topology.declare = false"
    } else {
        "if it exists with other arguments, empty and delete it, or set topology.declare = false"
    };
    LinkError::Broken(format!("{name} cannot be declared: {error}; {mend}"))
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
            let is =
                |name: &str, value: &str| queue.arguments.inner().get(name) == Some(&text(value));
            assert!(is("x-queue-type", "quorum"), "{}", queue.name);
            assert!(is("x-overflow", "reject-publish"), "{}", queue.name);
            let kept = ["checkout.dead", "checkout.replies"].contains(&queue.name.as_str());
            let limit = if kept { NEVER } else { i64::from(DELIVERY_LIMIT) };
            let given = queue.arguments.inner().get("x-delivery-limit");
            assert_eq!(given, Some(&AMQPValue::LongLongInt(limit)), "{}", queue.name);
            assert_eq!(is("x-dead-letter-strategy", "at-least-once"), !kept, "{}", queue.name);
            let leads_on = queue.arguments.contains_key("x-dead-letter-exchange");
            assert_eq!(leads_on, !kept, "{}", queue.name);
        }
    }
}
