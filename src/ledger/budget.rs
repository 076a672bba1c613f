//! The budget that all workers of a shared ledger keep together. Creem's two worlds have one each.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::future::BoxFuture;
use tokio::time::Instant;

use super::LedgerError;
use crate::job::Mode;

/// Places of the shared budget: points in time at which one call each may be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Places {
    /// When the first one is, as this worker's clock has it; where there is none, when there may be one.
    pub first: Instant,
    /// How many there are.
    pub count: u32,
    /// How far apart they are.
    pub interval: Duration,
    /// Whether there were others before them, or there are none: the rate holds calls up.
    pub waited: bool,
    /// For how long all workers are quiet.
    pub quiet: Duration,
}

/// A wish for places.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Wish {
    /// How many at most.
    pub count: u32,
    /// And how long they last together at most, if that is more than one of them does.
    pub lasting: Duration,
    /// How far apart at least, by one's own ceiling.
    pub least_interval: Duration,
    /// How far apart where nobody has learned yet how far they are to be.
    pub default_interval: Duration,
    /// How long the places may last of others that these overtake; whoever comes later is so much later.
    pub overtakes: Duration,
    /// None are given whose first lies further ahead: what is taken now cannot be given to somebody else, nor lie closer
    /// together when Creem takes more calls again. `None`: however far ahead it lies.
    pub horizon: Option<Duration>,
    /// They are for bulk, which gets them at the end of the line; once in so long beyond its horizon too: it is never
    /// starved.
    pub bulk_every: Option<Duration>,
}

/// What is known of Creem.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct News {
    /// For how long at least nobody may call, because Creem asked for that.
    pub quiet: Duration,
    /// For how long it is taken to be down, unless somebody says so again.
    pub down: Duration,
}

/// The rate that all have learned, as one of them has written it down.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Learned {
    /// They are numbered from 1; 0, and no text, where nobody has written one, as after a restore.
    pub version: i64,
    /// The rate; what it says is for those who share it, the ledger does not read it.
    pub text: String,
    /// How long ago.
    pub age: Duration,
}

/// A rate to be written down for all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Teaching<'a> {
    /// After which version; 0 where none is known.
    pub version: i64,
    /// The rate.
    pub text: &'a str,
    /// When it was so.
    pub at: Instant,
    /// How far apart places lie by it: whole microseconds, one at least.
    pub interval: Duration,
}

/// What became of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Taught {
    /// It was written down.
    Written,
    /// Another one was, before it.
    Other(Learned),
    /// Another one is being written down: it can be tried again.
    Busy,
}

/// What the workers of a shared ledger share besides jobs.
pub trait Budget: std::fmt::Debug + Send + Sync {
    /// Takes places from the budget of that world.
    ///
    /// # Errors
    /// See [`LedgerError`].
    fn lease_places(
        &self,
        mode: Mode,
        wish: Wish,
    ) -> BoxFuture<'static, Result<Places, LedgerError>>;

    /// Tells all workers what this one knows of Creem; what all of them know together, and have learned.
    ///
    /// # Errors
    /// See [`LedgerError`].
    fn share(
        &self,
        mode: Mode,
        news: News,
    ) -> BoxFuture<'static, Result<(News, Option<Learned>), LedgerError>>;

    /// Writes down a rate that was learned, unless another one was meanwhile.
    ///
    /// # Errors
    /// See [`LedgerError`].
    fn teach(
        &self,
        mode: Mode,
        teaching: Teaching<'_>,
    ) -> BoxFuture<'static, Result<Taught, LedgerError>>;
}

/// A reading that is surer than this needs no better one.
const SURE: Duration = Duration::from_millis(4);
/// How long an answer is good enough that no better one could be had: the way to that clock is long.
const SETTLED: Duration = Duration::from_mins(1);
/// How much less sure a reading becomes, per time that passes: two good clocks drift apart by less.
const DRIFT_PER_MILLION: u32 = 100;

/// Tells the points in time on the clock that keeps the budget by this worker's own.
///
/// What an answer says of that clock is wrong by up to half of its round trip, and workers that are
/// wrong in opposite ways would call in the same second. So the answer that came fastest is kept until
/// a better one comes, or until drift may have made it worse than the next.
#[derive(Debug, Default)]
pub struct Reckoning {
    best: Mutex<Best>,
}

#[derive(Debug, Default)]
struct Best {
    reading: Option<Reading>,
    /// When it was last tried to get a surer one.
    tried: Option<Instant>,
}

/// One answer: that clock showed `heard` microseconds at `at`, give or take `error`.
#[derive(Debug, Clone, Copy)]
struct Reading {
    heard: i64,
    at: Instant,
    error: Duration,
}

impl Reading {
    /// When that clock shows `micros`.
    fn instant(&self, micros: i64) -> Instant {
        let distance = micros.saturating_sub(self.heard);
        let duration = Duration::from_micros(distance.unsigned_abs());
        if distance < 0 {
            self.at.checked_sub(duration).unwrap_or(self.at)
        } else {
            self.at + duration
        }
    }

