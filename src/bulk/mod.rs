//! A file of jobs made into a file of links: for campaigns, with a broker or without one.
//!
//! Rows are read one at a time, brought to their ends side by side, and written in the order of the input,
//! so memory hardly grows with the file: by 16 bytes or so a row, to notice ids that come twice, and by as much
//! again for each link of an earlier output. Whatever is interrupted goes on where it was: what was written is
//! kept, and what was not is asked of the ledger, which knows each link that was ever made.

pub mod columns;
mod content_id;
pub mod given;
mod had;
mod hashes;
pub mod input;
pub mod inside;
pub mod layout;
pub mod look_up;
pub mod output;
mod reading;
mod records;
pub mod source;
pub mod stems;
pub mod table;
pub mod verify;

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use futures::future::LocalBoxFuture;
use futures::stream::FuturesUnordered;
use futures::{FutureExt as _, StreamExt as _};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::job::{CheckoutRequest, Status};
use had::Had;
use input::{Flaw, Input, InputError, Job, Row};
use layout::Outcome;
use output::{Earlier, EarlierLinks, Output, OutputError};
use reading::Reading;

/// Bytes of rows that are remembered at once: they may be done while one before them is tried again and again.
const WINDOW: usize = 32 * 1024 * 1024;
/// What a row takes besides its cells: its outcome, and what holds the two.
const ROW_TAKES: usize = 512;
/// After how many rows what is written is handed to the operating system.
const FLUSH_EVERY: usize = 256;
/// And after how long, where rows come slowly.
const FLUSH_AFTER: Duration = Duration::from_secs(1);

/// How often that is told which does not move.
const TICK: Duration = Duration::from_secs(1);

/// Why a run ended before its end.
#[derive(Debug, thiserror::Error)]
pub enum BulkError {
    /// The input.
    #[error(transparent)]
    Input(#[from] InputError),
    /// The output.
    #[error(transparent)]
    Output(#[from] OutputError),
}

/// How many rows came to what.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tally {
    /// Rows of this run and of the one that it goes on with.
    pub rows: u64,
    /// Those that an interrupted run had written.
    pub kept: u64,
    /// By status.
    pub statuses: BTreeMap<&'static str, u64>,
    /// Rows whose `request_id` an earlier row has: they share its link, or were told of a conflict.
    pub shared: u64,
    /// Whether all rows of the input are among them.
    pub whole: bool,
    /// How many links of the earlier output no row was given again, and the id of one: then that output stays.
    pub left: Option<(usize, String)>,
    /// The same of links that interrupted runs have made for rows which the input has no more.
    pub dropped: Option<(usize, String)>,
}

impl Tally {
    fn count(&mut self, status: Status) {
        self.rows += 1;
        *self.statuses.entry(status.as_str()).or_default() += 1;
    }

    /// Rows with a link.
    #[must_use]
    pub fn linked(&self) -> u64 {
        self.statuses.get(Status::Succeeded.as_str()).copied().unwrap_or(0)
    }
}

/// What a run is told as it goes on.
#[derive(Debug, Clone, Copy)]
pub struct Progress<'a> {
    /// So far.
    pub tally: &'a Tally,
    /// Further rows, which are done and wait for one before them to be written.
    pub ahead: u64,
    /// Bytes of the input that are read.
    pub position: u64,
}

