//! Several workers, one PostgreSQL: whoever dies, freezes or loses its database, others finish the
//! jobs, and no id gets two links.

use std::collections::HashSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use creem_checkout_worker::job::{Lane, Mode};
use creem_checkout_worker::ledger::postgres::inspect::Inspector;
use creem_checkout_worker::ledger::postgres::{Options, PostgresLedger, Time};
use creem_checkout_worker::ledger::{KnownOrphan, Row};
use creem_checkout_worker::pace::{Limits, Pacer};
use creem_checkout_worker::worker::budget::grant;
use futures::future::join_all;
use lapin::options::{QueueDeclareOptions, QueueDeleteOptions};
use lapin::types::FieldTable;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::cli::command;
use crate::ledger::key;
use crate::support::broker::ctl;
use crate::support::postgres::{connect, database, shared};
use crate::support::private::{BROKER, POSTGRES};
use crate::support::process::Process;
use crate::support::{World, body, eventually, next, persistent, soon};

/// A world whose workers share a database of its own.
async fn world(test: &str) -> Option<(World, String)> {
    let server = shared(test).await?;
    let url = database(&server).await;
    Some((on(test, &url).await?, url))
}

async fn on(test: &str, url: &str) -> Option<World> {
    let mut world = World::new(test).await?;
    world.settings.insert("LEDGER_URL".into(), url.to_owned());
    // A short lease: takeover is what is tested here.
    world.set("creem.request_timeout", "1s").set("amqp.heartbeat", "2s");
    Some(world)
}

async fn look(url: &str, id: &str) -> (Row, Vec<KnownOrphan>) {
    let options = Options { url: url.to_owned().into(), ca_pem: None };
    let inspector = Inspector::open(&options).await.unwrap();
    let row = inspector.row(&key(id)).await.unwrap().expect("the ledger has a row");
    (row, inspector.orphans(&key(id)).await.unwrap())
}

#[tokio::test]
async fn a_worker_says_how_long_it_keeps_outcomes_long_before_it_removes_any() {
    let Some((mut world, url)) = world("said_retention").await else { return };
    world.set("ledger.retention", "8d");
    let _worker = world.worker().await;
    let client = connect(&url).await;
    let said = "SELECT EXISTS (SELECT FROM checkout_worker.meta
        WHERE name = 'retention.test.691200000' AND number > 0)";
    let said = || async { client.query_one(said, &[]).await.unwrap().get(0) };
    eventually("it is said", said).await;
}

#[tokio::test]
async fn two_workers_serve_the_same_queues_and_each_job_gets_one_link() {
    let Some((world, url)) = world("two_workers").await else { return };
    let first = world.worker().await;
    let second = world.worker().await;
    let mut replies = world.replies().await;
    for n in 0..60 {
        // Every job twice: whichever workers get the copies, both are told the same.
        world.job(&format!("order_{}", n / 2)).await;
    }
    let mut bodies = HashSet::new();
    for _ in 0..60 {
        let reply = next(&mut replies).await;
        assert_eq!(reply.status(), "succeeded");
        bodies.insert(reply.body);
    }
    assert_eq!((bodies.len(), world.sessions()), (30, 30));
    assert_eq!(look(&url, "order_0").await.0.ambiguous, 0);
    for worker in [&first, &second] {
        assert_eq!(worker.get("/readyz").await.0, 200);
    }
}

#[tokio::test]
async fn workers_behind_a_pooler_in_transaction_mode_share_a_ledger_all_the_same() {
    let Some(server) = POSTGRES.start("pooler").await else { return };
    let direct = server.url.clone();
    let pooled = server.ask("pooler", &[]).await.unwrap();
    let Some(mut world) = on("pooler", &pooled).await else { return };
    world.set("rate_limit.per_second", "500");
    // They migrate at once, with two connections to the database for all of them.
    let workers = join_all((0..3).map(|_| world.worker())).await;
    let mut replies = world.replies().await;
    for n in 0..120 {
        world.job(&format!("order_{}", n / 2)).await;
    }
    let mut bodies = HashSet::new();
    for _ in 0..120 {
        let reply = next(&mut replies).await;
        assert_eq!(reply.status(), "succeeded");
        bodies.insert(reply.body);
    }
    assert_eq!((bodies.len(), world.sessions()), (60, 60));
    // The pooler dies with everything it had under way.
    server.act("pooler-kill").await;
    world.job("while_away").await;
    eventually("whoever has the job pauses", || async {
        workers.iter().any(|worker| worker.log().join("").contains("intake is paused"))
    })
    .await;
    assert_eq!(server.ask("pooler", &[]).await.unwrap(), pooled);
    assert_eq!(next(&mut replies).await.status(), "succeeded");
    assert_eq!(look(&direct, "while_away").await.0.attempts, 1);
}

