//! A look into the ledger, whichever it is, beside running workers.

use std::collections::BTreeMap;
use std::sync::Mutex;

use super::Failure;
use crate::config::check::Ledger;
use crate::job::Key;
use crate::ledger::{Campaign, KnownOrphan, LedgerError, Orders, Report, Row, postgres, sqlite};

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

    pub(super) async fn orders(&self) -> Result<Orders, LedgerError> {
        match self {
            Self::File(file) => locked(file).orders(),
            Self::Database(database) => database.orders().await,
        }
    }

    pub(super) async fn campaigns(
        &self,
        name: Option<&str>,
    ) -> Result<BTreeMap<String, Campaign>, LedgerError> {
        match self {
            Self::File(file) => locked(file).campaigns(name),
            Self::Database(database) => database.campaigns(name).await,
        }
    }

    pub(super) async fn jobs_of(
        &self,
        campaign: &str,
        visit: impl FnMut(Result<(Key, Row), LedgerError>),
    ) -> Result<(), LedgerError> {
        match self {
            Self::File(file) => locked(file).jobs_of(campaign, visit),
            Self::Database(database) => database.jobs_of(campaign, visit).await,
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
