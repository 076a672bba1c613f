//! The embedded ledger: one SQLite file, one worker process.
//!
//! WAL with `synchronous=FULL`: a commit is on the disk when it returns, which grouping makes
//! cheap. A lock file beside the database keeps a second worker out, while [`inspect`] needs no
//! lock and works beside a running worker.

pub mod beside;
pub mod inspect;
mod open;

use std::path::Path;

use futures::FutureExt as _;
use futures::future::BoxFuture;
use rusqlite::{Connection, ErrorCode, OptionalExtension as _, TransactionBehavior, params};

use crate::clock::{Millis, SharedClock};
use crate::job::{Key, Mode};
use crate::ledger::group::{Commit, Committed, Group, Store};
use crate::ledger::retention::{Cutoffs, RETENTION, Retention, SWEPT_OF_ALL, swept_name};
use crate::ledger::row::{Columns, Row};
use crate::ledger::transition::{self, Context, Effect, Forgotten, Swept};
use crate::ledger::{
    Adoption, Answer, CANCELLED, Command, Identity, Ledger, LedgerError, Orders, OwnCommand,
    PAUSED, SKEW, SKEW_AT, Standing, WAS_PAUSED, pause_name, was_paused_prefix,
};
pub use open::OpenError;
use open::{begin, lock, prepare, recognise, refuse_network};

/// How often the time of the last commit is noted, for the account of the time in which the
/// worker was down.
const ALIVE_EVERY: Millis = 1_000;
/// Rows per sweep: short enough that no job notices.
const SWEPT_AT_ONCE: i64 = 500;
const SWEEP: &str = "
    DELETE FROM job WHERE mode = ?1 AND request_id IN (
        SELECT request_id FROM job
        WHERE mode = ?1 AND ended_at IS NOT NULL AND ended_at < ?2 AND state <> 'unresolved'
        ORDER BY ended_at LIMIT ?3)";

/// An open embedded ledger.
#[derive(Debug)]
pub struct SqliteLedger {
    group: Group,
    identity: Identity,
    /// Held as long as the ledger is open; the operating system frees it when the process dies.
    _lock: open::Lock,
}

impl SqliteLedger {
    /// Opens, and if need be creates, the ledger at `path`.
    ///
    /// # Errors
    /// See [`OpenError`]; a file that is refused is left as it was.
    pub fn open(
        path: &Path,
        clock: SharedClock,
        observe: impl Fn(Commit) + Send + 'static,
    ) -> Result<Self, OpenError> {
        let io = |error: &dyn std::fmt::Display| OpenError::Io(path.to_owned(), error.to_string());
        refuse_network(path)?;
        if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            std::fs::create_dir_all(parent).map_err(|error| io(&error))?;
        }
        recognise(path)?;
        let lock = lock(path)?;
        let mut connection = Connection::open(path).map_err(|error| io(&error))?;
        prepare(&mut connection, path)?;
        let (identity, epoch) = begin(&mut connection, clock.now()).map_err(|error| {
            match unavailable(&error) {
                // What was read makes no sense, or the database says so itself.
                _ if error.sqlite_error().is_none() => {
                    OpenError::Damaged(path.to_owned(), error.to_string())
                }
                LedgerError::Damaged(what) => OpenError::Damaged(path.to_owned(), what),
                LedgerError::Unavailable(_)
                | LedgerError::DamagedRow(_)
                | LedgerError::Stopped(_) => io(&error),
            }
        })?;
        let swept = swept(&connection).map_err(|error| io(&error))?;
        let forgotten = Forgotten { restored: identity.restored, swept };
        let store = SqliteStore { connection, clock, epoch, alive: 0, forgotten };
        let group = Group::start(store, observe).map_err(|error| io(&error))?;
        Ok(Self { group, identity, _lock: lock })
    }
}

impl Ledger for SqliteLedger {
    fn execute(&self, command: Command) -> BoxFuture<'static, Result<Answer, LedgerError>> {
        self.group.execute(command)
    }

    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn standing(&self) -> BoxFuture<'static, Result<Standing, LedgerError>> {
        // Nobody else can decide about it while this process has it, and this one goes on after a refusal
        // only if an operator has said so.
        let standing = match self.identity.standing {
            Standing::New | Standing::Refused => Standing::New,
            Standing::Established => Standing::Established,
        };
        std::future::ready(Ok(standing)).boxed()
    }

    fn orders(&self) -> BoxFuture<'static, Result<Orders, LedgerError>> {
        self.group.orders()
    }

    fn sweep(&self, retention: Retention) -> BoxFuture<'static, Result<usize, LedgerError>> {
        self.group.sweep(retention)
    }
}

