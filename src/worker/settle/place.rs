//! Getting a message into a queue, and knowing that it is there, or why it cannot be.

use std::time::Duration;

use tokio::time::Instant;

use super::Settler;
use crate::observe::metrics;
use crate::rabbit::publisher::Class;
use crate::rabbit::{Delivery, LinkError, Message, Published, Publisher};
use crate::retry::backoff;

/// How often, and for how long at least, a reply queue that refuses is tried before the job is parked:
/// longer than a cluster takes to elect the queue's next leader.
const FULL_TRIES: u32 = 5;
const FULL_FOR: Duration = Duration::from_secs(5);
/// How often one of the worker's own queues is tried before it is taken to be missing.
const MISSING_TRIES: u32 = 4;

/// What became of a message for one of our own queues.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Placed {
    /// Confirmed and routed; the delivery may be acked.
    InQueue,
    /// The delivery is not ours any more and will come again.
    SessionOver,
}

/// What became of publishing.
pub(super) enum Sent {
    Routed,
    /// No queue was there, or it cannot be published to.
    Nowhere(String),
    /// A queue was there and refused it again and again.
    Full,
    SessionOver,
}

impl Settler {
    /// Publishes to one of our own queues, for as long as that takes: there is no other place
    /// for the job, so it is held, and after the session it comes again.
    pub(super) async fn place(
        &self,
        delivery: &Delivery,
        message: Result<Message, LinkError>,
        what: &str,
    ) -> Placed {
        let message = match message {
            Ok(message) => message,
            Err(error) => {
                tracing::error!(%error, what);
                return Placed::SessionOver;
            }
        };
        let (mut tries, mut missing) = (0, 0);
        loop {
            match self
                .publish(&self.publisher, delivery, Class::Internal, message.clone(), u32::MAX)
                .await
            {
                Sent::Routed => return Placed::InQueue,
                Sent::SessionOver => return Placed::SessionOver,
                Sent::Full => tracing::error!(what, "one of the worker's own queues is full"),
                Sent::Nowhere(error) => {
                    missing += 1;
                    tracing::error!(
                        error,
                        what,
                        "one of the worker's own queues does not take it; was it deleted?"
                    );
                    if self.declares && missing >= MISSING_TRIES {
                        tracing::warn!(
                            "the session is given up: the next one declares what is missing"
                        );
                        delivery.session.cancel();
                        return Placed::SessionOver;
                    }
                }
            }
            tries += 1;
            if !self.wait_before_retry(delivery, tries).await {
                return Placed::SessionOver;
            }
        }
    }

    /// Publishes until the broker has said something final, or the delivery is not ours any more.
    pub(super) async fn publish(
        &self,
        by: &Publisher,
        delivery: &Delivery,
        class: Class,
        message: Message,
        most_lost: u32,
    ) -> Sent {
        let (mut lost, mut refused) = (0, 0);
        let mut first_refused = None;
        loop {
            let published = tokio::select! {
                published = by.publish(class, message.clone()) => published,
                () = delivery.session.cancelled() => return Sent::SessionOver,
            };
            let tries = match published {
                Ok(Published::Routed) => return Sent::Routed,
                Ok(Published::Returned(reason)) => return Sent::Nowhere(reason),
                Ok(Published::Refused) => {
                    refused += 1;
                    if class == Class::Replies {
                        metrics::reply("refused");
                    }
                    let since = *first_refused.get_or_insert_with(Instant::now);
                    if refused >= FULL_TRIES && since.elapsed() >= FULL_FOR {
                        return Sent::Full;
                    }
                    refused
                }
                Err(error) => {
                    lost += 1;
                    tracing::debug!(%error, "publishing again");
                    // Only a publisher with one publish at a time has a bound: there a broken connection tells
                    // which publish broke it.
                    let alone = most_lost < u32::MAX;
                    if error.internal_error && alone || lost >= most_lost {
                        return Sent::Nowhere(format!(
                            "publishing to it broke the connection ({lost}x), so the address is taken to be the reason: {error}"
                        ));
                    }
                    lost
                }
            };
            if !self.wait_before_retry(delivery, tries).await {
                return Sent::SessionOver;
            }
        }
    }

    /// Waits before another try; says whether the delivery is still ours.
    async fn wait_before_retry(&self, delivery: &Delivery, tries: u32) -> bool {
        tokio::select! {
            () = tokio::time::sleep(self.backoff.delay(tries, None, backoff::chance())) => true,
            () = delivery.session.cancelled() => false,
        }
    }
}
