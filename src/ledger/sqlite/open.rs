//! Opening a ledger file: recognised before it is touched, locked, durable, and set up.

use std::fs::{File, OpenOptions, TryLockError};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use rusqlite::{Connection, ErrorCode, TransactionBehavior, params};

use super::{meta_number, record_pause, set_meta_number};
use crate::clock::Millis;
use crate::job::LedgerSecret;
use crate::ledger::{Identity, Standing};

/// Each step leads to the version of its number, from 1.
const STEPS: [&str; 3] = [
    include_str!("../schema/sqlite_1.sql"),
    include_str!("../schema/sqlite_2.sql"),
    include_str!("../schema/sqlite_3.sql"),
];
/// `user_version` of the schema above.
pub(super) const VERSION: i64 = 3;
/// `application_id`: "crCW", so that another program's database is not taken for a ledger.
pub(super) const APPLICATION: i64 = 0x6372_4357;

/// Why a ledger file was not opened. Each says what to do.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another process has it.
    #[error(
        "{0} is in use by another worker (its lock file is held): an embedded ledger serves one process at a time; stop the other one first, let the worker make the links (`bulk --via-queue`), or share a postgres:// ledger"
    )]
    Locked(PathBuf),
    /// It is not a ledger.
    #[error(
        "{0} is not a checkout-worker ledger ({1}): it was left untouched; set ledger.url to another path, or restore the ledger from a backup"
    )]
    Foreign(PathBuf, String),
    /// A newer program wrote it.
    #[error(
        "{0} was written by a newer version of this program (schema {1}, this one knows {VERSION}): it was left untouched; run the newer version"
    )]
    Newer(PathBuf, i64),
    /// It has no content.
    #[error(
        "{0} exists but is empty (0 bytes): a ledger that lost its content would make second links; restore it from a backup, or delete it and start once with --accept-empty-ledger"
    )]
    Empty(PathBuf),
    /// It is not there.
    #[error("there is no ledger at {0}: check ledger.url, or start the worker once")]
    Missing(PathBuf),
    /// On a file system without dependable locks.
    #[error(
        "{0} lies on a network file system ({1}), whose locks cannot be trusted: put the ledger on a local disk, or use a postgres:// ledger"
    )]
    Network(PathBuf, String),
    /// A commit would not be durable.
    #[error(
        "{0} cannot be used: the database refuses journal_mode=WAL with synchronous=FULL (it has {1}), without which a crash could make a second link; put the ledger on a local disk with an ordinary file system"
    )]
    NotDurable(PathBuf, String),
    /// What it holds is not what was written.
    #[error("the ledger {0} is damaged: {1}; keep the file, restore the ledger from a backup")]
    Damaged(PathBuf, String),
    /// The system said no.
    #[error(
        "the ledger {0} cannot be opened: {1}; check that the directory exists and has space, and that this user may write in it and to the ledger's files"
    )]
    Io(PathBuf, String),
}

/// Refuses what cannot be a ledger before anything is written beside it.
pub(super) fn recognise(path: &Path) -> Result<(), OpenError> {
    let Ok(file) = path.metadata() else { return Ok(()) };
    let foreign = |what: &str| OpenError::Foreign(path.to_owned(), what.to_owned());
    if !file.is_file() {
        return Err(foreign("it is not a regular file"));
    }
    if file.len() == 0 {
        return Err(OpenError::Empty(path.to_owned()));
    }
    let mut start = [0; 16];
    let read =
        File::open(path).and_then(|mut file| std::io::Read::read_exact(&mut file, &mut start));
    match read {
        Ok(()) if start == *b"SQLite format 3\0" => Ok(()),
        Ok(()) => Err(foreign("it is no SQLite database")),
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
            Err(foreign("it is no SQLite database"))
        }
        Err(error) => Err(OpenError::Io(path.to_owned(), error.to_string())),
    }
}

/// Holds a ledger for one process, as long as it is kept.
#[derive(Debug)]
pub(super) struct Lock {
    /// Beside the ledger: it stays where the ledger is removed and made anew.
    _beside: File,
    /// On the ledger itself: a file may have two names. SQLite's own locks are of another kind, and are let
    /// go with any of a file's descriptors; so this one is closed last.
    _itself: File,
}

/// Locks a ledger; the file is made where it is missing, for nobody else to read: links are in it.
pub(super) fn lock(path: &Path) -> Result<Lock, OpenError> {
    // By whichever path it is called, there is one lock.
    let whole = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let mut name = whole.into_os_string();
    name.push(".lock");
    let io = |error: std::io::Error| OpenError::Io(path.to_owned(), error.to_string());
    let locked = |name: &Path| {
        let mut options = OpenOptions::new();
        let file = options.create(true).truncate(false).write(true).mode(0o600).open(name);
        let file = file.map_err(io)?;
        match file.try_lock() {
            Ok(()) => Ok(file),
            Err(TryLockError::WouldBlock) => Err(OpenError::Locked(path.to_owned())),
            Err(TryLockError::Error(error)) => Err(io(error)),
        }
    };
    Ok(Lock { _beside: locked(Path::new(&name))?, _itself: locked(path)? })
}

