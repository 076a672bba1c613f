//! How many calls may be retries: a tenth of all, so that an outage is not answered with a flood.
//!
//! Whoever finds the budget spent waits longer; nothing fails for it. Each lane has one half, and is given what
//! the other one does not need: a buyer's retry never stands behind those of a campaign.

use std::time::Duration;

use tokio::time::Instant;

use crate::job::Lane;

/// Retries a second that are always allowed: where there are few calls, a tenth of them is nothing.
const FLOOR: u32 = 10;
/// Each lane's half of them.
const FLOOR_PER_LANE: f64 = FLOOR as f64 / 2.0;
/// Retries per call.
const PER_CALL: f64 = 0.1;
/// What is saved up at least, in retries: one period's floor and as much again. Where there are many calls, one
/// period's share.
const SAVED: f64 = 2.0 * FLOOR as f64;
/// Longest wait for a retry, however many wait: the ledger takes a much longer one for a clock's error.
const LONGEST: Duration = Duration::from_mins(20);
/// How often the floor is given.
const PERIOD: Duration = Duration::from_secs(1);
/// Calls in a period whose share the floor covers.
const COVERED: u32 = 10 * FLOOR;

/// The retries that are left.
///
/// Two accounts of the same retries. `unpromised` pays when a retry is put off: how far it is below zero says how long the
/// wait is. `unspent` pays when the retry is made. They differ, as a promise is a forecast: the calls that were to earn
/// the retry may never be made, and who would have to wait too long is promised none.
#[derive(Debug, Clone)]
pub struct RetryBudget {
    unpromised: Shares,
    unspent: Shares,
    period_began: Instant,
    calls: u32,
    /// In the period before.
    calls_before: u32,
}

impl RetryBudget {
    /// A budget of one period's floor.
    #[must_use]
    pub fn new(now: Instant) -> Self {
        let floor = Shares([FLOOR_PER_LANE; 2]);
        Self { unpromised: floor, unspent: floor, period_began: now, calls: 0, calls_before: 0 }
    }

    /// A call was made.
    pub fn deposit(&mut self, now: Instant) {
        self.roll(now);
        self.calls = self.calls.saturating_add(1);
        if self.calls > COVERED {
            self.earn(PER_CALL);
        }
    }

    /// Says how long a retry has to wait, 20 minutes at most, and promises it one of those that are earned until then;
    /// none where that is longer than `most`.
    #[must_use]
    pub fn promise(&mut self, lane: Lane, most: Duration, now: Instant) -> Option<Duration> {
        self.roll(now);
        let per_second = self.per_second(lane);
        let left = self.unpromised.of(lane);
        let wait = Duration::from_secs_f64((1.0 - *left).max(0.0) / per_second);
        if wait.min(LONGEST) > most {
            return None;
        }
        if wait > LONGEST {
            // That many wait already. It asks again when it has waited.
            return Some(LONGEST);
        }
        *left -= 1.0;
        Some(wait)
    }

    /// Takes a retry that is made now; says whether there was one.
    #[must_use]
    pub fn spend(&mut self, lane: Lane, now: Instant) -> bool {
        self.roll(now);
        // The floor is given once a period, and waits end within it.
        let early = self.per_second(lane) * PERIOD.as_secs_f64();
        let left = self.unspent.of(lane);
        let may = *left + early >= 1.0;
        if may {
            *left -= 1.0;
        }
        may
    }

    /// What a lane earns a second, lately: its half, and the other one's where that has all that it may save.
    fn per_second(&self, lane: Lane) -> f64 {
        let above = f64::from(self.calls_before.saturating_sub(COVERED));
        let half = FLOOR_PER_LANE + above * PER_CALL / 2.0;
        if self.unpromised.of_other(lane) >= self.most() { 2.0 * half } else { half }
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
        let most = self.most();
        self.unpromised.earn(retries, most);
        self.unspent.earn(retries, most);
    }

    /// How much a lane may save.
    fn most(&self) -> f64 {
        SAVED.max(f64::from(self.calls.max(self.calls_before)) * PER_CALL) / 2.0
    }
}

/// What each lane has.
#[derive(Debug, Clone, Copy)]
struct Shares([f64; 2]);

impl Shares {
    /// What a lane can take from. A buyer's comes first, and may have of bulk's what it lacks.
    fn of(&mut self, lane: Lane) -> &mut f64 {
        let [interactive, bulk] = &mut self.0;
        let lent = bulk.min(1.0 - *interactive);
        match lane {
            Lane::Interactive => {
                if lent > 0.0 {
                    *interactive += lent;
                    *bulk -= lent;
                }
                interactive
            }
            Lane::Bulk => bulk,
        }
    }

    const fn of_other(&self, lane: Lane) -> f64 {
        match lane {
            Lane::Interactive => self.0[1],
            Lane::Bulk => self.0[0],
        }
    }

