//! What only the shared ledger has to stand: other workers, other versions, a database that goes
//! away, restarts, or belongs to somebody else.

use std::sync::Arc;
use std::time::Duration;

use creem_checkout_worker::clock::Clock as _;
use creem_checkout_worker::job::{Mode, Status};
use creem_checkout_worker::ledger::postgres::{OpenError, Options, PostgresLedger, Time};
use creem_checkout_worker::ledger::*;
use futures::future::join_all;

use super::bench::{Backend, Bench, START};
use super::key;
use super::line::{Line, micros};
use super::promises::{link, rejected, wait};
use crate::support::eventually;
use crate::support::postgres::{administrator, connect, database, shared};
use crate::support::private::{POSTGRES, root};

async fn bench(test: &str) -> Option<Bench> {
    let server = shared(test).await?;
    Some(Bench::new(&Backend::Postgres(server), OnUnknown::Retry).await)
}

async fn open(url: &str) -> Result<PostgresLedger, OpenError> {
    let options = Options { url: url.to_owned().into(), ca_pem: None };
    PostgresLedger::open(&options, Time::Database, |_| {}).await
}

#[tokio::test]
async fn workers_racing_for_the_same_jobs_grant_each_once_and_count_everything() {
    let Some(bench) = bench("racing").await else { return };
    let mut workers = vec![bench.ledger().clone()];
    for _ in 0..3 {
        workers.push(bench.another().await);
    }
    let claims = (0..200).flat_map(|job| {
        workers.iter().map(move |worker| {
            let id = format!("job-{job}");
            let request = Bench::request(bench_claimant(worker, &id));
            async move { (id, worker.claim(request).await.unwrap()) }
        })
    });
    let mut granted = std::collections::HashMap::<String, Vec<Lease>>::new();
    for (id, claim) in join_all(claims).await {
        if let Claim::Granted(lease) = claim {
            granted.entry(id).or_default().push(lease);
        } else {
            assert!(matches!(claim, Claim::Busy { .. }), "{claim:?}");
        }
    }
    assert_eq!(granted.len(), 200);
    for (id, leases) in &granted {
        assert_eq!((leases.len(), leases[0].fence), (1, 1), "{id}");
    }
    // Whoever has the lease settles it through any worker: the fence decides, not the process.
    let settles = granted.iter().enumerate().map(|(n, (id, leases))| {
        let worker = &workers[n % workers.len()];
        let request = SettleRequest {
            key: key(id),
            lease: leases[0],
            attempt: Attempt::Counted,
            next: Next::End(link(&format!("ch_{id}"))),
            on_unknown: OnUnknown::Retry,
        };
        worker.settle(request)
    });
    for settle in join_all(settles).await {
        assert!(
            matches!(settle.unwrap(), Settle::Ended(stored) if stored.status == Status::Succeeded)
        );
    }
}

fn bench_claimant(worker: &Arc<dyn Ledger>, id: &str) -> Claimant {
    super::bench::claimant(&worker.identity().secret, id, 1, START, OnUnknown::Retry)
}

#[tokio::test]
async fn a_workers_memory_of_a_row_is_never_believed_over_the_database() {
    let Some(bench) = bench("memory").await else { return };
    let other = bench.another().await;
    let first = bench.lease("a").await;
    bench.clock.advance(Duration::from_secs(26));
    // The other takes over; what the first remembers is stale.
    let taken = other.claim(Bench::request(bench.claimant("a", 1))).await.unwrap();
    let Claim::Granted(second) = taken else { panic!("{taken:?}") };
    assert_eq!((second.fence, second.ambiguous), (2, 1));
    assert_eq!(
        bench.settle("a", first, Attempt::Counted, Next::End(link("ch_late"))).await,
        Settle::Zombie
    );
    assert_eq!(bench.orphans("a").await[0].checkout_id, "ch_late");
    let request = SettleRequest {
        key: key("a"),
        lease: second,
        attempt: Attempt::Counted,
        next: Next::End(link("ch_good")),
        on_unknown: OnUnknown::Retry,
    };
    assert!(matches!(other.settle(request).await.unwrap(), Settle::Ended(_)));
    assert_eq!(bench.row("a").await.checkout_id.as_deref(), Some("ch_good"));
    assert_eq!(bench.row("a").await.ambiguous, 1);
}

#[tokio::test]
async fn replicas_that_start_together_make_one_ledger() {
    let Some(server) = shared("together").await else { return };
    let url = database(&server).await;
    let opened = join_all((0..8).map(|_| open(&url))).await;
    let keys: Vec<[u8; 32]> =
        opened.into_iter().map(|ledger| ledger.unwrap().identity().secret.mac(&[b"x"])).collect();
    assert!(keys.iter().all(|key| *key == keys[0]), "one secret for all");
}

#[tokio::test]
async fn a_newer_schema_is_worked_on_only_if_it_allows_that() {
    let Some(bench) = bench("newer").await else { return };
    let client = connect(bench.url()).await;
    client
        .batch_execute("INSERT INTO checkout_worker.schema_step VALUES (4, 1, now())")
        .await
        .unwrap();
    assert!(open(bench.url()).await.is_ok(), "an addition harms nobody");
    client
        .batch_execute("INSERT INTO checkout_worker.schema_step VALUES (5, 4, now())")
        .await
        .unwrap();
    let error = open(bench.url()).await.unwrap_err();
    assert!(matches!(error, OpenError::Newer { found: 5, known: 3 }), "{error}");
}

