//! Whether a job is tried again, and when: its lane's policy, the retry budget, and the time that is left.

use std::time::Duration;

use super::Journey;
use crate::clock::{Millis, as_duration, as_millis};
use crate::job::{Ending, Problem};
use crate::ledger::{Lease, Next};
use crate::observe::metrics;
use crate::retry::policy::Tried;
use crate::retry::{backoff, policy};
use crate::worker::ask::Ask;

/// How long a retry that is not earned waits at least, so that it does not come again and again.
const UNEARNED: Duration = Duration::from_secs(1);

/// What a retry waits for; the longer one counts.
struct Waits {
    delay: Duration,
    budget: Duration,
}

impl Journey {
    /// Another try, or the end of trying.
    pub(super) fn again(
        &self,
        ask: &Ask,
        lease: Lease,
        retry_after: Option<Duration>,
        code: &'static str,
        reason: &str,
    ) -> Next {
        let tried = Tried {
            attempts: lease.attempt,
            free: lease.free,
            elapsed: self.gate.counted_since(lease.opened_at, &self.orders.pauses(ask.lane)),
        };
        let lane = &self.rules.of(ask.lane).policy;
        let failed = |code: &str, text: String| Next::End(Ending::Failed(Problem::new(code, text)));
        match lane.next(tried, retry_after, backoff::chance()) {
            policy::Next::After(delay) => match self.afford(ask, delay, retry_after) {
                Ok(waits) => {
                    metrics::retry(code);
                    let delay_ms = as_millis(waits.delay.max(waits.budget));
                    tracing::debug!(job.key = %ask.key, attempt = lease.attempt, error = reason, delay_ms, "asking again");
                    // Whoever finds the retry budget spent waits longer; nothing fails for it.
                    let uncounted = waits.budget.saturating_sub(waits.delay);
                    self.wait(ask, lease, waits.delay.max(waits.budget), uncounted)
                }
                Err(problem) => Next::End(Ending::Expired(problem)),
            },
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

    /// Waits for the retry budget, whatever was promised before.
    pub(super) fn retry_is_not_earned(&self, ask: &Ask, lease: Lease) -> Next {
        match self.afford(ask, UNEARNED, None) {
            Ok(waits) => {
                let wait = waits.delay.max(waits.budget);
                self.wait(ask, lease, wait, wait)
            }
            Err(problem) => Next::End(Ending::Expired(problem)),
        }
    }

    /// Waits, and does not count so much of it.
    fn wait(&self, ask: &Ask, lease: Lease, wait: Duration, uncounted: Duration) -> Next {
        let pauses = self.orders.pauses(ask.lane);
        let uncounted = self.gate.span_that_counts(lease.opened_at, as_millis(uncounted), &pauses);
        Next::Wait { until: self.clock.now() + as_millis(wait), uncounted }
    }

    /// What a retry has to wait for; nothing is taken from the retry budget for one that would come too late.
    fn afford(
        &self,
        ask: &Ask,
        delay: Duration,
        retry_after: Option<Duration>,
    ) -> Result<Waits, Problem> {
        let now = self.clock.now();
        // What Creem wants is not cut short.
        let delay =
            if retry_after.is_some() { delay } else { self.rules.affordable(ask, delay, now) };
        let needs = self.call_time.needed();
        if let Some(problem) = self.rules.in_vain(ask, now + as_millis(delay), needs) {
            return Err(problem);
        }
        let latest = self.rules.latest_call(ask, needs);
        let most = latest.map_or(Duration::MAX, |latest| as_duration(latest - now));
        if let Some(budget) = self.circuit.promise_retry(ask.lane, most) {
            return Ok(Waits { delay, budget });
        }
        let after = latest.map_or(Millis::MAX, |latest| latest.saturating_add(1));
        let text = "so many calls fail that another try would come too late";
        Err(self.rules.in_vain(ask, after, needs).unwrap_or(Problem::new("deadline_passed", text)))
    }
}
