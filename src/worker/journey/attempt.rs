//! One call to Creem under a lease, and what its answer means for the job.

use std::time::Duration;

use tokio::time::Instant;

use super::admission::Pass;
use super::record::LEASE_MARGIN;
use super::{Journey, Step, Verdict};
use crate::creem::{Answer, Fetched, KeyCheck, Pressure};
use crate::job::{Ending, Problem};
use crate::ledger::{Attempt, Lease, Next, OnUnknown};
use crate::observe::metrics;
use crate::pace::Place;

use crate::retry::backoff;
use crate::worker::ask::Ask;
use crate::worker::gate::Reason;

/// What a job waits for that was claimed and not sent.
const NOT_SENT: &str = "not_sent";
/// How much of a lease may be spent on waiting for the time of the call.
const SPARE: Duration = Duration::from_secs(8);
/// What must be left of a lease, beyond the call, when the call begins.
const SETTLE_MARGIN: Duration = Duration::from_secs(5);

impl Journey {
    /// One call under a lease, and what follows from its answer.
    pub(super) async fn attempt(
        &self,
        ask: &Ask,
        lease: Lease,
        pass: Pass<'_>,
        started: Instant,
    ) -> Step {
        let Some(place) = self.in_time(pass.place).await else {
            return self.settle(ask, lease, Attempt::GivenBack, self.at_once(), NOT_SENT).await;
        };
        if let Some(next) = self.not_to_be_sent(ask, started) {
            self.pacer.put_back(place);
            return self.settle(ask, lease, Attempt::GivenBack, next, NOT_SENT).await;
        }
        let is_retry = lease.attempt > 1 && pass.probe.is_none();
        if is_retry && !self.circuit.spend_retry(ask.lane) {
            self.pacer.put_back(place);
            let next = self.retry_is_not_earned(ask, lease);
            return self.settle(ask, lease, Attempt::GivenBack, next, "retry_budget").await;
        }
        let asked = Instant::now();
        let is_probe = pass.probe.is_some();
        let body = ask.request.wire.clone();
        // A probe is not made for the job's sake, and has all the time that a call may take.
        let time = if is_probe {
            self.rules.request_timeout
        } else {
            self.rules.time_for_a_call(ask, self.clock.now())
        };
        let answer = self.creem.create_checkout(&ask.request.request_id, body, time).await;
        metrics::creem_request(answer.label(), asked.elapsed());
        self.trouble.note(&answer);
        // One that the job's own deadline has cut short says little of Creem, but where it had half of a call's time.
        let cut_short = time < self.rules.request_timeout / 2 && asked.elapsed() >= time;
        if answer.pressure().is_some() || cut_short {
            self.call_time.note(asked.elapsed());
        }
        if !cut_short {
            self.circuit.note(&answer, pass.probe, &self.gate, &self.pacer);
        }
        match answer.pressure() {
            Some(Pressure::Taken) => self.pacer.taken(asked),
            Some(Pressure::SlowDown) => self.pacer.slow_down(asked),
            Some(Pressure::Overloaded) => self.pacer.overloaded(asked),
            None => {}
        }
        tracing::debug!(job.key = %ask.key, attempt = lease.attempt, answer = answer.label(), "creem answered");
        let answer = if let Answer::Linkless { checkout_id } = answer {
            self.fetch_link(ask, checkout_id, asked + time).await
        } else {
            answer
        };
        let why = waits_for(&answer);
        let call = Called { asked, is_probe, why };
        let (attempt, next) = self.judge(ask, lease, answer, call).await;
        self.settle(ask, lease, attempt, next, why).await
    }

    /// What follows for a job whose call is not to be made now: too little of its lease is left, or it has ended.
    fn not_to_be_sent(&self, ask: &Ask, started: Instant) -> Option<Next> {
        let left = (self.rules.request_timeout + LEASE_MARGIN).saturating_sub(started.elapsed());
        if self.stop.is_cancelled() || left < self.rules.request_timeout + SETTLE_MARGIN {
            return Some(self.at_once());
        }
        let cancelled = self.orders.cancels(ask).map(Ending::Cancelled);
        let needs = self.call_time.needed();
        let too_late = || self.rules.too_late(ask, self.clock.now(), needs).map(Ending::Expired);
        cancelled.or_else(too_late).map(Next::End)
    }

    /// Waits for the time of the call. If the claim took so long that its place is lost, another one
    /// is waited for, as long as the lease can spare; the place of the call, if it may be made.
    async fn in_time(&self, place: Place) -> Option<Place> {
        tokio::time::timeout(SPARE, self.pacer.pass(place)).await.ok()
    }