/// Makes a ledger one of version 1.
const VERSION_BEFORE: &str = "
    ALTER TABLE checkout_worker.job DROP COLUMN campaign;
    ALTER TABLE checkout_worker.budget DROP COLUMN bulk_at, DROP COLUMN down_until,
        DROP COLUMN interactive_next_at;
    DROP TABLE checkout_worker.rate;
    DROP INDEX checkout_worker.job_mode_ended;
    CREATE INDEX job_ended ON checkout_worker.job (ended_at) WHERE ended_at IS NOT NULL;
    DELETE FROM checkout_worker.schema_step WHERE version > 1";

/// Waits until the indexes are as they are in a new ledger.
async fn indexed(client: &tokio_postgres::Client) {
    let usable = "SELECT count(*) FILTER (WHERE indisvalid) = 2 AND to_regclass('checkout_worker.job_ended') IS NULL
        FROM pg_index WHERE indexrelid IN (to_regclass('checkout_worker.job_campaign'),
            to_regclass('checkout_worker.job_mode_ended'))";
    until(client, usable).await;
}

/// Waits until the database says yes.
async fn until(client: &tokio_postgres::Client, question: &str) {
    eventually(question, || async { client.query_one(question, &[]).await.unwrap().get(0) }).await;
}

#[tokio::test]
async fn an_upgrade_that_has_to_wait_for_a_table_lets_the_workers_of_before_go_on() {
    let Some(bench) = bench("upgrade").await else { return };
    bench.end("a", link("ch_1")).await;
    let [worker, mut backup, looking] =
        [connect(bench.url()).await, connect(bench.url()).await, connect(bench.url()).await];
    worker.batch_execute(VERSION_BEFORE).await.unwrap();
    let reads = backup.transaction().await.unwrap();
    reads.query("SELECT * FROM checkout_worker.job", &[]).await.unwrap();
    let url = bench.url().to_owned();
    let opening = tokio::spawn(async move { open(&url).await });
    let waits =
        "SELECT EXISTS (SELECT FROM pg_locks WHERE mode = 'AccessExclusiveLock' AND NOT granted
        AND relation = 'checkout_worker.job'::regclass)";
    until(&looking, waits).await;
    // It stands behind the upgrade now, which would stand behind the backup until that ends.
    let writes = worker.batch_execute("UPDATE checkout_worker.job SET updated_at = updated_at + 0");
    tokio::time::timeout(Duration::from_secs(20), writes)
        .await
        .expect("the worker goes on")
        .unwrap();
    assert!(!opening.is_finished(), "the backup still reads");
    reads.commit().await.unwrap();
    drop(opening.await.unwrap().unwrap());
    assert_eq!(bench.row("a").await.checkout_id.as_deref(), Some("ch_1"));
}

#[tokio::test]
async fn the_index_of_campaigns_is_made_where_it_is_missing_and_holds_up_no_writer() {
    index_is_made_after("DROP INDEX checkout_worker.job_campaign").await;
}

#[tokio::test]
async fn an_index_that_was_not_finished_is_made_anew_and_holds_up_no_writer() {
    // As a worker leaves it that dies while it makes it.
    let unfinished = "UPDATE pg_index SET indisvalid = false
        WHERE indexrelid = 'checkout_worker.job_campaign'::regclass";
    index_is_made_after(unfinished).await;
}

#[tokio::test]
async fn the_index_of_retention_is_made_where_it_is_missing() {
    index_is_made_after(
        "DROP INDEX checkout_worker.job_mode_ended;
         CREATE INDEX job_ended ON checkout_worker.job (ended_at) WHERE ended_at IS NOT NULL",
    )
    .await;
}

#[tokio::test]
async fn a_sweep_reads_past_no_outcomes_that_are_kept_longer() {
    let Some(bench) = bench("sweep_plan").await else { return };
    let client = connect(bench.url()).await;
    let sold = "INSERT INTO checkout_worker.job
            (mode, request_id, state, version, updated_at, ended_at, ambiguous, body, sum, prior)
        SELECT 'prod', n::text, 'succeeded', 1, 1, n, 0, 'b', 's', 's'
        FROM generate_series(1, 20000) AS n";
    for change in [sold, "ANALYZE checkout_worker.job"] {
        client.batch_execute(change).await.unwrap();
    }
    let keep = OwnCommand::Keep(Retention { mode: Mode::Live, keep: START });
    bench.ledger().tell(keep).await.unwrap();
    assert_eq!(bench.sweep(START - 1_000).await, 0);
    let used = "SELECT idx_tup_read < 100 AND idx_scan > 0 FROM pg_stat_user_indexes
        WHERE indexrelname = 'job_mode_ended'";
    until(&client, used).await;
}

