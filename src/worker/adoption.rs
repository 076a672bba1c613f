//! The guard of a new ledger: redelivered jobs are a sign that another ledger was lost, with links
//! that this one does not know.

use super::{Fatal, Shared};
use crate::ledger::Command;
use crate::rabbit::Delivery;

/// What has been decided about a new ledger.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Adoption {
    /// No job has come yet.
    Undecided,
    /// It serves.
    Adopted,
    /// It met jobs that another ledger may know.
    Refused,
}

impl Shared {
    /// Whether this is a new ledger whose first session has yet to show that no other was lost.
    pub(super) async fn ledger_is_new(&self) -> bool {
        self.worker.journey.ledger.identity().empty
            && !self.worker.accept_empty_ledger
            && *self.adoption.lock().await != Adoption::Adopted
    }

    /// Holds the empty-ledger guard, and takes note once that a new ledger serves.
    ///
    /// `fresh` says that the session is the first that serves with a new ledger: what is
    /// redelivered in it was taken by a worker with another ledger.
    pub(super) async fn may_serve(&self, delivery: &Delivery, fresh: bool) -> bool {
        let ledger = &self.worker.journey.ledger;
        if !ledger.identity().empty {
            return true;
        }
        // Held over the write, so that no lane's yes can come after another lane's no.
        let mut adoption = self.adoption.lock().await;
        if *adoption == Adoption::Refused {
            return false;
        }
        if fresh && self.worker.intake.was_taken_before(delivery) {
            *adoption = Adoption::Refused;
            // Until an operator has decided, the next start must ask again.
            drop(ledger.execute(Command::Adopt(false)).await);
            self.end(Fatal::EmptyLedger);
            return false;
        }
        if *adoption == Adoption::Undecided {
            // A ledger that cannot be written pauses the job that follows, and says so; the next
            // one tries again.
            if ledger.execute(Command::Adopt(true)).await.is_ok() {
                *adoption = Adoption::Adopted;
            }
        }
        true
    }
}
