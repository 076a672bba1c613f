//! What a look into a ledger from outside finds, whichever back-end it has.

use std::collections::BTreeMap;

use super::{LedgerError, Row};
use crate::clock::Millis;

/// Most lines of damage that are kept.
const MOST: usize = 100;

/// An orphan as it is shown.
#[derive(Debug, Clone)]
pub struct KnownOrphan {
    /// Creem's id of the session.
    pub checkout_id: String,
    /// Why nobody was given it.
    pub reason: String,
    /// When it was recorded.
    pub found_at: Millis,
}

/// What the ledger knows of a campaign: of those of its jobs that a worker has taken.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Campaign {
    /// How many of its jobs are in each state.
    pub states: BTreeMap<String, u64>,
    /// When the first of them was last changed.
    pub first_change: Millis,
    /// And the last.
    pub last_change: Millis,
}

impl Campaign {
    /// Takes note of the jobs in one state.
    pub(super) fn note(&mut self, state: String, jobs: u64, first: Millis, last: Millis) {
        let nothing = self.states.is_empty();
        self.first_change = if nothing { first } else { self.first_change.min(first) };
        self.last_change = self.last_change.max(last);
        *self.states.entry(state).or_default() += jobs;
    }
}

/// What a check of a whole ledger found.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// Rows read.
    pub rows: u64,
    /// Rows per state.
    pub states: BTreeMap<String, u64>,
    /// Ambiguous attempts in the rows.
    pub ambiguous_attempts: u64,
    /// Orphan sessions recorded.
    pub orphan_sessions: u64,
    /// Until when it was restored to, if it ever was.
    pub restored: Option<Millis>,
    /// What is wrong, at most a hundred lines.
    pub damage: Vec<String>,
}

impl Report {
    /// Takes note of a row.
    pub fn note(&mut self, row: Result<Row, LedgerError>) {
        self.rows += 1;
        match row {
            Ok(row) => {
                *self.states.entry(row.state.as_str().to_owned()).or_default() += 1;
                self.ambiguous_attempts += u64::from(row.ambiguous);
            }
            Err(error) if self.damage.len() < MOST => self.damage.push(error.to_string()),
            Err(_) => {}
        }
    }
}
