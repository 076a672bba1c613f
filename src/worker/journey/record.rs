//! What is asked of the ledger and made durable in it. While the ledger is away it is asked again, under
//! the same token, which cannot count twice.

use std::time::Duration;

use super::{Journey, Step, Verdict};
use crate::clock::as_duration;
use crate::job::Ending;
use crate::ledger::{
    Attempt, Claim, ClaimRequest, Claimant, CloseRequest, Lease, LedgerError, Next, Settle,
    SettleRequest, token,
};
use crate::worker::ask::Ask;
use crate::worker::gate::Reason;

/// What a lease lasts beyond the call itself: the durable write before it and after it.
pub(super) const LEASE_MARGIN: Duration = Duration::from_secs(15);

/// Why a job could not be claimed.
pub(super) enum Stopped {
    /// The ledger says so.
    Ledger(LedgerError),
    /// This copy may not wait for it.
    Interrupted(Verdict),
}

impl Journey {
    fn claimant(&self, ask: &Ask) -> Claimant {
        Claimant {
            key: ask.key.clone(),
            fingerprint: ask.fingerprint.clone(),
            product_id: ask.request.product_id.clone(),
            lane: ask.lane,
            campaign: ask.campaign.clone(),
            published_at: ask.published_at,
            picked_up_at: ask.picked_up_at,
            redelivered: ask.redelivered,
            elsewhere: ask.elsewhere,
            on_unknown: self.rules.on_unknown,
        }
    }

    /// Claims; while the ledger is away, asks again with the same token, which cannot count twice.
    pub(super) async fn claim(&self, ask: &Ask) -> Result<Claim, Stopped> {
        let request = ClaimRequest {
            claimant: self.claimant(ask),
            token: token(),
            lease: self.rules.request_timeout + LEASE_MARGIN,
            max_attempts: self.rules.of(ask.lane).policy.max_attempts,
        };
        loop {
            match self.ledger.claim(request.clone()).await {
                Err(error @ LedgerError::Unavailable(_)) => {
                    self.gate.close_for_the_ledger(&error);
                    tokio::select! {
                        () = self.gate.free_of(Reason::Ledger) => {}
                        verdict = self.interrupted(ask) => return Err(Stopped::Interrupted(verdict)),
                    }
                }
                answer => return answer.map_err(Stopped::Ledger),
            }
        }
    }

    /// What there is to say of a job without a call, if the ledger can be asked just now.
    pub(super) async fn look(&self, ask: &Ask) -> Option<Claim> {
        self.ledger.look(self.claimant(ask)).await.unwrap_or_default()
    }

    /// Makes an attempt's result durable, however long the ledger takes, past the session and past any hold: to
    /// give up here would lose it.
    ///
    /// `why` says in a word what the job waits for, if this is not its end.
    pub(super) async fn settle(
        &self,
        ask: &Ask,
        lease: Lease,
        attempt: Attempt,
        next: Next,
        why: &'static str,
    ) -> Step {
        let counted = !matches!(attempt, Attempt::GivenBack);
        let request = SettleRequest {
            key: ask.key.clone(),
            lease,
            attempt,
            next,
            on_unknown: self.rules.on_unknown,
        };
        loop {
            match self.ledger.settle(request.clone()).await {
                Ok(Settle::Ended(stored)) => return Step::Verdict(Verdict::Reply(stored)),
                Ok(Settle::Waiting { until }) => return Step::WaitUntil(until, why),
                Ok(Settle::Zombie) => {
                    tracing::warn!(job.key = %ask.key, fence = lease.fence, counted, "the lease was lost; what came of this attempt is an orphan and is not published");
                    return Step::Verdict(Verdict::Abandon);
                }
                Err(LedgerError::DamagedRow(what)) => {
                    return Step::Verdict(Verdict::Damaged(what));
                }
                Err(error @ (LedgerError::Damaged(_) | LedgerError::Stopped(_))) => {
                    return Step::Verdict(Verdict::Fatal(error));
                }
                Err(error @ LedgerError::Unavailable(_)) => {
                    self.gate.close_for_the_ledger(&error);
                    self.gate.free_of(Reason::Ledger).await;
                }
            }
        }
    }

    /// Ends a job without a call, unless the ledger has its outcome.
    pub(super) async fn close(&self, ask: &Ask, ending: Ending) -> Verdict {
        let request = CloseRequest { claimant: self.claimant(ask), ending };
        loop {
            match self.ledger.close(request.clone()).await {
                Ok(Claim::Settled(stored)) => return Verdict::Reply(stored),
                Ok(Claim::Conflict(fields)) => return Verdict::Conflict(fields),
                Ok(Claim::Busy { until } | Claim::Waiting { until }) => {
                    let wait = as_duration(until - self.clock.now());
                    return Verdict::Delay { wait, why: "busy" };
                }
                Ok(Claim::Granted(_)) => return Verdict::Abandon,
                Err(LedgerError::DamagedRow(what)) => return Verdict::Damaged(what),
                Err(error @ (LedgerError::Damaged(_) | LedgerError::Stopped(_))) => {
                    return Verdict::Fatal(error);
                }
                Err(error @ LedgerError::Unavailable(_)) => {
                    self.gate.close_for_the_ledger(&error);
                    tokio::select! {
                        () = self.gate.free_of(Reason::Ledger) => {}
                        verdict = self.interrupted(ask) => return verdict,
                    }
                }
            }
        }
    }
}
