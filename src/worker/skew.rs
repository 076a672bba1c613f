//! Clocks that differ: a job cannot have been published in the future.
//!
//! A producer whose clock is ahead gives deadlines that come late, and one that is behind gives deadlines
//! that are over before anybody had a chance; only the first can be seen, by the `timestamp` of its jobs.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::clock::{Millis, as_duration};
use crate::ledger::{Ledger, OwnCommand};
use crate::observe::metrics;

/// From here on clocks differ: AMQP timestamps are in whole seconds, and nobody's clock is perfect.
const NOTABLE: Millis = 5_000;
/// What stands for anything longer: no clock is wrong by more, a producer has invented that time or counts in other units.
const MOST: Millis = 24 * 3_600_000;
/// How often what was seen is told.
const TELL_EVERY: Duration = Duration::from_secs(10);
/// How often it is said in the log.
const SAY_EVERY: Duration = Duration::from_hours(1);

/// By how much producers' clocks are ahead.
#[derive(Debug, Default)]
pub(super) struct Skew(Mutex<Seen>);

#[derive(Debug, Default)]
struct Seen {
    most: Millis,
    said: Option<Instant>,
}

impl Skew {
    /// Takes note of a job's timestamp.
    pub(super) fn note(&self, published_at: Option<Millis>, now: Millis) {
        let Some(ahead) = published_at.map(|at| at.saturating_sub(now)) else { return };
        if ahead >= NOTABLE {
            let mut seen = self.seen();
            seen.most = seen.most.max(ahead.min(MOST));
        }
    }

    /// Tells the ledger what was seen, for `check`; never ends.
    pub(super) async fn tell(&self, ledger: &dyn Ledger) {
        loop {
            tokio::time::sleep(TELL_EVERY).await;
            let ahead = std::mem::take(&mut self.seen().most);
            metrics::clock_skew(as_duration(ahead));
            if ahead == 0 {
                continue;
            }
            if self.is_due() {
                tracing::warn!(
                    ahead_ms = ahead,
                    "a job was published in the future: a producer's clock is ahead of this worker's, or this one's is behind, and deadlines are judged by this one's; set the clocks by NTP"
                );
            }
            // The next one is told as well.
            drop(ledger.tell(OwnCommand::Skew { ahead }).await);
        }
    }

    fn is_due(&self) -> bool {
        let mut seen = self.seen();
        let due = seen.said.is_none_or(|said| said.elapsed() >= SAY_EVERY);
        if due {
            seen.said = Some(Instant::now());
        }
        due
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_lies_in_the_future_is_noted_and_a_day_stands_for_more() {
        let now = 1_795_370_400_000;
        for (published_at, most) in [
            (None, 0),
            (Some(now - 3_600_000), 0),
            (Some(now + NOTABLE - 1), 0),
            (Some(now + 60_000), 60_000),
            (Some(now * 1_000), MOST),
            (Some(Millis::MAX), MOST),
        ] {
            let skew = Skew::default();
            skew.note(published_at, now);
            assert_eq!(skew.seen().most, most, "{published_at:?}");
        }
    }
}
