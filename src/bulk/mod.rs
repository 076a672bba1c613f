//! A file of jobs made into a file of links: for campaigns, with a broker or without one.
//!
//! Rows are read one at a time, brought to their ends side by side, and written in the order of the input,
//! so memory hardly grows with the file (16 bytes or so a row, to notice ids that come twice). Whatever is
//! interrupted goes on where it was: what was written is kept, and what was not is asked of the ledger, which
//! knows each link that was ever made.

pub mod columns;
pub mod given;
pub mod input;
pub mod inside;
pub mod layout;
pub mod look_up;
pub mod output;
pub mod source;
pub mod table;
pub mod verify;

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::hash::{BuildHasher as _, RandomState};
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::job::{CheckoutRequest, Status};
use input::{Flaw, Input, InputError, Job, Row};
use layout::Outcome;
use output::{Earlier, Output, OutputError};

/// Rows that may be done while one before them is not: so many are remembered at once.
const WINDOW: usize = 4_096;
/// After how many rows what is written is handed to the operating system.
const FLUSH_EVERY: usize = 256;
/// And after how long, where rows come slowly.
const FLUSH_AFTER: Duration = Duration::from_secs(1);

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
    /// Bytes of the input that have been read.
    pub position: u64,
}

/// Takes an input to its output: `at_once` rows at a time are made into outcomes by `make`, until none is
/// left or `stop` is cancelled. What `make` then has not begun (`None`) is left for the next run. Whatever goes
/// wrong, what was begun is brought to its end first.
///
/// Where an interrupted run is gone on with, `prove` is given the first row for which it had a link, and that
/// link, and says whether `make` would give the same: if not, nothing is made.
///
/// # Errors
/// See [`BulkError`]. Whatever was written stays.
pub async fn run<F>(
    mut input: Input,
    mut earlier: Earlier,
    at_once: usize,
    prove: impl AsyncFnOnce(Given) -> bool,
    make: impl Fn(u64, CheckoutRequest) -> F,
    stop: &CancellationToken,
    mut tell: impl FnMut(Progress<'_>),
) -> Result<Tally, BulkError>
where
    F: Future<Output = Option<Outcome>>,
{
    let (mut tally, mut ids) = (Tally::default(), Ids::default());
    let (mut next, given) = first_new(&mut input, &mut earlier, &mut ids, &mut tally, &mut tell)?;
    let mut window = Window::new(earlier.go_on()?, tally);
    if let Some(given) = given
        && !prove(given).await
    {
        return window.end(false);
    }
    let mut going = FuturesUnordered::new();
    let (mut read_all, mut broken) = (false, None);
    loop {
        while !read_all && window.has_room() && going.len() < at_once && !stop.is_cancelled() {
            if next.is_none() {
                next = match input.next_row() {
                    Ok(next) => next,
                    Err(error) => {
                        broken = Some(BulkError::from(error));
                        break;
                    }
                };
                if let Some((row, _)) = &next {
                    window.tally.shared += u64::from(ids.had(row));
                }
            }
            let Some((row, job)) = next.take() else {
                read_all = true;
                break;
            };
            let number = row.number;
            match job {
                Err(flaw) => window.push(row, Slot::Done(flaw.into())),
                Ok(request) => {
                    window.push(row, Slot::Going);
                    let outcome = make(number, *request);
                    going.push(async move { (number, outcome.await) });
                }
            }
        }
        if let Err(error) = window.write() {
            broken = Some(error.into());
        }
        if let Some(error) = broken {
            // The ledger learns what comes of the calls; the same command finds it there.
            while let Some((number, outcome)) = going.next().await {
                window.done(number, outcome);
            }
            drop(window.write());
            return Err(error);
        }
        tell(Progress { tally: &window.tally, position: input.position() });
        if going.is_empty() && (read_all || stop.is_cancelled()) {
            return window.end(read_all);
        }
        tokio::select! {
            Some((number, outcome)) = going.next() => window.done(number, outcome),
            () = stop.cancelled(), if going.is_empty() => {}
            // Rows that need nobody may follow one another for long.
            () = tokio::task::yield_now(), if going.is_empty() => {}
        }
    }
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

/// The first row that the interrupted run has not written, if there is one, and the first of those that it had
/// a link for.
fn first_new(
    input: &mut Input,
    earlier: &mut Earlier,
    ids: &mut Ids,
    tally: &mut Tally,
    tell: &mut impl FnMut(Progress<'_>),
) -> Result<(Next, Option<Given>), InputError> {
    let mut given = None;
    while let Some((row, job)) = input.next_row()? {
        tally.shared += u64::from(ids.had(&row));
        let Some(written) = earlier.next(&row) else { return Ok((Some((row, job)), given)) };
        tally.count(written.status);
        tally.kept += 1;
        if given.is_none()
            && let (Ok(request), Some(checkout_id)) = (job, written.checkout_id)
        {
            given = Some(Given { number: row.number, request: *request, checkout_id });
        }
        tell(Progress { tally, position: input.position() });
    }
    Ok((None, given))
}

/// The ids of all rows so far, as eight bytes each.
#[derive(Debug, Default)]
struct Ids {
    hasher: RandomState,
    seen: HashSet<u64>,
}

impl Ids {
    /// Whether an earlier row has this one's id.
    fn had(&mut self, row: &Row) -> bool {
        let id = row.request_id.as_ref();
        id.is_some_and(|id| !self.seen.insert(self.hasher.hash_one(id)))
    }
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
    slots: VecDeque<(Row, Slot)>,
    unflushed: usize,
    flushed_at: Instant,
    tally: Tally,
}

impl Window {
    fn new(output: Output, tally: Tally) -> Self {
        let flushed_at = Instant::now();
        Self { output, slots: VecDeque::new(), unflushed: 0, flushed_at, tally }
    }

    fn has_room(&self) -> bool {
        self.slots.len() < WINDOW
    }

    fn push(&mut self, row: Row, slot: Slot) {
        self.slots.push_back((row, slot));
    }

    fn done(&mut self, number: u64, outcome: Option<Outcome>) {
        let first = self.slots.front().map_or(number, |(row, _)| row.number);
        let at = usize::try_from(number.saturating_sub(first)).unwrap_or(usize::MAX);
        if let Some((_, slot)) = self.slots.get_mut(at) {
            *slot = outcome.map_or(Slot::Left, Slot::Done);
        }
    }

    fn write(&mut self) -> Result<(), OutputError> {
        while let Some((row, Slot::Done(outcome))) = self.slots.front() {
            self.output.write(row, outcome)?;
            self.tally.count(outcome.status);
            self.unflushed += 1;
            self.slots.pop_front();
        }
        let due = self.flushed_at.elapsed() >= FLUSH_AFTER && self.unflushed > 0;
        if due || self.unflushed >= FLUSH_EVERY {
            self.unflushed = 0;
            self.flushed_at = Instant::now();
            self.output.flush()?;
        }
        Ok(())
    }

    fn end(mut self, read_all: bool) -> Result<Tally, BulkError> {
        self.output.flush()?;
        self.tally.whole = read_all && self.slots.is_empty();
        if self.tally.whole {
            self.output.finish()?;
        }
        Ok(self.tally)
    }
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