fn meta_number(connection: &Connection, name: &str) -> rusqlite::Result<Option<i64>> {
    let bytes: Option<Vec<u8>> = connection
        .prepare_cached("SELECT value FROM meta WHERE name = ?1")?
        .query_row([name], |row| row.get(0))
        .optional()?;
    Ok(bytes.and_then(|bytes| bytes.try_into().ok()).map(i64::from_le_bytes))
}

fn set_meta_number(connection: &Connection, name: &str, number: i64) -> rusqlite::Result<()> {
    connection
        .prepare_cached("INSERT INTO meta VALUES (?1, ?2) ON CONFLICT (name) DO UPDATE SET value = excluded.value")?
        .execute(params![name, number.to_le_bytes().as_slice()])
        .map(|_| ())
}

fn record_pause(connection: &Connection, from: Millis, to: Millis) -> rusqlite::Result<()> {
    if to <= from {
        return Ok(());
    }
    connection
        .prepare_cached(
            "INSERT INTO pause VALUES (?1, ?2) ON CONFLICT (started) DO UPDATE SET ended = max(ended, excluded.ended)",
        )?
        .execute([from, to])
        .map(|_| ())
}

struct SqliteStore {
    connection: Connection,
    clock: SharedClock,
    epoch: u64,
    alive: Millis,
    /// `restored` as it was when the ledger was opened: the command that changes it is run without a
    /// worker.
    forgotten: Forgotten,
}

impl Store for SqliteStore {
    fn commit(&mut self, batch: &[Command]) -> Result<Committed, LedgerError> {
        self.abandon()?;
        self.apply_all(batch).map_err(|error| unavailable(&error))
    }

    fn orders(&mut self) -> Result<Orders, LedgerError> {
        orders(&self.connection).map_err(|error| unavailable(&error))
    }

    fn sweep(&mut self, retention: Retention) -> Result<usize, LedgerError> {
        self.abandon()?;
        let now = self.clock.now();
        let gone = sweep(&mut self.connection, retention, now);
        let gone = gone.map_err(|error| unavailable(&error))?;
        self.forgotten.swept = swept(&self.connection).map_err(|error| unavailable(&error))?;
        Ok(gone)
    }
}

/// Removes old rows and says until when, in one transaction.
fn sweep(connection: &mut Connection, own: Retention, now: Millis) -> rusqlite::Result<usize> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    set_meta_number(&transaction, &own.name(), now)?;
    let cutoffs = Cutoffs::new(&meta_numbers(&transaction, &[RETENTION])?, own, now);
    let mut gone = 0;
    for (mode, before) in cutoffs.of_modes() {
        let of_mode = transaction.execute(SWEEP, params![mode.as_str(), before, SWEPT_AT_ONCE])?;
        if of_mode > 0 {
            let so_far = meta_number(&transaction, swept_name(mode))?.unwrap_or(before);
            set_meta_number(&transaction, swept_name(mode), so_far.max(before))?;
        }
        gone += of_mode;
    }
    let before = cutoffs.of_all();
    transaction.execute("DELETE FROM pause WHERE ended < ?1", [before])?;
    let ended = meta_numbers(&transaction, &[CANCELLED, WAS_PAUSED])?;
    let ended = ended.into_iter().filter(|(_, number)| *number < before).map(|(name, _)| name);
    for name in ended.chain(cutoffs.over) {
        forget(&transaction, &name)?;
    }
    transaction.commit()?;
    Ok(gone)
}

/// Until when outcomes were swept.
fn swept(connection: &Connection) -> rusqlite::Result<Swept> {
    let mut swept = Swept::default();
    let of_all = meta_number(connection, SWEPT_OF_ALL)?;
    for mode in Mode::ALL {
        swept.note(mode, of_all.max(meta_number(connection, swept_name(mode))?));
    }
    Ok(swept)
}

impl SqliteStore {
    /// Ends a transaction that an earlier error left open; its callers were told so.
    fn abandon(&self) -> Result<(), LedgerError> {
        if self.connection.is_autocommit() {
            return Ok(());
        }
        self.connection.execute_batch("ROLLBACK").map_err(|error| unavailable(&error))
    }

    fn apply_all(&mut self, batch: &[Command]) -> rusqlite::Result<Committed> {
        let now = self.clock.now();
        let transaction =
            self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let context = Context { now, epoch: Some(self.epoch), forgotten: self.forgotten };
        let (mut ambiguous, mut orphans) = (0_i64, 0_i64);
        let mut answers = Vec::with_capacity(batch.len());
        for command in batch {
            let command = match command {
                Command::Job(command) => command,
                Command::Own(command) => {
                    carry_out_own(&transaction, command, context.now)?;
                    answers.push(Ok(Answer::Done));
                    continue;
                }
            };
            let row = match load(&transaction, command.key())? {
                Ok(row) => row,
                Err(error) => {
                    answers.push(Err(error));
                    continue;
                }
            };
            let effect = transition::apply(row, command, context);
            ambiguous += i64::from(effect.ambiguous);
            orphans += record(&transaction, command.key(), &effect, context.now)?;
            answers.push(Ok(effect.answer));
        }
        for (name, more) in [("ambiguous_attempts", ambiguous), ("orphan_sessions", orphans)] {
            if more > 0 {
                let so_far = meta_number(&transaction, name)?.unwrap_or(0);
                set_meta_number(&transaction, name, so_far + more)?;
            }
        }
        if context.now - self.alive >= ALIVE_EVERY {
            set_meta_number(&transaction, "alive", context.now)?;
            self.alive = context.now;
        }
        transaction.commit()?;
        Ok(Committed {
            answers,
            ambiguous: ambiguous.cast_unsigned(),
            orphans: orphans.cast_unsigned(),
        })
    }
}

