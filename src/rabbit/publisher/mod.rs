//! Publishing that is known to have arrived: mandatory but for direct replies, confirmed, and every
//! return matched to its own message.
//!
//! Why not simply await lapin's confirm? When publishes overlap, lapin hands a returned message
//! to whichever confirm resolves next (4.12.3, `acknowledgement.rs`): an unroutable reply then
//! looks like an acknowledged one, and the job would be acked with nobody told. The broker sends
//! every return before its own confirm, so once *all* confirms of a batch are in, all of its
//! returns are in as well; they are matched by a header that each publish has for its own. A
//! batch is whatever is waiting, so a lone publish waits for nobody.

mod batch;
mod connection;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Mutex, mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::link::Options;
use super::outgoing::Message;
use crate::clock::as_millis;
use crate::retry::{Backoff, backoff};
use batch::Order;
use connection::{STABLE_AFTER, Told, serve_connection};

/// How long the broker may take for the confirms of a batch.
const CONFIRM: Duration = Duration::from_secs(30);

/// Pause before the next connection where the only publish on the last one has ended it, which is not tried again:
/// there is no broken broker to be spared, only others' publishes that wait. Long enough that a
/// stranger who sends many such addresses is no flood of connections.
const AFTER_LONE_LOSS: Duration = Duration::from_millis(20);

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
#[error("the publish was lost with its channel: {reason}")]
pub struct Lost {
    /// What happened.
    pub reason: String,
    /// Whether the broker met an error of its own over it (or over one of its batch), and closed the whole connection.
    pub internal_error: bool,
}

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

    const fn is_single(self) -> bool {
        self.batch == 1 && self.channels == 1
    }
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
        let told = Arc::new(Told::new(told));
        let orders = [reply_orders, internal_orders].map(|orders| Arc::new(Mutex::new(orders)));
        let keep = async move {
            let (mut failures, mut blocked) = (0, false);
            loop {
                let began = Instant::now();
                let reason = tokio::select! {
                    reason = serve_connection(&options, &name, &orders, &told, shape, blocked) => reason,
                    () = stop.cancelled() => return,
                };
                // Until a publish goes through again, an alarm is taken to be still on.
                blocked |= matches!(*told.state.borrow(), State::Blocked(_));
                blocked &= !matches!(*told.state.borrow(), State::Up);
                failures = if began.elapsed() > STABLE_AFTER { 1 } else { failures + 1 };
                let mut delay = backoff.reconnect(failures, backoff::chance());
                if told.take_lone_loss(&reason, shape) {
                    (failures, delay) = (0, AFTER_LONE_LOSS);
                }
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
        let ended = || Lost { reason: "the publisher has ended".to_owned(), internal_error: false };
        orders.send(Order { message, done }).await.map_err(|_| ended())?;
        answer.await.unwrap_or_else(|_| Err(ended()))
    }

    /// How the connection is, and when that changes.
    #[must_use]
    pub fn state(&self) -> watch::Receiver<State> {
        self.state.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_confirm_of_what_was_read_before_an_alarm_does_not_end_it() {
        let (state, _) = watch::channel(State::Blocked("low on memory".to_owned()));
        let told = Told::new(state);
        told.confirmed();
        assert!(matches!(*told.state.borrow(), State::Blocked(_)));
        told.say(State::Down("its channel broke".to_owned()));
        told.confirmed();
        assert_eq!(*told.state.borrow(), State::Up);
    }
}
