//! How many calls may be retries: a tenth of all, so that an outage is not answered with a flood.
//!
//! Whoever finds the budget spent waits longer; nothing fails for it. Each lane has one half, and is given what
//! the other one does not need: a buyer's retry never stands behind those of a campaign.

use std::time::Duration;

use tokio::time::Instant;

use crate::job::Lane;

/// Retries a second that are always allowed: where there are few calls, a tenth of them is nothing.
const FLOOR: u32 = 10;
/// Retries per call.
const PER_CALL: f64 = 0.1;
/// What is saved up at least, in retries: one period's floor and as much again. Where there are many calls, one
/// period's share.
const SAVED: f64 = 2.0 * FLOOR as f64;
/// Longest wait for a retry, however many wait: above it the ledger takes a row's time for a clock's error, and
/// lets all of them go at once.
const LONGEST: Duration = Duration::from_mins(20);
/// How often the floor is given.
const PERIOD: Duration = Duration::from_secs(1);
/// Calls in a period whose share the floor covers.
const COVERED: u32 = 10 * FLOOR;

/// The retries that are left.
#[derive(Debug, Clone)]
pub struct RetryBudget {
    /// By lane; below zero, how many wait.
    left: [f64; 2],
    period_began: Instant,
    calls: u32,
    /// In the period before.
    calls_before: u32,
}

impl RetryBudget {
    /// A budget of one period's floor.
    #[must_use]
    pub fn new(now: Instant) -> Self {
        Self { left: [f64::from(FLOOR) / 2.0; 2], period_began: now, calls: 0, calls_before: 0 }
    }

    /// A call was made.
    pub fn deposit(&mut self, now: Instant) {
        self.roll(now);
        self.calls = self.calls.saturating_add(1);
        if self.calls > COVERED {
            self.earn(PER_CALL);
        }
    }

    /// Takes a retry, and says how long it has to wait for it; takes none where that is longer than `most`.
    #[must_use]
    pub fn withdraw(&mut self, lane: Lane, most: Duration, now: Instant) -> Option<Duration> {
        self.roll(now);
        let [interactive, bulk] = &mut self.left;
        // A buyer's comes first.
        let lent = bulk.min(1.0 - *interactive);
        if lane == Lane::Interactive && lent > 0.0 {
            *interactive += lent;
            *bulk -= lent;
        }
        let own = match lane {
            Lane::Interactive => interactive,
            Lane::Bulk => bulk,
        };
        let missing = (1.0 - *own).max(0.0);
        let wait = Duration::from_secs_f64(missing / (f64::from(FLOOR) / 2.0)).min(LONGEST);
        if wait > most {
            return None;
        }
        // A debt that no wait tells of is none.
        *own = (*own - 1.0).max(1.0 - LONGEST.as_secs_f64() * f64::from(FLOOR) / 2.0);
        Some(wait)
    }

    fn roll(&mut self, now: Instant) {
        let periods = now.saturating_duration_since(self.period_began).as_secs();
        if periods == 0 {
            return;
        }
        self.period_began += PERIOD * u32::try_from(periods).unwrap_or(u32::MAX);
        self.calls_before = if periods == 1 { self.calls } else { 0 };
        self.calls = 0;
        self.earn(f64::from(FLOOR) * f64::from(u32::try_from(periods).unwrap_or(u32::MAX)));
    }

