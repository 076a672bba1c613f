//! Lanes that an operator pauses: their jobs wait in RabbitMQ, the others go on.

use lapin::types::AMQPValue;

use crate::cli::command;
use crate::support::postgres::{database, shared};
use crate::support::{World, body, eventually, next, persistent, soon};
use crate::worker::now;

async fn told(world: &World, arguments: &[&str]) -> String {
    let (code, output, error) = command(arguments, world.environment(), "").await;
    assert_eq!(code, 0, "{output}{error}");
    output
}

#[tokio::test]
async fn a_paused_lane_waits_and_the_other_goes_on() {
    let Some(world) = World::new("paused_lane").await else { return };
    let worker = world.worker().await;
    let mut replies = world.replies().await;
    let said = told(&world, &["pause", "--lane", "bulk"]).await;
    assert!(said.contains("resume --lane bulk"), "{said}");
    eventually("bulk is left", || async { world.consumers("jobs.bulk").await == 0 }).await;
    let bulk = world.queue("jobs.bulk");
    world.publish_to(&bulk, body("campaign"), persistent()).await;
    world.job("buyer").await;
    assert_eq!(next(&mut replies).await.text("/request_id"), "buyer");
    assert_eq!(world.depth("jobs.bulk").await, 1);
    let (status, _) = worker.get("/readyz").await;
    assert_eq!(status, 200, "it does what it is told");
    let (_, status) = worker.get("/status").await;
    assert!(status.contains(r#""paused_lanes":["bulk"]"#), "{status}");
    let (_, metrics) = worker.get("/metrics").await;
    assert!(metrics.contains(r#"checkout_worker_lane_paused{lane="bulk"} 1"#), "{metrics}");
    assert!(told(&world, &["check"]).await.contains("bulk is paused since 20"));

    // It outlives the worker: the next one does not take the lane's jobs first.
    worker.kill().await;
    let worker = world.worker().await;
    assert_eq!(world.consumers("jobs.bulk").await, 0);
    assert_eq!(worker.get("/readyz").await.0, 200);
    told(&world, &["resume", "--lane", "bulk"]).await;
    assert_eq!(next(&mut replies).await.text("/request_id"), "campaign");
    assert_eq!(world.posts(), 2);
    assert!(!told(&world, &["check"]).await.contains("is paused"));
}

#[tokio::test]
async fn jobs_that_wait_for_their_turn_when_a_lane_is_paused_go_back_unharmed() {
    let Some(mut world) = World::new("paused_waiting").await else { return };
    world.set("rate_limit.per_second", "0.1");
    let _worker = world.worker().await;
    let mut replies = world.replies().await;
    for number in 0..5 {
        world.job(&format!("job-{number}")).await;
    }
    next(&mut replies).await;
    told(&world, &["pause", "--lane", "interactive"]).await;
    eventually("they are in the queue again", || async { world.depth("jobs").await == 4 }).await;
    assert_eq!(world.posts(), 1);
}

#[tokio::test]
async fn a_pause_holds_for_all_workers_of_a_ledger() {
    let Some(server) = shared("paused_fleet").await else { return };
    let url = database(&server).await;
    let Some(mut world) = World::new("paused_fleet").await else { return };
    world.settings.insert("LEDGER_URL".into(), url);
    let _workers = [world.worker().await, world.worker().await];
    assert_eq!(world.consumers("jobs").await, 2);
    told(&world, &["pause", "--lane", "interactive"]).await;
    eventually("all have left", || async { world.consumers("jobs").await == 0 }).await;
    assert_eq!(world.consumers("jobs.bulk").await, 2);
    told(&world, &["resume", "--lane", "interactive"]).await;
    eventually("all are back", || async { world.consumers("jobs").await == 2 }).await;
}

#[tokio::test]
async fn a_job_out_of_the_future_shows_that_clocks_differ() {
    let Some(world) = World::new("clock_skew").await else { return };
    let worker = world.worker().await;
    let mut replies = world.replies().await;
    assert!(!told(&world, &["check"]).await.contains("clocks"));
    let before = u64::try_from(now() / 1000 - 90).unwrap();
    world.publish(body("late"), persistent().with_timestamp(before)).await;
    assert_eq!(next(&mut replies).await.status(), "succeeded");
    let counted = || async {
        let metrics = worker.get("/metrics").await.1;
        let line = |what: &str| {
            let name = format!("checkout_worker_latency_seconds_{what}{{lane=\"interactive\"}} ");
            let line = metrics.lines().find_map(|line| line.strip_prefix(&name)).map(str::to_owned);
            line.map(|value| value.parse::<f64>().unwrap())
        };
        line("count") == Some(1.0) && line("sum").is_some_and(|sum| sum >= 89.0)
    };
    eventually("its way from the producer is measured", counted).await;
    let in_an_hour = u64::try_from(now() / 1000 + 3_600).unwrap();
    world.publish(body("early"), persistent().with_timestamp(in_an_hour)).await;
    assert_eq!(next(&mut replies).await.status(), "succeeded");
    soon("it says so", worker.logged("a job was published in the future")).await;
    let reported = || async {
        let (code, output, _) = command(&["check"], world.environment(), "").await;
        code == 1 && output.contains("WRONG    clocks: at 20") && output.contains("59m")
    };
    eventually("check reports it", reported).await;
    let shown = || async { worker.get("/metrics").await.1.contains("clock_skew_seconds 3") };
    eventually("it is a gauge, too", shown).await;
}

#[tokio::test]
async fn a_job_that_was_given_back_often_is_not_taken_away_for_it() {
    let Some(world) = World::new("given_back").await else { return };
    world.worker().await.kill().await;
    world.job("patient").await;
    let queue = world.queue("jobs");
    let get = async || {
        let options = lapin::options::BasicGetOptions::default();
        world.channel.basic_get(queue.as_str().into(), options).await.unwrap()
    };
    // As ten pauses leave it.
    for _ in 0..10 {
        let given_back = lapin::options::BasicNackOptions { requeue: true, multiple: false };
        eventually("it is given back", || async {
            let Some(job) = get().await else { return false };
            job.delivery.acker.nack(given_back).await.unwrap()
        })
        .await;
    }
    // RabbitMQ 4 counts only what came back by itself: nothing can be lost there.
    let counts = std::cell::Cell::new(false);
    eventually("it is there", || async {
        let Some(job) = get().await else { return false };
        let headers = job.delivery.properties.headers().clone().unwrap_or_default();
        let count = headers.inner().get("x-delivery-count").and_then(AMQPValue::as_long_long_int);
        counts.set(count.is_some_and(|count| count >= 10));
        let given_back = lapin::options::BasicNackOptions { requeue: true, multiple: false };
        job.delivery.acker.nack(given_back).await.unwrap()
    })
    .await;
    if !counts.get() {
        eprintln!("skipped from here on: this broker does not count what is given back");
        let other = ["TEST_BROKER", "TEST_AMQP_URL"].map(|name| std::env::var_os(name).is_some());
        assert_ne!(other, [false, false], "Debian's 3.10 counts it");
        return;
    }
    world.simulator.accept_only("creem_test_other");
    let worker = world.worker_unready(&["--accept-empty-ledger"]);
    soon("it waits", worker.logged("Creem refuses the API key")).await;
    told(&world, &["pause", "--lane", "interactive"]).await;
    let put_off = worker.event(|event| event["job.code"] == "given_back_often");
    soon("it goes by way of a delay queue", put_off).await;
    eventually("it is back", || async { world.depth("jobs").await == 1 }).await;
    let job = get().await.unwrap();
    let headers = job.delivery.properties.headers().clone().unwrap_or_default();
    let count = headers.inner().get("x-delivery-count").and_then(AMQPValue::as_long_long_int);
    assert!(count.unwrap_or_default() == 0, "a count of its own: {count:?}");
}
