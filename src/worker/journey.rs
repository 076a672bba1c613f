//! One job's journey, from its turn to a verdict.
//!
//! Sends nothing to RabbitMQ: [`super::settle`] carries the verdict out. So a crash anywhere in
//! here leaves the message unacked, and the ledger decides what the next worker may do.

use std::panic::AssertUnwindSafe;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use futures::FutureExt as _;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::ask::{Ask, Rules};
use super::gate::{Gate, Reason};
use super::trouble::Trouble;
use super::turns::{Turn, Turns};
use crate::clock::{Millis, SharedClock, as_duration, as_millis};
use crate::creem::{Answer, Client, KeyCheck};
use crate::job::{Ending, Lane, Problem};
use crate::ledger::{
    Attempt, Claim, ClaimRequest, Claimant, CloseRequest, Lease, Ledger, LedgerError, Next, Settle,
    SettleRequest, Stored, token,
};
use crate::observe::metrics;
use crate::pace::{Pacer, Place};
use crate::retry::policy::{LONGEST_IN_PLACE, Tried};
use crate::retry::{backoff, policy};

/// What a lease lasts beyond the call itself: the durable write before it and after it.
const LEASE_MARGIN: Duration = Duration::from_secs(15);
/// How much of a lease may be spent on waiting for the time of the call.
const SPARE: Duration = Duration::from_secs(8);
/// What must be left of a lease, beyond the call, when the call begins.
const SETTLE_MARGIN: Duration = Duration::from_secs(5);
/// While the key is refused and a lane is full, a job without a deadline makes room after so long.
const MAKE_ROOM: Duration = Duration::from_secs(5);
/// For how long a job then goes to a delay queue, and after it was held for
/// [`super::ask::LONGEST_HOLD`]. Short, because what is left of it after a pause counts as time in
/// which the job was tried.
const ASIDE: Duration = Duration::from_secs(5);

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
    /// Nothing was sent and this worker stops: the next delivery is somebody else's.
    GiveBack,
    /// Another worker has the job, or the session is over: given back where that still can be.
    Abandon,
    /// The job's row in the ledger is damaged: park the job for a person, and go on.
    Damaged(String),
    /// The worker met a bug before anything was sent: park the job for a person, and go on.
    Panicked,
    /// The ledger is damaged: stop everything.
    Fatal(LedgerError),
}

/// What brings a job from its turn to a [`Verdict`]: the ledger, Creem, and what holds calls back.
#[derive(Debug)]
pub struct Journey {
    /// Whatever the rules are.
    pub rules: Rules,
    /// Creem.
    pub creem: Client,
    /// How fast.
    pub pacer: Pacer,
    /// Whether at all.
    pub gate: Arc<Gate>,
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
    /// The end.
    Verdict(Verdict),
}

/// Whether a call may be made now.
enum Admission {
    Admitted(Place),
    /// Too late while waiting, or the gate closed again.
    LookAgain,
    Verdict(Verdict),
}

impl Journey {
    /// Takes one copy of a job from its turn to a verdict.
    ///
    /// The turn comes back with the verdict: whoever carries it out may keep the next copy waiting.
    pub async fn run(&self, ask: &Ask) -> (Verdict, Option<Turn<'_>>) {
        let turn = tokio::select! {
            turn = self.turns.take(&ask.key) => turn,
            verdict = self.interrupted(ask) => return (verdict, None),
        };
        let travelled = AssertUnwindSafe(self.travel(ask)).catch_unwind().await;
        let verdict = match travelled {
            Ok(verdict) => verdict,
            // The hook has logged it. One job is set aside; the others go on.
            Err(_panic) => self.panicked(ask).await,
        };
        (verdict, Some(turn))
    }

    /// A bug was met: if that was under a lease, a session may exist that must be counted.
    async fn panicked(&self, ask: &Ask) -> Verdict {
        let lease = ask.lease.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(lease) = lease else { return Verdict::Panicked };
        let reason = "the worker met a bug while it handled the call".to_owned();
        let ending = Ending::Unresolved(Problem::new("worker_panicked", reason.clone()));
        let attempt = Attempt::Ambiguous { checkout_id: None, reason };
        match self.settle(ask, lease, attempt, Next::End(ending)).await {
            Step::Verdict(verdict) => verdict,
            Step::WaitUntil(..) => Verdict::Panicked,
        }
    }

    async fn travel(&self, ask: &Ask) -> Verdict {
        loop {
            if let Some(problem) = self.rules.too_late(ask, self.clock.now()) {
                return self.close(ask, problem).await;
            }
            let place = match self.admit(ask).await {
                Admission::Admitted(place) => place,
                Admission::LookAgain => continue,
                Admission::Verdict(verdict) => return verdict,
            };
            match self.step(ask, place).await {
                Step::Verdict(verdict) => return verdict,
                Step::WaitUntil(until, why) => {
                    let wait = as_duration(until - self.clock.now());
                    if wait > LONGEST_IN_PLACE {
                        return Verdict::Delay { wait, why };
                    }
                    tokio::select! {
                        () = tokio::time::sleep(wait) => {}
                        verdict = self.interrupted(ask) => return verdict,
                    }
                }
            }
        }
    }

