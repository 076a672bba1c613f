//! How fast Creem may be asked: a ceiling on calls a second, and silence where Creem asked for it.
//!
//! The pacer is told only *pressure*, never an HTTP error: it must not know whom it paces.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// Gives out the right to make calls.
#[derive(Debug)]
pub struct Pacer {
    /// Time between two calls at the ceiling; zero without one.
    interval: Duration,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// When the next call may be made at the earliest.
    next: Instant,
    /// Until when nobody may call at all.
    quiet_until: Instant,
}

impl Pacer {
    /// A pacer with a ceiling in calls a second, or without one.
    #[must_use]
    pub fn new(per_second: Option<f64>) -> Self {
        let now = Instant::now();
        let interval =
            per_second.map_or(Duration::ZERO, |rate| Duration::from_secs_f64(1.0 / rate));
        Self { interval, state: Mutex::new(State { next: now, quiet_until: now }) }
    }

    /// Waits for the right to make one call.
    ///
    /// Calls are spaced evenly, so that no second ever holds more than the ceiling; a caller that
    /// gives up while it waits has taken nothing.
    pub async fn admit(&self) {
        loop {
            let at = {
                let mut state = self.locked();
                let now = Instant::now();
                let at = state.quiet_until.max(state.next);
                if at <= now {
                    state.next = state.next.max(now.checked_sub(self.interval).unwrap_or(now))
                        + self.interval;
                    return;
                }
                at
            };
            tokio::time::sleep_until(at).await;
        }
    }

    /// Creem asked for silence: nobody calls until it is over.
    pub fn quiet(&self, duration: Duration) {
        let mut state = self.locked();
        state.quiet_until = state.quiet_until.max(Instant::now() + duration);
    }

    fn locked(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt as _;

    #[tokio::test(start_paused = true)]
    async fn no_second_holds_more_calls_than_the_ceiling() {
        let pacer = Pacer::new(Some(10.0));
        let started = Instant::now();
        let mut calls = Vec::new();
        for _ in 0..50 {
            pacer.admit().await;
            calls.push(started.elapsed());
        }
        for (index, call) in calls.iter().enumerate() {
            let within = calls[index..]
                .iter()
                .filter(|later| (**later).checked_sub(*call).unwrap() < Duration::from_secs(1))
                .count();
            assert!(within <= 11, "{within} calls in the second after {call:?}");
        }
        assert!(started.elapsed() <= Duration::from_secs(5));
    }

    #[tokio::test(start_paused = true)]
    async fn silence_holds_for_everybody() {
        let pacer = Pacer::new(None);
        pacer.quiet(Duration::from_secs(3));
        assert!(pacer.admit().now_or_never().is_none());
        let started = Instant::now();
        pacer.admit().await;
        assert!(started.elapsed() >= Duration::from_secs(3));
    }
}
