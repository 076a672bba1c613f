//! The last attempt and the last minute, and whether a wait is spent in place or in a queue.

use std::time::Duration;

use super::Backoff;

/// Longest wait that is spent in place, holding the delivery and its permit. Longer ones go to
/// a delay queue, which survives this process and frees the slot.
pub const LONGEST_IN_PLACE: Duration = Duration::from_secs(2);

/// The retry policy of one lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// Most calls for one outcome, free ones apart.
    pub max_attempts: u32,
    /// How long a job is tried from its first pickup, pauses apart.
    pub max_elapsed: Duration,
    /// The delays.
    pub backoff: Backoff,
}

/// What a failed attempt leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Try again after this long.
    After(Duration),
    /// That was the last attempt.
    AttemptsExhausted,
    /// The next try would come after the last minute.
    TimeExhausted,
}

/// What is known of the attempts so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tried {
    /// Calls sent, this one included.
    pub attempts: u32,
    /// How many of them were free: Creem was not reached, or said "slow down". Those cost time, but no
    /// attempt.
    pub free: u32,
    /// Time since the first pickup that counts.
    pub elapsed: Duration,
}

impl Policy {
    /// Decides after a failed attempt.
    #[must_use]
    pub fn next(&self, tried: Tried, retry_after: Option<Duration>, chance: f64) -> Next {
        // Neither "slow down" nor a Creem that cannot be reached is a failure of the job.
        let counted = tried.attempts.saturating_sub(tried.free);
        if counted >= self.max_attempts {
            return Next::AttemptsExhausted;
        }
        let delay = self.backoff.delay(tried.attempts, retry_after, chance);
        if tried.elapsed.saturating_add(delay) >= self.max_elapsed {
            return Next::TimeExhausted;
        }
        Next::After(delay)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy() -> Policy {
        Policy {
            max_attempts: 3,
            max_elapsed: Duration::from_mins(1),
            backoff: Backoff::try_new(Duration::from_millis(250), Duration::from_mins(1)).unwrap(),
        }
    }

    fn tried(attempts: u32, free: u32, seconds: u64) -> Tried {
        Tried { attempts, free, elapsed: Duration::from_secs(seconds) }
    }

    #[test]
    fn the_last_attempt_is_the_last() {
        assert!(matches!(policy().next(tried(2, 0, 0), None, 0.5), Next::After(_)));
        assert_eq!(policy().next(tried(3, 0, 0), None, 0.5), Next::AttemptsExhausted);
    }

    #[test]
    fn being_throttled_costs_time_but_no_attempt() {
        assert!(matches!(policy().next(tried(9, 7, 0), None, 0.0), Next::After(_)));
        assert_eq!(policy().next(tried(9, 9, 60), None, 0.0), Next::TimeExhausted);
    }

    #[test]
    fn a_retry_after_beyond_the_last_minute_ends_the_job_at_once() {
        assert_eq!(
            policy().next(tried(1, 1, 50), Some(Duration::from_secs(20)), 0.0),
            Next::TimeExhausted
        );
    }
}