    /// Resolves when this copy cannot or may not go on; nothing of it is under way then.
    async fn interrupted(&self, ask: &Ask) -> Verdict {
        tokio::select! {
            biased;
            () = ask.session.cancelled() => Verdict::Abandon,
            () = self.stop.cancelled() => Verdict::GiveBack,
            // A broker takes a delivery back that is held too long, and counts that against it.
            () = tokio::time::sleep_until(ask.hold_until) => {
                Verdict::Delay { wait: ASIDE, why: "held_too_long" }
            }
        }
    }

    /// Waits for the gate and the pacer, as long as the job can still make it.
    async fn admit(&self, ask: &Ask) -> Admission {
        let expiry = async {
            match self.rules.expires_at(ask) {
                Some(at) => tokio::time::sleep(as_duration(at - self.clock.now())).await,
                None => std::future::pending().await,
            }
        };
        let paced = async {
            self.gate.opened().await;
            let waited = Instant::now();
            let place = self.pacer.admit().await;
            metrics::rate_limit_wait(ask.lane, waited.elapsed());
            place
        };
        let admission = tokio::select! {
            biased;
            verdict = self.interrupted(ask) => Admission::Verdict(verdict),
            place = paced => Admission::Admitted(place),
            () = expiry => Admission::LookAgain,
            () = self.must_make_room(ask) => {
                Admission::Verdict(Verdict::Delay { wait: ASIDE, why: "key_refused" })
            }
        };
        // The gate may have closed while the pacer was waited for.
        if !self.gate.is_open() && matches!(admission, Admission::Admitted(_)) {
            return Admission::LookAgain;
        }
        admission
    }

    /// Resolves when an interactive job without a deadline holds a slot that one with a deadline
    /// may need: while the key is refused all wait, but those who are late must be told.
    async fn must_make_room(&self, ask: &Ask) {
        if ask.lane != Lane::Interactive || self.rules.expires_at(ask).is_some() {
            return std::future::pending().await;
        }
        loop {
            self.gate.closed_by(Reason::Key).await;
            // Held first: a full lane must not send its whole backlog round and round.
            tokio::time::sleep(MAKE_ROOM).await;
            if self.gate.is_closed_by(Reason::Key) && ask.permits.available_permits() == 0 {
                return;
            }
        }
    }

    /// Claims the job and, if it is free, asks Creem once.
    async fn step(&self, ask: &Ask, place: Place) -> Step {
        let started = Instant::now();
        match self.claim(ask).await {
            Ok(Claim::Granted(lease)) => {
                let held = || ask.lease.lock().unwrap_or_else(PoisonError::into_inner);
                *held() = Some(lease);
                let step = self.attempt(ask, lease, place, started).await;
                *held() = None;
                step
            }
            Ok(Claim::Settled(stored)) => Step::Verdict(Verdict::Reply(stored)),
            Ok(Claim::Conflict(fields)) => Step::Verdict(Verdict::Conflict(fields)),
            Ok(Claim::Busy { until }) => {
                metrics::retry("busy");
                let soonest = self.clock.now() + 100;
                Step::WaitUntil(until.max(soonest), "busy")
            }
            Ok(Claim::Waiting { until }) => Step::WaitUntil(until, "retry_not_due"),
            Err(LedgerError::DamagedRow(what)) => Step::Verdict(Verdict::Damaged(what)),
            Err(error @ (LedgerError::Damaged(_) | LedgerError::Stopped(_))) => {
                Step::Verdict(Verdict::Fatal(error))
            }
            // `claim` asks again until it gets an answer; this is its stop.
            Err(LedgerError::Unavailable(_)) => Step::Verdict(self.interrupted(ask).await),
        }
    }

    fn claimant(&self, ask: &Ask) -> Claimant {
        Claimant {
            key: ask.key.clone(),
            fingerprint: ask.fingerprint.clone(),
            product_id: ask.request.product_id.clone(),
            lane: ask.lane,
            campaign: ask.campaign.clone(),
            published_at: ask.timestamp,
            picked_up_at: ask.picked_up_at,
            redelivered: ask.redelivered,
            elsewhere: ask.elsewhere,
            on_unknown: self.rules.on_unknown,
        }
    }

