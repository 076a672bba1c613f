//! What a ledger promises, on the embedded one; and what that has to stand besides.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use creem_checkout_worker::clock::{Clock as _, ManualClock, SharedClock};
use creem_checkout_worker::job::json::Node;
use creem_checkout_worker::job::{
    Ending, Fingerprint, Key, Lane, Mode, Problem, RequestId, Status,
};
use creem_checkout_worker::ledger::sqlite::inspect::Inspector;
use creem_checkout_worker::ledger::sqlite::{OpenError, SqliteLedger};
use creem_checkout_worker::ledger::*;
use tempfile::TempDir;

const START: i64 = 1_795_370_400_000;

pub(crate) fn key(id: &str) -> Key {
    Key { mode: Mode::Test, request_id: RequestId::parse(id).unwrap() }
}

/// The row of a test job, read beside the worker.
pub(crate) fn row(path: &Path, id: &str) -> Row {
    Inspector::open(path).unwrap().row(&key(id)).unwrap().expect("the ledger has a row")
}

/// A ledger under test that can be closed and opened again, as a new process would.
struct Bench {
    directory: TempDir,
    clock: Arc<ManualClock>,
    ledger: Option<Arc<dyn Ledger>>,
    on_unknown: OnUnknown,
}

impl Bench {
    fn new(on_unknown: OnUnknown) -> Self {
        let mut bench = Self {
            directory: TempDir::new().unwrap(),
            clock: Arc::new(ManualClock::at(START)),
            ledger: None,
            on_unknown,
        };
        bench.reopen();
        bench
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("ledger.db")
    }

    fn reopen(&mut self) {
        self.ledger = None;
        let clock: SharedClock = self.clock.clone();
        // The last ledger's thread closes the file in its own time; its lock goes with it.
        for _ in 0..200 {
            match SqliteLedger::open(&self.path(), clock.clone(), |_| {}) {
                Ok(ledger) => {
                    self.ledger = Some(Arc::new(ledger));
                    return;
                }
                Err(OpenError::Locked(_)) => std::thread::sleep(Duration::from_millis(5)),
                Err(error) => panic!("{error}"),
            }
        }
        panic!("the lock was never freed");
    }

    fn ledger(&self) -> &Arc<dyn Ledger> {
        self.ledger.as_ref().unwrap()
    }

