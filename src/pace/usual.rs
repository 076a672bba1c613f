//! How long something usually takes, learned from how long it took.

use std::time::Duration;

/// How much a new time counts: an eighth, as TCP smooths its round trips (RFC 6298).
const WEIGHT: f64 = 0.125;
/// How many deviations above the mean are usual still. TCP takes four, so as never to send twice; here nothing is lost
/// where one takes longer.
const DEVIATIONS: f64 = 2.0;

/// A mean and how far off it things are, which weigh less the longer ago they were.
#[derive(Debug, Clone, Copy, Default)]
pub struct Usual {
    /// Seconds.
    mean: f64,
    /// Seconds by which times differ from it.
    deviation: f64,
}

impl Usual {
    /// One more took so long.
    pub fn note(&mut self, took: Duration) {
        let off = took.as_secs_f64() - self.mean;
        self.mean += WEIGHT * off;
        self.deviation += WEIGHT * (off.abs() - self.deviation);
    }

    /// How much of what was learned is left, from 0 to 1.
    pub fn fade(&mut self, left: f64) {
        self.mean *= left;
        self.deviation *= left;
    }

    /// Few take longer than that.
    #[must_use]
    pub fn most(&self) -> Duration {
        Duration::from_secs_f64((self.mean + DEVIATIONS * self.deviation).max(0.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_follows_what_was_seen_and_allows_for_what_differs() {
        let mut usual = Usual::default();
        assert_eq!(usual.most(), Duration::ZERO);
        for _ in 0..100 {
            usual.note(Duration::from_millis(500));
        }
        assert!((500..510).contains(&usual.most().as_millis()), "{:?}", usual.most());
        for took in (0..100).map(|number| 400 + 200 * (number % 2)) {
            usual.note(Duration::from_millis(took));
        }
        assert!((650..800).contains(&usual.most().as_millis()), "{:?}", usual.most());
        usual.fade(0.5);
        assert!((325..400).contains(&usual.most().as_millis()), "{:?}", usual.most());
    }
}
