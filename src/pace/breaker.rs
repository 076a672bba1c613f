//! When Creem is down: no calls but one now and then that shows whether it is back.
//!
//! Pure: time and chance come in as arguments. What counts as a failure is the caller's to say; being
//! asked to slow down is none, and neither is the refusal of a single job.

use std::time::Duration;

use tokio::time::Instant;

/// Fewest calls that an outage is judged by.
pub const FEWEST: u32 = 100;
/// How many buckets are kept: a minute of calls.
const BUCKETS: usize = 60;
/// How long calls are counted in one bucket.
const BUCKET: Duration = Duration::from_secs(1);
/// The first pause; it doubles with each probe that fails.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// The longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

#[derive(Debug, Clone, Copy, Default)]
struct Bucket {
    calls: u32,
    failures: u32,
}

/// What calls have come to of late, and whether any are made.
#[derive(Debug, Clone)]
pub struct Breaker {
    /// The newest first.
    buckets: [Bucket; BUCKETS],
    newest_at: Instant,
    open: Option<Open>,
}

#[derive(Debug, Clone, Copy)]
struct Open {
    since: Instant,
    probes: u32,
}

/// What a call's outcome leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// Nothing.
    Same,
    /// It opens, or stays open: no call for so long, then one.
    Pause(Duration),
    /// Creem is back.
    Closed,
}

impl Breaker {
    /// A closed one, which knows of no call.
    #[must_use]
    pub fn new(now: Instant) -> Self {
        Self { buckets: [Bucket::default(); BUCKETS], newest_at: now, open: None }
    }

    /// For how long it has been open, if it is.
    #[must_use]
    pub fn open_for(&self, now: Instant) -> Option<Duration> {
        self.open.map(|open| now.saturating_duration_since(open.since))
    }

    /// Takes note of a call's outcome. `chance`, in `0.0..1.0`, spreads the probes of many workers.
    pub fn note(&mut self, failed: bool, now: Instant, chance: f64) -> Change {
        self.turn(now);
        self.buckets[0].calls = self.buckets[0].calls.saturating_add(1);
        self.buckets[0].failures = self.buckets[0].failures.saturating_add(u32::from(failed));
        // Calls that were under way when it opened say nothing new; a probe has a note of its own.
        if self.open.is_some() || !self.is_outage() {
            return Change::Same;
        }
        self.open = Some(Open { since: now, probes: 0 });
        Change::Pause(pause(0, chance))
    }

    /// Takes note of the outcome of the one call that was made while it was open.
    pub fn note_probe(&mut self, failed: bool, now: Instant, chance: f64) -> Change {
        let Some(open) = &mut self.open else { return Change::Same };
        if failed {
            open.probes = open.probes.saturating_add(1);
            return Change::Pause(pause(open.probes, chance));
        }
        *self = Self::new(now);
        Change::Closed
    }

    /// Whether at least half of the last calls failed, of which there are enough.
    fn is_outage(&self) -> bool {
        let (mut calls, mut failures) = (0_u32, 0_u32);
        for bucket in &self.buckets {
            calls = calls.saturating_add(bucket.calls);
            failures = failures.saturating_add(bucket.failures);
            if calls >= FEWEST {
                return failures.saturating_mul(2) >= calls;
            }
        }
        false
    }

    fn turn(&mut self, now: Instant) {
        for _ in 0..=BUCKETS {
            if now < self.newest_at + BUCKET {
                return;
            }
            self.newest_at += BUCKET;
            self.buckets.rotate_right(1);
            self.buckets[0] = Bucket::default();
        }
        // Everything is older than that.
        self.newest_at = now;
    }
}

