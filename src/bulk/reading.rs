//! An input that is read by a thread of its own: a pipe may have nothing to give for long, and whoever waits for
//! it must hear of calls that come back and of a stop.

use std::hash::{BuildHasher as _, RandomState};
use std::io;
use std::thread;

use tokio::sync::mpsc;

use super::hashes::Hashes;
use super::input::{Input, InputError, Job, Row};

/// Rows that are read ahead; each may have 1 MiB.
const AHEAD: usize = 32;

enum Read {
    /// A row, and how many bytes were read up to its end.
    Row(Box<(Row, Job)>, u64),
    End,
    Broken(InputError),
}

/// The rows of an input, in their order.
#[derive(Debug)]
pub(super) struct Reading {
    rows: mpsc::Receiver<Read>,
    position: u64,
    /// None where no two rows can have the same one.
    ids: Option<Ids>,
    shared: u64,
}

/// The ids of all rows so far, as hashes.
#[derive(Debug, Default)]
struct Ids {
    hasher: RandomState,
    seen: Hashes,
}

impl Ids {
    /// Whether an earlier row has this one's id.
    fn had(&mut self, row: &Row) -> bool {
        row.request_id.as_ref().is_some_and(|id| !self.seen.insert(self.hasher.hash_one(id)))
    }
}

impl Reading {
    /// Begins to read. The thread ends with the input, or with the row after this is dropped.
    ///
    /// # Errors
    /// If the operating system gives no thread.
    pub(super) fn begin(mut input: Input) -> io::Result<Self> {
        let ids = (!input.names_rows()).then(Ids::default);
        let (read, rows) = mpsc::channel(AHEAD);
        thread::Builder::new().name("input".to_owned()).spawn(move || {
            loop {
                let (next, more) = match input.next_row() {
                    Ok(Some(row)) => (Read::Row(Box::new(row), input.position()), true),
                    Ok(None) => (Read::End, false),
                    Err(error) => (Read::Broken(error), false),
                };
                if read.blocking_send(next).is_err() || !more {
                    return;
                }
            }
        })?;
        Ok(Self { rows, position: 0, ids, shared: 0 })
    }

    /// How many bytes were read up to the last row.
    pub(super) const fn position(&self) -> u64 {
        self.position
    }

    /// How many rows so far have the id of an earlier one.
    pub(super) const fn shared(&self) -> u64 {
        self.shared
    }

    /// The next row, or `None` behind the last one; not to be asked again then. May be cancelled.
    ///
    /// # Errors
    /// See [`InputError`].
    pub(super) async fn next(&mut self) -> Result<Option<(Row, Job)>, InputError> {
        match self.rows.recv().await {
            Some(Read::Row(row, position)) => {
                self.position = position;
                let is_shared = self.ids.as_mut().is_some_and(|ids| ids.had(&row.0));
                self.shared += u64::from(is_shared);
                Ok(Some(*row))
            }
            Some(Read::End) => Ok(None),
            Some(Read::Broken(error)) => Err(error),
            None => Err(InputError::Io(io::Error::other("its thread has ended (a bug)"))),
        }
    }
}