/// Refuses network file systems, as far as `/proc/mounts` knows them.
pub(super) fn refuse_network(path: &Path) -> Result<(), OpenError> {
    let Ok(mounts) = std::fs::read_to_string("/proc/mounts") else { return Ok(()) };
    let parent = path.parent().unwrap_or(path);
    let whole = std::fs::canonicalize(parent)
        .unwrap_or_else(|_| std::env::current_dir().unwrap_or_default().join(parent));
    let kind = mounts
        .lines()
        .filter_map(|line| {
            let mut words = line.split(' ');
            let (point, kind) = (words.nth(1)?, words.next()?);
            whole.starts_with(point).then_some((point.len(), kind))
        })
        .max_by_key(|(length, _)| *length)
        .map(|(_, kind)| kind);
    match kind {
        Some(kind)
            if ["nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "fuse.sshfs"].contains(&kind) =>
        {
            Err(OpenError::Network(path.to_owned(), kind.to_owned()))
        }
        _ => Ok(()),
    }
}

/// Recognises the file before it changes anything, then sets it up.
pub(super) fn prepare(connection: &mut Connection, path: &Path) -> Result<(), OpenError> {
    let foreign = |error: rusqlite::Error| unreadable(path, &error);
    let io = |error: rusqlite::Error| OpenError::Io(path.to_owned(), error.to_string());
    let number = |connection: &Connection, name: &str| {
        connection.pragma_query_value(None, name, |row| row.get::<_, i64>(0))
    };
    let application = number(connection, "application_id").map_err(foreign)?;
    let version = number(connection, "user_version").map_err(foreign)?;
    let tables: i64 = connection
        .query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))
        .map_err(foreign)?;
    match (application, tables) {
        (APPLICATION, _) if version > VERSION => {
            return Err(OpenError::Newer(path.to_owned(), version));
        }
        (APPLICATION, _) | (0, 0) => {}
        _ => {
            return Err(foreign_database(connection, path));
        }
    }
    settings(connection).map_err(io)?;
    durable(connection, path)?;
    if tables == 0 {
        create(connection).map_err(io)?;
        sync_directory(path).map_err(|error| OpenError::Io(path.to_owned(), error.to_string()))?;
    } else if version < VERSION {
        let transaction =
            connection.transaction_with_behavior(TransactionBehavior::Immediate).map_err(io)?;
        take_steps(&transaction, version).map_err(io)?;
        transaction.commit().map_err(io)?;
    }
    Ok(())
}

/// A file that cannot be read as a ledger: for what it is, or because the system says no.
pub(super) fn unreadable(path: &Path, error: &rusqlite::Error) -> OpenError {
    let (path, text) = (path.to_owned(), error.to_string());
    match error.sqlite_error_code() {
        Some(
            ErrorCode::ReadOnly
            | ErrorCode::PermissionDenied
            | ErrorCode::CannotOpen
            | ErrorCode::SystemIoFailure
            | ErrorCode::DatabaseBusy
            | ErrorCode::DatabaseLocked,
        ) => OpenError::Io(path, text),
        Some(_) | None => OpenError::Foreign(path, text),
    }
}

pub(super) fn foreign_database(connection: &Connection, path: &Path) -> OpenError {
    let tables = connection.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0));
    let what = match tables {
        Ok(0) => "an empty database; if it is a copy of a ledger, its -wal file was left behind",
        Ok(1_i64..) => "another program's database",
        Ok(_) | Err(_) => "a database that cannot be read",
    };
    OpenError::Foreign(path.to_owned(), what.to_owned())
}

fn settings(connection: &Connection) -> rusqlite::Result<()> {
    connection.busy_timeout(std::time::Duration::from_secs(5))?;
    connection.pragma_update_and_check(None, "journal_mode", "WAL", |_| Ok(()))?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    // 4 MiB: the operating system keeps the file's pages as well, and more of SQLite's own made nothing faster.
    connection.pragma_update(None, "cache_size", -4_096)
}