/// Four workers start at once, while a transaction keeps whoever makes an index waiting.
async fn index_is_made_after(change: &str) {
    let Some(bench) = bench("index").await else { return };
    bench.end("a", link("ch_1")).await;
    let [worker, mut backup, looking] =
        [connect(bench.url()).await, connect(bench.url()).await, connect(bench.url()).await];
    looking.batch_execute(change).await.unwrap();
    let holds = backup.transaction().await.unwrap();
    let touch = "UPDATE checkout_worker.job SET updated_at = updated_at + 0";
    holds.batch_execute(touch).await.unwrap();
    let workers = join_all((0..4).map(|_| open(bench.url()))).await;
    let waits = "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database()
        AND query LIKE '% INDEX %' AND wait_event_type = 'Lock' AND pid <> pg_backend_pid())";
    until(&looking, waits).await;
    let insert = "INSERT INTO checkout_worker.job SELECT 'prod', 'b', state, version, updated_at,
        ended_at, ambiguous, body, sum, prior FROM checkout_worker.job";
    let writes = worker.batch_execute(insert);
    tokio::time::timeout(Duration::from_secs(20), writes).await.expect("a writer goes on").unwrap();
    holds.commit().await.unwrap();
    indexed(&looking).await;
    drop(workers);
}

#[tokio::test]
async fn a_ledger_of_the_version_before_is_brought_up_to_date_beside_its_workers() {
    let Some(bench) = bench("older").await else { return };
    let stored = bench.end("a", link("ch_1")).await;
    let client = connect(bench.url()).await;
    client.batch_execute(VERSION_BEFORE).await.unwrap();
    let opened = open(bench.url()).await.unwrap();
    indexed(&client).await;
    drop(opened);
    let row = bench.row("a").await;
    assert_eq!((row.reply, row.campaign), (Some(stored.reply), None));
    // What a worker of the version before writes names no campaign, and is a row all the same.
    client
        .batch_execute(
            "INSERT INTO checkout_worker.job
                 (mode, request_id, state, version, updated_at, ended_at, ambiguous, body, sum, prior)
             SELECT 'prod', request_id, state, version, updated_at, ended_at, ambiguous, body, sum, prior
             FROM checkout_worker.job",
        )
        .await
        .unwrap();
}

/// What makes a vacuum of its own accord come at once, and take minutes.
const LONG_VACUUM: &str = "
    ALTER TABLE checkout_worker.job SET (autovacuum_vacuum_threshold = 0,
        autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_cost_delay = 100,
        autovacuum_vacuum_cost_limit = 1);
    INSERT INTO checkout_worker.job
        (mode, request_id, state, version, updated_at, ambiguous, body, sum, prior)
    SELECT 'test', n::text, 'waiting', 1, 1, 0, decode(repeat('00', 500), 'hex'), 's', 's'
    FROM generate_series(1, 20000) AS n;
    DELETE FROM checkout_worker.job WHERE request_id LIKE '%7'";

#[tokio::test]
async fn an_upgrade_does_not_wait_until_a_vacuum_is_over() {
    let Some(server) = POSTGRES.start("vacuum").await else { return };
    let client = administrator(&server).await;
    client.batch_execute("ALTER SYSTEM SET autovacuum_naptime = '1s'").await.unwrap();
    client.batch_execute("SELECT pg_reload_conf()").await.unwrap();
    let url = database(&server.url).await;
    drop(open(&url).await.unwrap());
    let client = connect(&url).await;
    for change in [VERSION_BEFORE, LONG_VACUUM] {
        client.batch_execute(change).await.unwrap();
    }
    let vacuum = "SELECT EXISTS (SELECT FROM pg_stat_progress_vacuum
        WHERE relid = 'checkout_worker.job'::regclass)";
    let vacuum = || async { client.query_one(vacuum, &[]).await.unwrap().get(0) };
    eventually("the table is vacuumed", vacuum).await;
    // It holds a lock that no column is added beside.
    let beside = "SET lock_timeout = '200ms'; ALTER TABLE checkout_worker.job ADD COLUMN x int";
    client.batch_execute(beside).await.unwrap_err();
    assert!(open(&url).await.is_ok());
}

#[tokio::test]
async fn a_database_that_cannot_be_used_is_named_with_what_to_do() {
    let Some(server) = shared("unusable").await else { return };
    let (before, rest) = server.split_once("//checkout:").unwrap();
    let (_, place) = rest.split_once('@').unwrap();
    let error = open(&format!("{before}//checkout:wrong@{place}")).await.unwrap_err();
    assert!(matches!(error, OpenError::Refused(_)) && !error.is_passing(), "{error}");
    assert!(!error.to_string().contains("wrong"), "{error}");
    let error = open("postgres://a:canary@127.0.0.1:1/x").await.unwrap_err();
    assert!(error.is_passing() && !error.to_string().contains("canary"), "{error}");
}

#[tokio::test]
async fn a_damaged_row_is_noticed_and_the_others_are_served() {
    let Some(bench) = bench("damaged").await else { return };
    bench.end("a", link("ch_1")).await;
    bench.end("b", link("ch_2")).await;
    let client = connect(bench.url()).await;
    for change in [
        "body = set_byte(body, 20, (get_byte(body, 20) + 1) % 256)",
        "state = 'rejected'",
        "ended_at = ended_at + 1",
        "ambiguous = 7",
    ] {
        client
            .batch_execute("BEGIN; CREATE TEMP TABLE kept AS SELECT * FROM checkout_worker.job")
            .await
            .unwrap();
        client.batch_execute("COMMIT").await.unwrap();
        let damage = format!("UPDATE checkout_worker.job SET {change} WHERE request_id = 'a'");
        client.batch_execute(&damage).await.unwrap();
        bench.later();
        let claim = bench.ledger().claim(Bench::request(bench.claimant("a", 1))).await;
        assert!(matches!(claim, Err(LedgerError::DamagedRow(_))), "{change}: {claim:?}");
        assert!(matches!(bench.claim("b").await, Claim::Settled(_)), "{change}");
        client
            .batch_execute(
                "DELETE FROM checkout_worker.job; INSERT INTO checkout_worker.job SELECT * FROM kept; DROP TABLE kept",
            )
            .await
            .unwrap();
    }
    bench.later();
    assert!(matches!(bench.claim("a").await, Claim::Settled(_)));
}

