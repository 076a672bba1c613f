//! Returns are matched to their own publishes, which lapin by itself gets wrong.

use std::sync::Arc;
use std::time::Duration;

use creem_checkout_worker::job::reply;
use creem_checkout_worker::rabbit::envelope::ReplyTo;
use creem_checkout_worker::rabbit::link::Tls;
use creem_checkout_worker::rabbit::publisher::{Class, Shape};
use creem_checkout_worker::rabbit::{Envelope, Message, Options, Published, Publisher, Topology};
use creem_checkout_worker::retry::Backoff;
use futures::stream::{FuturesUnordered, StreamExt as _};
use lapin::options::*;
use lapin::types::FieldTable;
use lapin::{BasicProperties, Confirmation};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::support::private::BROKER;
use crate::support::{World, eventually, soon};

const PUBLISHES: usize = 8_000;

async fn quorum_queue(world: &World) -> String {
    let name = world.queue("load");
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), lapin::types::AMQPValue::LongString("quorum".into()));
    world
        .channel
        .queue_declare(name.as_str().into(), QueueDeclareOptions::durable(), arguments)
        .await
        .unwrap();
    name
}

fn publisher(world: &World, shape: Shape) -> (Publisher, JoinHandle<()>, CancellationToken) {
    let options = Options {
        url: world.environment()["AMQP_URL"].clone().into(),
        heartbeat: Duration::from_secs(10),
        tls: Tls::default(),
    };
    let backoff = Backoff::try_new(Duration::from_millis(50), Duration::from_secs(1)).unwrap();
    let stop = CancellationToken::new();
    let (publisher, keep) = Publisher::new(options, "test".into(), backoff, shape, stop.clone());
    (publisher, tokio::spawn(keep), stop)
}

/// Copies of one job share a `message_id`, so it cannot be what returns are matched by.
fn message(topology: &Topology, address: String) -> Message {
    let envelope =
        Envelope { reply_to: Some(ReplyTo { address, direct: false }), ..Envelope::default() };
    let id = reply::answer_message_id(b"same", b"same");
    Message::reply(topology, &envelope, None, Arc::from(&b"{}"[..]), &id, 0).unwrap()
}

/// A node that has lost a queue's leader may refuse on one channel for as long as that lives.
#[tokio::test]
async fn a_channel_on_which_a_queue_refuses_is_replaced_and_nothing_else_is_lost() {
    let Some(broker) = BROKER.start("refused").await else { return };
    let world = World::on(broker.url.clone(), "refused").await;
    let queue = quorum_queue(&world).await;
    let policy = [r"^.*\.load$", r#"{"max-length": 1, "overflow": "reject-publish"}"#];
    broker.ask("ctl", &["set_policy", "full", policy[0], policy[1]]).await.unwrap();
    let open = world.queue("open");
    let durable = QueueDeclareOptions::durable();
    world
        .channel
        .queue_declare(open.as_str().into(), durable, FieldTable::default())
        .await
        .unwrap();
    let (publisher, keep, stop) = publisher(&world, Shape::SINGLE);
    let topology = Topology::new(&world.prefix, None, "");
    let publish = async |address: &str| {
        let message = message(&topology, address.to_owned());
        soon("an answer", publisher.publish(Class::Replies, message)).await.unwrap()
    };
    eventually("it is full", async || publish(&queue).await == Published::Refused).await;
    let channels = async || broker.ask("ctl", &["list_channels", "pid"]).await.unwrap();
    let before = channels().await;
    eventually("another channel is there", async || {
        assert_eq!(publish(&queue).await, Published::Refused);
        assert_eq!(publish(&open).await, Published::Routed);
        channels().await != before
    })
    .await;
    stop.cancel();
    keep.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn every_unroutable_publish_is_known_and_no_routed_one_is_accused() {
    let Some(world) = World::new("returns").await else { return };
    let queue = quorum_queue(&world).await;
    let (publisher, keep, stop) = publisher(&world, Shape::WIDE);
    let topology = Topology::new(&world.prefix, None, "");
    let nowhere = world.queue("nowhere");
    let mut in_flight = FuturesUnordered::new();
    let (mut wrong, mut done) = (0, 0);
    for number in 0..PUBLISHES {
        let lost = number % 10 == 0;
        let address = if lost { nowhere.clone() } else { queue.clone() };
        let message = message(&topology, address);
        let publisher = publisher.clone();
        in_flight
            .push(async move { (lost, publisher.publish(Class::Replies, message).await.unwrap()) });
        if in_flight.len() >= 256 || number + 1 == PUBLISHES {
            while let Some((lost, published)) = soon("a confirm", in_flight.next()).await {
                done += 1;
                wrong += usize::from(matches!(published, Published::Returned(_)) != lost);
                if in_flight.len() < 128 && number + 1 < PUBLISHES {
                    break;
                }
            }
        }
    }
    assert_eq!((done, wrong), (PUBLISHES, 0));
    stop.cancel();
    keep.await.unwrap();
}

/// What the publisher guards against, shown on lapin itself: should this begin to fail, lapin
/// pairs returns rightly and the publisher's batches could go.
#[tokio::test(flavor = "multi_thread")]
async fn lapin_by_itself_gives_returns_to_the_wrong_publishes() {
    let Some(world) = World::new("lapin_returns").await else { return };
    let queue = quorum_queue(&world).await;
    let nowhere = world.queue("nowhere");
    let mut wrong = 0;
    for _round in 0..40 {
        let mut confirms = Vec::new();
        for number in 0..2_000 {
            let lost = number % 10 == 0;
            let key = if lost { &nowhere } else { &queue };
            let options = BasicPublishOptions { mandatory: true, immediate: false };
            let confirm = world
                .channel
                .basic_publish(
                    "".into(),
                    key.as_str().into(),
                    options,
                    b"{}",
                    BasicProperties::default(),
                )
                .await
                .unwrap();
            confirms.push((lost, confirm));
        }
        for (lost, confirm) in confirms {
            let returned =
                matches!(soon("a confirm", confirm).await.unwrap(), Confirmation::Ack(Some(_)));
            wrong += usize::from(returned != lost);
        }
        if wrong > 0 {
            return;
        }
    }
    panic!(
        "lapin paired 80,000 overlapping publishes rightly: is the publisher's matching still needed?"
    );
}
