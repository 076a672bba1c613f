//! How long a call to Creem takes lately: one that has less time than that is not begun for a job whose deadline it
//! would miss, as it may make a session that nobody is given.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// No call is thought to take less.
const SHORTEST: Duration = Duration::from_millis(100);
/// How much a new call counts.
const WEIGHT: f64 = 0.125;
/// Without calls, half of what was learned is forgotten in this time: if nobody calls because of it, it is tried again.
const HALF_LIFE: Duration = Duration::from_secs(15);

/// What was learned.
#[derive(Debug)]
pub struct CallTime {
    state: Mutex<State>,
    /// However slow Creem is, nothing longer is learned.
    longest: Duration,
}

#[derive(Debug)]
struct State {
    /// Seconds.
    mean: f64,
    /// Seconds by which calls differ from it.
    deviation: f64,
    noted_at: Instant,
}

impl CallTime {
    /// Nothing is known yet. No more than half of the time for a call is ever asked for.
    #[must_use]
    pub fn new(request_timeout: Duration) -> Self {
        let state = State { mean: 0.0, deviation: 0.0, noted_at: Instant::now() };
        Self { state: Mutex::new(state), longest: (request_timeout / 2).max(SHORTEST) }
    }

    /// A call took so long, or was given up after that.
    pub fn note(&self, took: Duration) {
        let now = Instant::now();
        let mut state = self.state();
        state.age(now);
        let off = took.as_secs_f64() - state.mean;
        state.mean += WEIGHT * off;
        state.deviation += WEIGHT * (off.abs() - state.deviation);
    }

    /// How much time a call should have.
    #[must_use]
    pub fn needed(&self) -> Duration {
        let mut state = self.state();
        state.age(Instant::now());
        let needed = Duration::from_secs_f64((state.mean + 2.0 * state.deviation).max(0.0));
        needed.clamp(SHORTEST, self.longest)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn age(&mut self, now: Instant) {
        let idle = now.saturating_duration_since(self.noted_at);
        let left = 0.5_f64.powf(idle.div_duration_f64(HALF_LIFE));
        self.mean *= left;
        self.deviation *= left;
        self.noted_at = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn it_learns_what_calls_need_and_forgets_it_where_none_is_made() {
        let time = CallTime::new(Duration::from_secs(10));
        assert_eq!(time.needed(), SHORTEST);
        for _ in 0..100 {
            time.note(Duration::from_millis(500));
        }
        let needed = time.needed();
        assert!((450..=600).contains(&needed.as_millis()), "{needed:?}");
        tokio::time::advance(Duration::from_mins(1)).await;
        assert_eq!(time.needed(), SHORTEST);
        for _ in 0..100 {
            time.note(Duration::from_secs(9));
        }
        assert_eq!(time.needed(), Duration::from_secs(5), "half of a call's time is always enough");
    }
}
