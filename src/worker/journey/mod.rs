//! One job's journey, from its turn to a verdict.
//!
//! Sends nothing to RabbitMQ: [`super::settle`] carries the verdict out. So a crash anywhere in
//! here leaves the message unacked, and the ledger decides what the next worker may do.

mod admission;
mod again;
mod attempt;
mod record;

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt as _;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::ask::Ask;
use super::call_time::CallTime;
use super::circuit::Circuit;
use super::gate::Gate;
use super::orders::Orders;
use super::rules::Rules;
use super::trouble::Trouble;
use super::turns::{Turn, Turns};
use crate::clock::{Millis, SharedClock, as_duration, as_millis};
use crate::creem::Client;
use crate::job::{Ending, Status};
use crate::ledger::{Claim, Ledger, LedgerError, Stored};
use crate::observe::metrics;
use crate::pace::Pacer;
use crate::retry::policy::LONGEST_IN_PLACE;
use admission::{Admission, Pass};
use record::Stopped;

/// For how long a job then goes to a delay queue, and after it was held for
/// [`super::ask::LONGEST_HOLD`]. Short, because what is left of it after a pause counts as time in
/// which the job was tried.
const ASIDE: Duration = Duration::from_secs(5);

/// What a job waits for whose next try lies ahead.
const NOT_DUE: &str = "retry_not_due";

/// What is to be done with the message.
#[derive(Debug)]
pub enum Verdict {
    /// Publish the stored outcome, then ack.
    Reply(Stored),
    /// Tell that the id belongs to another body, then ack.
    Conflict(Vec<String>),
    /// Let it come back after a while, then ack.
    Delay {
        /// How long.
        wait: Duration,
        /// What it waits for, for the log; one of a closed set.
        why: &'static str,
    },
    /// Nothing was sent, and this worker stops or its lane is paused: it is delivered again.
    GiveBack,
    /// Another worker has the job, or the session is over: given back where that still can be.
    Abandon,
    /// The job's row in the ledger is damaged: park the job for a person, and go on.
    Damaged(String),
    /// The worker met a bug before anything was sent: park the job for a person, and go on.
    Panicked,
    /// The ledger cannot be gone on with: stop everything.
    Fatal(LedgerError),
}

/// What brings a job from its turn to a [`Verdict`]: the ledger, Creem, and what holds calls back.
#[derive(Debug)]
pub struct Journey {
    /// When a job is too late, how long a call may take, and what follows an unknown outcome.
    pub rules: Rules,
    /// Creem.
    pub creem: Client,
    /// Gives each call its place in time.
    pub pacer: Pacer,
    /// What keeps all calls back: see [`Reason`](super::gate::Reason).
    pub gate: Arc<Gate>,
    /// What operators have told all workers.
    pub orders: Orders,
    /// Whether Creem is there.
    pub circuit: Circuit,
    /// How long a call takes.
    pub call_time: CallTime,
    /// One at a time per key.
    pub turns: Turns,
    /// Wall-clock time.
    pub clock: SharedClock,
    /// Names outages.
    pub trouble: Trouble,
    /// When the last check of the key began that found it accepted.
    pub key_accepted_at: tokio::sync::Mutex<Option<Instant>>,
    /// Cancelled when nothing new may be sent.
    pub stop: CancellationToken,
    /// The ledger.
    pub ledger: Arc<dyn Ledger>,
}

/// One step of a journey: go on, or the verdict.
enum Step {
    /// Wait until then, and try again; what for.
    WaitUntil(Millis, &'static str),
    /// Its next try is not due until then.
    NotDue(Millis),
    /// The end.
    Verdict(Verdict),
}

impl Journey {
    /// Takes one copy of a job from its turn to a verdict.
    ///
    /// The turn comes back with the verdict: whoever carries it out may keep the next copy waiting.
    pub async fn run(&self, ask: &Ask) -> (Verdict, Option<Turn<'_>>) {
        let turn = tokio::select! {
            biased;
            verdict = self.interrupted(ask) => return (verdict, None),
            turn = self.turns.take(&ask.key) => turn,
            verdict = self.told_late(ask) => return (verdict, None),
        };
        let travelled = AssertUnwindSafe(self.travel(ask)).catch_unwind().await;
        let verdict = match travelled {
            Ok(verdict) => verdict,
            // The hook has logged it. One job is set aside; the others go on.
            Err(_panic) => Verdict::Panicked,
        };
        (verdict, Some(turn))
    }

    /// Resolves when a copy is too late for which there is an outcome. Where there is none, whoever has the turn
    /// may still make it.
    async fn told_late(&self, ask: &Ask) -> Verdict {
        self.expiry(ask).await;
        match self.look(ask).await {
            // One that has yet to be parked is for whoever has the turn, or it would be parked twice.
            Some(Claim::Settled(stored))
                if stored.parked || stored.status != Status::Unresolved =>
            {
                Verdict::Reply(stored)
            }
            Some(Claim::Conflict(fields)) => Verdict::Conflict(fields),
            Some(
                Claim::Settled(_) | Claim::Granted(_) | Claim::Busy { .. } | Claim::Waiting { .. },
            )
            | None => std::future::pending().await,
        }
    }