    /// Claims; while the ledger is away, asks again with the same token, which cannot count twice.
    async fn claim(&self, ask: &Ask) -> Result<Claim, LedgerError> {
        let request = ClaimRequest {
            claimant: self.claimant(ask),
            token: token(),
            lease: self.rules.request_timeout + LEASE_MARGIN,
            max_attempts: self.rules.of(ask.lane).policy.max_attempts,
        };
        loop {
            match self.ledger.claim(request.clone()).await {
                Err(error @ LedgerError::Unavailable(_)) => {
                    self.ledger_away(&error);
                    tokio::select! {
                        () = self.gate.free_of(Reason::Ledger) => {}
                        _ = self.interrupted(ask) => return Err(error),
                    }
                }
                answer => return answer,
            }
        }
    }

    pub(super) fn ledger_away(&self, error: &LedgerError) {
        if self.hold(Reason::Ledger) {
            tracing::error!(%error, "intake is paused: no job is acked and none failed until the ledger can be written again");
        }
    }

    /// One call under a lease, and what follows from its answer.
    async fn attempt(&self, ask: &Ask, lease: Lease, place: Place, started: Instant) -> Step {
        let in_time = self.in_time(place).await;
        let left = (self.rules.request_timeout + LEASE_MARGIN).saturating_sub(started.elapsed());
        if !in_time || self.stop.is_cancelled() || left < self.rules.request_timeout + SETTLE_MARGIN
        {
            return self
                .settle(ask, lease, Attempt::GivenBack, Next::Wait { until: self.clock.now() })
                .await;
        }
        if let Some(problem) = self.rules.too_late(ask, self.clock.now()) {
            return self
                .settle(ask, lease, Attempt::GivenBack, Next::End(Ending::Expired(problem)))
                .await;
        }
        let asked = Instant::now();
        let body = ask.request.wire.clone();
        let answer = self
            .creem
            .create_checkout(&ask.request.request_id, body, self.rules.request_timeout)
            .await;
        metrics::creem_request(answer.label(), asked.elapsed());
        self.trouble.note(&answer);
        tracing::debug!(job.key = %ask.key, attempt = lease.attempt, answer = answer.label(), "creem answered");
        let (attempt, next) = self.judge(ask, lease, answer, asked).await;
        self.settle(ask, lease, attempt, next).await
    }

    /// Waits for the time of the call. If the claim took so long that its place is lost, another one
    /// is waited for, as long as the lease can spare; says whether the call may be made.
    async fn in_time(&self, place: Place) -> bool {
        tokio::time::timeout(SPARE, self.pacer.pass(place)).await.is_ok()
    }

    /// Turns an answer into what is written down.
    async fn judge(
        &self,
        ask: &Ask,
        lease: Lease,
        answer: Answer,
        asked: Instant,
    ) -> (Attempt, Next) {
        let unresolved =
            |code: &str, text: String| Next::End(Ending::Unresolved(Problem::new(code, text)));
        match answer {
            Answer::Made(checkout) => {
                let ending =
                    Ending::Succeeded { checkout_id: checkout.id, checkout_url: checkout.url };
                (Attempt::Counted, Next::End(ending))
            }
            Answer::Refused(problem) => (Attempt::Counted, Next::End(Ending::Rejected(problem))),
            Answer::Duplicate(problem) => {
                // Whose it is nobody knows, so it counts as a session that nobody was given.
                let reason = "Creem says that the identifier exists already".to_owned();
                let attempt = Attempt::Ambiguous { checkout_id: None, reason };
                (attempt, Next::End(Ending::Unresolved(problem)))
            }
            Answer::NotMade { reason } => {
                let next = self.again(ask, lease, None, "creem_unreachable", &reason);
                (Attempt::Counted, next)
            }
            Answer::Unknown { reason, retry_after } => {
                let next = self.again(ask, lease, retry_after, "outcome_unknown", &reason);
                (Attempt::Ambiguous { checkout_id: None, reason }, next)
            }
            Answer::Linkless { checkout_id } => {
                let text = format!("Creem made {checkout_id} and gave no link for it");
                let reason = "no link could be had for it".to_owned();
                (
                    Attempt::Ambiguous { checkout_id: Some(checkout_id), reason },
                    unresolved("no_checkout_url", text),
                )
            }
            Answer::Mismatch { reason, checkout_id } => {
                tracing::error!(job.key = %ask.key, error = reason, checkout_id, "an answer of Creem's is not this job's; its link is not published");
                let text = format!("Creem's answer cannot be trusted: {reason}");
                (Attempt::Ambiguous { checkout_id, reason }, unresolved("answer_mismatch", text))
            }
            Answer::Throttled { retry_after } => {
                if let Some(delay) = retry_after {
                    self.pacer.quiet(backoff::clamp_retry_after(delay));
                }
                let lease = Lease { throttled: lease.throttled + 1, ..lease };
                let next = self.again(
                    ask,
                    lease,
                    retry_after,
                    "throttled",
                    "Creem said 429, too many requests",
                );
                (Attempt::Throttled, next)
            }
            Answer::KeyRefused(problem) => self.key_refused(problem, asked).await,
        }
    }

