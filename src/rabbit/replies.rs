//! A queue of one's own for replies, for `enqueue --wait`.

use futures::StreamExt as _;
use lapin::options::{BasicConsumeOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::types::FieldTable;
use lapin::{Connection, Consumer};

use super::consumer::in_time;
use super::link::{self, LinkError, Options, short};

/// A server-named queue that goes away with its connection.
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

/// Declares the queue and consumes it.
async fn declared(
    connection: &Connection,
    exchange: &str,
) -> Result<(String, Consumer), LinkError> {
    let channel = connection.create_channel().await?;
    let declare = QueueDeclareOptions {
        passive: false,
        durable: false,
        exclusive: true,
        auto_delete: true,
        nowait: false,
    };
    let queue = channel.queue_declare(short("")?, declare, FieldTable::default()).await?;
    let name = queue.name().as_str().to_owned();
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
    let consume =
        BasicConsumeOptions { no_local: false, no_ack: true, exclusive: true, nowait: false };
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
        let (name, consumer) = in_time(declared(&connection, exchange)).await?;
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