    fn error_at(&self, now: Instant) -> Duration {
        self.error + now.saturating_duration_since(self.at) * DRIFT_PER_MILLION / 1_000_000
    }
}

impl Reckoning {
    /// Takes note of what that clock showed in the answer to a question of `asked`.
    pub fn hear(&self, heard: i64, asked: Instant) {
        let (now, error) = (Instant::now(), asked.elapsed() / 2);
        let new = Reading { heard, at: asked + error, error };
        let mut best = self.best();
        if let Some(reading) = best.reading {
            let error = reading.error_at(now);
            let (one, other) = (reading.instant(heard), new.at);
            let apart = one.max(other).duration_since(one.min(other));
            if apart > error + new.error {
                // Further than both can be wrong: that clock was set, or is another one.
                best.tried = None;
            } else if error < new.error {
                return;
            }
        }
        best.reading = Some(new);
    }

    /// Whether that clock should be asked a few times in a row, before anything depends on what is
    /// known of it. Says so once in a while only.
    #[must_use]
    pub fn should_try(&self) -> bool {
        let mut best = self.best();
        let now = Instant::now();
        let sure = best.reading.is_some_and(|reading| reading.error_at(now) <= SURE);
        let settled = best.tried.is_some_and(|tried| now.duration_since(tried) < SETTLED);
        if !sure && !settled {
            best.tried = Some(now);
        }
        !sure && !settled
    }

    /// When that clock shows so many microseconds; `None` before it was ever heard.
    #[must_use]
    pub fn instant(&self, micros: i64) -> Option<Instant> {
        self.best().reading.map(|reading| reading.instant(micros))
    }

    /// How many microseconds it shows then; `None` before it was ever heard.
    #[must_use]
    pub fn micros(&self, at: Instant) -> Option<i64> {
        let reading = self.best().reading?;
        let before = micros(reading.at.saturating_duration_since(at));
        let after = micros(at.saturating_duration_since(reading.at));
        Some(reading.heard.saturating_add(after).saturating_sub(before))
    }

    fn best(&self) -> MutexGuard<'_, Best> {
        self.best.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::advance;

    const MILLI: Duration = Duration::from_millis(1);

    #[tokio::test(start_paused = true)]
    async fn the_fastest_answer_is_believed_until_another_may_be_better() {
        let started = Instant::now();
        let reckoning = Reckoning::default();
        assert_eq!((reckoning.instant(0), reckoning.micros(started)), (None, None));
        advance(MILLI * 2).await;
        // The clock showed 1 ms in the middle.
        reckoning.hear(1_000, started);
        assert_eq!(reckoning.instant(0), Some(started));

        for at in [started, started + MILLI, started + MILLI * 700] {
            let there = reckoning.micros(at).unwrap();
            assert_eq!(reckoning.instant(there), Some(at), "there and back");
        }

        // 100 ms there and 2 ms back: its middle is wrong by 49 ms.
        let asked = Instant::now();
        advance(MILLI * 102).await;
        reckoning.hear(102_000, asked);
        assert_eq!(reckoning.instant(0), Some(started));

        // After an hour the two clocks may have drifted by 360 ms.
        advance(Duration::from_secs(3_600)).await;
        let asked = Instant::now();
        advance(MILLI * 10).await;
        let middle = asked + MILLI * 5;
        reckoning.hear(7_000, asked);
        assert_eq!(reckoning.instant(7_000), Some(middle));
    }

    #[tokio::test(start_paused = true)]
    async fn a_clock_that_was_set_is_believed_at_once() {
        let started = Instant::now();
        let reckoning = Reckoning::default();
        advance(MILLI).await;
        reckoning.hear(5_000_000, started);
        advance(MILLI).await;
        let asked = Instant::now();
        advance(MILLI * 20).await;
        reckoning.hear(1_000_000, asked);
        assert_eq!(reckoning.instant(1_000_000), Some(asked + MILLI * 10));
    }

    #[tokio::test(start_paused = true)]
    async fn a_surer_reading_is_asked_for_once_in_a_while_and_after_the_clock_was_set() {
        let reckoning = Reckoning::default();
        assert!(reckoning.should_try());
        assert!(!reckoning.should_try(), "it was tried just now");
        let answer = async |clock: i64, took: u32| {
            let asked = Instant::now();
            advance(MILLI * took).await;
            reckoning.hear(clock, asked);
        };
        answer(0, 100).await;
        advance(SETTLED).await;
        assert!(reckoning.should_try(), "it is still not sure");
        answer(60_100_000, 2).await;
        advance(SETTLED).await;
        // Drift alone: 1 ms + 6 ms.
        assert!(reckoning.should_try());
        answer(120_000_000, 2).await;
        assert!(!reckoning.should_try(), "it is sure");
        answer(0, 50).await;
        assert!(reckoning.should_try(), "the clock was set");
    }
}