/// Makes sure that a commit is on the disk when it returns.
fn durable(connection: &Connection, path: &Path) -> Result<(), OpenError> {
    let io = |error: rusqlite::Error| OpenError::Io(path.to_owned(), error.to_string());
    let mode: String =
        connection.pragma_query_value(None, "journal_mode", |row| row.get(0)).map_err(io)?;
    let synchronous: i64 =
        connection.pragma_query_value(None, "synchronous", |row| row.get(0)).map_err(io)?;
    if mode == "wal" && synchronous == 2 {
        return Ok(());
    }
    Err(OpenError::NotDurable(path.to_owned(), format!("{mode}, {synchronous}")))
}

fn create(connection: &mut Connection) -> rusqlite::Result<()> {
    let mut key = [0_u8; 32];
    getrandom::fill(&mut key)
        .map_err(|error| rusqlite::Error::ToSqlConversionFailure(Box::new(error)))?;
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    take_steps(&transaction, 0)?;
    transaction.execute("INSERT INTO meta VALUES ('secret', ?1)", params![key.as_slice()])?;
    transaction.pragma_update(None, "application_id", APPLICATION)?;
    transaction.commit()
}

/// Brings the schema from a version up to this program's.
fn take_steps(connection: &Connection, from: i64) -> rusqlite::Result<()> {
    for step in STEPS.iter().skip(usize::try_from(from).unwrap_or(0)) {
        connection.execute_batch(step)?;
    }
    connection.pragma_update(None, "user_version", VERSION)
}

/// A new file is durable only when its directory entry is.
fn sync_directory(path: &Path) -> std::io::Result<()> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    File::open(parent.unwrap_or_else(|| Path::new(".")))?.sync_all()
}

/// Begins a new epoch, which voids every lease of earlier ones, and reads what the ledger
/// knows of itself.
pub(super) fn begin(connection: &mut Connection, now: Millis) -> rusqlite::Result<(Identity, u64)> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let epoch = meta_number(&transaction, "epoch")?.unwrap_or(0) + 1;
    set_meta_number(&transaction, "epoch", epoch)?;
    if let Some(alive) = meta_number(&transaction, "alive")? {
        record_pause(&transaction, alive, now)?;
    }
    let secret: Vec<u8> =
        transaction
            .query_row("SELECT value FROM meta WHERE name = 'secret'", [], |row| row.get(0))?;
    let secret: [u8; 32] = secret.try_into().map_err(|secret: Vec<u8>| {
        rusqlite::Error::FromSqlConversionFailure(
            secret.len(),
            rusqlite::types::Type::Blob,
            "its secret is not 32 bytes long".into(),
        )
    })?;
    let unsigned = |number: Option<i64>| u64::try_from(number.unwrap_or(0)).unwrap_or(0);
    let standing = if meta_number(&transaction, "refused")?.is_some() {
        Standing::Refused
    } else if meta_number(&transaction, "adopted")?.is_none() {
        Standing::New
    } else {
        Standing::Established
    };
    let identity = Identity {
        secret: LedgerSecret::new(secret),
        standing,
        ambiguous_attempts: unsigned(meta_number(&transaction, "ambiguous_attempts")?),
        orphan_sessions: unsigned(meta_number(&transaction, "orphan_sessions")?),
        pauses: transaction
            .prepare("SELECT started, ended FROM pause ORDER BY started")?
            .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?
            .collect::<Result<_, _>>()?,
        restored: meta_number(&transaction, "restored")?,
    };
    transaction.commit()?;
    Ok((identity, u64::try_from(epoch).unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sweep_reads_no_rows_but_those_that_go() {
        let connection = Connection::open_in_memory().unwrap();
        take_steps(&connection, 0).unwrap();
        let plan: Vec<String> = connection
            .prepare(&format!("EXPLAIN QUERY PLAN {}", crate::ledger::sqlite::SWEEP))
            .unwrap()
            .query_map(params!["test", 1, 1], |row| row.get(3))
            .unwrap()
            .collect::<Result<_, _>>()
            .unwrap();
        let plan = plan.join("; ");
        assert!(plan.contains("job_mode_ended (mode=? AND ended_at>? AND ended_at<?)"), "{plan}");
        assert!(!plan.contains("SCAN") && !plan.contains("TEMP B-TREE"), "{plan}");
    }

    #[test]
    fn a_file_that_this_user_may_not_write_is_a_ledger_all_the_same() {
        let failure = |code| rusqlite::Error::SqliteFailure(rusqlite::ffi::Error::new(code), None);
        for code in [rusqlite::ffi::SQLITE_READONLY, rusqlite::ffi::SQLITE_CANTOPEN] {
            let error = unreadable(Path::new("ledger.db"), &failure(code));
            assert!(matches!(error, OpenError::Io(..)), "{error}");
        }
        let error = unreadable(Path::new("ledger.db"), &failure(rusqlite::ffi::SQLITE_NOTADB));
        assert!(matches!(error, OpenError::Foreign(..)), "{error}");
    }
}