#[tokio::test]
async fn connections_that_are_cut_cost_an_answer_and_nothing_else() {
    let Some(bench) = bench("cut").await else { return };
    let client = connect(bench.url()).await;
    for round in 0..10 {
        let id = format!("job-{round}");
        client
            .batch_execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                 WHERE datname = current_database() AND pid <> pg_backend_pid()",
            )
            .await
            .unwrap();
        let request = Bench::request(bench.claimant(&id, 1));
        // As a worker does: the same claim again, under the same token.
        let lease = loop {
            match bench.ledger().claim(request.clone()).await {
                Ok(Claim::Granted(lease)) => break lease,
                Err(LedgerError::Unavailable(_)) => {}
                other => panic!("{other:?}"),
            }
        };
        assert_eq!((lease.fence, lease.attempt), (1, 1));
        bench.settle(&id, lease, Attempt::Counted, Next::End(rejected())).await;
    }
}

#[tokio::test]
async fn a_commit_is_durable_even_where_the_session_has_that_switched_off() {
    let Some(bench) = bench("durable").await else { return };
    let client = connect(bench.url()).await;
    client
        .batch_execute(
            "ALTER DATABASE postgres SET synchronous_commit TO DEFAULT;
             ALTER ROLE CURRENT_USER IN DATABASE postgres RESET ALL;
             DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET synchronous_commit = off', current_database()); END $$",
        )
        .await
        .unwrap();
    let other = bench.another().await;
    // What is written is on the disk when the answer is here: the log is flushed up to its end, but
    // for what others have begun to write in the meantime, so this is tried until nobody has.
    let mut flushed = false;
    for round in 0..50 {
        let id = format!("job-{round}");
        other.claim(Bench::request(bench.claimant(&id, 1))).await.unwrap();
        let row = client
            .query_one("SELECT pg_current_wal_flush_lsn() >= pg_current_wal_insert_lsn()", &[])
            .await
            .unwrap();
        flushed |= row.get::<_, bool>(0);
        if flushed {
            break;
        }
    }
    assert!(flushed, "with an asynchronous commit the log is behind for up to 600 ms");
}

#[tokio::test]
async fn the_databases_clock_is_everybodys_clock() {
    let Some(server) = shared("clock").await else { return };
    let url = database(&server).await;
    let ledger = open(&url).await.unwrap();
    let client = connect(&url).await;
    let row = client
        .query_one("SELECT (extract(epoch from clock_timestamp()) * 1000)::int8", &[])
        .await
        .unwrap();
    let there: i64 = row.get(0);
    assert!((ledger.clock().now() - there).abs() < 1_000);
}

#[tokio::test]
async fn a_new_ledger_is_new_for_all_workers_until_one_has_served_for_a_while() {
    let Some(bench) = bench("adoption").await else { return };
    let other = bench.another().await;
    assert_eq!(other.standing().await.unwrap(), Standing::New);
    bench.ledger().tell(OwnCommand::Adopt(Adoption::Adopted)).await.unwrap();
    let standing = other.standing().await.unwrap();
    assert_eq!(standing, Standing::New, "all workers begin at about the same time");
    assert!(!other.knows(key("a")).await.unwrap());
    bench.lease("a").await;
    assert!(other.knows(key("a")).await.unwrap(), "it was taken with this ledger");
    bench.clock.advance(Duration::from_secs(61));
    assert_eq!(other.standing().await.unwrap(), Standing::Established);
    assert_eq!(bench.another().await.identity().standing, Standing::Established);

    other.tell(OwnCommand::Adopt(Adoption::Refused)).await.unwrap();
    assert_eq!(bench.another().await.identity().standing, Standing::Refused);
    bench.ledger().tell(OwnCommand::Adopt(Adoption::Accepted)).await.unwrap();
    assert_eq!(bench.another().await.identity().standing, Standing::Established);
}

#[tokio::test]
async fn two_sweeps_at_once_share_the_work() {
    let Some(bench) = bench("sweeps").await else { return };
    for n in 0..40 {
        bench.end(&format!("job-{n}"), link("ch")).await;
    }
    let lease = bench.lease("waiting").await;
    bench.settle("waiting", lease, Attempt::Counted, wait(START + 9_000)).await;
    bench.clock.advance(Duration::from_secs(3600));
    let other = bench.another().await;
    let retention = Retention { mode: Mode::Test, keep: 2_600_000 };
    let (one, two) = tokio::join!(bench.ledger().sweep(retention), other.sweep(retention));
    assert_eq!(one.unwrap() + two.unwrap(), 40);
    assert!(bench.look("waiting").await.is_some());
}