/// Between half of the pause and the whole.
fn pause(probes: u32, chance: f64) -> Duration {
    let chance = if chance.is_finite() { chance.clamp(0.0, 1.0) } else { 1.0 };
    let whole = FIRST_PAUSE.saturating_mul(1 << probes.min(8)).min(LONGEST_PAUSE);
    whole.mul_f64(0.5 + chance / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MILLI: Duration = Duration::from_millis(1);

    fn calls(
        breaker: &mut Breaker,
        now: &mut Instant,
        outcomes: &[bool],
        every: Duration,
    ) -> Change {
        let mut change = Change::Same;
        for failed in outcomes {
            *now += every;
            change = breaker.note(*failed, *now, 1.0);
            if change != Change::Same {
                break;
            }
        }
        change
    }

    #[test]
    fn half_of_a_hundred_calls_open_it_and_fewer_do_not() {
        let mut now = Instant::now();
        let mut breaker = Breaker::new(now);
        assert_eq!(calls(&mut breaker, &mut now, &[true; 99], MILLI), Change::Same);
        assert_eq!(calls(&mut breaker, &mut now, &[true], MILLI), Change::Pause(FIRST_PAUSE));
        assert_eq!(breaker.open_for(now + MILLI), Some(MILLI));

        let mut breaker = Breaker::new(now);
        let mixed: Vec<bool> = (0..1_000).map(|call| call * 49 % 100 < 49).collect();
        assert_eq!(calls(&mut breaker, &mut now, &mixed, MILLI * 10), Change::Same);
    }

    #[test]
    fn calls_of_long_ago_do_not_count() {
        let mut now = Instant::now();
        let mut breaker = Breaker::new(now);
        assert_eq!(calls(&mut breaker, &mut now, &[true; 90], MILLI), Change::Same);
        now += Duration::from_secs(61);
        assert_eq!(calls(&mut breaker, &mut now, &[true; 90], MILLI), Change::Same);
        now += Duration::from_secs(3_600);
        assert_eq!(calls(&mut breaker, &mut now, &[true; 99], MILLI), Change::Same);
        // A slow stream is judged by what there is within a minute.
        let every = Duration::from_millis(500);
        let opened = calls(&mut breaker, &mut now, &[true; 200], every);
        assert!(matches!(opened, Change::Pause(_)));
    }

    #[test]
    fn probes_come_less_and_less_often_and_one_success_closes_it() {
        let mut now = Instant::now();
        let mut breaker = Breaker::new(now);
        calls(&mut breaker, &mut now, &[true; 100], MILLI);
        let pauses: Vec<Change> = (0..5).map(|_| breaker.note_probe(true, now, 1.0)).collect();
        let seconds = [2, 4, 5, 5, 5].map(|seconds| Change::Pause(Duration::from_secs(seconds)));
        assert_eq!(pauses, seconds);
        // Those that were still under way change nothing.
        assert_eq!(breaker.note(false, now, 1.0), Change::Same);
        assert_eq!(breaker.note_probe(false, now, 1.0), Change::Closed);
        assert_eq!(breaker.open_for(now), None);
        // And what was before is forgotten.
        assert_eq!(calls(&mut breaker, &mut now, &[true; 99], MILLI), Change::Same);
    }

    proptest! {
        #[test]
        fn it_opens_only_in_an_outage(outcomes in proptest::collection::vec((any::<bool>(), 0_u32..3_000), 0..400)) {
            let mut now = Instant::now();
            let mut breaker = Breaker::new(now);
            let mut seen: Vec<(Instant, bool)> = Vec::new();
            for (failed, millis) in outcomes {
                now += MILLI * millis;
                seen.push((now, failed));
                let change = breaker.note(failed, now, 0.5);
                if let Change::Pause(_) = change {
                    let recent = seen.iter().rev().take_while(|(at, _)| *at + Duration::from_secs(62) > now);
                    let recent: Vec<bool> = recent.map(|(_, failed)| *failed).collect();
                    prop_assert!(recent.len() >= 100);
                    prop_assert!(recent.iter().filter(|failed| **failed).count() >= 50);
                    return Ok(());
                }
            }
        }
    }
}
