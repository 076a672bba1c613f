//! What a worker does about a message that breaks the connection again and again.
//!
//! A message that lapin cannot read ends the connection, and the broker counts that against every
//! delivery that was out. So after a few sessions that were over at once, one lane is consumed
//! alone and one delivery at a time: the count then grows for the culprit only, until the delivery
//! limit has taken it away.

use std::time::Duration;

use crate::rabbit::LinkError;
use crate::rabbit::topology::DELIVERY_LIMIT;

/// A session that lasted so long was a good one.
pub(super) const LONG_SESSION: Duration = Duration::from_secs(30);
/// So long a careful session takes to show that its lane has no culprit at its head.
pub(super) const CLEAN_SESSION: Duration = Duration::from_secs(5);
/// While care is taken, the longest pause between two sessions: every job of the lane waits behind
/// the culprit.
pub(super) const CAREFUL_PAUSE: Duration = Duration::from_millis(250);
/// Sessions in a row that must be short before care is taken, where nothing says why.
const SHORT: u32 = 3;
/// Careful sessions that break for no known reason, after which it must be another than a message: twice the
/// delivery limit.
const MOST_ROUNDS: u32 = 2 * DELIVERY_LIMIT;

/// Whether care is taken, and with which lane.
#[derive(Debug, Default)]
pub(super) struct Care {
    garbled: bool,
    short: u32,
    rounds: u32,
    lane: usize,
    clean: usize,
}

impl Care {
    /// The one lane, of so many, that the next session consumes; `None` for all as usual.
    pub(super) fn lane(&self, lanes: usize) -> Option<usize> {
        (self.garbled || self.short >= SHORT).then(|| self.lane % lanes.max(1))
    }

    /// Learns from the end of a session in which every queue was there. Often the real reason
    /// shows only as a session that is over before it has begun.
    pub(super) fn note(&mut self, ended: &LinkError, lasted: Duration, lanes: usize) {
        let careful = self.lane(lanes).is_some();
        if careful && lasted >= CLEAN_SESSION {
            self.clean += 1;
            self.lane += 1;
            if self.clean >= lanes {
                *self = Self::default();
            }
        } else if lasted >= LONG_SESSION {
            *self = Self::default();
        } else if !matches!(ended, LinkError::Denied(_)) {
            let garbled = matches!(ended, LinkError::Garbled(_));
            self.garbled |= garbled;
            self.short += 1;
            self.clean = 0;
            // While messages are known to be the reason, each round takes one nearer to its limit.
            self.rounds = if garbled { 0 } else { self.rounds + u32::from(careful) };
            if self.rounds >= MOST_ROUNDS {
                *self = Self::default();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT_ONCE: Duration = Duration::from_millis(10);

    fn broken() -> LinkError {
        LinkError::Broken("reset".to_owned())
    }

    #[test]
    fn one_lane_at_a_time_until_each_was_clean() {
        let mut care = Care::default();
        care.note(&LinkError::Garbled("utf-8".to_owned()), AT_ONCE, 2);
        assert_eq!(care.lane(2), Some(0));
        care.note(&broken(), CLEAN_SESSION, 2);
        assert_eq!(care.lane(2), Some(1), "the culprit is in the other lane");
        for _ in 0..20 {
            care.note(&broken(), AT_ONCE, 2);
            assert_eq!(care.lane(2), Some(1), "until the delivery limit has taken it away");
        }
        care.note(&broken(), CLEAN_SESSION, 2);
        assert_eq!(care.lane(2), Some(0));
        care.note(&broken(), CLEAN_SESSION, 2);
        assert_eq!(care.lane(2), None);
    }

    #[test]
    fn many_messages_that_cannot_be_read_are_taken_one_at_a_time_to_the_last() {
        let mut care = Care::default();
        for _ in 0..50 * DELIVERY_LIMIT {
            care.note(&LinkError::Garbled("utf-8".to_owned()), AT_ONCE, 2);
            assert_eq!(care.lane(2), Some(0));
        }
    }

    #[test]
    fn a_missing_queue_is_no_reason_and_care_does_not_last_for_ever() {
        let mut care = Care::default();
        for _ in 0..100 {
            care.note(&LinkError::Denied("NOT_FOUND".to_owned()), AT_ONCE, 2);
        }
        assert_eq!(care.lane(2), None);
        let careful = (0..100)
            .filter(|_| {
                care.note(&broken(), AT_ONCE, 2);
                care.lane(2).is_some()
            })
            .count();
        assert!((80..100).contains(&careful), "{careful}: now and then it tries as usual");
    }
}