#[tokio::test]
async fn a_row_that_a_failover_brought_back_is_not_taken_for_its_like() {
    let Some(bench) = bench("timelines").await else { return };
    let other = bench.another().await;
    bench.lease("a").await;
    let client = connect(bench.url()).await;
    client.batch_execute("CREATE TABLE kept AS SELECT * FROM checkout_worker.job").await.unwrap();
    // The first worker goes on; what it writes is lost when the database fails over.
    bench.clock.advance(Duration::from_secs(26));
    let first = bench.lease("a").await;
    client
        .batch_execute(
            "DELETE FROM checkout_worker.job; INSERT INTO checkout_worker.job SELECT * FROM kept",
        )
        .await
        .unwrap();
    // Another worker takes over: the same version, another row.
    let taken = other.claim(Bench::request(bench.claimant("a", 1))).await.unwrap();
    let Claim::Granted(second) = taken else { panic!("{taken:?}") };
    assert_eq!((first.fence, second.fence), (2, 2));
    assert_eq!(
        bench.settle("a", first, Attempt::Counted, Next::End(link("ch_first"))).await,
        Settle::Zombie
    );
    assert_eq!(bench.orphans("a").await[0].checkout_id, "ch_first");
}

async fn quiet(ledger: &PostgresLedger, mode: Mode, quiet: Duration) -> Duration {
    let news = News { quiet, ..News::default() };
    ledger.share(mode, news).await.unwrap().0.quiet
}

async fn news(ledger: &PostgresLedger, mode: Mode) -> News {
    ledger.share(mode, News::default()).await.unwrap().0
}

/// Places for somebody who waits.
fn wish(count: u32, interval: Duration) -> Wish {
    let lasting = interval * count;
    Wish {
        count,
        lasting,
        least_interval: interval,
        default_interval: Duration::ZERO,
        overtakes: Duration::ZERO,
        horizon: None,
        bulk_every: None,
    }
}

#[tokio::test]
async fn places_lie_ahead_of_their_answer_and_not_beyond_reason() {
    let Some(bench) = bench("places").await else { return };
    let ledger = open(bench.url()).await.unwrap();
    let interval = Duration::from_millis(50);
    ledger.lease_places(Mode::Test, wish(1, interval)).await.unwrap();
    // Nobody has called for a while; the answer comes late.
    let client = connect(bench.url()).await;
    client.batch_execute("UPDATE checkout_worker.budget SET next_at = 0").await.unwrap();
    client.batch_execute("BEGIN; LOCK TABLE checkout_worker.budget").await.unwrap();
    let (slow, ()) = tokio::join!(ledger.lease_places(Mode::Test, wish(1, interval)), async {
        client.batch_execute("SELECT pg_sleep(0.3); COMMIT").await.unwrap();
    });
    slow.unwrap();
    // No place of before makes it lie ahead.
    client.batch_execute("UPDATE checkout_worker.budget SET next_at = 0").await.unwrap();
    let places = ledger.lease_places(Mode::Test, wish(1, interval)).await.unwrap();
    assert!(
        places.first > tokio::time::Instant::now(),
        "it allows for an answer as slow as the last"
    );

    // A clock that was set back by a day must not mean a day of silence, nor places that are given twice.
    let before = ledger.lease_places(Mode::Test, wish(40, interval)).await.unwrap();
    client
        .batch_execute(
            "UPDATE checkout_worker.budget
             SET next_at = next_at + 86400000000::int8,
                 quiet_until = quiet_until + 86400000000::int8,
                 interactive_next_at = interactive_next_at + 86400000000::int8,
                 bulk_at = bulk_at + 86400000000::int8,
                 written_at = written_at + 86400000000::int8",
        )
        .await
        .unwrap();
    assert_eq!(quiet(&ledger, Mode::Test, Duration::ZERO).await, Duration::ZERO);
    let places = ledger.lease_places(Mode::Test, wish(1, interval)).await.unwrap();
    assert!(places.first < tokio::time::Instant::now() + Duration::from_secs(4));
    let after_the_last = places.first.duration_since(before.first);
    assert!(after_the_last > interval * 39, "{after_the_last:?}");
    assert_eq!(places.quiet, Duration::ZERO);
    assert!(quiet(&ledger, Mode::Test, Duration::from_secs(3)).await > Duration::from_secs(2));
    assert!(quiet(&ledger, Mode::Test, Duration::ZERO).await > Duration::from_secs(2));

    // Places may lie as far ahead as they must: a slow budget, and many that wait.
    let slow = Duration::from_secs(1_000);
    let mut last = ledger.lease_places(Mode::Test, wish(1, slow)).await.unwrap().first;
    for _ in 0..8 {
        let next = ledger.lease_places(Mode::Test, wish(1, slow)).await.unwrap().first;
        assert!(next > last + Duration::from_secs(990), "no place is given twice");
        last = next;
    }

    // Creem's other world has a budget of its own.
    assert_eq!(quiet(&ledger, Mode::Live, Duration::ZERO).await, Duration::ZERO);
    ledger.lease_places(Mode::Test, wish(1000, interval)).await.unwrap();
    let places = ledger.lease_places(Mode::Live, wish(1, interval)).await.unwrap();
    assert!(places.first < tokio::time::Instant::now() + Duration::from_secs(2));
}

