//! How long outcomes are kept: as long as any worker of their mode has said, until what it said is over.
//!
//! Workers that share a ledger may be configured differently, if only while a change of configuration rolls
//! through them; and whoever sweeps sweeps for all. A producer was told that its `request_id` gets the same
//! reply for so long, by whichever worker took it.

use crate::clock::Millis;
use crate::job::Mode;

/// What a worker says of the outcomes that it makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retention {
    /// Of which jobs.
    pub mode: Mode,
    /// How long they are kept after they have ended, in milliseconds.
    pub keep: Millis,
}

/// What the names begin with under which a ledger keeps what workers have said; the mode and the time
/// follow, and the number is when one last said so.
pub(super) const RETENTION: &str = "retention.";

impl Retention {
    /// Under which name a ledger keeps it.
    pub(super) fn name(self) -> String {
        format!("{RETENTION}{}.{}", self.mode.as_str(), self.keep)
    }

    fn parse(name: &str) -> Option<Self> {
        let (mode, keep) = name.strip_prefix(RETENTION)?.split_once('.')?;
        Some(Self { mode: Mode::parse(mode)?, keep: keep.parse().ok()? })
    }
}

/// Under which name a ledger keeps until when outcomes of a mode were swept.
pub(super) const fn swept_name(mode: Mode) -> &'static str {
    match mode {
        Mode::Test => "swept.test",
        Mode::Live => "swept.prod",
    }
}

/// Where versions kept it that swept all modes alike.
pub(super) const SWEPT_OF_ALL: &str = "swept";

/// Until when outcomes may be removed, by mode.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Cutoffs {
    of_modes: [(Mode, Millis); 2],
    /// Names of promises that are over: nothing is left that was made under them.
    pub(super) over: Vec<String>,
}

impl Cutoffs {
    /// Works it out of the names and numbers that a ledger keeps, for a worker that keeps outcomes as `own`
    /// says. The jobs of a mode that no worker serves any more go with that worker's.
    pub(super) fn new(said: &[(String, Millis)], own: Retention, now: Millis) -> Self {
        let mut over = Vec::new();
        let mut longest = [(Mode::Test, None), (Mode::Live, None)];
        for (name, at) in said {
            let Some(Retention { mode, keep }) = Retention::parse(name) else { continue };
            if now.saturating_sub(*at) > keep {
                over.push(name.clone());
                continue;
            }
            for (_, kept) in longest.iter_mut().filter(|(of, _)| *of == mode) {
                *kept = (*kept).max(Some(keep));
            }
        }
        let of_modes = longest.map(|(mode, said)| {
            let own_word = if mode == own.mode { Some(own.keep) } else { None };
            (mode, now.saturating_sub(said.max(own_word).unwrap_or(own.keep)))
        });
        Self { of_modes, over }
    }

    /// By mode: what ended before that.
    pub(super) const fn of_modes(&self) -> [(Mode, Millis); 2] {
        self.of_modes
    }

    /// What is of no mode, and older than that.
    pub(super) fn of_all(&self) -> Millis {
        self.of_modes.iter().map(|(_, before)| *before).min().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Millis = 1_000_000;

    fn cutoffs(said: &[(Mode, Millis, Millis)], own: Retention) -> (Cutoffs, [Millis; 2]) {
        let said: Vec<_> = said
            .iter()
            .map(|(mode, keep, at)| (Retention { mode: *mode, keep: *keep }.name(), *at))
            .collect();
        let cutoffs = Cutoffs::new(&said, own, NOW);
        let times = cutoffs.of_modes().map(|(_, before)| NOW - before);
        (cutoffs, times)
    }

    #[test]
    fn the_longest_that_was_said_of_a_mode_holds_for_it_until_it_is_over() {
        let own = Retention { mode: Mode::Test, keep: 100 };
        assert_eq!(cutoffs(&[], own).1, [100, 100], "nobody serves the other mode");
        let said = [(Mode::Test, 100, NOW), (Mode::Live, 700, NOW - 700)];
        assert_eq!(cutoffs(&said, own).1, [100, 700]);
        assert_eq!(cutoffs(&said, own).0.of_all(), NOW - 700);
        let said = [(Mode::Test, 300, NOW - 300), (Mode::Test, 100, NOW)];
        assert_eq!(cutoffs(&said, own).1, [300, 300 - 200]);
        let said = [(Mode::Test, 300, NOW - 301), (Mode::Live, 50, NOW)];
        let (cutoffs, times) = cutoffs(&said, own);
        assert_eq!(times, [100, 50]);
        assert_eq!(cutoffs.over, ["retention.test.300"]);
    }

    #[test]
    fn what_is_no_promise_and_what_was_said_under_a_clock_that_ran_ahead_do_no_harm() {
        let own = Retention { mode: Mode::Live, keep: 100 };
        let said = [("retention.prod".to_owned(), 1), ("retention.prod.x".to_owned(), 1)];
        assert!(Cutoffs::new(&said, own, NOW).over.is_empty());
        assert_eq!(cutoffs(&[(Mode::Live, 700, NOW + 5_000)], own).1, [100, 700]);
    }
}
