//! What an operator tells a ledger file beside the worker that has it: that lanes are to be paused, or campaigns
//! cancelled. It is
//! one small write of its own, and the worker looks for it.

use std::path::Path;

use rusqlite::{Connection, OpenFlags};

use super::inspect::Inspector;
use super::open::OpenError;
use super::{carry_out_own, unavailable};
use crate::clock::Millis;
use crate::ledger::{LedgerError, OwnCommand};

/// Why nothing was told.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no ledger to be told.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// It cannot be written.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
}

/// Pauses or resumes a lane, or cancels a campaign.
///
/// # Errors
/// See [`Error`].
pub fn tell(path: &Path, command: &OwnCommand, now: Millis) -> Result<(), Error> {
    // It knows what a ledger is, and of which version.
    drop(Inspector::open(path)?);
    let written = || {
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(path, flags)?;
        connection.busy_timeout(std::time::Duration::from_secs(5))?;
        connection.pragma_update(None, "synchronous", "FULL")?;
        carry_out_own(&connection, command, now)
    };
    written().map_err(|error| Error::Ledger(unavailable(&error)))
}