#[tokio::test]
async fn a_ledger_whose_table_was_partitioned_keeps_its_promises() {
    let Some(bench) = bench("partitioned").await else { return };
    // As docs/scaling.md says it.
    let recipe = std::fs::read_to_string(root().join("docs/scaling.md")).unwrap();
    let (_, sql) = recipe.split_once("```sql\n").unwrap();
    let (sql, _) = sql.split_once("```").unwrap();
    bench.lease("before").await;
    connect(bench.url()).await.batch_execute(sql).await.unwrap();
    assert_eq!(bench.row("before").await.attempts, 1, "what was there is kept");
    for n in 0..40 {
        let id = format!("order_{n}");
        let lease = bench.lease(&id).await;
        let ended = bench.settle(&id, lease, Attempt::Counted, Next::End(link(&id))).await;
        assert!(matches!(ended, Settle::Ended(_)), "{ended:?}");
        let again = bench.ledger().claim(Bench::request(bench.claimant(&id, 1))).await.unwrap();
        assert!(matches!(again, Claim::Settled(_)), "{again:?}");
    }
    let client = connect(bench.url()).await;
    let parts = "SELECT count(DISTINCT tableoid) FROM checkout_worker.job";
    let parts: i64 = client.query_one(parts, &[]).await.unwrap().get(0);
    assert!(parts > 4, "{parts}");
    bench.clock.advance(Duration::from_secs(86_400));
    let swept = bench.sweep(bench.clock.now()).await;
    assert_eq!(swept, 40, "retention reaches every partition");
}

#[tokio::test]
async fn bulk_takes_no_place_far_ahead_but_its_share_of_them() {
    let Some(bench) = bench("bulk_places").await else { return };
    let ledger = open(bench.url()).await.unwrap();
    let interval = Duration::from_millis(10);
    let horizon = Duration::from_millis(80);
    let bulk_every = Some(Duration::from_secs(60));
    let bulk = Wish { horizon: Some(horizon), bulk_every, ..wish(8, interval) };
    let lease = async |wish| ledger.lease_places(Mode::Test, wish).await.unwrap();
    assert_eq!(lease(bulk).await.count, 8, "nobody is before it");
    // Buyers fill the next ten seconds.
    let buyers = lease(wish(1_000, interval)).await;
    assert_eq!(buyers.count, 1_000);
    let refused = lease(bulk).await;
    assert_eq!(refused.count, 0);
    let line_ends = buyers.first + interval * 1_000;
    let told = refused.first.max(line_ends - horizon) - refused.first.min(line_ends - horizon);
    assert!(told < Duration::from_millis(50), "when there may be one: off by {told:?}");
    // A minute later it gets places at the end of the line.
    let client = connect(bench.url()).await;
    client.batch_execute("UPDATE checkout_worker.budget SET bulk_at = 0").await.unwrap();
    let share = lease(bulk).await;
    assert_eq!(share.count, 8);
    assert!(share.first > tokio::time::Instant::now() + Duration::from_secs(8));
    assert_eq!(lease(bulk).await.count, 0, "not again so soon");
    let buyer = Wish { horizon: Some(horizon), ..wish(1, interval) };
    let refused = lease(buyer).await;
    assert_eq!(refused.count, 0, "a buyer who would get it another way");
    let told = refused.first.max(line_ends) - refused.first.min(line_ends);
    assert!(told < Duration::from_millis(130), "when there may be one: off by {told:?}");
    assert_eq!(lease(wish(1, interval)).await.count, 1, "who waits is never refused");
}

#[tokio::test]
async fn buyers_go_ahead_of_bulk_where_they_may_and_the_line_grows_all_the_same() {
    let Some(bench) = bench("buyers_ahead").await else { return };
    let ledger = open(bench.url()).await.unwrap();
    // Long ones: no answer takes as long.
    let interval = Duration::from_secs(10);
    let lease = async |wish| ledger.lease_places(Mode::Test, wish).await.unwrap();
    let (horizon, bulk_every) = (Some(interval * 8), Some(Duration::from_secs(3_600)));
    let bulk = Wish { horizon, bulk_every, ..wish(4, interval) };
    let (first, now) = (lease(bulk).await, tokio::time::Instant::now());
    assert_eq!(first.count, 4);
    let ahead = Wish { overtakes: interval * 20, ..wish(2, interval) };
    let buyers = lease(ahead).await;
    assert!(buyers.first < now + interval / 2, "at once");
    let more = lease(ahead).await.first;
    assert!(more > buyers.first + interval * 19 / 10, "behind their own");
    let late = lease(Wish { overtakes: interval, ..ahead }).await.first;
    assert!(late > first.first + interval * 69 / 10, "no further ahead than they may");
    let last = lease(wish(1, interval)).await.first;
    assert!(last > first.first + interval * 99 / 10, "each of them has made the line longer");
    assert_eq!(lease(bulk).await.count, 0, "and bulk waits for them");
    // A worker of the version before has met a clock that was set back, and knows of one line only.
    let client = connect(bench.url()).await;
    let beyond = "UPDATE checkout_worker.budget
        SET interactive_next_at = interactive_next_at + 86400000000::int8";
    client.batch_execute(beyond).await.unwrap();
    let line = lease(wish(1, interval)).await.first;
    assert!(line < now + Duration::from_secs(3_600), "no place lies beyond the end of the line");
    // Nobody goes ahead of a silence.
    let silent = quiet(&ledger, Mode::Test, Duration::from_secs(600)).await;
    let buyer = lease(Wish { overtakes: Duration::from_secs(9_000), ..ahead }).await.first;
    assert!(buyer > now + silent / 2);
}

