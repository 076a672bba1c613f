//! Batches of messages on one channel, each confirmed as a whole.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use futures::future::join_all;
use lapin::options::BasicPublishOptions;
use lapin::types::AMQPValue;
use lapin::{Channel, Confirmation};
use tokio::sync::{Mutex, mpsc, oneshot};
use tokio::time::Instant;

use super::connection::{CLOSE, Ended, MIN_CHANNEL_AGE, Told};
use super::{CONFIRM, Lost, Published};
use crate::rabbit::headers;
use crate::rabbit::link::{LinkError, short};
use crate::rabbit::outgoing::Message;

pub(super) struct Order {
    pub(super) message: Message,
    pub(super) done: oneshot::Sender<Result<Published, Lost>>,
}

pub(super) type Orders = Arc<Mutex<mpsc::Receiver<Order>>>;

/// Publishes batch after batch on one channel, until it breaks or is refused.
pub(super) async fn serve(channel: &Channel, orders: &Orders, told: &Told, most: usize) -> Ended {
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
        told.begun();
        let published = publish_batch(channel, batch).await;
        told.done(published.is_err());
        let refused = match published {
            Ok(refused) => refused,
            Err(error) => return Ended::Broke(error),
        };
        if any {
            told.confirmed();
        }
        if refused && opened.elapsed() >= MIN_CHANNEL_AGE {
            // Nothing is under way on it. A node in trouble may never say that it is closed.
            let close = channel.close(200, short("replaced").unwrap_or_default());
            drop(tokio::time::timeout(CLOSE, close).await);
            return Ended::Refused;
        }
    }
}

/// Whether any of it was refused.
pub(super) async fn publish_batch(channel: &Channel, batch: Vec<Order>) -> Result<bool, LinkError> {
    let outcome = tokio::time::timeout(CONFIRM, send_and_confirm(channel, &batch)).await;
    let outcome = outcome.unwrap_or_else(|_| {
        Err(LinkError::Broken("the broker did not confirm in time".to_owned()))
    });
    let results = match outcome {
        Ok(results) => results,
        Err(error) => {
            let internal_error = matches!(error, LinkError::InternalError(_));
            for order in batch {
                give(order, Err(Lost { reason: error.to_string(), internal_error }));
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
pub(super) async fn send_and_confirm(
    channel: &Channel,
    batch: &[Order],
) -> Result<Vec<Published>, LinkError> {
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

pub(super) async fn send(
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
pub(super) fn give(order: Order, result: Result<Published, Lost>) {
    drop(order.done.send(result));
}