    fn earn(&mut self, retries: f64) {
        // Those that wait are served first; what is left over is not saved without end.
        let most = SAVED.max(f64::from(self.calls.max(self.calls_before)) * PER_CALL) / 2.0;
        let (mut unused, mut room) = (0.0, [0.0; 2]);
        for (left, room) in self.left.iter_mut().zip(&mut room) {
            let earned = (retries / 2.0).min((most - *left).max(0.0));
            *left += earned;
            unused += retries / 2.0 - earned;
            *room = (most - *left).max(0.0);
        }
        for (left, room) in self.left.iter_mut().zip(room) {
            let lent = unused.min(room);
            *left += lent;
            unused -= lent;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn take(budget: &mut RetryBudget, lane: Lane, now: Instant) -> Duration {
        budget.withdraw(lane, Duration::MAX, now).expect("any wait will do")
    }

    #[test]
    fn who_finds_it_spent_waits_in_turn() {
        let now = Instant::now();
        let mut budget = RetryBudget::new(now);
        for _ in 0..10 {
            assert_eq!(take(&mut budget, Lane::Interactive, now), Duration::ZERO);
        }
        assert_eq!(take(&mut budget, Lane::Interactive, now), Duration::from_millis(200));
        assert_eq!(take(&mut budget, Lane::Interactive, now), Duration::from_millis(400));
        let later = now + Duration::from_secs(2);
        assert_eq!(take(&mut budget, Lane::Interactive, later), Duration::ZERO);
    }

    #[test]
    fn a_buyers_retry_never_stands_behind_a_campaigns() {
        let now = Instant::now();
        let mut budget = RetryBudget::new(now);
        let longest = (0..10_000).map(|_| take(&mut budget, Lane::Bulk, now)).max();
        assert_eq!(longest, Some(LONGEST));
        for second in 0..60 {
            let at = now + Duration::from_secs(second);
            for _ in 0..5 {
                assert_eq!(take(&mut budget, Lane::Interactive, at), Duration::ZERO, "{second}");
            }
        }
    }

    #[test]
    fn what_a_lane_does_not_need_the_other_one_has() {
        for lane in Lane::ALL {
            let start = Instant::now();
            let mut budget = RetryBudget::new(start);
            let mut free = 0;
            for second in 0..60 {
                let now = start + Duration::from_secs(second);
                while budget.withdraw(lane, Duration::ZERO, now).is_some() {
                    free += 1;
                }
            }
            assert!((560..=620).contains(&free), "{lane}: {free}");
        }
    }

    #[test]
    fn one_that_would_come_too_late_takes_nothing() {
        let now = Instant::now();
        let mut budget = RetryBudget::new(now);
        while budget.withdraw(Lane::Bulk, Duration::ZERO, now).is_some() {}
        for _ in 0..100 {
            assert_eq!(budget.withdraw(Lane::Bulk, Duration::from_millis(100), now), None);
        }
        assert_eq!(take(&mut budget, Lane::Bulk, now), Duration::from_millis(200));
    }

    #[test]
    fn no_wait_is_so_long_that_the_ledger_would_not_believe_it() {
        let now = Instant::now();
        let mut budget = RetryBudget::new(now);
        let longest = (0..100_000).map(|_| take(&mut budget, Lane::Interactive, now)).max();
        // The ledger's `LONGEST_WAIT`.
        assert!(longest.is_some_and(|longest| longest < Duration::from_mins(40)), "{longest:?}");
    }

    #[test]
    fn the_longest_wait_is_over_when_its_time_is() {
        let now = Instant::now();
        let mut budget = RetryBudget::new(now);
        for _ in 0..1_000_000 {
            take(&mut budget, Lane::Bulk, now);
        }
        let later = now + LONGEST + Duration::from_secs(2);
        assert_eq!(take(&mut budget, Lane::Bulk, later), Duration::ZERO);
    }

    #[test]
    fn many_calls_earn_a_tenth() {
        let now = Instant::now();
        let mut budget = RetryBudget::new(now);
        let mut free = 0;
        for second in 0..60 {
            let at = now + Duration::from_secs(second);
            for _ in 0..1_000 {
                budget.deposit(at);
            }
            while budget.withdraw(Lane::Interactive, Duration::ZERO, at).is_some() {
                free += 1;
            }
        }
        assert!((5_900..=6_100).contains(&free), "{free} of 60,000");
    }

    proptest! {
        #[test]
        fn retries_stay_within_a_tenth_or_the_floor(steps in proptest::collection::vec((0_u32..2_000, 0_u32..50, 0_u32..50, 0_u32..50), 1..100)) {
            let start = Instant::now();
            let (mut now, mut calls, mut due) = (start, 0_u32, Vec::new());
            let mut budget = RetryBudget::new(now);
            for (millis, made, interactive, bulk) in steps {
                now += Duration::from_millis(millis.into());
                for _ in 0..made {
                    budget.deposit(now);
                }
                calls += made;
                for (lane, retries) in [(Lane::Interactive, interactive), (Lane::Bulk, bulk)] {
                    for _ in 0..retries {
                        due.push(now + take(&mut budget, lane, now));
                    }
                }
            }
            let end = due.iter().copied().max().unwrap_or(now).max(now);
            let seconds = end.duration_since(start).as_secs_f64();
            let allowed = f64::from(calls) * PER_CALL + (seconds + 2.0) * f64::from(FLOOR) + SAVED;
            prop_assert!(f64::from(u32::try_from(due.len()).unwrap()) <= allowed);
        }
    }
}