fn orders(connection: &Connection) -> rusqlite::Result<Orders> {
    let mut orders = Orders::default();
    for (name, number) in meta_numbers(connection, &[PAUSED, WAS_PAUSED, CANCELLED, SKEW])? {
        orders.note(&name, number);
    }
    Ok(orders)
}

/// What is kept under names that begin with one of these.
fn meta_numbers(
    connection: &Connection,
    beginnings: &[&str],
) -> rusqlite::Result<Vec<(String, i64)>> {
    let mut statement = connection
        .prepare_cached("SELECT name, value FROM meta WHERE substr(name, 1, length(?1)) = ?1")?;
    let mut numbers = Vec::new();
    for beginning in beginnings {
        let mut rows = statement.query([beginning])?;
        while let Some(row) = rows.next()? {
            let (name, value): (String, Vec<u8>) = (row.get(0)?, row.get(1)?);
            numbers.extend(value.try_into().ok().map(|bytes| (name, i64::from_le_bytes(bytes))));
        }
    }
    Ok(numbers)
}

fn forget(connection: &Connection, name: &str) -> rusqlite::Result<()> {
    connection.execute("DELETE FROM meta WHERE name = ?1", [name]).map(|_| ())
}

/// Carries out what is about no job.
fn carry_out_own(
    connection: &Connection,
    command: &OwnCommand,
    now: Millis,
) -> rusqlite::Result<()> {
    match command {
        OwnCommand::Pause { from, to } => record_pause(connection, *from, *to),
        OwnCommand::Keep(retention) => set_meta_number(connection, &retention.name(), now),
        OwnCommand::Probe => set_meta_number(connection, "probed", now),
        OwnCommand::Adopt(adoption) => adopt(connection, *adoption, now),
        // What was told before is not taken back by an earlier time.
        OwnCommand::Restored { until } => {
            let before = meta_number(connection, "restored")?.unwrap_or(0);
            set_meta_number(connection, "restored", before.max(*until))
        }
        OwnCommand::PauseLane(lane) => match meta_number(connection, pause_name(*lane))? {
            Some(_) => Ok(()),
            None => set_meta_number(connection, pause_name(*lane), now),
        },
        OwnCommand::ResumeLane(lane) => {
            // First, so that a pause whose end is cut off is still one.
            if let Some(from) = meta_number(connection, pause_name(*lane))?.filter(|at| *at < now) {
                set_meta_number(connection, &format!("{}{from}", was_paused_prefix(*lane)), now)?;
            }
            forget(connection, pause_name(*lane))
        }
        OwnCommand::Skew { ahead } => {
            set_meta_number(connection, SKEW, *ahead)?;
            set_meta_number(connection, SKEW_AT, now)
        }
        OwnCommand::CancelCampaign { campaign, before } => {
            set_meta_number(connection, &format!("{CANCELLED}{campaign}"), *before)
        }
        OwnCommand::ReinstateCampaign { campaign } => {
            forget(connection, &format!("{CANCELLED}{campaign}"))
        }
    }
}

fn adopt(connection: &Connection, adoption: Adoption, now: Millis) -> rusqlite::Result<()> {
    match adoption {
        Adoption::Adopted => set_meta_number(connection, "adopted", now),
        Adoption::Refused => {
            set_meta_number(connection, "refused", now)?;
            forget(connection, "adopted")
        }
        Adoption::Accepted => {
            forget(connection, "refused")?;
            set_meta_number(connection, "adopted", now)
        }
    }
}

/// Writes what an effect changed; returns how many orphans are new.
fn record(
    connection: &Connection,
    key: &Key,
    effect: &Effect,
    now: Millis,
) -> rusqlite::Result<i64> {
    if let Some(row) = &effect.write {
        store(connection, key, row)?;
    }
    let Some(orphan) = &effect.orphan else { return Ok(0) };
    let added = connection
        .prepare_cached(
            "INSERT OR IGNORE INTO orphan (mode, request_id, fence, checkout_id, reason, found_at)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
        )?
        .execute(params![
            key.mode.as_str(),
            key.request_id.as_str(),
            orphan.fence.cast_signed(),
            orphan.checkout_id,
            orphan.reason,
            now
        ])?;
    Ok(i64::try_from(added).unwrap_or(0))
}