#[tokio::test]
async fn a_worker_that_may_declare_nothing_is_seen_by_one_with_an_embedded_ledger() {
    let Some((mut world, _)) = world("seen").await else { return };
    world.worker().await.kill().await;
    forget_the_ledger_of(&world).await;
    world.set("topology.declare", "false");
    let _first = world.worker().await;
    let embedded = format!("sqlite:{}", world.ledger().display());
    world.settings.insert("LEDGER_URL".into(), embedded);
    let second = world.worker_unready(&[]);
    soon("it waits", second.logged("not consuming")).await;
    let (status, text) = second.get("/readyz").await;
    assert!(status == 503 && text.contains("has a consumer already"), "{text}");
}

#[tokio::test]
async fn a_queue_that_keeps_other_ledgers_out_is_made_again_when_somebody_deletes_it() {
    let Some((world, _)) = world("guard").await else { return };
    let worker = world.worker().await;
    let guard = world.queue("run");
    let delete =
        || world.channel.queue_delete(guard.as_str().into(), QueueDeleteOptions::default());
    delete().await.unwrap();
    let gone = worker.event(|event| {
        event["error"]
            .as_str()
            .is_some_and(|error| error.contains("keeps other ledgers' workers out"))
    });
    soon("it is noticed", gone).await;
    eventually("it serves again", || async { worker.get("/readyz").await.0 == 200 }).await;
    // With its mark: another ledger's worker would not be let in.
    let plain = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    let channel = world.connection.create_channel().await.unwrap();
    let declared = channel.queue_declare(guard.as_str().into(), plain, FieldTable::default()).await;
    assert!(declared.unwrap_err().to_string().contains("PRECONDITION"));
}

#[tokio::test]
async fn workers_with_different_ledgers_never_serve_the_same_queues_at_once() {
    let Some((mut world, url)) = world("different").await else { return };
    let other = database(&shared("different").await.unwrap()).await;
    let first = world.worker().await;
    let embedded = format!("sqlite:{}", world.ledger().display());
    for ledger in [&other, &embedded] {
        world.settings.insert("LEDGER_URL".into(), ledger.clone());
        let second = world.worker_unready(&[]);
        soon("it waits", second.logged("not consuming")).await;
        let (status, text) = second.get("/readyz").await;
        assert!(status == 503 && text.contains("serve these queues"), "{text}");
    }
    // And the other way round: whoever shares a ledger waits for the one that shares none.
    first.kill().await;
    forget_the_ledger_of(&world).await;
    let _alone = world.worker().await;
    world.settings.insert("LEDGER_URL".into(), url);
    for declare in ["true", "false"] {
        world.set("topology.declare", declare);
        let second = world.worker_unready(&[]);
        soon("it waits", second.logged("not consuming")).await;
        let (status, text) = second.get("/readyz").await;
        assert!(status == 503 && text.contains("a ledger of their own"), "{text}");
    }
}

#[tokio::test]
async fn a_restored_copy_of_a_ledger_never_serves_beside_the_one_it_is_a_copy_of() {
    let Some((mut world, url)) = world("restored_copy").await else { return };
    // Once opened, it is a ledger.
    world.worker().await.kill().await;
    let (server, name) = url.rsplit_once('/').unwrap();
    let copy = format!("{name}_copy");
    let administrator = connect(&format!("{server}/postgres")).await;
    let copied = || async {
        // Not while the last of the worker's connections is still there.
        administrator
            .batch_execute(&format!("CREATE DATABASE {copy} TEMPLATE {name}"))
            .await
            .is_ok()
    };
    eventually("the ledger is copied", copied).await;
    world.settings.insert("LEDGER_URL".into(), format!("{server}/{copy}"));
    let said = command(&["ledger", "restored-to", "now"], world.environment(), "").await;
    assert_eq!(said.0, 0, "{said:?}");
    world.settings.insert("LEDGER_URL".into(), url.clone());
    let _original = world.worker().await;

    world.settings.insert("LEDGER_URL".into(), format!("{server}/{copy}"));
    let restored = world.worker_unready(&[]);
    soon("it waits", restored.logged("not consuming")).await;
    let (status, text) = restored.get("/readyz").await;
    assert!(status == 503 && text.contains("serve these queues"), "{text}");
}

