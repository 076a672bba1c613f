//! How long a call to Creem takes lately: one that has less time than that is not begun for a job whose deadline it
//! would miss, as it may make a session that nobody is given.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::pace::usual::Usual;

/// No call is thought to take less.
const SHORTEST: Duration = Duration::from_millis(100);
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
    usual: Usual,
    decayed_at: Instant,
}

impl CallTime {
    /// Nothing is known yet. No more than half of the time for a call is ever asked for.
    #[must_use]
    pub fn new(request_timeout: Duration) -> Self {
        let state = State { usual: Usual::default(), decayed_at: Instant::now() };
        Self { state: Mutex::new(state), longest: (request_timeout / 2).max(SHORTEST) }
    }

    /// A call took so long, or was given up after that.
    pub fn note(&self, took: Duration) {
        let now = Instant::now();
        let mut state = self.state();
        state.age(now);
        state.usual.note(took);
    }

    /// How much time a call should have.
    #[must_use]
    pub fn needed(&self) -> Duration {
        let mut state = self.state();
        state.age(Instant::now());
        state.usual.most().clamp(SHORTEST, self.longest)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn age(&mut self, now: Instant) {
        let idle = now.saturating_duration_since(self.decayed_at);
        self.usual.fade(0.5_f64.powf(idle.div_duration_f64(HALF_LIFE)));
        self.decayed_at = now;
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