    /// How a job ends that is cancelled or too late.
    fn ending(&self, ask: &Ask) -> Option<Ending> {
        let cancelled = self.orders.cancels(ask).map(Ending::Cancelled);
        cancelled.or_else(|| {
            let now = self.clock.now();
            // While Creem wants silence nobody calls.
            let soonest = now.saturating_add(as_millis(self.pacer.silence()));
            let needs = self.call_time.needed();
            let late = self.rules.too_late(ask, now, needs);
            let late = late.or_else(|| self.rules.in_vain(ask, soonest, needs));
            late.map(Ending::Expired)
        })
    }

    /// Resolves when the job is too late.
    async fn expiry(&self, ask: &Ask) {
        match self.rules.latest_call(ask, self.call_time.needed()) {
            Some(at) => {
                tokio::time::sleep(as_duration(at.saturating_add(1) - self.clock.now())).await;
            }
            None => std::future::pending().await,
        }
    }

    async fn travel(&self, ask: &Ask) -> Verdict {
        let mut look = ask.look_first;
        loop {
            if let Some(ending) = self.ending(ask) {
                return self.close(ask, ending).await;
            }
            // What there is to say already needs no place, and waits for nobody.
            if std::mem::take(&mut look) || self.gate.holds_calls_only() {
                let looked = tokio::select! {
                    biased;
                    looked = self.look(ask) => looked,
                    verdict = self.interrupted(ask) => return verdict,
                };
                if let Some(claim) = looked {
                    match self.follow(ask, self.answered(claim)).await {
                        Some(verdict) => return verdict,
                        None => continue,
                    }
                }
            }
            let pass = match self.admit(ask).await {
                Admission::Admitted(pass) => pass,
                Admission::LookAgain => continue,
                Admission::Verdict(verdict) => return verdict,
            };
            let step = self.step(ask, pass).await;
            if let Some(verdict) = self.follow(ask, step).await {
                return verdict;
            }
        }
    }

    /// Waits as a step says; a verdict ends the journey.
    async fn follow(&self, ask: &Ask, step: Step) -> Option<Verdict> {
        let (until, why) = match step {
            Step::Verdict(verdict) => return Some(verdict),
            // Whoever has the job now may still make it; a try that is not due yet cannot.
            Step::NotDue(until) => match self.rules.in_vain(ask, until, self.call_time.needed()) {
                Some(problem) => return Some(self.close(ask, Ending::Expired(problem)).await),
                None => (until, NOT_DUE),
            },
            Step::WaitUntil(until, why) => (until, why),
        };
        let wait = as_duration(until - self.clock.now());
        if wait > LONGEST_IN_PLACE {
            return Some(Verdict::Delay { wait, why });
        }
        tokio::select! {
            () = tokio::time::sleep(wait) => None,
            () = self.orders.cancelled(ask) => None,
            verdict = self.interrupted(ask) => Some(verdict),
        }
    }

    /// What follows where no call does.
    fn answered(&self, claim: Claim) -> Step {
        match claim {
            Claim::Settled(stored) => Step::Verdict(Verdict::Reply(stored)),
            Claim::Conflict(fields) => Step::Verdict(Verdict::Conflict(fields)),
            Claim::Busy { until } => {
                metrics::retry("busy");
                let soonest = self.clock.now() + 100;
                Step::WaitUntil(until.max(soonest), "busy")
            }
            Claim::Waiting { until } => Step::NotDue(until),
            // `step` takes a granted claim itself, and a look grants none: the message stays the broker's.
            Claim::Granted(_) => Step::Verdict(Verdict::Abandon),
        }
    }

    /// Resolves when this copy cannot or may not go on; nothing of it is under way then.
    async fn interrupted(&self, ask: &Ask) -> Verdict {
        tokio::select! {
            biased;
            () = ask.session.cancelled() => Verdict::Abandon,
            () = self.stop.cancelled() => Verdict::GiveBack,
            () = self.orders.paused(ask.lane) => Verdict::GiveBack,
            // A broker takes a delivery back that is held too long, and counts that against it.
            () = tokio::time::sleep_until(ask.hold_until) => {
                Verdict::Delay { wait: ASIDE, why: "held_too_long" }
            }
        }
    }

    /// Claims the job and, if it is free, asks Creem once.
    async fn step(&self, ask: &Ask, pass: Pass<'_>) -> Step {
        let started = Instant::now();
        match self.claim(ask).await {
            Ok(Claim::Granted(lease)) => {
                let attempt = AssertUnwindSafe(self.attempt(ask, lease, pass, started));
                // The hook has logged it.
                match attempt.catch_unwind().await {
                    Ok(step) => step,
                    Err(_panic) => self.panicked(ask, lease).await,
                }
            }
            Ok(claim) => {
                self.pacer.put_back(pass.place);
                self.answered(claim)
            }
            Err(Stopped::Interrupted(verdict)) => Step::Verdict(verdict),
            Err(Stopped::Ledger(LedgerError::DamagedRow(what))) => {
                Step::Verdict(Verdict::Damaged(what))
            }
            Err(Stopped::Ledger(error)) => Step::Verdict(Verdict::Fatal(error)),
        }
    }
}
