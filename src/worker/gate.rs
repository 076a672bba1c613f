//! The gate of intake: while one reason holds it, nothing new is sent to Creem.
//!
//! A pause keeps the deliveries it holds, eats no attempt, and its time does not count against
//! any job; so it is recorded in the ledger when it is over.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;

use crate::clock::{Millis, SharedClock, as_duration};
use crate::ledger::{Ledger, LedgerError, OwnCommand};
use crate::observe::metrics;
use crate::retry::Pauses;

/// Why intake is paused. A closed set; the names are the labels of `paused`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// The ledger cannot be written.
    Ledger,
    /// Creem refuses the API key.
    Key,
    /// Replies cannot be published.
    Publishing,
    /// No jobs are delivered: the broker is away.
    Broker,
    /// At least half of the last calls to Creem failed.
    Circuit,
}

impl Reason {
    /// The label.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ledger => "ledger",
            Self::Key => "key_refused",
            Self::Publishing => "publishing",
            Self::Broker => "broker",
            Self::Circuit => "circuit_open",
        }
    }

    const fn bit(self) -> u8 {
        1 << self as u8
    }
}

/// The reasons that hold intake, and how long they have held it.
pub struct Gate {
    held: watch::Sender<u8>,
    pauses: Mutex<Pauses>,
    clock: SharedClock,
    /// Told of each pause that is over.
    record: Box<dyn Fn(Millis, Millis) + Send + Sync>,
}

impl std::fmt::Debug for Gate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gate").field("held", &self.held).finish_non_exhaustive()
    }
}

impl Gate {
    /// An open gate, with the pauses that earlier processes recorded in the ledger.
    #[must_use]
    pub fn new(clock: SharedClock, ledger: Arc<dyn Ledger>) -> Self {
        let pauses = Pauses::from_intervals(ledger.identity().pauses.clone());
        Self::recording(clock, pauses, move |from, to| {
            // Losing this record only makes the worker less patient; no job depends on it.
            let ledger = ledger.clone();
            #[expect(clippy::disallowed_methods, reason = "a write nobody waits for")]
            drop(tokio::spawn(async move { ledger.tell(OwnCommand::Pause { from, to }).await }));
        })
    }

    /// An open gate that tells somebody else of each pause that is over.
    pub(super) fn recording(
        clock: SharedClock,
        pauses: Pauses,
        record: impl Fn(Millis, Millis) + Send + Sync + 'static,
    ) -> Self {
        let (held, pauses) = (watch::Sender::new(0), Mutex::new(pauses));
        Self { held, pauses, clock, record: Box::new(record) }
    }

    /// Closes the gate because the ledger does not answer; says so once.
    pub fn close_for_the_ledger(&self, error: &LedgerError) {
        if self.close(Reason::Ledger) {
            tracing::error!(%error, "intake is paused: no job is acked and none failed until the ledger can be written again");
        }
    }

    /// Closes the gate for a reason; says whether that is new.
    pub fn close(&self, reason: Reason) -> bool {
        metrics::paused(reason.as_str(), true);
        self.held.send_if_modified(|held| {
            let before = *held;
            *held |= reason.bit();
            // Under the same lock as the reasons, so that no pause outlives them.
            self.locked().begin(self.clock.now());
            *held != before
        })
    }

    /// Takes a reason away, and records the pause that ends with it, if one does.
    pub fn open(&self, reason: Reason) {
        metrics::paused(reason.as_str(), false);
        let mut over = None;
        self.held.send_if_modified(|held| {
            let before = *held;
            *held &= !reason.bit();
            if before != 0 && *held == 0 {
                over = self.locked().end(self.clock.now());
            }
            *held != before
        });
        if let Some((from, to)) = over {
            (self.record)(from, to);
        }
    }

    /// Whether a reason holds the gate.
    #[must_use]
    pub fn is_closed_by(&self, reason: Reason) -> bool {
        *self.held.borrow() & reason.bit() != 0
    }

    /// Whether no reason holds the gate.
    #[must_use]
    pub fn is_open(&self) -> bool {
        *self.held.borrow() == 0
    }

    /// Whether that reason holds the gate, and no other.
    #[must_use]
    pub fn is_held_only_by(&self, reason: Reason) -> bool {
        *self.held.borrow() == reason.bit()
    }

    /// Whether only calls to Creem are held back: the ledger can be asked, and replies can be published.
    #[must_use]
    pub fn holds_calls_only(&self) -> bool {
        let held = *self.held.borrow();
        held != 0 && held & !(Reason::Key.bit() | Reason::Circuit.bit()) == 0
    }

    /// Waits until that reason holds the gate, and no other.
    pub async fn held_only_by(&self, reason: Reason) {
        self.wait(|held| held == reason.bit()).await;
    }

    /// Waits until no reason holds the gate.
    pub async fn opened(&self) {
        self.wait(|held| held == 0).await;
    }

    /// Waits until one reason holds the gate.
    pub async fn closed_by(&self, reason: Reason) {
        self.wait(|held| held & reason.bit() != 0).await;
    }

    /// Waits until one reason does not hold the gate.
    pub async fn free_of(&self, reason: Reason) {
        self.wait(|held| held & reason.bit() == 0).await;
    }

    async fn wait(&self, until: impl Fn(u8) -> bool) {
        let mut held = self.held.subscribe();
        // The sender lives as long as `self`, so this cannot fail while anybody waits.
        drop(held.wait_for(|held| until(*held)).await);
    }

    /// How much of the time since `from` counts against a job: neither this gate was closed then, nor was the
    /// job's lane paused.
    #[must_use]
    pub fn counted_since(&self, from: Millis, of_its_lane: &Pauses) -> Duration {
        as_duration(self.locked().counted(of_its_lane, from, self.clock.now()))
    }

    /// How much later than `from` a job counts as opened of whose time `counted` more milliseconds are not to count;
    /// what is paused does not count already.
    #[must_use]
    pub fn span_that_counts(&self, from: Millis, counted: Millis, of_its_lane: &Pauses) -> Millis {
        self.locked().span_that_counts(of_its_lane, from, counted, self.clock.now())
    }

    fn locked(&self) -> MutexGuard<'_, Pauses> {
        self.pauses.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::ManualClock;
    use futures::FutureExt as _;

    #[test]
    fn the_gate_opens_when_the_last_reason_is_gone_and_the_time_did_not_count() {
        let clock = Arc::new(ManualClock::at(1_000));
        let (recorded, over) = std::sync::mpsc::channel();
        let gate = Gate::recording(clock.clone(), Pauses::default(), move |from, to| {
            recorded.send((from, to)).unwrap();
        });
        assert!(gate.close(Reason::Ledger));
        assert!(!gate.close(Reason::Ledger));
        assert!(gate.close(Reason::Key));
        clock.advance(Duration::from_secs(5));
        gate.open(Reason::Ledger);
        assert!(over.try_recv().is_err());
        assert!(gate.opened().now_or_never().is_none());
        let none = Pauses::default();
        assert_eq!(gate.counted_since(1_000, &none), Duration::ZERO);
        gate.open(Reason::Key);
        assert_eq!(over.try_recv(), Ok((1_000, 6_000)));
        assert!(gate.opened().now_or_never().is_some());
        clock.advance(Duration::from_secs(2));
        assert_eq!(gate.counted_since(500, &none), Duration::from_millis(2_500));
        gate.open(Reason::Key);
        assert!(over.try_recv().is_err());
    }
}
