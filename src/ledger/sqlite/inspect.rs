//! A look into a ledger file beside a running worker: read-only and without its lock.

use std::collections::BTreeMap;
use std::path::Path;

use rusqlite::{Connection, OpenFlags};

use super::open::{APPLICATION, OpenError, VERSION, foreign_database, recognise, unreadable};
use super::{load, own_damage, read, unavailable};
use crate::job::{Key, Mode, RequestId};
use crate::ledger::{Campaign, KnownOrphan, LedgerError, Orders, Report, Row};

/// An open ledger file.
#[derive(Debug)]
pub struct Inspector {
    connection: Connection,
}

impl Inspector {
    /// Opens a ledger file for reading.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        if !path.exists() {
            let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
            return Err(OpenError::Missing(path));
        }
        recognise(path)?;
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let foreign = |error: rusqlite::Error| unreadable(path, &error);
        let connection = Connection::open_with_flags(path, flags).map_err(foreign)?;
        connection.busy_timeout(std::time::Duration::from_secs(5)).map_err(foreign)?;
        let number =
            |name: &str| connection.pragma_query_value(None, name, |row| row.get::<_, i64>(0));
        if number("application_id").map_err(foreign)? != APPLICATION {
            return Err(foreign_database(&connection, path));
        }
        match number("user_version").map_err(foreign)? {
            version if version > VERSION => Err(OpenError::Newer(path.to_owned(), version)),
            _ => Ok(Self { connection }),
        }
    }

    /// Reads one job's row.
    ///
    /// # Errors
    /// See [`LedgerError`].
    pub fn row(&self, key: &Key) -> Result<Option<Row>, LedgerError> {
        load(&self.connection, key).map_err(|error| unavailable(&error))?
    }

    /// What operators have told it.
    ///
    /// # Errors
    /// See [`LedgerError`].
    pub fn orders(&self) -> Result<Orders, LedgerError> {
        super::orders(&self.connection).map_err(|error| unavailable(&error))
    }

    /// The campaigns of its jobs, by name; of all, or of one.
    ///
    /// # Errors
    /// See [`LedgerError`].
    pub fn campaigns(&self, name: Option<&str>) -> Result<BTreeMap<String, Campaign>, LedgerError> {
        const CAMPAIGNS: &str = "SELECT campaign, state, count(*), min(updated_at), max(updated_at)
             FROM job WHERE campaign IS NOT NULL AND (?1 IS NULL OR campaign = ?1) GROUP BY 1, 2";
        if self.version()? < 2 {
            return Ok(BTreeMap::new());
        }
        let query = || {
            let mut campaigns: BTreeMap<String, Campaign> = BTreeMap::new();
            let mut statement = self.connection.prepare(CAMPAIGNS)?;
            let mut rows = statement.query([name])?;
            while let Some(row) = rows.next()? {
                let jobs: i64 = row.get(2)?;
                let campaign = campaigns.entry(row.get(0)?).or_default();
                campaign.note(row.get(1)?, jobs.cast_unsigned(), row.get(3)?, row.get(4)?);
            }
            Ok(campaigns)
        };
        query().map_err(|error| unavailable(&error))
    }

    /// Its schema's. Version 1 knew of no campaigns; a worker brings the file up to date when it opens it.
    fn version(&self) -> Result<i64, LedgerError> {
        let version = self.connection.pragma_query_value(None, "user_version", |row| row.get(0));
        version.map_err(|error| unavailable(&error))
    }

    /// Visits the jobs of a campaign in the order of their ids; a damaged one comes as an error.
    ///
    /// # Errors
    /// See [`LedgerError`].
    pub fn jobs_of(
        &self,
        campaign: &str,
        visit: impl FnMut(Result<(Key, Row), LedgerError>),
    ) -> Result<(), LedgerError> {
        const JOBS: &str =
            "SELECT mode, request_id, state, updated_at, ended_at, ambiguous, body, sum
             FROM job WHERE campaign = ?1 ORDER BY mode, request_id";
        if self.version()? < 2 {
            return Ok(());
        }
        self.visit(JOBS, [campaign], visit)
    }

    /// The sessions nobody was given for one job.
    ///
    /// # Errors
    /// See [`LedgerError`].
    pub fn orphans(&self, key: &Key) -> Result<Vec<KnownOrphan>, LedgerError> {
        let query = || {
            self.connection
                .prepare("SELECT checkout_id, reason, found_at FROM orphan WHERE mode = ?1 AND request_id = ?2 ORDER BY id")?
                .query_map([key.mode.as_str(), key.request_id.as_str()], |row| {
                    Ok(KnownOrphan { checkout_id: row.get(0)?, reason: row.get(1)?, found_at: row.get(2)? })
                })?
                .collect::<Result<_, _>>()
        };
        query().map_err(|error| unavailable(&error))
    }

    /// Visits every row; a damaged one comes as an error.
    ///
    /// # Errors
    /// See [`LedgerError`].
    pub fn rows(
        &self,
        visit: impl FnMut(Result<(Key, Row), LedgerError>),
    ) -> Result<(), LedgerError> {
        const ALL: &str =
            "SELECT mode, request_id, state, updated_at, ended_at, ambiguous, body, sum FROM job";
        self.visit(ALL, [], visit)
    }

    fn visit(
        &self,
        sql: &str,
        parameters: impl rusqlite::Params,
        mut visit: impl FnMut(Result<(Key, Row), LedgerError>),
    ) -> Result<(), LedgerError> {
        let query = || -> rusqlite::Result<()> {
            let mut statement = self.connection.prepare(sql)?;
            let mut rows = statement.query(parameters)?;
            while let Some(row) = rows.next()? {
                let (mode, id): (String, String) = (row.get(0)?, row.get(1)?);
                let (Some(mode), Ok(request_id)) = (Mode::parse(&mode), RequestId::parse(&id))
                else {
                    visit(Err(LedgerError::DamagedRow("a row's key is not a job's".to_owned())));
                    continue;
                };
                let key = Key { mode, request_id };
                let row = read(row, 2, &key).map_or_else(own_damage, |row| Ok(Ok(row)))?;
                visit(row.map(|row| (key, row)));
            }
            Ok(())
        };
        query().map_err(|error| unavailable(&error))
    }

    /// Reads the whole file: SQLite's own integrity check, then every row's checksum.
    #[must_use]
    pub fn report(&self) -> Report {
        let mut report = Report::default();
        let integrity = || -> rusqlite::Result<Vec<String>> {
            self.connection
                .prepare("PRAGMA integrity_check(20)")?
                .query_map([], |row| row.get(0))?
                .collect::<Result<_, _>>()
        };
        match integrity() {
            Ok(lines) => report.damage.extend(lines.into_iter().filter(|line| line != "ok")),
            Err(error) => report.damage.push(error.to_string()),
        }
        let visited = self.rows(|row| report.note(row.map(|(_, row)| row)));
        if let Err(error) = visited {
            report.damage.push(error.to_string());
        }
        let orphans =
            self.connection.query_row("SELECT count(*) FROM orphan", [], |row| row.get(0));
        match orphans {
            Ok(orphans) => report.orphan_sessions = i64::cast_unsigned(orphans),
            Err(error) => report.damage.push(format!("orphan sessions: {error}")),
        }
        match super::meta_number(&self.connection, "restored") {
            Ok(restored) => report.restored = restored,
            Err(error) => report.damage.push(format!("what it knows of itself: {error}")),
        }
        report
    }
}