/// What RabbitMQ does by itself a minute after the last worker is gone.
async fn forget_the_ledger_of(world: &World) {
    let guard = world.queue("run");
    let delete = QueueDeleteOptions::default();
    world.channel.queue_delete(guard.as_str().into(), delete).await.unwrap();
}

#[tokio::test]
async fn an_idle_worker_notices_that_its_database_is_away() {
    let Some(server) = POSTGRES.start("idle").await else { return };
    let Some(world) = on("idle", &server.url).await else { return };
    let worker = world.worker().await;
    server.act("stop").await;
    eventually("it is not ready", || async { worker.get("/readyz").await.0 == 503 }).await;
    server.act("start").await;
    eventually("it is ready", || async { worker.get("/readyz").await.0 == 200 }).await;
}

#[tokio::test]
async fn a_right_that_jobs_need_is_missed_until_it_is_there_again() {
    let Some((mut world, url)) = world("rights").await else { return };
    let worker = world.worker().await;
    let owner = connect(&url).await;
    owner
        .batch_execute(
            "DROP ROLE IF EXISTS limited; CREATE ROLE limited LOGIN PASSWORD 'limited';
             GRANT USAGE ON SCHEMA checkout_worker TO limited;
             GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA checkout_worker TO limited;
             REVOKE UPDATE ON checkout_worker.job FROM limited",
        )
        .await
        .unwrap();
    worker.kill().await;
    let (_, place) = url.split_once('@').unwrap();
    world.settings.insert("LEDGER_URL".into(), format!("postgres://limited:limited@{place}"));
    let mut replies = world.replies().await;
    let worker = world.worker().await;
    world.job("a").await;
    soon("intake pauses", worker.logged("intake is paused")).await;
    eventually("it is not ready", || async { worker.get("/readyz").await.0 == 503 }).await;
    assert_eq!(world.posts(), 0);
    owner.batch_execute("GRANT UPDATE ON checkout_worker.job TO limited").await.unwrap();
    assert_eq!(next(&mut replies).await.status(), "succeeded");
    let log = worker.log().join("\n");
    assert_eq!(log.matches("intake goes on").count(), 1, "it did not go on in between");
    worker.kill().await;
    owner.batch_execute("DROP OWNED BY limited; DROP ROLE limited").await.unwrap();
}

