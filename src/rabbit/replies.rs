//! A queue of one's own for replies, for `enqueue --wait` and `bulk --via-queue`.

use std::time::Duration;

use futures::StreamExt as _;
use lapin::options::{BasicConsumeOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Connection, Consumer};
use tokio::time::Instant;

use super::consumer::in_time;
use super::link::{self, LinkError, Options, short};

/// A queue whose replies are nobody else's.
pub struct ReplyQueue {
    name: String,
    consumer: Consumer,
    /// Kept: the queue lives as long as it.
    _connection: Connection,
}

impl std::fmt::Debug for ReplyQueue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ReplyQueue").field("name", &self.name).finish_non_exhaustive()
    }
}

/// A reply, as it came.
#[derive(Debug, Clone)]
pub struct Received {
    /// Which job it answers.
    pub correlation_id: String,
    /// The JSON.
    pub body: Vec<u8>,
}

/// How long a queue of a name is kept that nobody uses, in milliseconds: a run that was interrupted on a
/// Friday goes on on Monday.
const EXPIRES_MS: i64 = 4 * 24 * 3600 * 1000;

/// For how long whoever consumes the queue is thought to be one that was killed just now.
const TAKEOVER_PATIENCE: Duration = Duration::from_secs(5);
/// How long until it is tried again.
const RETRY_EVERY: Duration = Duration::from_millis(200);

/// Declares the queue and consumes it: one of that name, which outlives its connection, or one that does not.
async fn declared(
    connection: &Connection,
    exchange: &str,
    name: Option<&str>,
) -> Result<(String, Consumer), LinkError> {
    let channel = connection.create_channel().await?;
    let stays = name.is_some();
    let declare = QueueDeclareOptions {
        passive: false,
        durable: stays,
        exclusive: !stays,
        auto_delete: !stays,
        nowait: false,
    };
    let mut arguments = FieldTable::default();
    if stays {
        // Whatever the virtual host's default is: it is one run's, and may be lost with its node.
        arguments.insert("x-queue-type".into(), AMQPValue::LongString("classic".into()));
        arguments.insert("x-expires".into(), AMQPValue::LongLongInt(EXPIRES_MS));
    }
    let queue = channel.queue_declare(short(name.unwrap_or(""))?, declare, arguments).await?;
    let name = queue.name().as_str().to_owned();
    let consume =
        BasicConsumeOptions { no_local: false, no_ack: true, exclusive: true, nowait: false };
    if !exchange.is_empty() {
        channel
            .queue_bind(
                short(&name)?,
                short(exchange)?,
                short(&name)?,
                QueueBindOptions { nowait: false },
                FieldTable::default(),
            )
            .await?;
    }
    let consumer =
        channel.basic_consume(short(&name)?, short("")?, consume, FieldTable::default()).await?;
    Ok((name, consumer))
}

impl ReplyQueue {
    /// Makes the queue, reachable under its name from the exchange that replies go through (`""` is
    /// the default exchange, which reaches every queue).
    ///
    /// # Errors
    /// If the broker is not there or says no.
    pub async fn open(options: &Options, name: &str, exchange: &str) -> Result<Self, LinkError> {
        let connection = link::connect(options, name).await?;
        let (name, consumer) = in_time(declared(&connection, exchange, None)).await?;
        Ok(Self { name, consumer, _connection: connection })
    }

    /// Opens the queue of that name, which outlives its connection: replies that come while nobody consumes it wait
    /// for whoever opens it next. Nobody else may consume it; a consumer that was killed just now is waited for, 5 s at
    /// most.
    ///
    /// # Errors
    /// If the broker is not there or says no, or somebody else takes its replies.
    pub async fn open_named(
        options: &Options,
        connection_name: &str,
        exchange: &str,
        name: &str,
    ) -> Result<Self, LinkError> {
        let connection = link::connect(options, connection_name).await?;
        let patience = Instant::now() + TAKEOVER_PATIENCE;
        let (name, consumer) = loop {
            match in_time(declared(&connection, exchange, Some(name))).await {
                // RabbitMQ says 403 both for a missing permission and for a queue that another consumer has: only
                // the text tells them apart.
                Err(LinkError::Denied(why))
                    if why.contains("exclusive use") && Instant::now() < patience =>
                {
                    tokio::time::sleep(RETRY_EVERY).await;
                }
                declared => break declared?,
            }
        };
        Ok(Self { name, consumer, _connection: connection })
    }

    /// The queue's name, for `reply_to`.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The next reply.
    ///
    /// # Errors
    /// If the connection broke.
    pub async fn next(&mut self) -> Result<Received, LinkError> {
        match self.consumer.next().await {
            Some(Ok(delivery)) => Ok(Received {
                correlation_id: delivery
                    .properties
                    .correlation_id()
                    .as_ref()
                    .map_or_else(String::new, |id| id.as_str().to_owned()),
                body: delivery.data,
            }),
            Some(Err(error)) => Err(error.into()),
            None => Err(LinkError::Broken("the connection for replies ended".to_owned())),
        }
    }
}
