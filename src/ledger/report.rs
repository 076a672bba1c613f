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