    fn claimant(&self, id: &str, units: u32) -> Claimant {
        let node = Node::parse(&format!(r#"{{"request_id":"{id}","units":{units}}}"#)).unwrap();
        Claimant {
            key: key(id),
            fingerprint: Fingerprint::of(node.as_object().unwrap(), &self.ledger().identity().key),
            product_id: "prod_1".into(),
            lane: Lane::Interactive,
            campaign: None,
            picked_up_at: self.clock.now(),
            redelivered: false,
            on_unknown: self.on_unknown,
        }
    }

    fn request(claimant: Claimant) -> ClaimRequest {
        ClaimRequest { claimant, token: token(), lease: Duration::from_secs(25), max_attempts: 8 }
    }

    async fn claim(&self, id: &str) -> Claim {
        self.claim_as(self.claimant(id, 1)).await
    }

    async fn claim_as(&self, claimant: Claimant) -> Claim {
        self.ledger().claim(Self::request(claimant)).await.unwrap()
    }

    async fn lease(&self, id: &str) -> Lease {
        let claim = self.claim(id).await;
        let Claim::Granted(lease) = claim else { panic!("{claim:?}") };
        lease
    }

    async fn settle(&self, id: &str, lease: Lease, attempt: Attempt, next: Next) -> Settle {
        let request =
            SettleRequest { key: key(id), lease, attempt, next, on_unknown: self.on_unknown };
        self.ledger().settle(request).await.unwrap()
    }

    async fn end(&self, id: &str, ending: Ending) -> Stored {
        let lease = self.lease(id).await;
        let settle = self.settle(id, lease, Attempt::Counted, Next::End(ending)).await;
        let Settle::Ended(stored) = settle else { panic!("{settle:?}") };
        stored
    }

    async fn close(&self, id: &str, ending: Ending) -> Claim {
        let request = CloseRequest { claimant: self.claimant(id, 1), ending };
        self.ledger().close(request).await.unwrap()
    }

    fn later(&self) {
        self.clock.advance(Duration::from_secs(1));
    }
}

fn link(id: &str) -> Ending {
    Ending::Succeeded { checkout_id: id.into(), checkout_url: format!("https://creem.io/{id}") }
}

fn rejected() -> Ending {
    Ending::Rejected(Problem::new("creem_rejected", "no"))
}

fn failed() -> Ending {
    Ending::Failed(Problem::new("attempts_exhausted", "no"))
}

fn expired() -> Ending {
    Ending::Expired(Problem::new("deadline_passed", "no"))
}

fn unknown() -> Attempt {
    Attempt::Ambiguous { checkout_id: None, reason: "no answer".into() }
}

fn wait(until: i64) -> Next {
    Next::Wait { until }
}

#[tokio::test]
async fn a_link_is_stored_once_and_repeated_byte_for_byte_for_ever() {
    let mut bench = Bench::new(OnUnknown::Retry);
    let stored = bench.end("a", link("ch_1")).await;
    assert_eq!(stored.status, Status::Succeeded);
    bench.later();
    assert_eq!(bench.claim("a").await, Claim::Settled(stored.clone()));
    bench.reopen();
    assert_eq!(bench.claim("a").await, Claim::Settled(stored.clone()));
    assert_eq!(bench.close("a", expired()).await, Claim::Settled(stored));
}

#[tokio::test]
async fn another_body_is_a_conflict_that_names_the_fields_and_touches_nothing() {
    let bench = Bench::new(OnUnknown::Retry);
    let stored = bench.end("a", link("ch_1")).await;
    bench.later();
    let conflict = bench.claim_as(bench.claimant("a", 2)).await;
    assert_eq!(conflict, Claim::Conflict(vec!["units".into()]));
    assert_eq!(bench.claim("a").await, Claim::Settled(stored));
    // In flight and waiting, the id may yet have a link: also a conflict.
    let lease = bench.lease("b").await;
    assert!(matches!(bench.claim_as(bench.claimant("b", 2)).await, Claim::Conflict(_)));
    bench.settle("b", lease, Attempt::Counted, wait(START)).await;
    assert!(matches!(bench.claim_as(bench.claimant("b", 2)).await, Claim::Conflict(_)));
}

#[tokio::test]
async fn a_live_claim_keeps_others_out_and_a_dead_one_counts_as_ambiguous() {
    let bench = Bench::new(OnUnknown::Retry);
    let first = bench.lease("a").await;
    assert_eq!(bench.claim("a").await, Claim::Busy { until: START + 25_000 });
    bench.clock.advance(Duration::from_secs(26));
    let second = bench.lease("a").await;
    assert_eq!((second.fence, second.attempt, second.ambiguous), (first.fence + 1, 2, 1));

    // The zombie comes back with a link: no row is touched, the session is an orphan.
    let late = bench.settle("a", first, Attempt::Counted, Next::End(link("ch_late"))).await;
    assert_eq!(late, Settle::Zombie);
    let ended = bench.settle("a", second, Attempt::Counted, Next::End(link("ch_good"))).await;
    assert!(matches!(ended, Settle::Ended(_)));
    let inspector = Inspector::open(&bench.path()).unwrap();
    assert_eq!(inspector.orphans(&key("a")).unwrap()[0].checkout_id, "ch_late");
    assert_eq!(row(&bench.path(), "a").checkout_id.as_deref(), Some("ch_good"));
}

#[tokio::test]
async fn a_zombie_may_neither_end_nor_delay_a_job_that_is_settled() {
    let bench = Bench::new(OnUnknown::Retry);
    let first = bench.lease("a").await;
    bench.clock.advance(Duration::from_secs(26));
    let second = bench.lease("a").await;
    bench.settle("a", second, Attempt::Counted, Next::End(rejected())).await;
    let before = row(&bench.path(), "a");
    for next in [wait(START), Next::End(link("ch_x")), Next::End(failed())] {
        assert_eq!(bench.settle("a", first, unknown(), next).await, Settle::Zombie);
    }
    assert_eq!(row(&bench.path(), "a"), before);
}

#[tokio::test]
async fn a_claim_or_settle_asked_twice_counts_once() {
    let bench = Bench::new(OnUnknown::Retry);
    let request = Bench::request(bench.claimant("a", 1));
    let first = bench.ledger().claim(request.clone()).await.unwrap();
    assert_eq!(bench.ledger().claim(request).await.unwrap(), first);
    let Claim::Granted(lease) = first else { panic!("{first:?}") };
    let once = bench.settle("a", lease, Attempt::Counted, Next::End(link("ch_1"))).await;
    bench.later();
    assert_eq!(bench.settle("a", lease, Attempt::Counted, Next::End(link("ch_1"))).await, once);
    assert_eq!(row(&bench.path(), "a").attempts, 1);
}

#[tokio::test]
async fn a_new_process_voids_the_leases_of_the_last_one_at_once() {
    let mut bench = Bench::new(OnUnknown::Retry);
    bench.lease("a").await;
    bench.reopen();
    let lease = bench.lease("a").await;
    assert_eq!((lease.attempt, lease.ambiguous), (2, 1));
}

#[tokio::test]
async fn a_job_that_ends_the_process_again_and_again_is_given_up() {
    let mut bench = Bench::new(OnUnknown::Retry);
    for _ in 0..transition::MOST_CRASHES {
        bench.lease("a").await;
        bench.reopen();
    }
    let Claim::Settled(stored) = bench.claim("a").await else { panic!("it is given up") };
    assert_eq!(
        (stored.status, stored.code.as_deref()),
        (Status::Unresolved, Some("crashes_worker"))
    );
}

#[tokio::test]
async fn no_session_exists_is_never_said_after_an_ambiguous_attempt() {
    for ending in [rejected(), failed(), expired()] {
        let bench = Bench::new(OnUnknown::Retry);
        let lease = bench.lease("a").await;
        bench.settle("a", lease, unknown(), wait(START)).await;
        assert_eq!(bench.end("a", ending.clone()).await.status, Status::Unresolved);
        let lease = bench.lease("b").await;
        let ended = bench.settle("b", lease, unknown(), Next::End(ending)).await;
        assert!(matches!(ended, Settle::Ended(stored) if stored.status == Status::Unresolved));
        // Nor by closing a job whose call was cut off.
        bench.lease("c").await;
        bench.clock.advance(Duration::from_secs(26));
        assert!(
            matches!(bench.close("c", expired()).await, Claim::Settled(stored) if stored.status == Status::Unresolved)
        );
    }
}

#[tokio::test]
async fn what_ended_without_a_session_is_tried_afresh_when_sent_again_with_any_body() {
    for ending in [rejected(), failed(), expired()] {
        let bench = Bench::new(OnUnknown::Retry);
        let stored = bench.end("a", ending.clone()).await;
        bench.later();
        let again = bench.claimant("a", 1);
        // A redelivery was not sent again, nor was a copy picked up before the outcome.
        let redelivered = Claimant { redelivered: true, ..again.clone() };
        assert_eq!(bench.claim_as(redelivered).await, Claim::Settled(stored.clone()));
        let earlier = Claimant { picked_up_at: stored.ended_at, ..again.clone() };
        assert_eq!(bench.claim_as(earlier).await, Claim::Settled(stored.clone()));
        let other = Claimant { redelivered: true, ..bench.claimant("a", 7) };
        let taken = bench.claim_as(other).await;
        assert!(
            matches!(taken, Claim::Conflict(_)),
            "a redelivery does not free the id: {taken:?}"
        );
        let Claim::Granted(lease) = bench.claim_as(bench.claimant("a", 7)).await else {
            panic!("{ending:?} is tried afresh with another body")
        };
        assert_eq!((lease.attempt, lease.ambiguous), (1, 0));
        let ended = bench.settle("a", lease, Attempt::Counted, Next::End(link("ch_2"))).await;
        assert!(matches!(ended, Settle::Ended(new) if new.message_id != stored.message_id));
    }
}

#[tokio::test]
async fn a_lease_written_under_a_clock_that_ran_ahead_is_over() {
    let bench = Bench::new(OnUnknown::Retry);
    bench.lease("a").await;
    bench.clock.advance(Duration::from_secs(20));
    assert!(matches!(bench.claim("a").await, Claim::Busy { .. }), "within its time it is alive");
    bench.clock.set(START - 24 * 3_600_000);
    assert_eq!(bench.lease("a").await.ambiguous, 1);
}

#[tokio::test]
async fn unresolved_is_tried_afresh_with_the_same_body_only_and_with_park_not_at_all() {
    let bench = Bench::new(OnUnknown::Retry);
    let lease = bench.lease("a").await;
    bench.settle("a", lease, unknown(), Next::End(failed())).await;
    bench.later();
    assert!(matches!(bench.claim_as(bench.claimant("a", 2)).await, Claim::Conflict(_)));
    let lease = bench.lease("a").await;
    assert_eq!((lease.attempt, lease.ambiguous), (1, 1), "what is known of sessions stays");

    let bench = Bench::new(OnUnknown::Park);
    let lease = bench.lease("a").await;
    let Settle::Ended(stored) = bench.settle("a", lease, unknown(), wait(START)).await else {
        panic!("park never asks twice")
    };
    assert_eq!(stored.status, Status::Unresolved);
    bench.later();
    assert_eq!(bench.claim("a").await, Claim::Settled(stored));
}

#[tokio::test]
async fn with_park_a_call_that_was_cut_off_is_not_repeated() {
    let mut bench = Bench::new(OnUnknown::Park);
    bench.lease("a").await;
    bench.reopen();
    assert!(
        matches!(bench.claim("a").await, Claim::Settled(stored) if stored.status == Status::Unresolved)
    );
}

#[tokio::test]
async fn a_retry_waits_for_its_time_and_gives_its_lease_back_at_once() {
    let bench = Bench::new(OnUnknown::Retry);
    let lease = bench.lease("a").await;
    bench.settle("a", lease, unknown(), wait(START + 5_000)).await;
    assert_eq!(bench.claim("a").await, Claim::Waiting { until: START + 5_000 });
    bench.clock.advance(Duration::from_secs(5));
    assert_eq!(bench.lease("a").await.attempt, 2);
}

#[tokio::test]
async fn an_attempt_that_was_not_sent_is_given_back_and_a_throttled_one_is_counted_apart() {
    let bench = Bench::new(OnUnknown::Retry);
    let lease = bench.lease("a").await;
    bench.settle("a", lease, Attempt::GivenBack, wait(START)).await;
    let lease = bench.lease("a").await;
    assert_eq!(lease.attempt, 1);
    bench.settle("a", lease, Attempt::Throttled, wait(START)).await;
    let lease = bench.lease("a").await;
    assert_eq!((lease.attempt, lease.throttled), (2, 1));
}

#[tokio::test]
async fn test_and_live_are_different_jobs() {
    let bench = Bench::new(OnUnknown::Retry);
    bench.end("a", link("ch_1")).await;
    let live = Claimant { key: Key { mode: Mode::Live, ..key("a") }, ..bench.claimant("a", 1) };
    assert!(matches!(bench.claim_as(live).await, Claim::Granted(_)));
}

#[tokio::test]
async fn many_racing_claims_of_one_job_grant_one() {
    let bench = Bench::new(OnUnknown::Retry);
    let claims = (0..500).map(|_| bench.claim("a"));
    let granted = futures::future::join_all(claims)
        .await
        .into_iter()
        .filter(|claim| matches!(claim, Claim::Granted(_)))
        .count();
    assert_eq!(granted, 1);
}

#[tokio::test]
async fn totals_and_pauses_survive_the_process() {
    let mut bench = Bench::new(OnUnknown::Retry);
    let lease = bench.lease("a").await;
    let orphan = Attempt::Ambiguous { checkout_id: Some("ch_9".into()), reason: "mismatch".into() };
    bench.settle("a", lease, orphan, Next::End(failed())).await;
    bench.ledger().execute(Command::Pause { from: START - 50, to: START }).await.unwrap();
    bench.clock.advance(Duration::from_secs(60));
    bench.reopen();
    let identity = bench.ledger().identity().clone();
    assert_eq!((identity.ambiguous_attempts, identity.orphan_sessions), (1, 1));
    assert!(identity.pauses.contains(&(START - 50, START)));
    // The minute in which no process ran does not count against any job either.
    assert!(
        identity.pauses.iter().any(|(from, to)| *to == START + 60_000 && *from >= START - 1_000)
    );
}

#[tokio::test]
async fn retention_removes_old_outcomes_but_nothing_that_may_hide_a_session() {
    let bench = Bench::new(OnUnknown::Retry);
    bench.end("old", link("ch_1")).await;
    let lease = bench.lease("hidden").await;
    bench.settle("hidden", lease, unknown(), Next::End(failed())).await;
    bench.lease("sending").await;
    bench.clock.advance(Duration::from_secs(3600));
    bench.end("new", link("ch_2")).await;
    assert_eq!(bench.ledger().sweep(START + 1_000).await.unwrap(), 1);
    let inspector = Inspector::open(&bench.path()).unwrap();
    let there = |id: &str| inspector.row(&key(id)).unwrap().is_some();
    assert!(!there("old") && there("hidden") && there("sending") && there("new"));
}

#[tokio::test]
async fn a_parked_copy_is_noted_for_its_own_outcome_only() {
    let bench = Bench::new(OnUnknown::Retry);
    let stored = bench.end("a", rejected()).await;
    for (fence, parked) in [(stored.fence + 1, false), (stored.fence, true)] {
        bench.ledger().execute(Command::Parked { key: key("a"), fence }).await.unwrap();
        assert_eq!(row(&bench.path(), "a").parked, parked);
    }
}

// What only the embedded ledger has to stand.

fn open(path: &Path) -> Result<SqliteLedger, OpenError> {
    SqliteLedger::open(path, Arc::new(ManualClock::at(START)), |_| {})
}

#[tokio::test]
async fn a_second_worker_on_the_same_file_is_refused_while_readers_are_not() {
    let bench = Bench::new(OnUnknown::Retry);
    bench.end("a", link("ch_1")).await;
    assert!(matches!(open(&bench.path()), Err(OpenError::Locked(_))));
    assert_eq!(row(&bench.path(), "a").state, State::Ended(Status::Succeeded));
    assert_eq!(Inspector::open(&bench.path()).unwrap().report().damage, Vec::<String>::new());
}

#[test]
fn what_is_not_this_programs_ledger_is_refused_and_left_as_it_was() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("ledger.db");
    let cases: [(&str, &dyn Fn()); 4] = [
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
    let mut bench = Bench::new(OnUnknown::Retry);
    bench.end("a", link("ch_1")).await;
    bench.end("b", link("ch_2")).await;
    bench.ledger = None;
    let connection = rusqlite::Connection::open(bench.path()).unwrap();
    connection
        .execute("UPDATE job SET body = CAST(replace(CAST(body AS TEXT), 'ch_1', 'ch_7') AS BLOB) WHERE request_id = 'a'", [])
        .unwrap();
    drop(connection);
    bench.reopen();
    let request = Bench::request(bench.claimant("a", 1));
    let error = bench.ledger().claim(request).await.unwrap_err();
    assert!(matches!(&error, LedgerError::DamagedRow(text) if text.contains("test/a")), "{error}");
    assert!(matches!(bench.claim("b").await, Claim::Settled(_)), "the next job is served");
    let report = Inspector::open(&bench.path()).unwrap().report();
    assert_eq!((report.rows, report.damage.len()), (2, 1));
}

#[tokio::test]
async fn every_flipped_byte_of_a_row_is_noticed() {
    let bench = Bench::new(OnUnknown::Retry);
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
    let bench = Bench::new(OnUnknown::Retry);
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
