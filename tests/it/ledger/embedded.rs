//! What only the embedded ledger has to stand.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;

use creem_checkout_worker::clock::ManualClock;
use creem_checkout_worker::job::Status;
use creem_checkout_worker::ledger::sqlite::inspect::Inspector;
use creem_checkout_worker::ledger::sqlite::{OpenError, SqliteLedger};
use creem_checkout_worker::ledger::*;
use tempfile::TempDir;

use super::bench::{Backend, Bench, START};
use super::key;
use super::promises::link;

fn open(path: &Path) -> Result<SqliteLedger, OpenError> {
    SqliteLedger::open(path, Arc::new(ManualClock::at(START)), |_| {})
}

#[tokio::test]
async fn a_second_worker_on_the_same_file_is_refused_while_readers_are_not() {
    let bench = Bench::new(&Backend::Sqlite, OnUnknown::Retry).await;
    bench.end("a", link("ch_1")).await;
    assert!(matches!(open(&bench.path()), Err(OpenError::Locked(_))));
    // Nor by another name of the same file.
    let other_name = bench.path().with_file_name("other.db");
    std::fs::hard_link(bench.path(), &other_name).unwrap();
    assert!(matches!(open(&other_name), Err(OpenError::Locked(_))));
    // Nor one that was put in its place while it is worked on.
    let moved = bench.path().with_file_name("moved.db");
    std::fs::rename(bench.path(), &moved).unwrap();
    assert!(matches!(open(&bench.path()), Err(OpenError::Locked(_))));
    assert!(!bench.path().exists(), "nor is one made");
    std::fs::rename(&moved, bench.path()).unwrap();
    let mode = std::fs::metadata(bench.path()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "links are in it");
    assert_eq!(bench.row("a").await.state, State::Ended(Status::Succeeded));
    assert_eq!(Inspector::open(&bench.path()).unwrap().report().damage, Vec::<String>::new());
}

#[test]
fn what_is_not_this_programs_ledger_is_refused_and_left_as_it_was() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("ledger.db");
    let cases: [(&str, &dyn Fn()); 5] = [
        ("short", &|| std::fs::write(&path, "hello").unwrap()),
        ("empty", &|| std::fs::write(&path, "").unwrap()),
        ("garbage", &|| std::fs::write(&path, "x".repeat(5000)).unwrap()),
        ("foreign", &|| {
            let other = rusqlite::Connection::open(&path).unwrap();
            other.execute_batch("CREATE TABLE theirs (x)").unwrap();
        }),
        ("newer", &|| {
            drop(open(&path).unwrap());
            let other = rusqlite::Connection::open(&path).unwrap();
            other.pragma_update(None, "user_version", 99).unwrap();
        }),
    ];
    for (name, prepare) in cases {
        for suffix in ["", "-wal", "-shm"] {
            drop(std::fs::remove_file(directory.path().join(format!("ledger.db{suffix}"))));
        }
        prepare();
        let before = std::fs::read(&path).unwrap();
        let error = open(&path).expect_err(name).to_string();
        assert_eq!(std::fs::read(&path).unwrap(), before, "{name} was left untouched");
        assert!(!error.contains('\n'), "one line: {error}");
    }
}

#[tokio::test]
async fn a_damaged_row_is_noticed_when_it_is_read_and_by_the_check() {
    let mut bench = Bench::new(&Backend::Sqlite, OnUnknown::Retry).await;
    bench.end("a", link("ch_1")).await;
    bench.end("b", link("ch_2")).await;
    bench.ledger = None;
    let connection = rusqlite::Connection::open(bench.path()).unwrap();
    connection
        .execute("UPDATE job SET body = CAST(replace(CAST(body AS TEXT), 'ch_1', 'ch_7') AS BLOB) WHERE request_id = 'a'", [])
        .unwrap();
    drop(connection);
    bench.reopen().await;
    let request = Bench::request(bench.claimant("a", 1));
    let error = bench.ledger().claim(request).await.unwrap_err();
    assert!(matches!(&error, LedgerError::DamagedRow(text) if text.contains("test/a")), "{error}");
    assert!(matches!(bench.claim("b").await, Claim::Settled(_)), "the next job is served");
    let report = Inspector::open(&bench.path()).unwrap().report();
    assert_eq!((report.rows, report.damage.len()), (2, 1));
}

