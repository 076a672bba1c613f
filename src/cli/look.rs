//! A look into the ledger, whichever it is, beside running workers.

use std::sync::Mutex;

use super::Failure;
use crate::config::check::Ledger;
use crate::job::Key;
use crate::ledger::{KnownOrphan, LedgerError, PausedLane, Report, Row, postgres, sqlite};

/// An open ledger.
pub(super) enum Look {
    File(Mutex<sqlite::inspect::Inspector>),
    Database(postgres::inspect::Inspector),
}

impl Look {
    pub(super) async fn open(ledger: &Ledger) -> Result<Self, Failure> {
        Ok(match ledger {
            Ledger::File(path) => Self::File(Mutex::new(sqlite::inspect::Inspector::open(path)?)),
            Ledger::Database(options) => {
                Self::Database(postgres::inspect::Inspector::open(options).await?)
            }
        })
    }

    pub(super) async fn row(&self, key: &Key) -> Result<Option<Row>, LedgerError> {
        match self {
            Self::File(file) => locked(file).row(key),
            Self::Database(database) => database.row(key).await,
        }
    }

    pub(super) async fn paused_lanes(&self) -> Result<Vec<PausedLane>, LedgerError> {
        match self {
            Self::File(file) => locked(file).paused_lanes(),
            Self::Database(database) => database.paused_lanes().await,
        }
    }

    pub(super) async fn orphans(&self, key: &Key) -> Result<Vec<KnownOrphan>, LedgerError> {
        match self {
            Self::File(file) => locked(file).orphans(key),
            Self::Database(database) => database.orphans(key).await,
        }
    }

    pub(super) async fn report(&self) -> Result<Report, LedgerError> {
        match self {
            Self::File(file) => Ok(locked(file).report()),
            Self::Database(database) => database.report().await,
        }
    }
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// The ledger's place, without a password.
pub(super) fn shown(ledger: &Ledger) -> String {
    match ledger {
        Ledger::File(path) => {
            let whole = std::path::absolute(path).unwrap_or_else(|_| path.clone());
            whole.display().to_string()
        }
        Ledger::Database(options) => options.shown(),
    }
}