const LOAD: &str = "SELECT state, updated_at, ended_at, ambiguous, body, sum FROM job WHERE mode = ?1 AND request_id = ?2";

fn load(connection: &Connection, key: &Key) -> rusqlite::Result<Result<Option<Row>, LedgerError>> {
    connection
        .prepare_cached(LOAD)?
        .query_row([key.mode.as_str(), key.request_id.as_str()], |row| Ok(read(row, 0, key)))
        .optional()?
        .transpose()
        .map_or_else(own_damage, |row| Ok(Ok(row)))
}

/// Why a row was not read.
enum Unread {
    /// The database did not give it.
    Database(rusqlite::Error),
    /// It is not what was written.
    Damaged(LedgerError),
}

impl From<rusqlite::Error> for Unread {
    fn from(error: rusqlite::Error) -> Self {
        Self::Database(error)
    }
}

/// Tells a damaged row from a database in trouble: a column of a type or a value that was never
/// written is the row's own fault.
fn own_damage<T>(unread: Unread) -> rusqlite::Result<Result<T, LedgerError>> {
    match unread {
        Unread::Damaged(error) => Ok(Err(error)),
        Unread::Database(error @ rusqlite::Error::SqliteFailure(..)) => Err(error),
        Unread::Database(error) => Ok(Err(LedgerError::DamagedRow(format!("a row has {error}")))),
    }
}

/// Reads and verifies a row whose columns begin at `at`.
fn read(row: &rusqlite::Row<'_>, at: usize, key: &Key) -> Result<Row, Unread> {
    let text = |at| -> Result<String, Unread> { Ok(row.get::<_, String>(at)?) };
    let state = text(at)?;
    let blob = |at| -> Result<Vec<u8>, Unread> { Ok(row.get::<_, Vec<u8>>(at)?) };
    let (body, sum) = (blob(at + 4)?, blob(at + 5)?);
    let columns = Columns {
        state: &state,
        updated_at: row.get(at + 1)?,
        ended_at: row.get(at + 2)?,
        ambiguous: row.get(at + 3)?,
        body: &body,
    };
    let damaged =
        |what: &str| Unread::Damaged(LedgerError::DamagedRow(format!("the row of {key} {what}")));
    if sum != columns.checksum(key.mode.as_str(), key.request_id.as_str()) {
        return Err(damaged("does not match its checksum"));
    }
    Row::decode(&columns).map_err(|what| damaged(&format!("has {what}")))
}

fn store(connection: &Connection, key: &Key, row: &Row) -> rusqlite::Result<()> {
    let body = row.encode();
    let columns = row.columns(&body);
    let sum = columns.checksum(key.mode.as_str(), key.request_id.as_str());
    connection
        .prepare_cached(
            "INSERT INTO job (mode, request_id, state, updated_at, ended_at, ambiguous, body, sum, campaign)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)
             ON CONFLICT (mode, request_id) DO UPDATE SET state = excluded.state,
                 updated_at = excluded.updated_at, ended_at = excluded.ended_at,
                 ambiguous = excluded.ambiguous, body = excluded.body, sum = excluded.sum,
                 campaign = excluded.campaign",
        )?
        .execute(params![
            key.mode.as_str(),
            key.request_id.as_str(),
            columns.state,
            columns.updated_at,
            columns.ended_at,
            columns.ambiguous,
            columns.body,
            sum.as_slice(),
            row.campaign
        ])
        .map(|_| ())
}

/// Sorts SQLite's errors into "later" and "never".
fn unavailable(error: &rusqlite::Error) -> LedgerError {
    let extended = if let rusqlite::Error::SqliteFailure(failure, _) = error {
        failure.extended_code
    } else {
        0
    };
    let synced = [rusqlite::ffi::SQLITE_IOERR_FSYNC, rusqlite::ffi::SQLITE_IOERR_DIR_FSYNC];
    match error.sqlite_error_code() {
        Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => {
            LedgerError::Damaged(error.to_string())
        }
        // After a failed sync nobody can say which pages are on the disk: only a restart, which
        // reads them back, may go on.
        _ if synced.contains(&extended) => LedgerError::Stopped(format!(
            "a disk sync failed ({error}); restart the worker once the disk is well"
        )),
        Some(ErrorCode::DiskFull) => {
            LedgerError::Unavailable(format!("the disk is full ({error}): free some space"))
        }
        Some(ErrorCode::ReadOnly) => {
            LedgerError::Unavailable(format!("the file is read-only ({error}): make it writable"))
        }
        _ => LedgerError::Unavailable(error.to_string()),
    }
}
