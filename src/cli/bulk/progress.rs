//! How far a run is: a bar on a terminal, a line now and then elsewhere.

use std::io::IsTerminal as _;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use tokio::time::Instant;

use crate::bulk::{Progress, Tally};
use crate::cli::say_error;

/// How often a line is written where there is no terminal.
const EVERY: Duration = Duration::from_secs(10);
/// How often a bar's words change.
const OFTEN: Duration = Duration::from_millis(200);

pub(super) struct Shown {
    bar: Option<ProgressBar>,
    /// How many bytes the input has, if that is known.
    bytes: Option<u64>,
    began: Instant,
    said: Instant,
}

impl Shown {
    pub(super) fn new(bytes: Option<u64>) -> Self {
        let now = Instant::now();
        let bar = std::io::stderr().is_terminal().then(|| bar(bytes));
        Self { bar, bytes, began: now, said: now }
    }

    pub(super) fn tell(&mut self, progress: Progress<'_>) {
        let often = if self.bar.is_some() { OFTEN } else { EVERY };
        if self.said.elapsed() < often {
            return;
        }
        self.said = Instant::now();
        let words = words(progress.tally, self.began.elapsed());
        if let Some(bar) = &self.bar {
            bar.set_position(progress.position);
            bar.set_message(words);
            return;
        }
        let left = self.bytes.map(|bytes| left(progress.position, bytes, self.began.elapsed()));
        say_error(&format!("{words}{}", left.unwrap_or_default()));
    }

    pub(super) fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn bar(bytes: Option<u64>) -> ProgressBar {
    let (bar, template) = match bytes {
        Some(bytes) => (ProgressBar::new(bytes), "{bar:30} {percent} %, {eta} left; {msg}"),
        None => (ProgressBar::new_spinner(), "{spinner} {elapsed} {msg}"),
    };
    match ProgressStyle::with_template(template) {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

/// How many rows came to what, and how fast.
fn words(tally: &Tally, elapsed: Duration) -> String {
    let fresh = tally.rows.saturating_sub(tally.kept);
    let rate = count(fresh) / elapsed.as_secs_f64().max(0.001);
    let mut words = format!("{} rows, {rate:.0} a second", tally.rows);
    for (status, rows) in &tally.statuses {
        words = format!("{words}, {rows} {status}");
    }
    words
}

/// How much longer it may take, by the bytes that are read.
fn left(position: u64, bytes: u64, elapsed: Duration) -> String {
    if position == 0 || position >= bytes {
        return String::new();
    }
    let whole = elapsed.as_secs_f64() * count(bytes) / count(position);
    let left = Duration::from_secs_f64((whole - elapsed.as_secs_f64()).max(0.0));
    format!("; about {} left", humantime::format_duration(Duration::from_secs(left.as_secs())))
}

#[expect(clippy::cast_precision_loss, reason = "for the eye")]
fn count(number: u64) -> f64 {
    number as f64
}
