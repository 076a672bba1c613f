//! The delay before the next try: doubling, full jitter, bounds, and the server's own word.
//!
//! The schedule comes from the `backoff` crate. It is unmaintained (RUSTSEC-2025-0012), so it
//! stays behind this one file, and only its interval arithmetic is used: its jitter can exceed
//! the longest interval and its retry loop lets `Retry-After` run for ever, so both are ours.

use std::time::Duration;

use backoff::ExponentialBackoffBuilder;
use backoff::backoff::Backoff as _;

/// Longest wait that a server may ask for with `Retry-After`.
///
/// Creem publishes no figure; beyond this a value is more likely a mistake than a wish, and the
/// next answer can repeat it.
pub const LONGEST_RETRY_AFTER: Duration = Duration::from_mins(5);
/// Shortest wait after an answer that carried a `Retry-After`, even one of `0`.
pub const SHORTEST_RETRY_AFTER: Duration = Duration::from_secs(1);

/// A schedule of delays: at most `first`, doubling, at most `longest`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backoff {
    first: Duration,
    longest: Duration,
}

impl Backoff {
    /// Makes a schedule.
    ///
    /// # Errors
    /// A sentence, if `first` is zero or longer than `longest`.
    pub fn try_new(first: Duration, longest: Duration) -> Result<Self, &'static str> {
        if first.is_zero() {
            return Err("the first delay must be longer than zero");
        }
        if first > longest {
            return Err("the first delay must not be longer than the longest");
        }
        Ok(Self { first, longest })
    }

    /// The schedule for whatever must come back by itself: a broker, a ledger. Not the jobs' one: an
    /// operator who is patient with Creem still wants the worker back soon after an outage.
    #[must_use]
    pub const fn of_reconnects() -> Self {
        Self { first: Duration::from_millis(250), longest: Duration::from_secs(15) }
    }

    /// The longest delay before try `failures + 1`, without jitter; `failures` counts from 1.
    #[must_use]
    pub fn ceiling(&self, failures: u32) -> Duration {
        let mut schedule = ExponentialBackoffBuilder::new()
            .with_initial_interval(self.first)
            .with_max_interval(self.longest)
            .with_multiplier(2.0)
            .with_randomization_factor(0.0)
            .with_max_elapsed_time(None)
            .build();
        let mut ceiling = self.first;
        // The interval stops growing at `longest`, so more steps than its doublings change
        // nothing: 64 doublings of a nanosecond are already 584 years.
        for _ in 0..failures.clamp(1, 64) {
            ceiling = schedule.next_backoff().unwrap_or(self.longest);
        }
        ceiling.min(self.longest)
    }

    /// The delay before something is reached for again after `failures` failed tries: between half of the
    /// ceiling and the ceiling. A login that is refused must not be tried several times a second.
    #[must_use]
    pub fn reconnect(&self, failures: u32, chance: f64) -> Duration {
        self.ceiling(failures) / 2 + self.delay(failures, None, chance) / 2
    }

    /// The delay before the next try after `failures` failed ones.
    ///
    /// Full jitter: `chance`, in `0.0..1.0`, picks the point between nothing and the ceiling, so
    /// that jobs which failed together do not come back together. `retry_after`, where the
    /// server gave one, is the least that is waited; the jitter comes on top of it, at most
    /// `first`, for the same reason.
    #[must_use]
    pub fn delay(&self, failures: u32, retry_after: Option<Duration>, chance: f64) -> Duration {
        let chance = if chance.is_finite() { chance.clamp(0.0, 1.0) } else { 1.0 };
        match retry_after {
            Some(asked) => clamp_retry_after(asked) + self.first.mul_f64(chance),
            None => self.ceiling(failures).mul_f64(chance),
        }
    }
}

/// Brings a server's `Retry-After` into bounds.
#[must_use]
pub fn clamp_retry_after(asked: Duration) -> Duration {
    asked.clamp(SHORTEST_RETRY_AFTER, LONGEST_RETRY_AFTER)
}

/// A random number in `0.0..1.0` for jitter.
#[must_use]
pub fn chance() -> f64 {
    let mut bytes = [0_u8; 4];
    // Without randomness the middle is as good as any point; jitter is no secret.
    if getrandom::fill(&mut bytes).is_err() {
        return 0.5;
    }
    f64::from(u32::from_le_bytes(bytes)) / (f64::from(u32::MAX) + 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn schedule() -> Backoff {
        Backoff::try_new(Duration::from_millis(250), Duration::from_mins(1)).unwrap()
    }

    #[test]
    fn the_ceiling_doubles_up_to_the_longest() {
        let ceilings: Vec<u128> = (1..=10).map(|n| schedule().ceiling(n).as_millis()).collect();
        assert_eq!(ceilings, [250, 500, 1000, 2000, 4000, 8000, 16_000, 32_000, 60_000, 60_000]);
    }

    #[test]
    fn nothing_is_reached_for_again_at_once() {
        for failures in 1..20 {
            let ceiling = schedule().ceiling(failures);
            assert_eq!(schedule().reconnect(failures, 0.0), ceiling / 2);
            assert!(schedule().reconnect(failures, 0.999) <= ceiling);
        }
    }

    #[test]
    fn nonsense_is_refused() {
        assert!(Backoff::try_new(Duration::ZERO, Duration::from_secs(1)).is_err());
        assert!(Backoff::try_new(Duration::from_secs(2), Duration::from_secs(1)).is_err());
    }

    proptest! {
        #[test]
        fn a_delay_stays_within_its_ceiling(failures in 0_u32.., chance in 0.0_f64..1.0) {
            let delay = schedule().delay(failures, None, chance);
            prop_assert!(delay <= schedule().ceiling(failures));
            prop_assert!(delay <= Duration::from_mins(1));
        }

        #[test]
        fn retry_after_wins_and_is_clamped(seconds in 0_u64.., failures in 0_u32.., chance in 0.0_f64..1.0) {
            let delay = schedule().delay(failures, Some(Duration::from_secs(seconds)), chance);
            prop_assert!(delay >= Duration::from_secs(seconds.clamp(1, 300)));
            prop_assert!(delay <= Duration::from_millis(300_250));
        }
    }
}
