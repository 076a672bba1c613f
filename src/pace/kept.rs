//! A rate as it is written down for whoever shares it: points in time by how long ago they were, as clocks differ.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::rate::{Rate, TICKS};

#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    per_second: f64,
    limit: Option<f64>,
    cut_us_ago: Option<u64>,
    tick_us_ago: u64,
    pressed: [bool; 2],
    refused_us_ago: Option<u64>,
    taken: [u32; TICKS],
    refused: [u32; TICKS],
    best: f64,
}

impl Rate {
    /// Writes it down.
    #[must_use]
    pub fn keep(&self, now: Instant) -> String {
        let ago = |at: Instant| {
            u64::try_from(now.saturating_duration_since(at).as_micros()).unwrap_or(u64::MAX)
        };
        let kept = Kept {
            per_second: self.per_second,
            limit: self.limit,
            cut_us_ago: self.cut_at.map(ago),
            tick_us_ago: ago(self.tick_at),
            pressed: self.pressed,
            refused_us_ago: self.refused_at.map(ago),
            taken: self.taken,
            refused: self.refused,
            best: self.best,
        };
        #[expect(clippy::expect_used, reason = "numbers and flags have a JSON form")]
        serde_json::to_string(&kept).expect("numbers and flags have a JSON form")
    }

    /// Reads what was so that long ago. What cannot be read, as another version wrote it, is a rate of which nothing
    /// is known yet but one's own ceiling.
    #[must_use]
    pub fn from_kept(text: &str, age: Duration, ceiling: Option<f64>, now: Instant) -> Self {
        let mut rate = Self::shared(ceiling, now);
        let Ok(kept) = serde_json::from_str::<Kept>(text) else { return rate };
        // Longer ago than this machine runs is taken for just now, which is careful.
        let at = |micros: u64| {
            now.checked_sub(age.saturating_add(Duration::from_micros(micros))).unwrap_or(now)
        };
        rate.limit = kept.limit;
        rate.cut_at = kept.cut_us_ago.map(at);
        rate.tick_at = at(kept.tick_us_ago);
        rate.pressed = kept.pressed;
        rate.refused_at = kept.refused_us_ago.map(at);
        rate.taken = kept.taken;
        rate.refused = kept.refused;
        rate.best = kept.best;
        rate.set(kept.per_second);
        rate
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MILLI: Duration = Duration::from_millis(1);

    /// A rate that has seen something of everything, and when that was.
    fn seasoned() -> (Rate, Instant) {
        let start = Instant::now();
        let (mut rate, mut now) = (Rate::new(None, start), start);
        for _ in 0..300 {
            now += MILLI * 3;
            rate.press(now);
            rate.taken(now, now);
        }
        for _ in 0..10 {
            now += MILLI * 3;
            rate.slow_down(now, now);
        }
        (rate, now)
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_read_goes_on_as_what_was_written() {
        let (rate, now) = seasoned();
        let age = MILLI * 250;
        let read = Rate::from_kept(&rate.keep(now), age, None, now + age);
        let (mut one, mut other) = (rate, read);
        let mut now = now + age;
        for step in 0..5_000 {
            now += MILLI * 7;
            for rate in [&mut one, &mut other] {
                rate.press(now);
                if step % 400 == 399 { rate.slow_down(now, now) } else { rate.taken(now, now) }
            }
            // The last digits of a number may differ that was written and read.
            let ratio = one.per_second() / other.per_second();
            assert!((0.999_999..1.000_001).contains(&ratio), "{one:?} {other:?}");
            assert_eq!(one.held(now), other.held(now));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_ceiling_of_whoever_reads_it_is_not_told_to_others() {
        let (rate, now) = seasoned();
        let read = Rate::from_kept(&rate.keep(now), Duration::ZERO, Some(5.0), now);
        assert!((read.per_second() - rate.per_second()).abs() < 0.001);
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_that_anybody_could_have_written_stops_or_frees_the_calls() {
        let now = Instant::now();
        let unknown = Rate::new(None, now).per_second();
        for text in ["", "{}", "null", "{\"per_second\":9}", "\u{0}"] {
            let read = Rate::from_kept(text, Duration::ZERO, None, now);
            assert_eq!(read.per_second().to_bits(), unknown.to_bits(), "{text}");
        }
        let (rate, _) = seasoned();
        let kept: serde_json::Value = serde_json::from_str(&rate.keep(now)).unwrap();
        let with = |name: &str, value: serde_json::Value| {
            let mut kept = kept.clone();
            kept[name] = value;
            kept.to_string()
        };
        let huge = serde_json::json!(u64::MAX);
        for text in [
            with("per_second", 0.into()),
            with("per_second", (-1).into()),
            with("limit", 0.into()),
            with("limit", (-5).into()),
            with("best", (-5).into()),
            with("per_second", 1e300.into()),
            with("limit", 1e300.into()),
            with("best", 1e300.into()),
            with("taken", vec![u32::MAX; TICKS].into()),
            with("refused", vec![u32::MAX; TICKS].into()),
            with("cut_us_ago", huge.clone()),
            with("tick_us_ago", huge.clone()),
            with("refused_us_ago", huge),
        ] {
            let mut now = Instant::now();
            let mut read = Rate::from_kept(&text, Duration::MAX, None, now);
            for _ in 0..1_000 {
                now += MILLI * 10;
                read.press(now);
                read.taken(now, now);
            }
            assert!(read.per_second() >= unknown, "{text}: {}", read.per_second());
            read.slow_down(now, now);
            read.restart(now);
            let bounds = Duration::from_micros(1)..=Duration::from_secs(1);
            assert!(bounds.contains(&read.interval()), "{text}: {:?}", read.interval());
        }
    }
}