#[tokio::test]
async fn a_job_of_a_worker_that_died_is_finished_by_another() {
    let Some((world, url)) = world("other_finishes").await else { return };
    let first = world.worker().await;
    world.script(r#"{"faults":[{"request_id":"a","times":1,"kind":"hang_after"}]}"#);
    world.job("a").await;
    soon("the call", world.simulator.posts_arrived(1)).await;
    let mut replies = world.replies().await;
    let _second = world.worker().await;
    first.kill().await;
    let reply = next(&mut replies).await;
    assert_eq!((reply.status(), world.sessions()), ("succeeded".into(), 2));
    assert_eq!(look(&url, "a").await.0.ambiguous, 1, "the session nobody was given is counted");
}

#[tokio::test]
async fn a_worker_that_was_frozen_beyond_its_lease_hands_nothing_out() {
    let Some((mut world, url)) = world("frozen").await else { return };
    world.set("creem.request_timeout", "2s");
    let first = world.worker().await;
    // Its answer comes while it is frozen; it finds it when it wakes.
    world.script(r#"{"latency_ms":1500}"#);
    world.job("a").await;
    soon("the call", world.simulator.posts_arrived(1)).await;
    first.signal("STOP");
    let mut replies = world.replies().await;
    let second = world.worker().await;
    let reply = next(&mut replies).await;
    assert_eq!(reply.status(), "succeeded");
    first.signal("CONT");
    soon("it learns that it is late", first.logged("the lease was lost")).await;
    let (row, orphans) = look(&url, "a").await;
    assert_eq!(
        (row.ambiguous, world.sessions()),
        (1, 2),
        "the session nobody was given is counted"
    );
    // Whether it could still read its answer, or only learned that it was too late for it.
    for orphan in orphans {
        assert_ne!(row.checkout_id.as_deref(), Some(orphan.checkout_id.as_str()));
    }
    world.script("{}");
    world.job("a").await;
    assert_eq!(next(&mut replies).await.body, reply.body);
    // One figure for all workers.
    for worker in [&first, &second] {
        eventually("the attempt is counted", || async {
            let metrics = worker.get("/metrics").await.1;
            metrics.contains("checkout_worker_ambiguous_attempts_total 1\n")
        })
        .await;
    }
}

#[tokio::test]
async fn a_database_that_restarts_or_comes_late_costs_no_job() {
    let Some(server) = POSTGRES.start("restarts").await else { return };
    let Some(world) = on("restarts", &server.url).await else { return };
    server.act("stop").await;
    let worker = world.worker_unready(&[]);
    soon("it waits", worker.logged("the ledger is not there; trying again")).await;
    let (status, text) = worker.get("/readyz").await;
    assert!(status == 503 && text.contains("ledger"), "{text}");
    server.act("start").await;
    soon("it serves", worker.logged("consuming")).await;
    let mut replies = world.replies().await;
    world.job("a").await;
    assert_eq!(next(&mut replies).await.status(), "succeeded");

    for verb in ["stop", "kill"] {
        server.act(verb).await;
        world.job(verb).await;
        soon("intake pauses", worker.logged("intake is paused")).await;
        eventually("it is not ready", || async { worker.get("/readyz").await.0 == 503 }).await;
        assert_eq!(worker.get("/livez").await.0, 200);
        let posts = world.posts();
        server.act("start").await;
        let reply = next(&mut replies).await;
        assert_eq!((reply.status(), reply.text("/request_id")), ("succeeded".into(), verb.into()));
        assert_eq!(world.posts(), posts + 1, "nothing is asked while nothing can be written");
        assert_eq!(look(&server.url, verb).await.0.attempts, 1, "a pause eats no attempt");
        eventually("it is ready", || async { worker.get("/readyz").await.0 == 200 }).await;
    }
}

#[tokio::test]
async fn a_database_that_hangs_costs_no_job() {
    let Some((world, url)) = world("hangs").await else { return };
    let worker = world.worker().await;
    let mut replies = world.replies().await;
    world.job("first").await;
    assert_eq!(next(&mut replies).await.status(), "succeeded");
    let mut client = connect(&url).await;
    let lock = client.transaction().await.unwrap();
    lock.batch_execute("LOCK TABLE checkout_worker.job IN ACCESS EXCLUSIVE MODE").await.unwrap();
    world.job("a").await;
    soon("intake pauses", worker.logged("intake is paused")).await;
    assert_eq!(world.posts(), 1);
    lock.commit().await.unwrap();
    assert_eq!(next(&mut replies).await.text("/request_id"), "a");
    assert_eq!(look(&url, "a").await.0.attempts, 1, "a claim that was asked again counts once");
}

/// The most calls that any second holds.
fn most_in_a_second(calls: &[u64]) -> usize {
    let within = |from: u64| {
        let second = from..from + 1_000_000;
        calls.iter().filter(|call| second.contains(*call)).count()
    };
    calls.iter().map(|call| within(*call)).max().unwrap_or(0)
}

#[tokio::test]
async fn one_budget_holds_for_one_four_and_sixteen_workers() {
    let Some(server) = shared("one_budget").await else { return };
    for count in [1, 4, 16] {
        let url = database(&server).await;
        let options = Options { url: url.into(), ca_pem: None };
        let ledgers = (0..count).map(|_| PostgresLedger::open(&options, Time::Database, |_| {}));
        let ledgers: Vec<_> =
            join_all(ledgers).await.into_iter().map(|ledger| Arc::new(ledger.unwrap())).collect();
        let calls = Arc::new(Mutex::new(Vec::new()));
        let started = Instant::now();
        let mut tasks = JoinSet::new();
        for ledger in ledgers {
            let pacer = Arc::new(Pacer::shared(Limits { ceiling: Some(200.0), bulk_share: 0.05 }));
            // Each could use the whole budget by itself.
            for _ in 0..40 {
                let (pacer, calls) = (pacer.clone(), calls.clone());
                tasks.spawn(async move {
                    loop {
                        pacer.pass(pacer.admit(Lane::Interactive).await).await;
                        let at = started.elapsed().as_micros();
                        calls.lock().unwrap().push(u64::try_from(at).unwrap());
                        // The call itself.
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                });
            }
            tasks.spawn(async move { grant(&pacer, &*ledger, Mode::Test).await.unwrap() });
        }
        drop(tokio::time::timeout(Duration::from_secs(4), tasks.join_next()).await);
        tasks.shutdown().await;
        let calls = std::mem::take(&mut *calls.lock().unwrap());
        let most = most_in_a_second(&calls);
        eprintln!("{count} workers: {} calls in 4 s, at most {most} in a second", calls.len());
        assert!(most <= 200, "{count} workers: {most} calls in a second");
        // A quarter of what there was to be had: none was stuck behind another's block.
        assert!(calls.len() >= 200, "{count} workers: {} calls", calls.len());
    }
}

#[tokio::test]
async fn four_workers_keep_one_budget_and_one_silence() {
    let Some((mut world, _url)) = world("four_workers").await else { return };
    world.set("rate_limit.per_second", "60");
    let mut workers = Vec::new();
    for _ in 0..4 {
        workers.push(world.worker().await);
    }
    let mut replies = world.replies().await;
    for n in 0..240 {
        world.job(&format!("order_{n}")).await;
    }
    for _ in 0..240 {
        assert_eq!(next(&mut replies).await.status(), "succeeded");
    }
    let calls: Vec<u64> =
        world.simulator.log().posts().iter().map(|post| post.arrived_us).collect();
    assert!(most_in_a_second(&calls) <= 60, "{}", most_in_a_second(&calls));
    let metrics = workers[0].get("/metrics").await.1;
    for line in [
        "checkout_worker_rate_limit_per_second 60",
        r#"checkout_worker_rate_limit_wait_seconds_count{lane="interactive"}"#,
        r#"checkout_worker_consuming{lane="interactive"} 1"#,
    ] {
        assert!(metrics.contains(line), "{line}: {metrics}");
    }

    // One worker is told to wait for three seconds; after one, nobody asks any more.
    world.script(
        r#"{"faults":[{"request_id":"told","times":1,"kind":"throttle","retry_after":"3"}]}"#,
    );
    world.job("told").await;
    for n in 0..300 {
        world.job(&format!("later_{n}")).await;
    }
    let says = || async {
        let told = futures::future::join_all(workers.iter().map(|worker| worker.get("/status")));
        told.await.iter().all(|(_, status)| status.contains("Creem asked for silence, for"))
    };
    eventually("all say why they wait", says).await;
    for _ in 0..301 {
        assert_eq!(next(&mut replies).await.status(), "succeeded");
    }
    let log = world.simulator.log();
    let told = log.posts().iter().find(|post| post.fault == Some("throttle")).unwrap().arrived_us;
    let quiet = told + 1_000_000..told + 3_000_000;
    let late: Vec<_> = log.posts().iter().filter(|post| quiet.contains(&post.arrived_us)).collect();
    assert!(late.is_empty(), "{late:?}");
}

/// How many calls a second a worker says that may be made.
async fn told_rate(worker: &Process) -> f64 {
    let status: serde_json::Value = serde_json::from_str(&worker.get("/status").await.1).unwrap();
    status["rate_limit"]["per_second"].as_f64().unwrap()
}

#[tokio::test]
async fn workers_of_one_lane_each_learn_together_how_fast_creem_may_be_asked() {
    let Some((world, _url)) = world("learn_together").await else { return };
    world.script(r#"{"limit_per_second":40}"#);
    let start = async |lane| {
        let worker = world.worker_unready(&["--lanes", lane]);
        soon("the worker consumes", worker.logged("consuming")).await;
        worker
    };
    let (bulk, buyers) = (start("bulk").await, start("interactive").await);
    assert!(told_rate(&buyers).await > 90.0, "nobody has learned anything");
    let mut replies = world.replies().await;
    for n in 0..400 {
        world.publish_to(&world.queue("jobs.bulk"), body(&format!("bulk_{n}")), persistent()).await;
    }
    for _ in 0..200 {
        assert_eq!(next(&mut replies).await.status(), "succeeded");
    }
    // It has not made a call, and knows what the other one has learned; so does one that starts now.
    let newcomer = start("interactive").await;
    for worker in [&bulk, &buyers, &newcomer] {
        let heard = || async { told_rate(worker).await < 80.0 };
        eventually("it has heard of the limit", heard).await;
    }
    buyers.kill().await;
    world.job("buyer").await;
    let mut before = 0;
    while next(&mut replies).await.text("/request_id") != "buyer" {
        before += 1;
    }
    assert!(before < 100, "a buyer has come behind {before} of the campaign");
    for _ in before..200 {
        assert_eq!(next(&mut replies).await.status(), "succeeded");
    }
    let log = world.simulator.log();
    let refused = log.posts().iter().filter(|post| post.status == Some(429)).count();
    assert_eq!(log.posts().len() - refused, 401);
    assert!(refused < 100, "{refused} of 401 calls were refused");
}

#[tokio::test]
async fn what_an_operator_says_of_a_new_ledger_holds_for_all_workers_at_once() {
    let Some((mut world, url)) = world("accepted").await else { return };
    let lost = database(&shared("accepted").await.unwrap()).await;
    // A job that a worker with another ledger had in the works.
    world.settings.insert("LEDGER_URL".into(), lost);
    let worker = world.worker().await;
    world.script(r#"{"faults":[{"request_id":"a","times":1,"kind":"hang_after"}]}"#);
    world.job("a").await;
    soon("the call", world.simulator.posts_arrived(1)).await;
    world.settings.insert("LEDGER_URL".into(), url);
    worker.kill().await;
    forget_the_ledger_of(&world).await;
    let mut accepting = world.worker_unready(&["--accept-empty-ledger", "--lanes", "bulk"]);
    soon("it serves", accepting.logged("consuming")).await;
    accepting.signal("TERM");
    assert_eq!(accepting.ended().await, 0);
    let mut replies = world.replies().await;
    let _second = world.worker().await;
    assert_eq!(next(&mut replies).await.status(), "succeeded", "the second one does not ask again");
}

#[tokio::test]
async fn a_worker_that_has_begun_to_serve_heeds_the_refusal_of_another() {
    let Some(server) = shared("heeds").await else { return };
    let Some(broker) = BROKER.start("heeds").await else { return };
    let url = database(&server).await;
    let mut world = World::on(broker.url.clone(), "heeds").await;
    world.settings.insert("LEDGER_URL".into(), url.clone());
    let mut worker = world.worker().await;
    let mut replies = world.replies().await;
    world.job("plain").await;
    assert_eq!(next(&mut replies).await.status(), "succeeded");
    // Creem asks for silence, so the next job is held without a row of its own.
    world.script(
        r#"{"faults":[{"request_id":"told","times":1,"kind":"throttle","retry_after":"20"}]}"#,
    );
    world.job("told").await;
    soon("the call", world.simulator.posts_arrived(2)).await;
    soon("silence", worker.logged("creem answered")).await;
    world.job("known_elsewhere").await;
    eventually("it is delivered", || async { world.depth("jobs").await == 0 }).await;
    // Another worker refuses the ledger; then this one's session breaks, and the job comes again.
    let refused = "INSERT INTO checkout_worker.meta (name, number) VALUES ('refused', 1)";
    connect(&url).await.batch_execute(refused).await.unwrap();
    ctl(&broker, &["close_all_connections", "test"]).await;
    assert_eq!(soon("it ends", worker.ended()).await, 1);
    assert!(worker.log().join("\n").contains("--accept-empty-ledger"));
    assert_eq!(world.posts(), 2, "the job was not asked for");
}
