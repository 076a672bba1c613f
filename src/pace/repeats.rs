//! How many calls may be repeats: a tenth of all, so that an outage is not answered with a flood.
//!
//! Who finds the budget spent waits longer; nothing fails for it.

use std::time::Duration;

use tokio::time::Instant;

/// Repeats a second that are always allowed: where there are few calls, a tenth of them is nothing.
const FLOOR: u32 = 10;
/// Repeats per call.
const SHARE: f64 = 0.1;
/// What is saved up at least, in repeats: one period's floor and as much again. Where there are many calls, one
/// period's share.
const SAVED: f64 = 2.0 * FLOOR as f64;
/// Longest wait for a repeat, however many wait: above it the ledger takes a row's time for a clock's error, and
/// lets all of them go at once.
const LONGEST: Duration = Duration::from_mins(20);
/// How often the floor is given.
const PERIOD: Duration = Duration::from_secs(1);
/// Calls in a period whose share the floor covers.
const COVERED: u32 = 10 * FLOOR;

/// The repeats that are left; below zero, how many wait.
#[derive(Debug, Clone)]
pub struct RetryBudget {
    left: f64,
    period_began: Instant,
    calls: u32,
    /// In the period before.
    calls_before: u32,
}

impl RetryBudget {
    /// A budget of one period's floor.
    #[must_use]
    pub fn new(now: Instant) -> Self {
        Self { left: f64::from(FLOOR), period_began: now, calls: 0, calls_before: 0 }
    }

    /// A call was made.
    pub fn call(&mut self, now: Instant) {
        self.turn(now);
        self.calls = self.calls.saturating_add(1);
        if self.calls > COVERED {
            self.earn(SHARE);
        }
    }

    /// Takes a repeat, and says how long it has to wait for it.
    #[must_use]
    pub fn take(&mut self, now: Instant) -> Duration {
        self.turn(now);
        self.left -= 1.0;
        Duration::from_secs_f64((-self.left).max(0.0) / f64::from(FLOOR)).min(LONGEST)
    }

    fn turn(&mut self, now: Instant) {
        let periods = now.saturating_duration_since(self.period_began).as_secs();
        if periods == 0 {
            return;
        }
        self.period_began += PERIOD * u32::try_from(periods).unwrap_or(u32::MAX);
        self.calls_before = if periods == 1 { self.calls } else { 0 };
        self.calls = 0;
        self.earn(f64::from(FLOOR) * f64::from(u32::try_from(periods).unwrap_or(u32::MAX)));
    }

    fn earn(&mut self, repeats: f64) {
        // Those that wait are served first; what is left over is not saved without end.
        let most = SAVED.max(f64::from(self.calls.max(self.calls_before)) * SHARE);
        self.left = (self.left + repeats).min(most.max(self.left));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn who_finds_it_spent_waits_in_turn() {
        let now = Instant::now();
        let mut budget = RetryBudget::new(now);
        for _ in 0..10 {
            assert_eq!(budget.take(now), Duration::ZERO);
        }
        assert_eq!(budget.take(now), Duration::from_millis(100));
        assert_eq!(budget.take(now), Duration::from_millis(200));
        let later = now + Duration::from_secs(2);
        assert_eq!(budget.take(later), Duration::ZERO);
    }

    #[test]
    fn no_wait_is_so_long_that_the_ledger_would_not_believe_it() {
        let now = Instant::now();
        let mut budget = RetryBudget::new(now);
        let longest = (0..100_000).map(|_| budget.take(now)).max();
        // The ledger's `LONGEST_WAIT`.
        assert!(longest.is_some_and(|longest| longest < Duration::from_mins(40)), "{longest:?}");
    }

    #[test]
    fn many_calls_earn_a_tenth() {
        let now = Instant::now();
        let mut budget = RetryBudget::new(now);
        let mut free = 0;
        for second in 0..60 {
            let at = now + Duration::from_secs(second);
            for _ in 0..1_000 {
                budget.call(at);
            }
            while budget.left >= 1.0 {
                assert_eq!(budget.take(at), Duration::ZERO);
                free += 1;
            }
        }
        assert!((5_900..=6_100).contains(&free), "{free} of 60,000");
    }

    proptest! {
        #[test]
        fn repeats_stay_within_a_tenth_or_the_floor(steps in proptest::collection::vec((0_u32..2_000, 0_u32..50, 0_u32..50), 1..100)) {
            let start = Instant::now();
            let (mut now, mut calls, mut due) = (start, 0_u32, Vec::new());
            let mut budget = RetryBudget::new(now);
            for (millis, made, repeats) in steps {
                now += Duration::from_millis(millis.into());
                for _ in 0..made {
                    budget.call(now);
                }
                calls += made;
                for _ in 0..repeats {
                    due.push(now + budget.take(now));
                }
            }
            let end = due.iter().copied().max().unwrap_or(now).max(now);
            let seconds = end.duration_since(start).as_secs_f64();
            let allowed = f64::from(calls) * SHARE + (seconds + 2.0) * f64::from(FLOOR) + SAVED;
            prop_assert!(f64::from(u32::try_from(due.len()).unwrap()) <= allowed);
        }
    }
}
