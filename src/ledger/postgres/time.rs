//! The database's clock, as this process knows it between two answers.

use std::sync::atomic::{AtomicI64, Ordering};

use tokio::time::Instant;

use crate::clock::{Clock, Millis, as_millis};

/// Follows the database's clock: every answer carries its time, and between two answers this
/// process's monotonic clock goes on from there. So all workers of one ledger agree on leases and
/// deadlines to within half a round trip, whatever their own wall clocks say.
#[derive(Debug)]
pub struct DatabaseClock {
    base: Instant,
    /// The database's time at `base`.
    at_base: AtomicI64,
}

impl DatabaseClock {
    /// A clock that has heard the database's time once.
    #[must_use]
    pub fn new(heard: Millis, asked: Instant) -> Self {
        let clock = Self { base: asked, at_base: AtomicI64::new(0) };
        clock.hear(heard, asked);
        clock
    }

    /// Takes note of the time in an answer to a question that was asked at `asked`.
    pub fn hear(&self, heard: Millis, asked: Instant) {
        // Somewhere between question and answer; the middle is wrong by half of that at most.
        let since = asked.duration_since(self.base) + asked.elapsed() / 2;
        self.at_base.store(heard - as_millis(since), Ordering::Relaxed);
    }
}

impl Clock for DatabaseClock {
    fn now(&self) -> Millis {
        self.at_base.load(Ordering::Relaxed) + as_millis(self.base.elapsed())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[tokio::test(start_paused = true)]
    async fn the_clock_goes_on_from_the_middle_of_the_last_answer() {
        let asked = Instant::now();
        tokio::time::advance(Duration::from_millis(10)).await;
        let clock = DatabaseClock::new(1_000_000, asked);
        assert_eq!(clock.now(), 1_000_005);
        tokio::time::advance(Duration::from_secs(2)).await;
        assert_eq!(clock.now(), 1_002_005);
        let asked = Instant::now();
        clock.hear(5_000, asked);
        assert_eq!(clock.now(), 5_000, "the database's word wins, backwards too");
    }
}