#[tokio::test]
async fn bulk_goes_on_at_once_when_the_clock_was_set_back() {
    let Some(bench) = bench("bulk_set_back").await else { return };
    let ledger = open(bench.url()).await.unwrap();
    let interval = Duration::from_millis(50);
    let lease = async |wish| ledger.lease_places(Mode::Test, wish).await.unwrap();
    let (horizon, bulk_every) =
        (Some(Duration::from_millis(100)), Some(Duration::from_secs(3_600)));
    let bulk = Wish { horizon, bulk_every, ..wish(2, interval) };
    assert_eq!(lease(bulk).await.count, 2);
    lease(wish(40, interval)).await;
    assert_eq!(lease(bulk).await.count, 0, "two seconds are taken");
    let client = connect(bench.url()).await;
    let ahead = "UPDATE checkout_worker.budget
        SET next_at = next_at + 86400000000::int8, bulk_at = bulk_at + 86400000000::int8,
            interactive_next_at = interactive_next_at + 86400000000::int8,
            written_at = written_at + 86400000000::int8";
    client.batch_execute(ahead).await.unwrap();
    let places = lease(bulk).await;
    assert_eq!(places.count, 2, "else nothing would be written until the clock shows that day");
    assert!(places.first < tokio::time::Instant::now() + Duration::from_secs(4));
    assert_eq!(lease(bulk).await.count, 0, "it is as before");
}

#[tokio::test]
async fn fleets_are_simulated_with_the_databases_arithmetic() {
    let Some(bench) = bench("arithmetic").await else { return };
    let ledger = open(bench.url()).await.unwrap();
    let client = connect(bench.url()).await;
    let clock = "SELECT (extract(epoch from clock_timestamp()) * 1000000)::int8";
    let seconds = Duration::from_secs;
    let mut random = fastrand::Rng::with_seed(7);
    let mut line = None::<Line>;
    let (mut given, mut refused) = (0, 0);
    // Long ones, so that what a question takes decides nothing: all are whole minutes, and horizons half of one more.
    let minutes = |random: &mut fastrand::Rng, most| seconds(60 * random.u64(0..=most));
    for asked in 0..400 {
        let for_bulk = random.bool();
        let wish = Wish {
            count: random.u32(1..6),
            lasting: minutes(&mut random, 30),
            least_interval: minutes(&mut random, 4),
            default_interval: seconds(120),
            overtakes: if for_bulk { Duration::ZERO } else { minutes(&mut random, 20) },
            horizon: (for_bulk || random.bool()).then(|| minutes(&mut random, 60) + seconds(30)),
            bulk_every: for_bulk.then(|| minutes(&mut random, 600) + seconds(30)),
        };
        let now: i64 = client.query_one(clock, &[]).await.unwrap().get(0);
        let here = tokio::time::Instant::now();
        if random.u8(..40) == 0 {
            quiet(&ledger, Mode::Test, seconds(3_600)).await;
            let line = line.get_or_insert_default();
            line.quiet_until = line.quiet_until.max(now + micros(seconds(3_600)));
        }
        let places = ledger.lease_places(Mode::Test, wish).await.unwrap();
        let expected = line.get_or_insert_default().lease(wish, now, Duration::ZERO, None);
        assert_eq!(places.count, expected.count, "{asked}: {wish:?} {line:?}");
        assert_eq!(places.interval, expected.interval, "{asked}: {wish:?}");
        let first = if places.first > here {
            now + micros(places.first - here)
        } else {
            now - micros(here - places.first)
        };
        // What is over is over: how long ago it was makes no difference.
        let off = first.max(now) - expected.first.max(now);
        assert!(off.abs() < micros(seconds(20)), "{asked}: off by {off} us: {wish:?}");
        let drained = if expected.count > 0 { &mut given } else { &mut refused };
        *drained += 1;
        // An hour or two go by.
        if random.u8(..4) == 0 {
            let (past, line) = (micros(minutes(&mut random, 120)), line.as_mut().unwrap());
            let shift = "UPDATE checkout_worker.budget SET next_at = next_at - $1,
                quiet_until = quiet_until - $1, bulk_at = bulk_at - $1,
                interactive_next_at = interactive_next_at - $1";
            client.execute(shift, &[&past]).await.unwrap();
            for at in [
                &mut line.next,
                &mut line.quiet_until,
                &mut line.bulk_at,
                &mut line.interactive_next,
            ] {
                *at -= past;
            }
        }
    }
    assert!(given > 50 && refused > 50, "{given} were given, {refused} were not");
}

