//! How fast Creem may be asked: a ceiling on calls a second, and silence where Creem asked for it.
//!
//! The pacer is told only *pressure*, never an HTTP error: it must not know whom it paces.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// How late a call may be for its place: timers are, by a millisecond or two. Places are that much
/// further apart in a second, so that a late call and the next one still keep the ceiling.
const SLACK: Duration = Duration::from_millis(20);

/// Gives out the right to make calls.
#[derive(Debug)]
pub struct Pacer {
    /// Between two places at the ceiling; zero without one.
    interval: Duration,
    /// The next place. Whoever waits for it holds the lock, so that one timer serves them all, and
    /// the others stand in line.
    next: tokio::sync::Mutex<Instant>,
    /// Until when nobody may call at all.
    quiet_until: Mutex<Instant>,
}

impl Pacer {
    /// A pacer with a ceiling in calls a second, or without one.
    #[must_use]
    pub fn new(per_second: Option<f64>) -> Self {
        let now = Instant::now();
        let second = Duration::from_secs(1) + SLACK;
        let interval = per_second
            .map_or(Duration::ZERO, |rate| Duration::from_secs_f64(second.as_secs_f64() / rate));
        Self { interval, next: tokio::sync::Mutex::new(now), quiet_until: Mutex::new(now) }
    }

    /// Waits for the right to make one call, first come, first served.
    ///
    /// Calls are spaced evenly, so that no second holds more than the ceiling (rounded up to whole
    /// calls), after an idle time neither. A caller that gives up while it waits has taken nothing.
    pub async fn admit(&self) {
        let mut next = self.next.lock().await;
        loop {
            let now = Instant::now();
            let at = (*next).max(*self.quiet_until());
            if at <= now {
                *next = (*next).max(now.checked_sub(SLACK).unwrap_or(now)) + self.interval;
                return;
            }
            tokio::time::sleep_until(at).await;
        }
    }

    /// Creem asked for silence: nobody calls until it is over.
    pub fn quiet(&self, duration: Duration) {
        let mut until = self.quiet_until();
        *until = (*until).max(Instant::now() + duration);
    }

    fn quiet_until(&self) -> MutexGuard<'_, Instant> {
        self.quiet_until.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt as _;

    /// The most calls that any second holds.
    fn most_in_a_second(calls: &[Duration]) -> usize {
        let within = |from: &Duration| {
            let later = calls.iter().filter(|call| *call >= from);
            later.filter(|call| call.saturating_sub(*from) < Duration::from_secs(1)).count()
        };
        calls.iter().map(within).max().unwrap_or(0)
    }

    #[tokio::test(start_paused = true)]
    async fn no_second_holds_more_calls_than_the_ceiling() {
        for (rate, most) in [(1.0, 1), (10.0, 10), (333.0, 333), (0.5, 1), (2.5, 3)] {
            let pacer = Pacer::new(Some(rate));
            let started = Instant::now();
            let mut calls = Vec::new();
            let count = if rate < 5.0 { 20 } else { 700 };
            for call in 0..count {
                // Idle for a while, then late again and again.
                if call == count / 2 {
                    tokio::time::advance(Duration::from_secs(60)).await;
                }
                if call % 3 == 0 {
                    tokio::time::advance(Duration::from_millis(7)).await;
                }
                pacer.admit().await;
                calls.push(started.elapsed());
            }
            assert!(most_in_a_second(&calls) <= most, "{rate}: {}", most_in_a_second(&calls));
            let busy = started.elapsed().checked_sub(Duration::from_secs(60)).unwrap();
            let least = f64::from(count - 2) / busy.as_secs_f64();
            assert!(least >= rate * 0.9, "{rate}: only {least} a second");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_gives_up_in_line_takes_nothing_and_those_behind_keep_their_places() {
        let pacer = Pacer::new(Some(1.0));
        pacer.admit().await;
        let started = Instant::now();
        let (first, second, third) = (pacer.admit(), pacer.admit(), pacer.admit());
        let given_up = async {
            drop(tokio::time::timeout(Duration::from_millis(500), second).await);
        };
        tokio::join!(first, given_up, third);
        assert!(started.elapsed() < Duration::from_millis(2_100), "{:?}", started.elapsed());
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
