//! The guard of a new ledger: redelivered jobs are a sign that another ledger was lost, with links
//! that this one does not know.

use super::{Fatal, Shared};
use crate::ledger::{Adoption, LedgerError, OwnCommand, Standing};
use crate::rabbit::Delivery;

/// How often the ledger is asked to remember a refusal.
const TRIES: usize = 3;

impl Shared {
    /// Holds a refusal that an earlier process has made, before a single job is taken: each one
    /// taken and given back would count against its delivery limit. What an operator has said of a new
    /// ledger holds for every worker, and from then on.
    pub(super) async fn begin_with_the_ledger(&self) {
        let ledger = &self.worker.engine.journey.ledger;
        let standing = ledger.identity().standing;
        if self.worker.accept_empty_ledger && standing != Standing::Established {
            // Where this cannot be written, the next start needs the flag again.
            drop(ledger.tell(OwnCommand::Adopt(Adoption::Accepted)).await);
        } else if standing == Standing::Refused {
            self.worker.engine.end(Fatal::EmptyLedger);
        }
    }

    /// Whether this is a new ledger whose first session has yet to show that no other was lost.
    pub(super) async fn ledger_is_new(&self) -> bool {
        self.worker.engine.journey.ledger.identity().standing != Standing::Established
            && !self.worker.accept_empty_ledger
            && *self.adoption.lock().await != Some(Adoption::Adopted)
    }

    /// What a job that some worker had taken before says of this ledger: nothing, if there is a row of it.
    async fn told_by(&self, delivery: &Delivery) -> Result<Standing, LedgerError> {
        let ledger = &self.worker.engine.journey.ledger;
        if let Some(key) = self.worker.intake.key(delivery)
            && ledger.knows(key).await?
        {
            return Ok(Standing::Established);
        }
        ledger.standing().await
    }

    /// Holds the empty-ledger guard, and takes note once that a new ledger serves.
    ///
    /// `fresh` says that the session is the first that serves with a new ledger: what is
    /// redelivered in it was taken by a worker with another ledger. In later ones it was taken by this
    /// one, or by one that has refused the ledger since.
    pub(super) async fn may_serve(&self, delivery: &Delivery, fresh: bool) -> bool {
        if self.worker.engine.journey.ledger.identity().standing == Standing::Established {
            return true;
        }
        // Held over the write, so that no lane's yes can come after another lane's no.
        let mut adoption = self.adoption.lock().await;
        if *adoption == Some(Adoption::Refused) {
            return false;
        }
        match self.judge(delivery, fresh, *adoption).await {
            Ok(Some(Adoption::Refused)) => {
                *adoption = Some(Adoption::Refused);
                self.worker.engine.end(Fatal::EmptyLedger);
                false
            }
            Ok(decided) => {
                *adoption = decided;
                true
            }
            // Nobody can say now. The session ends, and the next one begins when the ledger is back.
            Err(error) => {
                self.gate.close_for_the_ledger(&error);
                false
            }
        }
    }

    /// What is decided about the new ledger after this delivery.
    async fn judge(
        &self,
        delivery: &Delivery,
        fresh: bool,
        before: Option<Adoption>,
    ) -> Result<Option<Adoption>, LedgerError> {
        let ledger = &self.worker.engine.journey.ledger;
        if delivery.redelivered && !self.worker.accept_empty_ledger {
            match self.told_by(delivery).await? {
                Standing::Refused => return Ok(Some(Adoption::Refused)),
                Standing::New if fresh => {
                    // The next start must refuse as well, whatever it would meet first.
                    for _ in 0..TRIES {
                        if ledger.tell(OwnCommand::Adopt(Adoption::Refused)).await.is_ok() {
                            break;
                        }
                    }
                    return Ok(Some(Adoption::Refused));
                }
                Standing::Established if fresh => return Ok(before),
                Standing::New | Standing::Established => {}
            }
        }
        // A ledger that cannot be written pauses the job that follows, and says so; the next one tries
        // again. Who has refused it in the meantime has done so for all.
        if before.is_none() && ledger.tell(OwnCommand::Adopt(Adoption::Adopted)).await.is_ok() {
            let refused = ledger.standing().await? == Standing::Refused;
            let decided = if refused { Adoption::Refused } else { Adoption::Adopted };
            return Ok(Some(decided));
        }
        Ok(before)
    }
}