#[tokio::test]
async fn every_flipped_byte_of_a_row_is_noticed() {
    let bench = Bench::new(&Backend::Sqlite, OnUnknown::Retry).await;
    bench.end("a", link("ch_1")).await;
    let connection = rusqlite::Connection::open(bench.path()).unwrap();
    let body: Vec<u8> = connection.query_row("SELECT body FROM job", [], |row| row.get(0)).unwrap();
    for at in 0..body.len() {
        let mut flipped = body.clone();
        flipped[at] ^= 0x10;
        connection.execute("UPDATE job SET body = ?1", [&flipped]).unwrap();
        let read = Inspector::open(&bench.path()).unwrap().row(&key("a"));
        assert!(matches!(read, Err(LedgerError::DamagedRow(_))), "byte {at}");
    }
    connection.execute("UPDATE job SET body = ?1", [&body]).unwrap();
    for change in [
        "state = 'rejected'",
        "ambiguous = 9",
        "ended_at = 5",
        "updated_at = 5",
        "request_id = 'b'",
    ] {
        connection.execute_batch(&format!("BEGIN; UPDATE job SET {change}")).unwrap();
        connection.execute_batch("COMMIT").unwrap();
        let damage = Inspector::open(&bench.path()).unwrap().report().damage;
        assert_eq!(damage.len(), 1, "{change}: {damage:?}");
        connection.execute("UPDATE job SET state = 'succeeded', ambiguous = 0, ended_at = ?1, updated_at = ?1, request_id = 'a'", [START]).unwrap();
    }
}

#[tokio::test]
async fn a_ledger_that_cannot_write_is_unavailable_and_counts_nothing() {
    let bench = Bench::new(&Backend::Sqlite, OnUnknown::Retry).await;
    bench.end("a", link("ch_1")).await;
    let limit = rusqlite::Connection::open(bench.path()).unwrap();
    limit.execute_batch("BEGIN IMMEDIATE").unwrap();
    let request = Bench::request(bench.claimant("b", 1));
    let error = bench.ledger().claim(request.clone()).await.unwrap_err();
    assert!(matches!(error, LedgerError::Unavailable(_)), "{error}");
    limit.execute_batch("ROLLBACK").unwrap();
    assert!(
        matches!(bench.ledger().claim(request).await.unwrap(), Claim::Granted(lease) if lease.attempt == 1)
    );
    assert!(matches!(bench.claim("a").await, Claim::Settled(_)));
}

#[tokio::test]
async fn a_ledger_of_the_version_before_is_brought_up_to_date_and_keeps_its_links() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("ledger.db");
    let bench = Bench::new(&Backend::Sqlite, OnUnknown::Retry).await;
    let stored = bench.end("a", link("ch_1")).await;
    std::fs::copy(bench.path(), &path).unwrap();
    std::fs::copy(bench.path().with_extension("db-wal"), path.with_extension("db-wal")).unwrap();
    let before = rusqlite::Connection::open(&path).unwrap();
    before
        .execute_batch("DROP INDEX job_mode_ended; CREATE INDEX job_ended ON job (ended_at) WHERE ended_at IS NOT NULL;
            DROP INDEX job_campaign; ALTER TABLE job DROP COLUMN campaign; PRAGMA user_version = 1")
        .unwrap();
    drop(before);
    assert!(Inspector::open(&path).unwrap().campaigns(None).unwrap().is_empty());
    drop(open(&path).unwrap());
    let inspector = Inspector::open(&path).unwrap();
    let row = inspector.row(&key("a")).unwrap().unwrap();
    assert_eq!(row.reply, Some(stored.reply));
    assert!(inspector.campaigns(None).unwrap().is_empty());
    assert_eq!(inspector.report().damage, Vec::<String>::new());
}
