//! Deaths, restarts and full disks: whatever happens, no job is lost and no id gets two links.

use std::collections::HashSet;
use std::process::Command;

use futures::StreamExt as _;
use lapin::options::*;
use lapin::types::{AMQPValue, FieldTable};
use tokio::io::AsyncWriteExt as _;

use crate::support::broker::ctl;
use crate::support::private::{BROKER, Private};
use crate::support::relay::Relay;
use crate::support::{World, body, eventually, header, next, persistent, soon};

#[tokio::test]
async fn a_worker_killed_in_mid_call_leaves_a_job_that_the_next_one_finishes() {
    let Some(world) = World::new("killed").await else { return };
    let worker = world.worker().await;
    let mut replies = world.replies().await;
    world.script(r#"{"faults":[{"request_id":"a","times":1,"kind":"hang_after"}]}"#);
    world.job("a").await;
    soon("the call", world.simulator.posts_arrived(1)).await;
    worker.kill().await;
    let _next = world.worker().await;

    let reply = next(&mut replies).await;

    assert_eq!((reply.status(), reply.json["attempts"].clone()), ("succeeded".into(), 2.into()));
    assert_eq!(world.sessions(), 2);
    let row = crate::ledger::row(&world.ledger(), "a");
    assert_eq!((row.ambiguous, row.crashes), (1, 1), "the session nobody was given is counted");
}

#[tokio::test]
async fn sigterm_finishes_what_was_sent_and_gives_back_the_rest() {
    let Some(mut world) = World::new("sigterm").await else { return };
    world.set("lanes.interactive.concurrency", "1");
    let mut worker = world.worker().await;
    let mut replies = world.replies().await;
    world.script(r#"{"latency_ms":700}"#);
    for id in ["a", "b", "c"] {
        world.job(id).await;
    }
    soon("the first call", world.simulator.posts_arrived(1)).await;
    worker.signal("TERM");
    assert_eq!(worker.ended().await, 0);

    assert_eq!(next(&mut replies).await.text("/request_id"), "a");
    assert_eq!(world.posts(), 1, "nothing new was begun");
    eventually("the others are back", || async { world.depth("jobs").await == 2 }).await;
    let _next = world.worker().await;
    let rest: HashSet<String> = [next(&mut replies).await, next(&mut replies).await]
        .map(|reply| reply.text("/request_id"))
        .into();
    assert_eq!(rest, HashSet::from(["b".into(), "c".into()]));
    assert_eq!(world.sessions(), 3);
    for id in ["a", "b", "c"] {
        assert_eq!(crate::ledger::row(&world.ledger(), id).attempts, 1, "a stop eats no attempt");
    }
}

#[tokio::test]
async fn a_second_signal_leaves_at_once() {
    let Some(world) = World::new("second_signal").await else { return };
    let mut worker = world.worker().await;
    world.script(r#"{"faults":[{"request_id":"a","kind":"hang"}]}"#);
    world.job("a").await;
    soon("the call", world.simulator.posts_arrived(1)).await;
    worker.signal("TERM");
    soon("it stops", worker.logged("stopping: finishing what was sent")).await;
    worker.signal("TERM");
    assert_eq!(worker.ended().await, 1);
    eventually("the job is back", || async { world.depth("jobs").await == 1 }).await;
}

#[tokio::test]
async fn a_second_worker_on_the_same_queues_waits_until_the_first_is_gone() {
    let Some(world) = World::new("second_worker").await else { return };
    let first = world.worker().await;
    let mut environment = world.environment();
    let other = world.directory.path().join("other.db");
    environment.insert("LEDGER_URL".into(), format!("sqlite:{}", other.display()));
    let second = crate::support::Process::start(&["run"], &environment);
    soon("it waits", second.logged("not consuming; trying again")).await;
    let (status, text) = second.get("/readyz").await;
    assert_eq!(status, 503);
    assert!(text.contains("a ledger of their own"), "{text}");
    assert_eq!(second.get("/livez").await.0, 200);

    // On the same file it is refused outright, saying why.
    let mut third = world.worker_unready(&[]);
    assert_eq!(third.ended().await, 1);
    assert!(third.log().join("\n").contains("in use by another worker"), "{:?}", third.log());

    first.kill().await;
    soon("its turn", second.logged("consuming")).await;
    eventually("it is ready", || async { second.get("/readyz").await.0 == 200 }).await;
}

#[tokio::test]
async fn a_lost_ledger_is_noticed_before_a_redelivered_job_gets_a_second_link() {
    let Some(world) = World::new("lost_ledger").await else { return };
    let worker = world.worker().await;
    world.script(r#"{"faults":[{"request_id":"a","times":1,"kind":"hang_after"}]}"#);
    world.job("a").await;
    soon("the call", world.simulator.posts_arrived(1)).await;
    worker.kill().await;
    for suffix in ["", "-wal", "-shm"] {
        let mut path = world.ledger().into_os_string();
        path.push(suffix);
        drop(std::fs::remove_file(path));
    }
    for _ in 0..2 {
        let mut worker = world.worker_unready(&[]);
        assert_eq!(worker.ended().await, 1);
        assert!(worker.log().join("\n").contains("--accept-empty-ledger"));
        assert_eq!(world.posts(), 1);
    }
    // The refusal is remembered: not even a job that nobody took before is taken.
    world
        .channel
        .queue_purge(world.queue("jobs").as_str().into(), QueuePurgeOptions::default())
        .await
        .unwrap();
    world.job("b").await;
    let mut worker = world.worker_unready(&[]);
    assert_eq!(worker.ended().await, 1);
    assert_eq!((world.posts(), world.depth("jobs").await), (1, 1));
    let mut replies = world.replies().await;
    let worker = world.worker_unready(&["--accept-empty-ledger"]);
    assert_eq!(next(&mut replies).await.status(), "succeeded");
    worker.kill().await;
    let _worker = world.worker().await;
    world.job("c").await;
    assert_eq!(next(&mut replies).await.status(), "succeeded", "the operator's word is remembered");
}

#[tokio::test]
async fn a_queue_of_the_workers_own_that_is_deleted_is_declared_again_and_no_job_is_lost() {
    let Some(world) = World::new("own_queue").await else { return };
    let worker = world.worker().await;
    let dead = world.queue("dead");
    world.channel.queue_delete(dead.as_str().into(), QueueDeleteOptions::default()).await.unwrap();
    world.publish(body("a"), persistent().with_reply_to(world.queue("jobs").into())).await;
    soon("it is noticed", worker.logged("one of the worker's own queues does not take it")).await;
    eventually("it is declared again", || async {
        let channel = world.connection.create_channel().await.unwrap();
        let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::durable() };
        channel.queue_declare(dead.as_str().into(), passive, FieldTable::default()).await.is_ok()
    })
    .await;
    let mut dead = world.dead().await;
    assert_eq!(next(&mut dead).await.body, body("a").into_bytes());
}

#[tokio::test]
async fn a_lane_whose_queue_is_missing_costs_the_other_lane_nothing() {
    let Some(mut world) = World::new("one_lane").await else { return };
    world.worker().await.kill().await;
    let bulk = world.queue("jobs.bulk");
    world.channel.queue_delete(bulk.as_str().into(), QueueDeleteOptions::default()).await.unwrap();
    world.set("topology.declare", "false");
    let worker = world.worker_unready(&[]);
    soon("it is said", worker.logged("this lane cannot be consumed")).await;
    let mut replies = world.replies().await;
    for n in 0..30 {
        world.job(&format!("order_{n}")).await;
        assert_eq!(next(&mut replies).await.status(), "succeeded");
    }
    let (status, text) = worker.get("/readyz").await;
    assert!(status == 503 && text.contains("lane bulk"), "{text}");
    assert_eq!(world.depth("dead").await, 0);
    // As an operator does it, from the definitions.
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
    world
        .channel
        .queue_declare(bulk.as_str().into(), QueueDeclareOptions::durable(), arguments)
        .await
        .unwrap();
    eventually("it is ready", || async { worker.get("/readyz").await.0 == 200 }).await;
}

#[tokio::test]
async fn idle_connections_take_no_descriptor_that_a_job_needs() {
    let Some(world) = World::new("idle").await else { return };
    let worker = world.worker().await;
    let address = worker.http().await;
    let mut idle = Vec::new();
    for _ in 0..200 {
        let mut stream = tokio::net::TcpStream::connect(&address).await.unwrap();
        // One that is dropped may tell so here.
        drop(stream.write_all(b"GET /livez HTTP/1.1\r\n").await);
        idle.push(stream);
    }
    let open = || std::fs::read_dir(format!("/proc/{}/fd", worker.pid)).unwrap().count();
    eventually("the rest are dropped", || async { open() < 120 }).await;
    eventually("there is room again", || async {
        reqwest::get(format!("http://{address}/livez"))
            .await
            .is_ok_and(|answer| answer.status() == 200)
    })
    .await;
}

#[tokio::test]
async fn a_ledger_has_one_lock_by_whichever_name() {
    let Some(mut world) = World::new("symlink").await else { return };
    let _first = world.worker().await;
    let link = world.directory.path().join("link.db");
    std::os::unix::fs::symlink(world.ledger(), &link).unwrap();
    world.settings.insert("LEDGER_URL".into(), format!("sqlite:{}", link.display()));
    let mut second = world.worker_unready(&[]);
    assert_eq!(second.ended().await, 1);
    assert!(second.log().join("\n").contains("in use by another worker"), "{:?}", second.log());
}

#[tokio::test]
async fn a_reply_exchange_that_is_gone_pauses_intake_and_fails_no_job() {
    let Some(mut world) = World::new("reply_exchange").await else { return };
    let exchange = world.queue("outbox");
    world.set("replies.exchange", &exchange);
    let worker = world.worker().await;
    let gone = ExchangeDeleteOptions::default();
    world.channel.exchange_delete(exchange.as_str().into(), gone).await.unwrap();
    world.job("a").await;
    eventually("it is noticed", || async {
        let (status, text) = worker.get("/readyz").await;
        status == 503 && text.contains("publishing breaks its channel")
    })
    .await;
    let channel = world.connection.create_channel().await.unwrap();
    let durable = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
    let queue = world.queue("replies");
    channel
        .exchange_declare(
            exchange.as_str().into(),
            lapin::ExchangeKind::Direct,
            durable,
            FieldTable::default(),
        )
        .await
        .unwrap();
    channel
        .queue_bind(
            queue.as_str().into(),
            exchange.as_str().into(),
            queue.as_str().into(),
            QueueBindOptions::default(),
            FieldTable::default(),
        )
        .await
        .unwrap();
    let mut replies = world.replies().await;
    assert_eq!(next(&mut replies).await.status(), "succeeded");
    eventually("it is ready", || async { worker.get("/readyz").await.0 == 200 }).await;
    assert_eq!(world.posts(), 1);
}

#[tokio::test]
async fn a_lost_ledger_is_noticed_by_a_job_that_comes_from_its_delay_queue() {
    let Some(world) = World::new("lost_hop").await else { return };
    world.worker().await.kill().await;
    // What still goes to its consumer would come again, to a worker with a new ledger.
    eventually("the broker has noticed", || async { world.consumers("jobs").await == 0 }).await;
    std::fs::remove_file(world.ledger()).unwrap();
    // As another ledger's worker would have signed it.
    let mark = "1;1795370400000;0;00112233445566778899aabbccddeeff";
    world.publish(body("a"), header("checkout-hop", mark)).await;
    let worker = world.worker_unready(&[]);
    let (mut replies, mut dead) = (world.replies().await, world.dead().await);
    let reply = next(&mut replies).await;
    assert_eq!(
        (reply.status(), reply.text("/error/code")),
        ("unresolved".into(), "other_ledger".into())
    );
    assert_eq!(next(&mut dead).await.body, body("a").into_bytes());
    assert_eq!(world.posts(), 0);
    // A producer could have written it; so it costs its own job only.
    world.job("b").await;
    assert_eq!(next(&mut replies).await.status(), "succeeded");
    assert_eq!(worker.get("/readyz").await.0, 200);
}

#[tokio::test]
async fn two_ledgers_cannot_serve_one_lane_each() {
    let Some(world) = World::new("lane_each").await else { return };
    let first = world.worker_unready(&["--lanes", "interactive"]);
    soon("the first", first.logged("consuming")).await;
    let mut environment = world.environment();
    let other = world.directory.path().join("other.db");
    environment.insert("LEDGER_URL".into(), format!("sqlite:{}", other.display()));
    let second = crate::support::Process::start(&["run", "--lanes", "bulk"], &environment);
    soon("it waits", second.logged("not consuming; trying again")).await;
    assert_eq!(second.get("/readyz").await.0, 503);
}

#[tokio::test]
async fn a_damaged_row_parks_its_job_and_the_others_are_served() {
    let Some(world) = World::new("damaged_row").await else { return };
    let _worker = world.worker().await;
    let (mut replies, mut dead) = (world.replies().await, world.dead().await);
    for id in ["a", "b"] {
        world.job(id).await;
        assert_eq!(next(&mut replies).await.status(), "succeeded");
    }
    let beside = rusqlite::Connection::open(world.ledger()).unwrap();
    beside.busy_timeout(std::time::Duration::from_secs(5)).unwrap();
    for (column, code) in [("ended_at = ended_at + 1", 1), ("ambiguous = -1", 2)] {
        beside.execute(&format!("UPDATE job SET {column} WHERE request_id = 'a'"), []).unwrap();
        world.job("a").await;
        let parked = next(&mut dead).await;
        assert_eq!(
            parked.header("checkout-error-code").as_deref(),
            Some("ledger_row_damaged"),
            "{code}"
        );
        world.job("b").await;
        assert_eq!(next(&mut replies).await.text("/request_id"), "b");
    }
    assert_eq!(world.posts(), 2, "nobody knows whether it has a link, so nobody asks for another");
}

#[tokio::test]
async fn sigterm_while_the_broker_is_away_still_settles_what_was_sent() {
    let Some(mut world) = World::new("sigterm_away").await else { return };
    let url = world.environment()["AMQP_URL"].clone();
    let port = url.rsplit(':').next().unwrap().split('/').next().unwrap().to_owned();
    let relay = Relay::start(format!("127.0.0.1:{port}")).await;
    let relayed = format!("amqp://guest:guest@{}/%2f?heartbeat=1", relay.address);
    world.settings.insert("AMQP_URL".into(), relayed);
    let mut worker = world.worker().await;
    world.script(r#"{"latency_ms":5000}"#);
    world.job("a").await;
    soon("the call", world.simulator.posts_arrived(1)).await;
    relay.freeze(true);
    soon("it notices", worker.logged("not consuming; trying again")).await;
    worker.signal("TERM");
    assert_eq!(worker.ended().await, 0);
    assert!(crate::ledger::row(&world.ledger(), "a").checkout_id.is_some(), "the link was kept");
}

#[tokio::test]
async fn a_deleted_job_queue_comes_back_and_is_served_again() {
    let Some(world) = World::new("queue_deleted").await else { return };
    let worker = world.worker().await;
    let mut replies = world.replies().await;
    let queue = world.queue("jobs");
    world.channel.queue_delete(queue.as_str().into(), QueueDeleteOptions::default()).await.unwrap();
    soon("it notices", worker.logged("not consuming; trying again")).await;
    eventually("the queue is back", || async {
        let channel = world.connection.create_channel().await.unwrap();
        let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::durable() };
        channel.queue_declare(queue.as_str().into(), passive, FieldTable::default()).await.is_ok()
    })
    .await;
    world.job("a").await;
    assert_eq!(next(&mut replies).await.status(), "succeeded");
}

#[tokio::test]
async fn a_full_reply_queue_parks_the_job_after_a_while_and_keeps_its_outcome() {
    let Some(mut world) = World::new("full_queue").await else { return };
    world.set("retry.first", "10ms").set("retry.longest", "50ms");
    let worker = world.worker().await;
    let (mut dead, mut replies) = (world.dead().await, world.replies().await);
    let full = world.queue("full");
    let mut arguments = FieldTable::default();
    arguments.insert("x-max-length".into(), AMQPValue::LongLongInt(0));
    arguments.insert("x-overflow".into(), AMQPValue::LongString("reject-publish".into()));
    world
        .channel
        .queue_declare(full.as_str().into(), QueueDeclareOptions::durable(), arguments)
        .await
        .unwrap();
    world.publish(body("a"), persistent().with_reply_to(full.as_str().into())).await;
    let parked = next(&mut dead).await;
    assert_eq!(parked.header("checkout-error-code").as_deref(), Some("reply_unroutable"));
    assert!(parked.header("checkout-error-message").unwrap().contains("full"));
    let done = soon("its line", worker.event(|event| event["message"] == "job")).await;
    let held = done["duration_ms"].as_u64().unwrap();
    assert!(held >= 5_000, "an election may take that long, and it was borne for {held} ms");
    world.job("a").await;
    assert_eq!(next(&mut replies).await.status(), "succeeded");
    assert_eq!(world.posts(), 1);
    world.channel.queue_delete(full.as_str().into(), QueueDeleteOptions::default()).await.unwrap();
}

#[tokio::test]
async fn a_broker_that_restarts_dies_or_raises_an_alarm_costs_no_job() {
    let Some(broker) = BROKER.start("restart").await else { return };
    let mut world = World::on(broker.url.clone(), "restart").await;
    world.set("retry.first", "100ms").set("amqp.heartbeat", "2s");
    let worker = world.worker().await;
    world.script(r#"{"latency_ms":1500}"#);
    world.job("a").await;
    soon("the call", world.simulator.posts_arrived(1)).await;

    // The broker goes away while the call is under way; its result is kept.
    broker.act("restart").await;
    world = world.reconnect(&broker.url).await;
    let mut replies = world.replies().await;
    let reply = next(&mut replies).await;
    assert_eq!((reply.status(), world.posts()), ("succeeded".into(), 1));
    assert_eq!(
        crate::ledger::row(&world.ledger(), "a").attempts,
        1,
        "a lost connection eats no attempt"
    );

    // It dies without a word.
    world.script("{}");
    broker.act("kill").await;
    soon("it notices", worker.logged("the publishing connection is down")).await;
    eventually("it is not ready", || async { worker.get("/readyz").await.0 == 503 }).await;
    assert_eq!(worker.get("/livez").await.0, 200);
    broker.act("start").await;
    world = world.reconnect(&broker.url).await;
    let mut replies = world.replies().await;
    world.job("b").await;
    while next(&mut replies).await.text("/request_id") != "b" {}
}

#[tokio::test]
async fn a_memory_alarm_at_the_broker_pauses_intake_and_nothing_is_lost() {
    let Some(broker) = BROKER.start("alarm").await else { return };
    let world = World::on(broker.url.clone(), "alarm").await;
    let mut first = world.worker().await;
    first.signal("TERM");
    first.ended().await;
    world.job("a").await;

    // A broker blocks a connection when it next publishes; the reply to the job makes it.
    ctl(&broker, &["set_vm_memory_high_watermark", "absolute", "1MB"]).await;
    let worker = world.worker_unready(&[]);
    soon("it is blocked", worker.logged("the broker has blocked publishing")).await;
    eventually("it is not ready", || async {
        let (status, text) = worker.get("/readyz").await;
        status == 503 && text.contains("publishing")
    })
    .await;
    eventually("the pause is counted", || async {
        let metrics = worker.get("/metrics").await.1;
        metrics.contains(r#"checkout_worker_paused{reason="publishing"} 1"#)
    })
    .await;
    assert_eq!(world.posts(), 1);

    // A new connection is not told of the alarm until it publishes; it must not count as a good one.
    ctl(&broker, &["close_all_connections", "test"]).await;
    let of_replies = |event: &serde_json::Value, text: &str| {
        event["message"] == text && event["connection"].as_str().unwrap().ends_with(" publish")
    };
    let tried = |event: &serde_json::Value| {
        of_replies(event, "the publishing connection is down")
            && event["error"].as_str().unwrap().contains("still takes no messages")
    };
    soon("it tries", worker.event(tried)).await;
    let events = worker.log();
    let events = events.iter().filter_map(|line| serde_json::from_str(line).ok());
    let ups = events.filter(|event| of_replies(event, "the publishing connection is up")).count();
    assert_eq!(ups, 1, "before the alarm");
    assert_eq!(worker.get("/readyz").await.0, 503);
    ctl(&broker, &["set_vm_memory_high_watermark", "absolute", "768MiB"]).await;
    let world = world.reconnect(&broker.url).await;
    let mut replies = world.replies().await;
    assert_eq!(next(&mut replies).await.text("/request_id"), "a");
    world.job("b").await;
    while next(&mut replies).await.text("/request_id") != "b" {}
    assert_eq!(world.posts(), 2, "one call for one job");
}

#[tokio::test]
async fn a_full_disk_pauses_intake_and_space_lets_it_go_on() {
    let Some(mut world) = World::new("full_disk").await else { return };
    let disk = world.directory.path().join("disk");
    std::fs::create_dir(&disk).unwrap();
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=1m", "tmpfs"])
        .arg(&disk)
        .output()
        .is_ok_and(|output| output.status.success());
    if !mounted {
        assert!(std::env::var("CI").is_err(), "a full disk needs the right to mount a tmpfs");
        eprintln!("skipped: a_full_disk_pauses_intake needs the right to mount a tmpfs");
        return;
    }
    let _unmount = Unmount(disk.clone());
    world.settings.insert("LEDGER_URL".into(), format!("sqlite:{}/ledger.db", disk.display()));
    let worker = world.worker().await;
    let mut replies = world.replies().await;
    world.job("a").await;
    assert_eq!(next(&mut replies).await.status(), "succeeded");

    let ballast = disk.join("ballast");
    let filled = std::fs::write(&ballast, vec![0; 4 << 20]);
    assert!(filled.is_err(), "the disk is full");
    for n in 0..40 {
        world.job(&format!("order_{n}")).await;
    }
    soon("intake pauses", worker.logged("intake is paused: no job is acked")).await;
    eventually("it is not ready, and says why", || async {
        let (status, text) = worker.get("/readyz").await;
        status == 503 && text.contains("disk is full")
    })
    .await;
    std::fs::remove_file(&ballast).unwrap();

    let mut links = HashSet::new();
    for _ in 0..40 {
        let reply = next(&mut replies).await;
        assert_eq!(reply.status(), "succeeded");
        links.insert(reply.text("/checkout_url"));
    }
    assert_eq!((links.len(), world.posts()), (40, 41), "no job was asked for twice");

    // On a disk that has become read-only it does not start, and says so in one line.
    worker.kill().await;
    let remount = ["-o", "remount,ro"];
    assert!(Command::new("mount").args(remount).arg(&disk).status().unwrap().success());
    let mut worker = world.worker_unready(&[]);
    assert_eq!(worker.ended().await, 1);
    let last = worker.log().pop().unwrap_or_default();
    assert!(last.contains("cannot be opened") && last.contains("may write in it"), "{last}");
}

#[tokio::test]
async fn a_black_holed_broker_is_given_up_and_found_again() {
    let Some(mut world) = World::new("black_hole").await else { return };
    let url = world.environment()["AMQP_URL"].clone();
    let port = url.rsplit(':').next().unwrap().split('/').next().unwrap().to_owned();
    let relay = Relay::start(format!("127.0.0.1:{port}")).await;
    let relayed = format!("amqp://guest:guest@{}/%2f?heartbeat=1", relay.address);
    world.settings.insert("AMQP_URL".into(), relayed);
    world.set("retry.first", "50ms").set("retry.longest", "500ms");
    let worker = world.worker().await;
    let mut replies = world.replies().await;
    world.job("a").await;
    assert_eq!(next(&mut replies).await.status(), "succeeded");

    relay.freeze(true);
    soon("it notices", worker.logged("not consuming; trying again")).await;
    soon("it notices", worker.logged("the publishing connection is down")).await;
    world.job("b").await;
    assert_eq!(worker.get("/livez").await.0, 200);
    relay.freeze(false);

    // The ack of the first job may have met the black hole; then its reply repeats.
    while next(&mut replies).await.text("/request_id") != "b" {}
    assert_eq!(world.posts(), 2);
}

#[tokio::test]
async fn the_environments_proxies_are_ignored() {
    let Some(mut world) = World::new("no_proxy").await else { return };
    for name in ["HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"] {
        world.settings.insert(name.into(), "http://127.0.0.1:1".into());
    }
    let _worker = world.worker().await;
    let mut replies = world.replies().await;
    world.job("a").await;
    assert_eq!(next(&mut replies).await.status(), "succeeded");
}

struct Unmount(std::path::PathBuf);

impl Drop for Unmount {
    fn drop(&mut self) {
        drop(Command::new("umount").arg("-l").arg(&self.0).status());
    }
}

#[tokio::test]
async fn a_message_that_lapin_cannot_read_ends_in_the_dead_queue_and_takes_nobody_along() {
    let Some(mut world) = World::new("unreadable").await else { return };
    world.set("retry.first", "20ms").set("retry.longest", "100ms");
    let _worker = world.worker().await;
    let mut replies = world.replies().await;
    // On a new ledger, what breaks its first session would be taken for a lost ledger's job.
    world.job("first").await;
    assert_eq!(next(&mut replies).await.status(), "succeeded");
    // A correlation_id that is not UTF-8 breaks lapin's frame parser, and with it the connection.
    crate::support::raw::publish_garbled(&world).await;
    for n in 0..10 {
        world.job(&format!("order_{n}")).await;
    }
    let mut answered = HashSet::new();
    while answered.len() < 10 {
        answered.insert(next(&mut replies).await.text("/request_id"));
    }
    assert_eq!(world.sessions(), 11);
    eventually("only the poison is dead-lettered", || async { world.depth("dead").await == 1 })
        .await;
}

#[tokio::test]
async fn headers_nested_as_deep_as_a_frame_can_hold_end_no_process() {
    let Some(mut world) = World::new("nested").await else { return };
    // Whatever the caller has set.
    world.settings.insert("RUST_MIN_STACK".into(), "8388608".into());
    let worker = world.worker().await;
    let mut replies = world.replies().await;
    crate::support::raw::publish_nested(&world, 17_000).await;
    assert_eq!(next(&mut replies).await.text("/request_id"), "nested");
    world.job("after").await;
    assert_eq!(next(&mut replies).await.status(), "succeeded");
    assert_eq!(worker.get("/livez").await.0, 200, "it is still the same process");
}

#[tokio::test]
async fn no_log_filter_brings_out_the_login_or_an_address() {
    let Some(mut world) = World::new("log_filter").await else { return };
    let loud = "trace,lapin::channel=trace,lapin::io_loop=trace,amq_protocol=trace,hyper=trace";
    world.settings.insert("RUST_LOG".into(), loud.into());
    let mut worker = world.worker().await;
    let mut replies = world.replies().await;
    let job = r#"{"request_id":"a","product_id":"p","customer":{"email":"canary@example.com"}}"#;
    world.publish(job, persistent()).await;
    assert_eq!(next(&mut replies).await.status(), "succeeded");
    soon("the job's line", worker.event(|event| event["message"] == "job")).await;
    worker.signal("TERM");
    worker.ended().await;
    // Libraries print bytes as numbers, too. The login is user and password, each after a NUL.
    let numbers = |bytes: &[u8]| bytes.iter().map(u8::to_string).collect::<Vec<_>>().join(", ");
    let (login, address) = (numbers(b"\0guest\0guest"), numbers(b"canary"));
    let log = worker.log();
    assert!(log.iter().any(|line| line.contains(r#""level":"DEBUG""#)), "the filter is open");
    for line in log {
        for secret in ["canary", "guest\\0guest", "guest\\u0000guest", &login, &address] {
            assert!(!line.contains(secret), "{line}");
        }
    }
}

#[tokio::test]
async fn a_deadline_far_away_and_odd_properties_do_no_harm() {
    let Some(world) = World::new("odd_properties").await else { return };
    let _worker = world.worker().await;
    let mut replies = world.replies().await;
    let odd = header("checkout-deadline", "2126-01-01T00:00:00Z")
        .with_delivery_mode(1)
        .with_priority(255)
        .with_reply_to("".into())
        .with_correlation_id("x".repeat(255).into());
    world.publish(body("a"), odd).await;
    let reply = next(&mut replies).await;
    assert_eq!((reply.status(), reply.correlation_id().len()), ("succeeded".into(), 255));
}

#[tokio::test]
async fn a_full_dead_queue_holds_what_is_to_be_parked_and_nothing_else() {
    let Some(broker) = BROKER.start("full_dead").await else { return };
    let world = World::on(broker.url.clone(), "full_dead").await;
    let worker = world.worker().await;
    let pattern = format!("^{}$", world.queue("dead").replace('.', "\\."));
    let policy = r#"{"max-length": 1}"#;
    ctl(&broker, &["set_policy", "full", &pattern, policy, "--apply-to", "queues"]).await;
    let mut replies = world.replies().await;
    let unanswerable = || persistent().with_reply_to(world.queue("jobs").into());
    // A quorum queue tells its publishers that it is full once it is: one more fits than the policy
    // says, and as many as are on their way.
    for id in ["parked_0", "parked_1"] {
        world.publish(body(id), unanswerable()).await;
        let parked = |event: &serde_json::Value| {
            event["message"] == "job" && event["job.key"] == format!("test/{id}")
        };
        soon("it is parked", worker.event(parked)).await;
    }
    world.publish(body("parked_2"), unanswerable()).await;
    let full = |event: &serde_json::Value| {
        event["message"].as_str().is_some_and(|text| text.contains("own queues is full"))
    };
    soon("it is noticed", worker.event(full)).await;
    // Longer than a queue that is missing would be waited for.
    eventually("it is tried again and again", || async {
        // Each is a round of refusals of five seconds at least.
        let seen = worker.log().iter().filter(|line| line.contains("own queues is full")).count();
        seen > 2
    })
    .await;
    world.job("good").await;
    assert_eq!(next(&mut replies).await.text("/request_id"), "good");
    let log = worker.log().join("\n");
    assert_eq!(log.matches("\"consuming\"").count(), 1, "the session goes on: {log}");

    // Somebody makes room. (To lift the policy is not enough: RabbitMQ 3.10.8 goes on refusing.)
    let mut dead = world.dead().await;
    let mut parked = HashSet::new();
    while parked.len() < 3 {
        parked.insert(next(&mut dead).await.body);
    }
}

#[tokio::test]
async fn a_consumer_that_the_broker_has_lost_without_a_word_is_made_again() {
    let Some(broker) = BROKER.start("lost_consumer").await else { return };
    let mut world = World::on(broker.url.clone(), "lost_consumer").await;
    world.set("amqp.heartbeat", "1s");
    let _worker = world.worker().await;
    let mut replies = world.replies().await;
    world.job("before").await;
    assert_eq!(next(&mut replies).await.text("/request_id"), "before");
    forget_the_consumer(&broker, &world.queue("jobs")).await;
    world.job("after").await;
    assert_eq!(next(&mut replies).await.text("/request_id"), "after");
    // A lane that is idle is consumed anew again and again, and each time by one channel.
    let channels = async || broker.ask("ctl", &["list_channels", "-q", "pid"]).await.unwrap();
    let before = channels().await;
    eventually("another channel is there", || async { channels().await != before }).await;
    eventually("and the one before is not", || async {
        channels().await.lines().count() <= before.lines().count()
    })
    .await;
}

#[tokio::test]
async fn a_lane_that_is_never_idle_finds_its_lost_consumer_as_well() {
    let Some(broker) = BROKER.start("lost_and_busy").await else { return };
    let mut world = World::on(broker.url.clone(), "lost_and_busy").await;
    world.set("amqp.heartbeat", "1s");
    world.set("creem.request_timeout", "60s").set("shutdown.grace", "65s");
    let worker = world.worker().await;
    let mut replies = world.replies().await;
    world.script(r#"{"latency_ms":45000}"#);
    world.job("slow").await;
    soon("the call", world.simulator.posts_arrived(1)).await;
    world.script(r#"{"latency_ms":0}"#);
    forget_the_consumer(&broker, &world.queue("jobs")).await;
    world.job("after").await;
    assert_eq!(next(&mut replies).await.text("/request_id"), "after");
    // What was in hand meanwhile is answered, and acked on the channel that it came by.
    assert_eq!(next(&mut replies).await.text("/request_id"), "slow");
    eventually("both are acked", || async {
        let summary = worker.log();
        summary.iter().filter(|line| line.contains(r#""job.acked":true"#)).count() == 2
    })
    .await;
    assert_eq!((world.depth("jobs").await, world.posts()), (0, 2));
}

#[tokio::test]
async fn a_lane_that_may_be_consumed_no_more_serves_by_its_old_consumer_and_is_not_called_ready() {
    let Some(broker) = BROKER.start("forbidden").await else { return };
    let mut world = World::on(broker.url.clone(), "forbidden").await;
    world.set("amqp.heartbeat", "1s");
    let worker = world.worker().await;
    let mut replies = world.replies().await;
    ctl(&broker, &["set_permissions", "guest", ".*", ".*", "^$"]).await;
    let ready = async |code: u16| {
        eventually("readiness follows", || async { worker.get("/readyz").await.0 == code }).await;
    };
    ready(503).await;
    assert!(worker.get("/readyz").await.1.contains("lane "));
    world.job("a").await;
    assert_eq!(next(&mut replies).await.text("/request_id"), "a");
    ctl(&broker, &["set_permissions", "guest", ".*", ".*", ".*"]).await;
    ready(200).await;
}

#[tokio::test]
async fn what_comes_again_to_a_lane_that_is_consumed_anew_is_no_sign_of_a_lost_ledger() {
    let Some(broker) = BROKER.start("anew_and_new").await else { return };
    let mut world = World::on(broker.url.clone(), "anew_and_new").await;
    world.set("amqp.heartbeat", "1s");
    let worker = world.worker().await;
    let mut replies = world.replies().await;
    // The ledger is new, and a job goes to somebody who never answers.
    let mut first = FieldTable::default();
    first.insert("x-priority".into(), AMQPValue::LongInt(10));
    let queue = world.queue("jobs");
    let options = BasicConsumeOptions::default();
    let consume = world.channel.basic_consume(queue.as_str().into(), "".into(), options, first);
    let mut silent = consume.await.unwrap();
    world.job("held").await;
    let held = soon("the job", silent.next()).await.unwrap().unwrap();
    let channels = async || broker.ask("ctl", &["list_channels", "-q", "pid"]).await.unwrap();
    let before = channels().await;
    eventually("the lanes are consumed anew", || async {
        let now = channels().await;
        before.lines().filter(|pid| !now.contains(*pid)).count() >= 2
    })
    .await;
    world.channel.basic_cancel(silent.tag(), BasicCancelOptions::default()).await.unwrap();
    held.acker.nack(BasicNackOptions { requeue: true, multiple: false }).await.unwrap();
    assert_eq!(next(&mut replies).await.text("/request_id"), "held");
    assert_eq!(worker.get("/readyz").await.0, 200);
}

/// Does what a change of a quorum queue's leader may do: the queue forgets its consumer, whose channel and
/// connection know nothing of it.
async fn forget_the_consumer(broker: &Private, queue: &str) {
    let forget = format!(
        "{{ok, Q}} = rabbit_amqqueue:lookup(rabbit_misc:r(<<\"/\">>, queue, <<\"{queue}\">>)),
         Forget = fun(C) ->
             Cancel = rabbit_fifo:make_checkout({{element(2, C), element(1, C)}}, cancel, #{{}}),
             {{ok, _, _}} = ra:process_command(amqqueue:get_pid(Q), Cancel)
         end,
         [_ | _] = [Forget(C) || C <- rabbit_amqqueue:consumers(Q)]."
    );
    ctl(broker, &["eval", &forget]).await;
}
