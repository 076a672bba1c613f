//! Time that does not count: while intake is paused or the worker is down, no job grows older
//! in the eyes of `max_elapsed`.

use crate::clock::Millis;

/// Most intervals that are remembered; past it the two oldest are joined, which only makes the
/// worker more patient with very old jobs.
const MOST: usize = 512;

/// Intervals of wall-clock time in which nothing could be tried, oldest first, disjoint.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pauses {
    closed: Vec<(Millis, Millis)>,
    open: Option<Millis>,
}

impl Pauses {
    /// Intervals that an earlier process recorded.
    #[must_use]
    pub fn from_intervals(intervals: impl IntoIterator<Item = (Millis, Millis)>) -> Self {
        let mut pauses = Self::default();
        for (from, to) in intervals {
            pauses.add(from, to);
        }
        pauses
    }

    /// A pause begins, unless one is under way.
    pub fn begin(&mut self, now: Millis) {
        self.open.get_or_insert(now);
    }

    /// The pause under way ends; returns it, so that it can be recorded.
    pub fn end(&mut self, now: Millis) -> Option<(Millis, Millis)> {
        let from = self.open.take()?;
        if now <= from {
            return None;
        }
        self.add(from, now);
        Some((from, now))
    }

    /// Adds an interval that is over.
    pub fn add(&mut self, from: Millis, to: Millis) {
        if to <= from {
            return;
        }
        let at = self.closed.partition_point(|(start, _)| *start < from);
        self.closed.insert(at, (from, to));
        let mut joined: Vec<(Millis, Millis)> = Vec::with_capacity(self.closed.len());
        for &(start, end) in &self.closed {
            match joined.last_mut() {
                Some(last) if start <= last.1 => last.1 = last.1.max(end),
                Some(_) | None => joined.push((start, end)),
            }
        }
        if joined.len() > MOST {
            let second = joined.remove(1);
            joined[0].1 = second.1;
        }
        self.closed = joined;
    }

    /// The inverse of [`counted`](Self::counted): how many milliseconds after `from` it takes until `counted` of them
    /// have counted. Pauses are known up to `now`; all later time counts.
    #[must_use]
    pub fn span_that_counts(
        &self,
        others: &Self,
        from: Millis,
        counted: Millis,
        now: Millis,
    ) -> Millis {
        let until_now = self.counted(others, from, now);
        if counted >= until_now {
            return (now - from).max(0) + (counted - until_now);
        }
        // More time counts the longer one looks: the shortest that is enough is halved in on.
        let (mut short, mut enough) = (0, (now - from).max(0));
        while short < enough {
            let middle = short + (enough - short) / 2;
            if self.counted(others, from, from + middle) >= counted {
                enough = middle;
            } else {
                short = middle + 1;
            }
        }
        enough
    }

    /// How much of `from..to` counts: what neither these pauses cover nor others do.
    #[must_use]
    pub fn counted(&self, others: &Self, from: Millis, to: Millis) -> Millis {
        let mut all = self.clone();
        for &(start, end) in &others.closed {
            all.add(start, end);
        }
        for start in [self.open, others.open].into_iter().flatten() {
            all.add(start, to);
        }
        let paused: Millis =
            all.closed.iter().map(|(start, end)| (*end.min(&to) - *start.max(&from)).max(0)).sum();
        (to - from - paused).max(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_pause_does_not_count() {
        let mut pauses = Pauses::from_intervals([(100, 200)]);
        let none = Pauses::default();
        assert_eq!(pauses.counted(&none, 0, 300), 200);
        assert_eq!(pauses.counted(&none, 150, 300), 100);
        pauses.begin(300);
        pauses.begin(350);
        assert_eq!(pauses.counted(&none, 0, 400), 200);
        assert_eq!(pauses.end(400), Some((300, 400)));
        assert_eq!(pauses.end(500), None);
        assert_eq!(pauses.counted(&none, 0, 500), 300);
    }

    #[test]
    fn what_two_pauses_cover_is_taken_off_once() {
        let mut pauses = Pauses::from_intervals([(100, 200)]);
        let mut others = Pauses::from_intervals([(150, 250), (300, 310)]);
        assert_eq!(pauses.counted(&others, 0, 400), 240);
        pauses.begin(350);
        others.begin(390);
        assert_eq!(pauses.counted(&others, 0, 400), 190);
    }

    proptest! {
        #[test]
        fn what_is_taken_off_is_taken_off_once(
            spans in prop::collection::vec((0_i64..1000, 1_i64..100, any::<bool>()), 0..20),
            from in 0_i64..1000, length in 0_i64..1000, counted in 0_i64..1500, more in 0_i64..1000,
        ) {
            let now = from + length;
            let within = |span: &(i64, i64, bool)| span.0 + span.1 <= now;
            let spans = spans.into_iter().filter(within);
            let (mut pauses, mut others) = (Pauses::default(), Pauses::default());
            for (at, length, other) in spans {
                let pauses = if other { &mut others } else { &mut pauses };
                pauses.add(at, at + length);
            }
            let opened = from + pauses.span_that_counts(&others, from, counted, now);
            let then = now.max(opened) + more;
            let expected = pauses.counted(&others, from, then) - counted;
            prop_assert_eq!(pauses.counted(&others, opened, then), expected);
        }

        #[test]
        fn counted_time_is_never_negative_nor_longer_than_the_time(
            spans in prop::collection::vec((0_i64..1000, 0_i64..100), 0..600),
            from in 0_i64..1000, length in 0_i64..1000,
        ) {
            let pauses = Pauses::from_intervals(spans.iter().map(|(at, length)| (*at, at + length)));
            let counted = pauses.counted(&Pauses::default(), from, from + length);
            prop_assert!((0..=length).contains(&counted));
        }
    }
}
