//! A run's own queue of replies, on a real broker.

use std::time::Duration;

use creem_checkout_worker::rabbit::Options;
use creem_checkout_worker::rabbit::link::Tls;
use creem_checkout_worker::rabbit::replies::ReplyQueue;
use lapin::options::{BasicGetOptions, QueueDeleteOptions};

use crate::cli::command;
use crate::support::{Process, World, eventually, persistent, soon};

#[tokio::test]
async fn a_queue_is_one_runs_and_what_came_for_one_that_was_killed_is_there_for_the_next() {
    let Some(world) = World::new("named_replies").await else { return };
    let options = Options {
        url: world.environment()["AMQP_URL"].clone().into(),
        heartbeat: Duration::from_secs(10),
        tls: Tls::default(),
    };
    let name = world.queue("run");
    let open = || ReplyQueue::open_named(&options, "test", "", &name);
    let answer = async |text: &str| world.publish_to(&name, text.as_bytes(), persistent()).await;
    drop(open().await.unwrap());
    // The broker may not have heard of its end yet.
    let mut first = open().await.unwrap();
    answer("one").await;
    let refused = open().await.map(drop).unwrap_err();
    assert!(refused.to_string().contains("exclusive use"), "{refused}");
    answer("two").await;
    for expected in ["one", "two"] {
        let reply = soon("a reply", first.next()).await.unwrap();
        assert_eq!(String::from_utf8_lossy(&reply.body), expected);
    }
    drop(first);
    eventually("it is gone", || async { world.consumers("run").await == 0 }).await;
    answer("three").await;
    let mut second = open().await.unwrap();
    assert_eq!(soon("a reply", second.next()).await.unwrap().body, b"three");
    let gone = QueueDeleteOptions::default();
    world.channel.queue_delete(name.as_str().into(), gone).await.unwrap();
}

#[tokio::test]
async fn a_reply_to_an_earlier_run_is_not_taken_for_one_to_this() {
    let Some(world) = World::new("earlier_replies").await else { return };
    world.worker().await.kill().await;
    let path = |name: &str| world.directory.path().join(name).display().to_string();
    std::fs::write(path("in.csv"), "request_id,product_id\na,p\n").unwrap();
    let (input, out) = (path("in.csv"), path("links.csv"));
    let bulk = ["bulk", &input, "--out", &out, "--via-queue"];
    let process = Process::start(&bulk, &world.environment());
    let queue = world.queue("jobs.bulk");
    eventually("its job is there", || async { world.depth("jobs.bulk").await == 1 }).await;
    process.kill().await;
    let taken = BasicGetOptions { no_ack: true };
    let job = world.channel.basic_get(queue.as_str().into(), taken).await.unwrap().unwrap();
    let properties = &job.delivery.properties;
    let reply_to = properties.reply_to().as_ref().unwrap().as_str().to_owned();
    let correlation = properties.correlation_id().clone().unwrap();

    // As workers with another ledger answer it.
    let other = br#"{"version":1,"status":"succeeded","next":"redirect","request_id":"a","mode":"test","product_id":"p","checkout_id":"ch_other","checkout_url":"https://pay.example/other"}"#;
    world.publish_to(&reply_to, other, persistent().with_correlation_id(correlation)).await;
    let worker = world.worker().await;
    let (code, _, said) = command(&bulk, world.environment(), "").await;
    assert_eq!(code, 0, "{said}");
    let session = world.simulator.log().sessions()[0].clone();
    let text = std::fs::read_to_string(&out).unwrap();
    assert!(text.contains(&session.id) && !text.contains("ch_other"), "{text}");
    worker.kill().await;
}
