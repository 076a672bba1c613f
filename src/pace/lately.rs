//! How many of something there were of late.

use std::time::Duration;

use tokio::time::Instant;

/// For so long they are counted together.
pub const LATELY: Duration = Duration::from_millis(200);

/// Those of this span and of the one before.
#[derive(Debug, Clone, Copy)]
pub(super) struct Lately {
    began: Instant,
    now: u32,
    before: u32,
}

impl Lately {
    pub(super) fn new(now: Instant) -> Self {
        Self { began: now, now: 0, before: 0 }
    }

    /// One more.
    pub(super) fn count(&mut self, now: Instant) {
        self.turn(now);
        self.now = self.now.saturating_add(1);
    }

    /// How many there were in this span or the one before, whichever had more.
    pub(super) fn lately(&mut self, now: Instant) -> u32 {
        self.turn(now);
        self.now.max(self.before)
    }

    fn turn(&mut self, now: Instant) {
        let past = now.saturating_duration_since(self.began);
        if past >= LATELY {
            self.before = if past < LATELY * 2 { self.now } else { 0 };
            (self.began, self.now) = (now, 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_of_the_span_before_count_until_the_next_one_is_over() {
        let start = Instant::now();
        let mut lately = Lately::new(start);
        assert_eq!(lately.lately(start), 0);
        for _ in 0..7 {
            lately.count(start);
        }
        assert_eq!(lately.lately(start + LATELY / 2), 7);
        assert_eq!(lately.lately(start + LATELY), 7, "a new one has begun");
        lately.count(start + LATELY);
        assert_eq!(lately.lately(start + LATELY * 3 / 2), 7);
        assert_eq!(lately.lately(start + LATELY * 2), 1);
        assert_eq!(lately.lately(start + LATELY * 4), 0, "there was none for a while");
    }
}