    /// Gives each lane one half, and what the other one may not save.
    fn earn(&mut self, retries: f64, most: f64) {
        let (mut unused, mut room) = (0.0, [0.0; 2]);
        for (left, room) in self.0.iter_mut().zip(&mut room) {
            let earned = (retries / 2.0).min((most - *left).max(0.0));
            *left += earned;
            unused += retries / 2.0 - earned;
            *room = (most - *left).max(0.0);
        }
        for (left, room) in self.0.iter_mut().zip(room) {
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
        budget.promise(lane, Duration::MAX, now).expect("any wait will do")
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
                while budget.promise(lane, Duration::ZERO, now).is_some() {
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
        while budget.promise(Lane::Bulk, Duration::ZERO, now).is_some() {}
        for _ in 0..100 {
            assert_eq!(budget.promise(Lane::Bulk, Duration::from_millis(100), now), None);
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
            while budget.promise(Lane::Interactive, Duration::ZERO, at).is_some() {
                free += 1;
            }
        }
        assert!((5_900..=6_100).contains(&free), "{free} of 60,000");
    }

    #[test]
    fn what_many_calls_earn_is_promised_as_soon() {
        let start = Instant::now();
        let mut budget = RetryBudget::new(start);
        for _ in 0..400 {
            budget.deposit(start);
        }
        let now = start + PERIOD;
        let longest = (0..1_000).map(|_| take(&mut budget, Lane::Bulk, now)).max().unwrap();
        // Ten a second, and a tenth of 300 calls more; nobody else needs any.
        assert!((23..=26).contains(&longest.as_secs()), "{longest:?}");
    }

    /// Retries that wait, by when they are due.
    type Due = std::collections::BTreeMap<(Instant, u64), Lane>;

    /// Makes those that are due, at most so many; how many were made.
    fn retry(budget: &mut RetryBudget, due: &mut Due, most: u32, now: Instant) -> u32 {
        let mut made = 0;
        while made < most
            && let Some(first) = due.first_entry().filter(|first| first.key().0 <= now)
        {
            let ((_, number), lane) = first.remove_entry();
            if budget.spend(lane, now) {
                made += 1;
            } else {
                let wait = take(budget, lane, now).max(PERIOD);
                due.insert((now + wait, number), lane);
            }
        }
        made
    }

    #[test]
    fn a_part_of_calls_that_always_fails_is_retried_within_a_tenth_for_ever() {
        let start = Instant::now();
        let mut budget = RetryBudget::new(start);
        let (mut due, mut number) = (Due::new(), 0);
        for window in 0..24_u64 {
            let (mut calls, mut retries) = (0_u32, 0_u32);
            for step in 0..30_000 {
                let now = start + Duration::from_millis(10 * (30_000 * window + step));
                // Retries first; 400 calls a second in all, of which two in five fail.
                let made = retry(&mut budget, &mut due, 4, now);
                (calls, retries) = (calls + 4, retries + made);
                for _ in 0..4 {
                    budget.deposit(now);
                    number += 1;
                    if number % 5 < 2 {
                        let wait = take(&mut budget, Lane::Bulk, now);
                        due.insert((now + wait, number), Lane::Bulk);
                    }
                }
            }
            let part = f64::from(retries) / f64::from(calls);
            // A tenth beyond the floor, which covers 100 of the 400 calls a second.
            assert!((0.08..=0.105).contains(&part), "5 minutes, {window}: {part}");
        }
    }

    proptest! {
        #[test]
        fn retries_stay_within_a_tenth_or_the_floor(steps in proptest::collection::vec((0_u32..2_000, 0_u32..500, 0_u32..50, 0_u32..50), 1..100)) {
            let start = Instant::now();
            let (mut now, mut calls, mut made, mut due, mut number) = (start, 0_u32, 0, Due::new(), 0);
            let mut budget = RetryBudget::new(now);
            for (millis, others, interactive, bulk) in steps {
                now += Duration::from_millis(millis.into());
                let retries = retry(&mut budget, &mut due, u32::MAX, now);
                for _ in 0..others + retries {
                    budget.deposit(now);
                }
                (calls, made) = (calls + others + retries, made + retries);
                for (lane, retries) in [(Lane::Interactive, interactive), (Lane::Bulk, bulk)] {
                    for _ in 0..retries {
                        number += 1;
                        due.insert((now + take(&mut budget, lane, now), number), lane);
                    }
                }
                let seconds = now.duration_since(start).as_secs_f64();
                let earned = f64::from(calls) * PER_CALL + seconds * f64::from(FLOOR);
                // Beyond it what was there at first, and what may be spent early.
                let early = f64::from(budget.calls.max(budget.calls_before)).mul_add(PER_CALL, f64::from(FLOOR));
                prop_assert!(f64::from(made) <= earned + f64::from(FLOOR) + 2.0 * early, "{made}, {earned}");
            }
        }
    }
}
