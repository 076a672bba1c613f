//! How far a run is: a bar on a terminal, a line now and then elsewhere.

use std::collections::VecDeque;
use std::io::IsTerminal as _;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use tokio::time::Instant;

use crate::bulk::Progress;
use crate::cli::{count as rows, say_error};

/// How often a line is written where there is no terminal.
const EVERY: Duration = Duration::from_secs(10);
/// How often a bar's words change.
const OFTEN: Duration = Duration::from_millis(200);

/// So many rows that are done and not written yet are told: a few always are.
const WORTH_TELLING: u64 = 200;

/// How long ago things count for how fast they go.
const LATELY: Duration = Duration::from_secs(30);

pub(super) struct Shown {
    bar: Option<ProgressBar>,
    /// How many bytes the input has, if that is known.
    bytes: Option<u64>,
    said: Instant,
    /// How far it was lately.
    seen: VecDeque<Seen>,
}

/// How far a run was at a time.
#[derive(Debug, Clone, Copy)]
struct Seen {
    at: Instant,
    /// Rows that this run has done.
    fresh: u64,
    /// Bytes of the input.
    position: u64,
}

impl Shown {
    pub(super) fn new(bytes: Option<u64>) -> Self {
        let now = Instant::now();
        let bar = std::io::stderr().is_terminal().then(|| bar(bytes));
        let seen = [Seen { at: now, fresh: 0, position: 0 }].into();
        Self { bar, bytes, said: now, seen }
    }

    /// Tells now and then; `held` says what is waited for, if all waits for it.
    pub(super) fn tell(&mut self, progress: Progress<'_>, held: Option<&str>) {
        let often = if self.bar.is_some() { OFTEN } else { EVERY };
        if self.said.elapsed() < often {
            return;
        }
        let now = Instant::now();
        self.said = now;
        let fresh = (progress.tally.rows + progress.ahead).saturating_sub(progress.tally.kept);
        self.seen.push_back(Seen { at: now, fresh, position: progress.position });
        while self.seen.len() > 2 && now.duration_since(self.seen[0].at) > LATELY {
            self.seen.pop_front();
        }
        let words = words(&progress, &self.seen, self.bytes, held);
        match &self.bar {
            Some(bar) => {
                bar.set_position(progress.position);
                bar.set_message(words);
            }
            None => say_error(&words),
        }
    }

    pub(super) fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn bar(bytes: Option<u64>) -> ProgressBar {
    let (bar, template) = match bytes {
        Some(bytes) => (ProgressBar::new(bytes), "{bar:30} {percent} %, {msg}"),
        None => (ProgressBar::new_spinner(), "{spinner} {elapsed} {msg}"),
    };
    match ProgressStyle::with_template(template) {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

/// How many rows came to what, how fast it goes lately, and how much longer it may take then; or what is waited
/// for.
fn words(
    progress: &Progress<'_>,
    seen: &VecDeque<Seen>,
    bytes: Option<u64>,
    held: Option<&str>,
) -> String {
    let tally = progress.tally;
    let mut words = rows(tally.rows, "row");
    for (status, rows) in &tally.statuses {
        words = format!("{words}, {rows} {status}");
    }
    if progress.ahead >= WORTH_TELLING {
        words = format!("{words}, {} more done behind row {}", progress.ahead, tally.rows + 1);
    }
    if let Some(held) = held {
        return format!("{words}; waiting: {held}");
    }
    let (Some(first), Some(last)) = (seen.front(), seen.back()) else { return words };
    let seconds = last.at.duration_since(first.at).as_secs_f64();
    if seconds <= 0.0 {
        return words;
    }
    words = format!("{words}; {:.0} a second", as_float(last.fresh - first.fresh) / seconds);
    let speed = as_float(last.position.saturating_sub(first.position)) / seconds;
    let left = bytes.map(|bytes| bytes.saturating_sub(last.position)).filter(|left| *left > 0);
    if let Some(left) = left.filter(|_| speed > 0.0 && last.fresh > first.fresh) {
        let left = Duration::try_from_secs_f64(as_float(left) / speed).unwrap_or(Duration::MAX);
        let left = Duration::from_secs(left.as_secs());
        words = format!("{words}, about {} left", humantime::format_duration(left));
    }
    words
}

#[expect(clippy::cast_precision_loss, reason = "for the eye")]
fn as_float(number: u64) -> f64 {
    number as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bulk::Tally;

    fn seen(at: Instant, seconds: u64, fresh: u64, position: u64) -> Seen {
        Seen { at: at + Duration::from_secs(seconds), fresh, position }
    }

    #[test]
    fn it_says_how_fast_it_goes_lately_and_nothing_of_a_time_that_nobody_knows() {
        let tally = Tally { rows: 1_200, ..Tally::default() };
        let progress = Progress { tally: &tally, ahead: 0, position: 0 };
        let at = Instant::now();
        let going = [seen(at, 0, 200, 2_000), seen(at, 10, 1_200, 12_000)].into();
        let said = words(&progress, &going, Some(72_000), None);
        assert_eq!(said, "1200 rows; 100 a second, about 1m left");
        let standing = [seen(at, 0, 1_200, 12_000), seen(at, 10, 1_200, 12_000)].into();
        assert_eq!(words(&progress, &standing, Some(72_000), None), "1200 rows; 0 a second");
        let ahead = Progress { ahead: 579, ..progress };
        let said = words(&ahead, &going, None, None);
        assert_eq!(said, "1200 rows, 579 more done behind row 1201; 100 a second");
        let held = words(&progress, &going, Some(72_000), Some("the lane is paused"));
        assert_eq!(held, "1200 rows; waiting: the lane is paused");
    }
}
