//! Creem is down for a while: calls stop, jobs wait, and all goes on by itself.

use std::collections::HashSet;

use creem_checkout_worker::job::reply::rfc3339;

use crate::support::postgres::{database, shared};
use crate::support::{World, body, eventually, header, next, persistent, soon};
use crate::worker::now;

const JOBS: usize = 300;

#[tokio::test]
async fn a_job_says_what_it_waits_for_while_creem_cannot_be_reached() {
    let Some(mut world) = World::new("unreachable").await else { return };
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    world.settings.insert("CREEM_BASE_URL".into(), format!("http://{nobody}"));
    let worker = world.worker().await;
    world.job("a").await;
    let delayed = |event: &serde_json::Value| event["verdict"] == "delayed";
    let event = soon("it is delayed", worker.event(delayed)).await;
    assert_eq!(event["job.code"], "creem_unreachable", "{event}");
}

#[tokio::test]
async fn an_outage_pauses_intake_and_is_over_by_itself() {
    let Some(world) = World::new("outage").await else { return };
    let worker = world.worker().await;
    let mut replies = world.replies().await;
    world.script(r#"{"faults":[{"weight":1.0,"kind":"status","status":503}]}"#);
    for number in 0..JOBS {
        world.job(&format!("job-{number}")).await;
    }
    soon("intake pauses", worker.logged("at least half of the last calls to Creem failed")).await;
    let (_, metrics) = worker.get("/metrics").await;
    assert!(metrics.contains("checkout_worker_circuit_open 1"), "{metrics}");
    assert!(metrics.contains(r#"checkout_worker_paused{reason="circuit_open"} 1"#), "{metrics}");
    assert_eq!(worker.get("/readyz").await.0, 200, "another pod would find the same Creem");

    // One call now and then, and no more: what was under way, then two that fail.
    let before = world.posts();
    soon("the probes", world.simulator.posts_arrived(before + 3)).await;

    // Those who wait without a deadline make room, so that who is late is told.
    let late = now() + 1_000;
    world.publish(body("late"), header("checkout-deadline", &rfc3339(late))).await;
    let reply = next(&mut replies).await;
    assert_eq!((reply.text("/request_id"), reply.status()), ("late".into(), "expired".into()));
    let (_, metrics) = worker.get("/metrics").await;
    assert!(metrics.contains("checkout_worker_circuit_open 1"), "{metrics}");

    world.script(r#"{"faults":[]}"#);
    soon("Creem is back", worker.logged("intake goes on")).await;

    let mut answered = HashSet::new();
    while answered.len() < JOBS {
        let reply = next(&mut replies).await;
        assert_eq!(reply.status(), "succeeded", "an outage fails no job");
        answered.insert(reply.text("/request_id"));
    }
    let failed = world.posts() - world.sessions();
    assert!(failed < 200, "{failed} calls for nothing");
    let (_, metrics) = worker.get("/metrics").await;
    assert!(metrics.contains("checkout_worker_circuit_open 0"), "{metrics}");
}

#[tokio::test]
async fn what_one_worker_finds_holds_all_workers_of_a_ledger() {
    let Some(server) = shared("outage_shared").await else { return };
    let url = database(&server).await;
    let Some(mut world) = World::new("outage_shared").await else { return };
    world.settings.insert("LEDGER_URL".into(), url);
    let finder = world.worker_unready(&["--lanes", "interactive"]);
    let other = world.worker_unready(&["--lanes", "bulk"]);
    for worker in [&finder, &other] {
        soon("it serves", worker.logged("consuming")).await;
    }
    let mut replies = world.replies().await;
    world.script(r#"{"faults":[{"weight":1.0,"kind":"status","status":503}]}"#);
    for number in 0..JOBS {
        world.job(&format!("job-{number}")).await;
    }
    soon("it finds out", finder.logged("at least half of the last calls to Creem failed")).await;
    soon("the other hears of it", other.logged("another worker of this ledger finds")).await;
    let says = || async { !other.get("/status").await.1.contains(r#""circuit":"closed""#) };
    eventually("its status says so", says).await;
    let status = other.get("/status").await.1;
    assert!(status.contains("another worker of this ledger finds that at least half"), "{status}");
    assert!(
        status.contains("the circuit is open: no call is made but one now and then"),
        "{status}"
    );
    world.publish_to(&world.queue("jobs.bulk"), body("held"), persistent()).await;
    world.script(r#"{"faults":[]}"#);
    for worker in [&finder, &other] {
        soon("Creem is back", worker.logged("intake goes on")).await;
    }
    for _ in 0..=JOBS {
        assert_eq!(next(&mut replies).await.status(), "succeeded");
    }
    assert_eq!(world.simulator.log().posts_for("held"), 1, "it made no call before");
}