    /// Another try, or the end of trying.
    fn again(
        &self,
        ask: &Ask,
        lease: Lease,
        retry_after: Option<Duration>,
        code: &'static str,
        reason: &str,
    ) -> Next {
        let tried = Tried {
            attempts: lease.attempt,
            throttled: lease.throttled,
            elapsed: self.gate.counted_since(lease.opened_at),
        };
        let lane = &self.rules.of(ask.lane).policy;
        let failed = |code: &str, text: String| Next::End(Ending::Failed(Problem::new(code, text)));
        match lane.next(tried, retry_after, backoff::chance()) {
            policy::Next::After(delay) => {
                metrics::retry(code);
                tracing::debug!(job.key = %ask.key, attempt = lease.attempt, error = reason, delay_ms = as_millis(delay), "asking again");
                Next::Wait { until: self.clock.now() + as_millis(delay) }
            }
            policy::Next::AttemptsExhausted => failed(
                "attempts_exhausted",
                format!("{} attempts were made; the last one: {reason}", lease.attempt),
            ),
            policy::Next::TimeExhausted => {
                let most = humantime::format_duration(lane.max_elapsed);
                failed(
                    "time_exhausted",
                    format!(
                        "no link within {most} after {} attempts; the last one: {reason}",
                        lease.attempt
                    ),
                )
            }
        }
    }

    /// A refused key is not this job's fault, unless the key is fine. `asked` is when the call began
    /// that met the refusal: one check that began after it speaks for every such job.
    async fn key_refused(&self, problem: Problem, asked: Instant) -> (Attempt, Next) {
        let wait = (Attempt::GivenBack, Next::Wait { until: self.clock.now() });
        let rejected = (Attempt::Counted, Next::End(Ending::Rejected(problem)));
        let mut accepted_at = self.key_accepted_at.lock().await;
        if accepted_at.is_some_and(|accepted_at| accepted_at > asked) {
            return rejected;
        }
        if !self.hold(Reason::Key) {
            return wait;
        }
        let checked = Instant::now();
        match self.creem.check_key().await {
            KeyCheck::Accepted => {
                *accepted_at = Some(checked);
                self.reopen(Reason::Key);
                rejected
            }
            KeyCheck::Refused(status) => {
                tracing::error!(
                    status,
                    "intake is paused: Creem refuses the API key; check CREEM_API_KEY and that it belongs to creem.base_url"
                );
                wait
            }
            KeyCheck::Unknown(reason) => {
                tracing::error!(
                    error = reason,
                    "intake is paused: Creem refused a call, and whether it refuses the API key is not known yet"
                );
                wait
            }
        }
    }

    /// Closes the gate for a reason; says whether that is new.
    pub(super) fn hold(&self, reason: Reason) -> bool {
        metrics::paused(reason.as_str(), true);
        self.gate.close(reason)
    }

    /// Takes a reason from the gate, and records the pause that ends with it.
    pub(super) fn reopen(&self, reason: Reason) {
        metrics::paused(reason.as_str(), false);
        if let Some((from, to)) = self.gate.open(reason) {
            // Losing this record only makes the worker less patient; no job depends on it.
            #[expect(clippy::disallowed_methods, reason = "a write nobody waits for")]
            drop(tokio::spawn(self.ledger.execute(crate::ledger::Command::Pause { from, to })));
        }
    }

    /// Makes the result durable, however long the ledger takes, past the session and past any hold:
    /// giving up here would lose it.
    async fn settle(&self, ask: &Ask, lease: Lease, attempt: Attempt, next: Next) -> Step {
        let counted = !matches!(attempt, Attempt::GivenBack);
        let why = waits_for(&attempt);
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
                    self.ledger_away(&error);
                    self.gate.free_of(Reason::Ledger).await;
                }
            }
        }
    }

    /// Ends a job that is too late, unless the ledger has its outcome.
    async fn close(&self, ask: &Ask, problem: Problem) -> Verdict {
        let request =
            CloseRequest { claimant: self.claimant(ask), ending: Ending::Expired(problem) };
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
                    self.ledger_away(&error);
                    tokio::select! {
                        () = self.gate.free_of(Reason::Ledger) => {}
                        verdict = self.interrupted(ask) => return verdict,
                    }
                }
            }
        }
    }
}

/// What a job waits for after such an attempt, in a word for the log.
const fn waits_for(attempt: &Attempt) -> &'static str {
    match attempt {
        Attempt::GivenBack => "not_sent",
        Attempt::Counted => "creem_unreachable",
        Attempt::Throttled => "throttled",
        Attempt::Ambiguous { .. } => "outcome_unknown",
    }
}