    /// A session exists, and its link did not come with the answer. To ask for it changes nothing, so that
    /// is done until the call's deadline; each time is a call like others, at a place of its own, ahead of the line: the
    /// call that made the session would be in vain.
    async fn fetch_link(&self, ask: &Ask, checkout_id: String, deadline: Instant) -> Answer {
        let mut tries = 0;
        let fetching = async {
            loop {
                self.pacer.keep(self.pacer.admit_ahead(ask.lane).await).await;
                let id = &ask.request.request_id;
                let asked = Instant::now();
                let fetched = self.creem.fetch_link(id, &checkout_id, deadline).await;
                let (retry_after, throttled) = match fetched {
                    Fetched::Certain(answer) => {
                        metrics::creem_request(answer.label(), asked.elapsed());
                        return answer;
                    }
                    Fetched::Later { retry_after, throttled } => (retry_after, throttled),
                };
                let label = if throttled { "throttled" } else { "unknown" };
                metrics::creem_request(label, asked.elapsed());
                if throttled {
                    self.pacer.slow_down(asked);
                }
                if let Some(delay) = retry_after.filter(|_| throttled) {
                    self.pacer.quiet(backoff::clamp_retry_after(delay));
                }
                tries += 1;
                let backoff = self.rules.of(ask.lane).policy.backoff;
                tokio::time::sleep(backoff.delay(tries, retry_after, backoff::chance())).await;
            }
        };
        let fetched = tokio::time::timeout_at(deadline, fetching).await;
        fetched.unwrap_or(Answer::Linkless { checkout_id })
    }

    /// Turns an answer into what is written down.
    async fn judge(
        &self,
        ask: &Ask,
        lease: Lease,
        answer: Answer,
        Called { asked, is_probe, why }: Called,
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
                let next = self.again(ask, without_this_call(lease), None, why, &reason);
                (Attempt::Free, next)
            }
            Answer::Unknown { reason, retry_after, overloaded } => {
                if let Some(delay) = retry_after.filter(|_| overloaded) {
                    self.pacer.quiet(backoff::clamp_retry_after(delay));
                }
                if self.rules.on_unknown == OnUnknown::Park {
                    // The ledger parks it: nothing of the retry budget is its.
                    let attempt = Attempt::Ambiguous { checkout_id: None, reason };
                    return (attempt, self.at_once());
                }
                // Not made for this job's sake, and so no attempt of it.
                if is_probe {
                    let next = self.again(ask, without_this_call(lease), retry_after, why, &reason);
                    return (Attempt::Probed { reason }, next);
                }
                let next = self.again(ask, lease, retry_after, why, &reason);
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
                let text = "Creem said 429, too many requests";
                let next = self.again(ask, without_this_call(lease), retry_after, why, text);
                (Attempt::Free, next)
            }
            Answer::KeyRefused(problem) => self.key_refused(problem, asked).await,
        }
    }

    fn at_once(&self) -> Next {
        Next::Wait { until: self.clock.now(), uncounted: 0 }
    }

    /// A refused key is not this job's fault, unless the key is fine. `asked` is when the call began
    /// that met the refusal: one check that began after it speaks for every such job.
    async fn key_refused(&self, problem: Problem, asked: Instant) -> (Attempt, Next) {
        let wait = (Attempt::GivenBack, self.at_once());
        let rejected = (Attempt::Counted, Next::End(Ending::Rejected(problem)));
        let mut accepted_at = self.key_accepted_at.lock().await;
        if accepted_at.is_some_and(|accepted_at| accepted_at > asked) {
            return rejected;
        }
        if !self.gate.close(Reason::Key) {
            return wait;
        }
        let checked = Instant::now();
        match self.creem.check_key().await {
            KeyCheck::Accepted => {
                *accepted_at = Some(checked);
                self.gate.open(Reason::Key);
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

    /// A bug was met under a lease: a session may exist that must be counted.
    pub(super) async fn panicked(&self, ask: &Ask, lease: Lease) -> Step {
        let reason = "the worker met a bug while it handled the call".to_owned();
        let ending = Ending::Unresolved(Problem::new("worker_panicked", reason.clone()));
        let attempt = Attempt::Ambiguous { checkout_id: None, reason };
        match self.settle(ask, lease, attempt, Next::End(ending), NOT_SENT).await {
            Step::WaitUntil(..) | Step::NotDue(_) => Step::Verdict(Verdict::Panicked),
            verdict @ Step::Verdict(_) => verdict,
        }
    }
}

/// A call that was answered.
struct Called {
    /// When it began.
    asked: Instant,
    /// Whether it was made to see whether Creem is back.
    is_probe: bool,
    /// What the job then waits for, in a word.
    why: &'static str,
}

/// The same lease, where this call is no attempt of the job's.
const fn without_this_call(lease: Lease) -> Lease {
    Lease { free: lease.free + 1, ..lease }
}

/// What a job waits for after such an answer, in a word for the log and the metrics.
const fn waits_for(answer: &Answer) -> &'static str {
    match answer {
        Answer::NotMade { .. } => "creem_unreachable",
        Answer::Unknown { .. } => "outcome_unknown",
        Answer::Throttled { .. } => "throttled",
        Answer::KeyRefused(_) => "key_refused",
        // Such a job is at its end.
        Answer::Made(_)
        | Answer::Linkless { .. }
        | Answer::Refused(_)
        | Answer::Duplicate(_)
        | Answer::Mismatch { .. } => "nothing",
    }
}