/// Takes an input to its output: `at_once` rows at a time are made into outcomes by `make`, until none is
/// left or `stop` is cancelled. What `make` then has not begun (`None`) is left for the next run. Whatever goes
/// wrong, what was begun is brought to its end first.
///
/// Where an interrupted run is gone on with, `prove` is told which links it had, and says whether `make` would give
/// the same: if not, nothing is made and its lines stay.
///
/// # Errors
/// See [`BulkError`]. Whatever was written stays.
pub async fn run<F>(
    input: Input,
    mut earlier: Earlier,
    at_once: usize,
    prove: impl AsyncFnOnce(Proof) -> bool,
    make: impl Fn(u64, CheckoutRequest) -> F,
    stop: &CancellationToken,
    mut tell: impl FnMut(Progress<'_>),
) -> Result<Tally, BulkError>
where
    F: Future<Output = Option<Outcome>>,
{
    let mut had = Had::read(&earlier)?;
    let mut rows = Reading::begin(input).map_err(InputError::Io)?;
    let mut tally = Tally::default();
    let skipped = tokio::select! {
        skipped = first_new(&mut rows, &mut earlier, &mut had, &mut tally, &mut tell) => Some(skipped?),
        () = stop.cancelled() => None,
    };
    // What was not looked through is not cut off either.
    let Some((first, given)) = skipped else { return Ok(tally) };
    let proof = Proof { given, cut_off: earlier.cut_off() };
    if earlier.was_interrupted() && !prove(proof).await {
        return Ok(tally);
    }
    if !earlier.is_rehearsal() {
        had.note_cut_off(earlier.cut_off())?;
    }
    let mut window = Window::new(earlier.go_on()?, had, tally, at_once);
    let mut going = FuturesUnordered::new();
    let ran = go_through(first, &mut rows, &mut window, &mut going, make, stop, tell).await;
    match ran {
        Ok(read_all) => window.end(read_all, &earlier),
        Err(error) => {
            // The ledger learns what comes of the calls; the same command finds it there.
            while let Some((number, outcome)) = going.next().await {
                window.done(number, outcome);
            }
            drop(window.write());
            Err(error)
        }
    }
}

/// Begins rows as there is room for them, and writes what came of them; says whether that were all.
async fn go_through<'a, F: Future<Output = Option<Outcome>> + 'a>(
    first: Next,
    rows: &mut Reading,
    window: &mut Window,
    going: &mut FuturesUnordered<LocalBoxFuture<'a, (u64, Option<Outcome>)>>,
    make: impl Fn(u64, CheckoutRequest) -> F,
    stop: &CancellationToken,
    mut tell: impl FnMut(Progress<'_>),
) -> Result<bool, BulkError> {
    let mut read_all = first.is_none();
    let mut next = first;
    // While nothing moves, that is told as well.
    let mut tick = tokio::time::interval(TICK);
    loop {
        if let Some((row, job)) = next.take() {
            let number = row.number;
            match job {
                Err(flaw) => {
                    window.push(row);
                    window.done(number, Some(flaw.into()));
                }
                Ok(request) => {
                    window.push(row);
                    let outcome = make(number, *request);
                    going.push(async move { (number, outcome.await) }.boxed_local());
                }
            }
        }
        window.write()?;
        let (ahead, position) = (window.ahead, rows.position());
        tell(Progress { tally: &window.tally, ahead, position });
        let stopped = stop.is_cancelled();
        if going.is_empty() && (read_all || stopped) {
            return Ok(read_all);
        }
        tokio::select! {
            Some((number, outcome)) = going.next() => window.done(number, outcome),
            read = rows.next(), if !read_all && !stopped && window.has_room(going.len()) => {
                next = read?;
                read_all = next.is_none();
            }
            () = stop.cancelled(), if !stopped => {}
            _ = tick.tick() => {}
            () = tokio::time::sleep_until(window.flush_due()), if window.unflushed > 0 => {}
        }
        window.tally.shared = rows.shared();
    }
}

/// What shows whether an interrupted run had the same links.
#[derive(Debug)]
pub struct Proof {
    /// The last of the rows that are kept for which it had one.
    pub given: Option<Given>,
    /// The links of lines that are not kept, because the input has changed.
    pub cut_off: EarlierLinks,
}

/// A row that was given a link by the interrupted run.
#[derive(Debug)]
pub struct Given {
    /// Its number.
    pub number: u64,
    /// Its job.
    pub request: CheckoutRequest,
    /// Creem's id of the session.
    pub checkout_id: String,
}

/// A row of the input.
type Next = Option<(Row, Job)>;

/// The first row that the interrupted run has not written, if there is one, and the last of those that it had a
/// link for.
async fn first_new(
    rows: &mut Reading,
    earlier: &mut Earlier,
    had: &mut Had,
    tally: &mut Tally,
    tell: &mut impl FnMut(Progress<'_>),
) -> Result<(Next, Option<Given>), BulkError> {
    let (mut given, mut first) = (None, true);
    while let Some((row, job)) = rows.next().await? {
        if std::mem::take(&mut first) {
            earlier.refuse_other_ids(&row)?;
        }
        tally.shared = rows.shared();
        let Some(written) = earlier.outcome_of(&row) else { return Ok((Some((row, job)), given)) };
        had.wrote(&row, &written);
        tally.count(written.status);
        tally.kept += 1;
        if let (Ok(request), Some(checkout_id)) = (job, written.checkout_id) {
            given = Some(Given { number: row.number, request: *request, checkout_id });
        }
        tell(Progress { tally, ahead: 0, position: rows.position() });
    }
    Ok((None, given))
}

/// What is known of a row that is read and not written yet.
enum Slot {
    Going,
    Done(Outcome),
    /// Not begun; nothing behind it may be written.
    Left,
}

/// Rows in the order of the input, from the first that is not written.
struct Window {
    output: Output,
    had: Had,
    slots: VecDeque<(Row, Slot)>,
    /// What they take.
    bytes: usize,
    /// How many of them are done.
    ahead: u64,
    unflushed: usize,
    flushed_at: Instant,
    tally: Tally,
    at_once: usize,
}

impl Window {
    fn new(output: Output, had: Had, tally: Tally, at_once: usize) -> Self {
        let flushed_at = Instant::now();
        let (slots, bytes, ahead) = (VecDeque::new(), 0, 0);
        Self { output, had, slots, bytes, ahead, unflushed: 0, flushed_at, tally, at_once }
    }

    /// Whether another row may be read, with so many under way.
    fn has_room(&self, going: usize) -> bool {
        self.bytes < WINDOW && going < self.at_once
    }

    /// When what is written is to be handed on.
    fn flush_due(&self) -> Instant {
        self.flushed_at + FLUSH_AFTER
    }

    fn push(&mut self, row: Row) {
        self.bytes += taken_by(&row);
        self.slots.push_back((row, Slot::Going));
    }

    fn done(&mut self, number: u64, outcome: Option<Outcome>) {
        let first = self.slots.front().map_or(number, |(row, ..)| row.number);
        let at = usize::try_from(number.saturating_sub(first)).unwrap_or(usize::MAX);
        if let Some((_, slot)) = self.slots.get_mut(at) {
            self.ahead += u64::from(outcome.is_some());
            *slot = outcome.map_or(Slot::Left, Slot::Done);
        }
    }

    fn write(&mut self) -> Result<(), OutputError> {
        while let Some((row, Slot::Done(outcome))) = self.slots.front() {
            self.output.write(row, outcome)?;
            self.had.wrote(row, outcome);
            self.tally.count(outcome.status);
            self.unflushed += 1;
            self.bytes -= taken_by(row);
            self.ahead -= 1;
            self.slots.pop_front();
        }
        let due = Instant::now() >= self.flush_due() && self.unflushed > 0;
        if due || self.unflushed >= FLUSH_EVERY {
            self.unflushed = 0;
            self.flushed_at = Instant::now();
            self.output.flush()?;
        }
        Ok(())
    }

    fn end(mut self, read_all: bool, earlier: &Earlier) -> Result<Tally, BulkError> {
        self.output.flush()?;
        self.tally.whole = read_all && self.slots.is_empty();
        if self.tally.whole {
            self.tally.left = self.had.left(earlier)?;
            self.tally.dropped = self.had.dropped(earlier)?;
            if self.tally.left.is_none() {
                self.output.finish()?;
            }
        }
        Ok(self.tally)
    }
}

fn taken_by(row: &Row) -> usize {
    // Each cell has its end, and there is room for more.
    let ends = 2 * size_of::<usize>() * row.cells.len();
    row.cells.as_slice().len() + ends + ROW_TAKES
}

impl From<Flaw> for Outcome {
    fn from(flaw: Flaw) -> Self {
        let message = match flaw.column {
            Some(column) => format!("column {column}: {}", flaw.message),
            None => flaw.message,
        };
        inside::problem(Status::Invalid, flaw.code, &message)
    }
}
