//! A run's own queue of replies, on a real broker.

use std::time::Duration;

use creem_checkout_worker::rabbit::Options;
use creem_checkout_worker::rabbit::link::Tls;
use creem_checkout_worker::rabbit::replies::ReplyQueue;
use lapin::options::QueueDeleteOptions;

use crate::support::{World, persistent, soon};

#[tokio::test]
async fn a_queue_is_emptied_for_a_new_run_and_never_under_one_that_consumes_it() {
    let Some(world) = World::new("emptied").await else { return };
    let options = Options {
        url: world.environment()["AMQP_URL"].clone().into(),
        heartbeat: Duration::from_secs(10),
        tls: Tls::default(),
    };
    let name = world.queue("run");
    let open = |emptied| ReplyQueue::open_named(&options, "test", "", &name, emptied);
    let answer = async |text: &str| world.publish_to(&name, text.as_bytes(), persistent()).await;
    drop(open(false).await.unwrap());
    answer("of an earlier run").await;

    // The first consumer's end may reach the broker after this.
    let mut first = loop {
        match open(true).await {
            Ok(first) => break first,
            Err(error) => assert!(error.to_string().contains("use"), "{error}"),
        }
    };
    answer("of this run").await;
    let refused = open(true).await.map(drop).unwrap_err();
    assert!(refused.to_string().contains("in use"), "{refused}");
    answer("still of this run").await;

    for expected in ["of this run", "still of this run"] {
        let reply = soon("a reply", first.next()).await.unwrap();
        assert_eq!(String::from_utf8_lossy(&reply.body), expected);
    }
    let gone = QueueDeleteOptions::default();
    world.channel.queue_delete(name.as_str().into(), gone).await.unwrap();
}