#[tokio::test]
async fn what_was_learned_is_written_once_per_version_and_places_lie_as_it_says() {
    let Some(bench) = bench("learned").await else { return };
    let (one, other) = (open(bench.url()).await.unwrap(), open(bench.url()).await.unwrap());
    let nothing = News::default();
    let teaching = |version, text, millis| Teaching {
        version,
        text,
        at: tokio::time::Instant::now(),
        interval: Duration::from_millis(millis),
    };
    assert_eq!(one.share(Mode::Test, nothing).await.unwrap().1, None);
    let (default_interval, lasting) = (Duration::from_secs(5), Duration::from_secs(20));
    let wish = Wish { default_interval, lasting, ..wish(100, Duration::ZERO) };
    let places = one.lease_places(Mode::Live, wish).await.unwrap();
    assert_eq!(
        (places.count, places.interval),
        (4, default_interval),
        "nobody has learned anything"
    );

    let taught = one.teach(Mode::Test, teaching(0, "first", 1_000)).await.unwrap();
    assert_eq!(taught, Taught::Written);
    let late = other.teach(Mode::Test, teaching(0, "late", 1)).await.unwrap();
    let Taught::Other(learned) = late else { panic!("{late:?}") };
    assert_eq!((learned.version, &*learned.text), (1, "first"));
    assert!(learned.age < Duration::from_secs(10), "{learned:?}");
    let heard = other.share(Mode::Test, nothing).await.unwrap().1.unwrap();
    assert_eq!((heard.version, &*heard.text), (1, "first"));
    assert_eq!(other.share(Mode::Live, nothing).await.unwrap().1, None, "another world");
    let places = other.lease_places(Mode::Test, wish).await.unwrap();
    assert_eq!((places.count, places.interval), (20, Duration::from_secs(1)));
    let least = Wish { least_interval: Duration::from_secs(7), ..wish };
    let places = other.lease_places(Mode::Test, least).await.unwrap();
    assert_eq!((places.count, places.interval), (2, Duration::from_secs(7)), "a ceiling holds");

    let taught = other.teach(Mode::Test, teaching(1, "second", 50_000)).await.unwrap();
    assert_eq!(taught, Taught::Written);
    let places = one.lease_places(Mode::Test, wish).await.unwrap();
    // No rate that is learned is slower than one a second, whoever wrote that.
    assert_eq!((places.count, places.interval), (20, Duration::from_secs(1)));
    let short = Wish { lasting: Duration::ZERO, ..wish };
    let places = one.lease_places(Mode::Test, short).await.unwrap();
    assert_eq!(places.count, 1, "one place, however far apart they are");
    // Silence and outages are told beside it, and change nothing of it.
    one.share(Mode::Test, News { quiet: Duration::from_secs(1), ..nothing }).await.unwrap();
    let heard = one.share(Mode::Test, nothing).await.unwrap().1.unwrap();
    assert_eq!((heard.version, &*heard.text), (2, "second"));
    // A ledger that was restored knows of fewer versions than those who work on.
    let client = connect(bench.url()).await;
    client.batch_execute("DELETE FROM checkout_worker.rate").await.unwrap();
    assert_eq!(one.teach(Mode::Test, teaching(2, "third", 1)).await.unwrap(), Taught::Written);
    let older = "UPDATE checkout_worker.rate SET learned = 'older', version = 1";
    client.batch_execute(older).await.unwrap();
    let taught = one.teach(Mode::Test, teaching(3, "fourth", 1)).await.unwrap();
    let Taught::Other(Learned { version: 1, .. }) = taught else { panic!("{taught:?}") };
}

#[tokio::test]
async fn whoever_waits_for_another_ones_lesson_does_not_take_it_for_its_own() {
    let Some(bench) = bench("busy_lesson").await else { return };
    let ledger = open(bench.url()).await.unwrap();
    let interval = Duration::from_millis(10);
    let at = tokio::time::Instant::now();
    let lesson = |version, text| Teaching { version, text, at, interval };
    assert_eq!(ledger.teach(Mode::Test, lesson(0, "first")).await.unwrap(), Taught::Written);
    let mut client = connect(bench.url()).await;
    let other = client.transaction().await.unwrap();
    other
        .batch_execute("UPDATE checkout_worker.rate SET learned = 'other', version = 2")
        .await
        .unwrap();
    let looking = connect(bench.url()).await;
    let (taught, ()) = tokio::join!(ledger.teach(Mode::Test, lesson(1, "late")), async {
        let waits = "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock'
            AND datname = current_database() AND query LIKE '%checkout_worker.rate%')";
        until(&looking, waits).await;
        other.commit().await.unwrap();
    });
    assert_eq!(taught.unwrap(), Taught::Busy);
    let taught = ledger.teach(Mode::Test, lesson(1, "late")).await.unwrap();
    let Taught::Other(Learned { version: 2, text, .. }) = taught else { panic!("{taught:?}") };
    assert_eq!(text, "other");
}

#[tokio::test]
async fn what_one_worker_finds_out_about_creem_all_hear_until_it_is_over() {
    let Some(bench) = bench("news").await else { return };
    let (one, other) = (open(bench.url()).await.unwrap(), open(bench.url()).await.unwrap());
    let nothing = News::default();
    assert_eq!(news(&other, Mode::Test).await, nothing);
    let down = News { down: Duration::from_secs(5), ..nothing };
    one.share(Mode::Test, down).await.unwrap();
    let heard = news(&other, Mode::Test).await;
    assert!(heard.down > Duration::from_secs(3) && heard.quiet.is_zero(), "{heard:?}");
    assert_eq!(news(&other, Mode::Live).await, nothing, "another world");
    // A lease of places changes nothing of it, and it ends by itself.
    one.lease_places(Mode::Test, wish(1, Duration::from_millis(10))).await.unwrap();
    assert!(!news(&other, Mode::Test).await.down.is_zero());
    let client = connect(bench.url()).await;
    client
        .batch_execute("UPDATE checkout_worker.budget SET down_until = down_until - 5000000")
        .await
        .unwrap();
    assert_eq!(news(&other, Mode::Test).await, nothing);
}
