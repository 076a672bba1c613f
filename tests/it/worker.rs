//! What the worker promises to producers, on a real broker.

use std::collections::HashSet;

use creem_checkout_worker::job::reply::rfc3339;
use lapin::options::*;
use lapin::types::{AMQPValue, FieldTable};
use serde_json::json;

use crate::support::{World, body, eventually, header, next, persistent, soon};

#[tokio::test]
async fn a_job_becomes_a_link_in_the_reply_queue() {
    let Some(world) = World::new("a_job_becomes_a_link").await else { return };
    let _worker = world.worker().await;
    let mut replies = world.replies().await;
    let trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let properties = header("traceparent", trace).with_correlation_id("c-1".into());
    world.publish(body("order_1"), properties).await;

    let reply = next(&mut replies).await;

    assert_eq!(reply.status(), "succeeded");
    assert_eq!(reply.text("/next"), "redirect");
    assert_eq!(reply.correlation_id(), "c-1");
    assert_eq!(reply.header("checkout-request-id").as_deref(), Some("order_1"));
    assert_eq!(reply.header("traceparent").as_deref(), Some(trace));
    let properties = &reply.properties;
    assert_eq!(*properties.delivery_mode(), Some(2));
    assert_eq!(properties.kind().as_ref().unwrap().as_str(), "checkout.result.v1");
    assert_eq!(properties.app_id().as_ref().unwrap().as_str(), "checkout-worker");
    assert_eq!(properties.content_type().as_ref().unwrap().as_str(), "application/json");
    assert!(properties.message_id().is_some() && properties.timestamp().is_some());
    let session = world.simulator.log().sessions()[0].clone();
    assert_eq!(reply.text("/checkout_id"), session.id);
    assert_eq!(reply.text("/checkout_url"), session.url);
}

#[tokio::test]
async fn a_hundred_copies_make_one_post_and_a_hundred_identical_replies() {
    let Some(world) = World::new("a_hundred_copies").await else { return };
    let _worker = world.worker().await;
    let mut replies = world.replies().await;
    for copy in 0..100 {
        world
            .publish(body("same"), persistent().with_correlation_id(format!("{copy}").into()))
            .await;
    }

    let (mut bodies, mut ids, mut copies) = (HashSet::new(), HashSet::new(), HashSet::new());
    for _ in 0..100 {
        let reply = next(&mut replies).await;
        ids.insert(reply.properties.message_id().clone().unwrap().to_string());
        copies.insert(reply.correlation_id());
        bodies.insert(reply.body);
    }

    assert_eq!((bodies.len(), ids.len(), copies.len()), (1, 1, 100));
    assert_eq!((world.posts(), world.sessions()), (1, 1));
    let other = r#"{"request_id":"same","product_id":"prod_1","units":2}"#;
    world.publish(other, persistent()).await;
    let conflict = next(&mut replies).await;
    assert_eq!(conflict.status(), "conflict");
    assert_eq!(conflict.text("/next"), "new_request_id");
    assert_eq!(conflict.json["error"]["details"], json!(["units"]));
    assert!(conflict.json.get("created_at").is_none() && conflict.json.get("attempts").is_none());
    assert_eq!(world.posts(), 1);
}

#[tokio::test]
async fn a_wrong_job_is_answered_with_the_rule_and_creem_is_not_asked() {
    let Some(world) = World::new("a_wrong_job").await else { return };
    let worker = world.worker().await;
    let mut replies = world.replies().await;
    let canary = "ada.canary@example.com";
    let cases = [
        (
            format!(r#"{{"request_id":"a","product_id":"p","custommer":"{canary}"}}"#),
            "unknown_field",
        ),
        (
            format!(
                r#"{{"request_id":"a","product_id":"p","customer":{{"email":"{canary}\u0000"}}}}"#
            ),
            "email",
        ),
        (format!("{{\"{canary}\\n{{\\\"level\\\":\\\"error\\\"}}\":1"), "not_json"),
        (r#"{"product_id":"p"}"#.to_owned(), "request_id_missing"),
    ];
    for (job, code) in &cases {
        world.publish(job, persistent()).await;
        let reply = next(&mut replies).await;
        assert_eq!(
            (reply.status().as_str(), reply.text("/error/code").as_str()),
            ("invalid", *code)
        );
        assert_eq!(reply.text("/next"), "fix");
        assert!(reply.properties.message_id().is_some());
        assert!(
            !String::from_utf8_lossy(&reply.body).contains("canary"),
            "a reply repeats no value"
        );
    }
    world.job("good").await;
    assert_eq!(next(&mut replies).await.status(), "succeeded");
    assert_eq!(world.posts(), 1);
    let good =
        |event: &serde_json::Value| event["job.key"] == "test/good" && event["message"] == "job";
    soon("the last job's line", worker.event(good)).await;
    for line in worker.log() {
        assert!(
            serde_json::from_str::<serde_json::Value>(&line).is_ok(),
            "one event a line: {line}"
        );
        assert!(!line.contains("canary@"), "no address in the log: {line}");
        assert!(!line.contains("creem_test_canary"), "no key in the log: {line}");
    }
}

#[tokio::test]
async fn a_reply_that_no_queue_takes_parks_the_job_and_creem_is_not_asked_again() {
    let Some(world) = World::new("reply_unroutable").await else { return };
    let _worker = world.worker().await;
    let (mut dead, mut replies) = (world.dead().await, world.replies().await);
    let mut headers = FieldTable::default();
    let elsewhere = vec![AMQPValue::LongString("elsewhere".into())];
    headers.insert("CC".into(), AMQPValue::FieldArray(elsewhere.into()));
    let properties = persistent()
        .with_headers(headers)
        .with_reply_to(world.queue("gone").as_str().into())
        .with_expiration("60000".into());
    world.publish(body("order_1"), properties).await;

    let parked = next(&mut dead).await;

    assert_eq!(parked.body, body("order_1").into_bytes());
    assert_eq!(parked.header("checkout-error-code").as_deref(), Some("reply_unroutable"));
    assert_eq!(parked.header("checkout-source-queue"), Some(world.queue("jobs")));
    assert_eq!(parked.header("checkout-original-expiration").as_deref(), Some("60000"));
    assert!(
        parked.header("checkout-parked-at").is_some()
            && parked.header("checkout-attempts").is_some()
    );
    assert_eq!((parked.properties.expiration(), parked.header("CC")), (&None, None));
    world.job("order_1").await;
    assert_eq!(next(&mut replies).await.status(), "succeeded");
    assert_eq!(world.posts(), 1);
}

#[tokio::test]
async fn a_reply_address_among_the_workers_own_queues_is_parked_before_creem_is_asked() {
    let Some(world) = World::new("reply_to_denied").await else { return };
    let _worker = world.worker().await;
    let mut dead = world.dead().await;
    for queue in ["jobs", "jobs.bulk", "dead", "retry.interactive.1s", "retry.nowhere"] {
        let properties = persistent().with_reply_to(world.queue(queue).as_str().into());
        world.publish(body("order_1"), properties).await;
        let parked = next(&mut dead).await;
        assert_eq!(
            parked.header("checkout-error-code").as_deref(),
            Some("reply_to_denied"),
            "{queue}"
        );
    }
    assert_eq!(world.posts(), 0);
}

#[tokio::test]
async fn direct_reply_to_is_served_and_a_malformed_one_harms_nobody() {
    let Some(world) = World::new("direct_reply_to").await else { return };
    let _worker = world.worker().await;
    let channel = world.connection.create_channel().await.unwrap();
    let options = BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() };
    let mut direct = channel
        .basic_consume("amq.rabbitmq.reply-to".into(), "".into(), options, FieldTable::default())
        .await
        .unwrap();
    let properties = persistent().with_reply_to("amq.rabbitmq.reply-to".into());
    channel
        .basic_publish(
            "".into(),
            world.queue("jobs").as_str().into(),
            BasicPublishOptions::default(),
            body("order_1").as_bytes(),
            properties,
        )
        .await
        .unwrap();
    assert_eq!(next(&mut direct).await.status(), "succeeded");
    assert_eq!(world.depth("dead").await, 0);
    let mut dead = world.dead().await;

    // RabbitMQ 3.10 closes the whole connection over such an address.
    for address in ["amq.rabbitmq.reply-to.garbage", "amq.rabbitmq.reply-to.g2dk.AAAA"] {
        let properties = persistent().with_reply_to(address.into());
        world.publish(body(&format!("bad-{}", address.len())), properties).await;
        let parked = next(&mut dead).await;
        assert_eq!(
            parked.header("checkout-error-code").as_deref(),
            Some("reply_to_denied"),
            "{address}"
        );
    }
    let mut replies = world.replies().await;
    world.job("order_2").await;
    assert_eq!(next(&mut replies).await.status(), "succeeded");
    eventually("the job queue drains", || async { world.depth("jobs").await == 0 }).await;
}

#[tokio::test]
async fn a_job_that_cannot_make_its_deadline_is_told_at_once_and_its_calls_are_cut_short() {
    let Some(world) = World::new("cannot_make_it").await else { return };
    let _worker = world.worker().await;
    let mut replies = world.replies().await;
    let until = |at| header("checkout-deadline", &rfc3339(at));
    // The next try would come after it: nobody waits until then to hear that.
    world.script(
        r#"{"faults":[{"request_id":"told","times":1,"kind":"throttle","retry_after":"40"},
                      {"request_id":"hangs","kind":"hang"}]}"#,
    );
    world.publish(body("hangs"), until(now() + 3_000)).await;
    soon("the call", world.simulator.posts_arrived(1)).await;
    let deadline = now() + 30_000;
    world.publish(body("told"), until(deadline)).await;
    let reply = next(&mut replies).await;
    assert_eq!(
        (reply.text("/request_id"), reply.status(), reply.text("/error/code")),
        ("told".into(), "expired".into(), "deadline_passed".into())
    );
    assert!(now() < deadline, "it is told so before the deadline is over");
    // A call that was cut short by it may have made a session.
    let reply = next(&mut replies).await;
    assert_eq!((reply.text("/request_id"), reply.status()), ("hangs".into(), "unresolved".into()));
    assert_eq!(world.posts(), 2);
}

#[tokio::test]
async fn a_deadline_that_has_passed_is_answered_without_a_call() {
    let Some(world) = World::new("a_deadline").await else { return };
    let _worker = world.worker().await;
    let mut replies = world.replies().await;
    world.publish(body("late"), header("checkout-deadline", "2020-01-01T00:00:00Z")).await;

    let reply = next(&mut replies).await;

    assert_eq!(
        (reply.status(), reply.text("/error/code")),
        ("expired".into(), "deadline_passed".into())
    );
    assert_eq!(world.posts(), 0);
    // Sent again without the deadline it is tried afresh; once there is a link, a late copy gets it.
    world.job("late").await;
    assert_eq!(next(&mut replies).await.status(), "succeeded");
    world.publish(body("late"), header("checkout-deadline", "2020-01-01T00:00:00Z")).await;
    assert_eq!(next(&mut replies).await.status(), "succeeded");
    assert_eq!(world.posts(), 1);
}

#[tokio::test]
async fn a_job_older_than_the_ledger_remembers_is_expired_not_asked_for() {
    let Some(world) = World::new("too_old").await else { return };
    let _worker = world.worker().await;
    let mut replies = world.replies().await;
    world.publish(body("old"), persistent().with_timestamp(1_500_000_000)).await;
    let reply = next(&mut replies).await;
    assert_eq!(
        (reply.status(), reply.text("/error/code")),
        ("expired".into(), "older_than_retention".into())
    );
    assert_eq!(world.posts(), 0);
}

#[tokio::test]
async fn what_creem_refuses_is_rejected_and_can_be_tried_afresh_with_another_body() {
    let Some(world) = World::new("rejected").await else { return };
    let _worker = world.worker().await;
    let mut replies = world.replies().await;
    world.publish(r#"{"request_id":"a","product_id":"prod_missing_1"}"#, persistent()).await;
    let reply = next(&mut replies).await;
    assert_eq!(
        (reply.status(), reply.text("/error/code")),
        ("rejected".into(), "creem_rejected".into())
    );
    assert_eq!(reply.json["error"]["http_status"], 404);
    assert!(!reply.text("/error/trace_id").is_empty());
    world.job("a").await;
    assert_eq!(next(&mut replies).await.status(), "succeeded");
}

#[tokio::test]
async fn a_longer_wait_goes_through_a_delay_queue_and_the_copy_is_not_taken_for_a_resend() {
    let Some(world) = World::new("delay_queue").await else { return };
    let worker = world.worker().await;
    let mut replies = world.replies().await;
    world
        .script(r#"{"faults":[{"request_id":"a","times":1,"kind":"throttle","retry_after":"3"}]}"#);
    let asked = std::time::SystemTime::now();
    world
        .publish(body("a"), header("checkout-campaign", "autumn").with_correlation_id("c".into()))
        .await;

    let reply = next(&mut replies).await;

    assert!(asked.elapsed().unwrap().as_secs() >= 3, "Retry-After is kept to");
    assert_eq!((reply.status(), reply.correlation_id()), ("succeeded".into(), "c".into()));
    assert_eq!(reply.json["attempts"], 2);
    assert_eq!(world.posts(), 2);
    soon("it was delayed", worker.event(|event| event["verdict"] == "delayed")).await;
}

#[tokio::test]
async fn an_unknown_outcome_is_asked_again_and_never_gives_a_second_url() {
    let Some(mut world) = World::new("unknown_outcome").await else { return };
    world.set("retry.first", "10ms");
    let _worker = world.worker().await;
    let mut replies = world.replies().await;
    world.script(r#"{"faults":[{"request_id":"a","times":2,"kind":"cut_after"}]}"#);
    world.job("a").await;
    let reply = next(&mut replies).await;
    assert_eq!((reply.status(), reply.json["attempts"].clone()), ("succeeded".into(), json!(3)));
    assert_eq!(world.sessions(), 3);
    let row = crate::ledger::row(&world.ledger(), "a");
    assert_eq!(row.ambiguous, 2, "both extra sessions are counted");
}

#[tokio::test]
async fn with_park_creem_is_never_asked_twice_and_the_job_waits_for_an_operator() {
    let Some(mut world) = World::new("park").await else { return };
    world.set("creem.on_unknown", "park");
    let _worker = world.worker().await;
    let (mut replies, mut dead) = (world.replies().await, world.dead().await);
    world.script(r#"{"faults":[{"request_id":"a","kind":"cut_after"}]}"#);
    world.job("a").await;
    let reply = next(&mut replies).await;
    assert_eq!((reply.status(), reply.text("/next")), ("unresolved".into(), "ask_operator".into()));
    assert_eq!(
        next(&mut dead).await.header("checkout-error-code").as_deref(),
        Some("outcome_unknown")
    );
    world.job("a").await;
    assert_eq!(next(&mut replies).await.body, reply.body);
    assert_eq!(world.posts(), 1);
    // No second copy was parked: the next parked message is the next job's.
    world.publish(body("marker"), persistent().with_reply_to(world.queue("jobs").into())).await;
    assert_eq!(next(&mut dead).await.body, body("marker").into_bytes());
}

#[tokio::test]
async fn an_answer_that_is_not_this_jobs_is_never_published() {
    let Some(world) = World::new("mismatch").await else { return };
    let _worker = world.worker().await;
    let (mut replies, mut dead) = (world.replies().await, world.dead().await);
    for kind in ["wrong_id", "wrong_mode", "plain_url"] {
        world.script(&format!(r#"{{"faults":[{{"request_id":"{kind}","kind":"{kind}"}}]}}"#));
        world.job(kind).await;
        let reply = next(&mut replies).await;
        assert_eq!(
            (reply.status(), reply.text("/error/code")),
            ("unresolved".into(), "answer_mismatch".into())
        );
        assert!(reply.json.get("checkout_url").is_none());
        assert_eq!(
            next(&mut dead).await.header("checkout-error-code").as_deref(),
            Some("answer_mismatch")
        );
        assert_eq!(world.simulator.log().posts_for(kind), 1, "unresolved at once");
    }
}

#[tokio::test]
async fn a_session_without_a_link_is_fetched() {
    let Some(mut world) = World::new("no_url").await else { return };
    world.set("creem.request_timeout", "2s");
    let _worker = world.worker().await;
    let mut replies = world.replies().await;
    world.script(r#"{"faults":[{"request_id":"a","kind":"no_url"}]}"#);
    world.job("a").await;
    let reply = next(&mut replies).await;
    assert_eq!(reply.status(), "succeeded");
    assert_eq!((world.posts(), world.simulator.log().gets), (1, 1));

    // To ask for it again is harmless, so a throttled question is not the last.
    world.script(r#"{"faults":[{"request_id":"b","kind":"no_url","throttled_gets":2}]}"#);
    world.job("b").await;
    assert_eq!(next(&mut replies).await.status(), "succeeded");
    assert_eq!((world.posts(), world.simulator.log().gets), (2, 4));

    // But it has an end, within the time for the call.
    world.script(r#"{"faults":[{"request_id":"c","kind":"no_url","throttled_gets":1000000}]}"#);
    world.job("c").await;
    let reply = next(&mut replies).await;
    assert_eq!(
        (reply.status(), reply.text("/error/code")),
        ("unresolved".into(), "no_checkout_url".into())
    );
    assert_eq!(world.posts(), 3);
}

#[tokio::test]
async fn attempts_that_run_out_are_failed_only_if_no_session_can_exist() {
    let Some(mut world) = World::new("attempts_run_out").await else { return };
    world
        .set("retry.max_attempts", "2")
        .set("retry.first", "10ms")
        .set("lanes.interactive.max_elapsed", "2s");
    let _worker = world.worker().await;
    let (mut replies, mut dead) = (world.replies().await, world.dead().await);
    world.script(r#"{"faults":[{"request_id":"slow","kind":"throttle"},{"request_id":"broken","kind":"status_after","status":500}]}"#);
    world.job("slow").await;
    let reply = next(&mut replies).await;
    assert_eq!(
        (reply.status(), reply.text("/error/code")),
        ("failed".into(), "time_exhausted".into())
    );
    assert_eq!(reply.text("/next"), "resend");
    world.job("broken").await;
    let reply = next(&mut replies).await;
    assert_eq!(
        (reply.status(), reply.text("/error/code")),
        ("unresolved".into(), "attempts_exhausted".into())
    );
    assert_eq!(world.simulator.log().posts_for("broken"), 2);
    // The first parked message is this one: "failed" is not parked, its producer was told.
    assert_eq!(next(&mut dead).await.body, body("broken").into_bytes());
}

#[tokio::test]
async fn a_refused_key_pauses_intake_and_fails_nobody() {
    let Some(mut world) = World::new("key_refused").await else { return };
    world.set("lanes.interactive.concurrency", "2");
    let worker = world.worker().await;
    let mut replies = world.replies().await;
    // With nothing else accepted, the harmless GET is refused like the POST.
    world.simulator.accept_only("creem_test_rotated");
    for n in 0..5 {
        world.job(&format!("order_{n}")).await;
    }
    let soonish = rfc3339(now() + 1_500);
    world.publish(body("hurried"), header("checkout-deadline", &soonish)).await;
    soon("intake pauses", worker.logged("intake is paused: Creem refuses the API key")).await;
    eventually("it is not ready, and says why", || async {
        let (status, text) = worker.get("/readyz").await;
        status == 503 && text.contains("creem key: Creem refuses the API key")
    })
    .await;

    // The job with a deadline is told in time, although the lane is full of jobs without one.
    let reply = next(&mut replies).await;
    assert_eq!((reply.status(), reply.text("/request_id")), ("expired".into(), "hurried".into()));

    world.simulator.accept_only("creem_test_canary");
    let mut links = HashSet::new();
    for _ in 0..5 {
        let reply = next(&mut replies).await;
        assert_eq!(reply.status(), "succeeded");
        links.insert(reply.text("/checkout_url"));
    }
    assert_eq!(links.len(), 5);
    assert_eq!(world.depth("dead").await, 0);
}

#[tokio::test]
async fn a_refusal_of_one_job_with_a_good_key_ends_only_this_job() {
    let Some(world) = World::new("one_refusal").await else { return };
    let worker = world.worker().await;
    let mut replies = world.replies().await;
    // All calls are under way before the first is answered: one check of the key speaks for all,
    // and nobody is asked again.
    world.script(r#"{"latency_ms":300,"faults":[{"weight":1.0,"kind":"status","status":403}]}"#);
    for n in 0..40 {
        world.job(&format!("a{n}")).await;
    }
    for _ in 0..40 {
        let reply = next(&mut replies).await;
        assert_eq!(
            (reply.status(), reply.text("/error/code")),
            ("rejected".into(), "creem_key_refused".into())
        );
    }
    assert!(world.posts() < 80, "{} calls for 40 jobs", world.posts());
    world.script("{}");
    world.job("b").await;
    assert_eq!(next(&mut replies).await.status(), "succeeded");
    assert_eq!(worker.get("/readyz").await.0, 200);
}

#[tokio::test]
async fn spoofed_bookkeeping_changes_nothing() {
    let Some(world) = World::new("spoofed").await else { return };
    let worker = world.worker().await;
    let mut replies = world.replies().await;
    // A new ledger takes a foreign mark for a sign that another ledger was lost; one that has
    // served before knows better.
    world.job("first").await;
    assert_eq!(next(&mut replies).await.status(), "succeeded");
    worker.kill().await;
    let _worker = world.worker().await;
    let mut headers = FieldTable::default();
    for name in ["x-death", "x-delivery-count", "checkout-hop", "checkout-attempts", "x-retry"] {
        headers.insert(name.into(), AMQPValue::LongString("99".into()));
    }
    for n in 0..1000 {
        headers.insert(format!("h{n}").as_str().into(), AMQPValue::LongLongInt(n));
    }
    world.publish(body("a"), persistent().with_headers(headers)).await;
    let reply = next(&mut replies).await;
    assert_eq!((reply.status(), reply.json["attempts"].clone()), ("succeeded".into(), json!(1)));
}

#[tokio::test]
async fn an_identifier_that_creem_knows_already_is_never_called_free() {
    let Some(world) = World::new("duplicate").await else { return };
    let _worker = world.worker().await;
    let (mut replies, mut dead) = (world.replies().await, world.dead().await);
    world.script(r#"{"faults":[{"request_id":"a","kind":"duplicate"}]}"#);
    world.job("a").await;
    let reply = next(&mut replies).await;
    assert_eq!(
        (reply.status(), reply.text("/error/code")),
        ("unresolved".into(), "creem_duplicate".into())
    );
    assert_eq!(next(&mut dead).await.body, body("a").into_bytes());
    // Sent again too late it is not "expired", and the id is not free for another body.
    world.publish(body("a"), header("checkout-deadline", "2020-01-01T00:00:00Z")).await;
    assert_eq!(next(&mut replies).await.status(), "unresolved");
    world.publish(r#"{"request_id":"a","product_id":"other"}"#, persistent()).await;
    assert_eq!(next(&mut replies).await.status(), "conflict");
}

#[tokio::test]
async fn the_bulk_lane_is_served_from_its_own_queue() {
    let Some(world) = World::new("bulk_lane").await else { return };
    let worker = world.worker().await;
    let mut replies = world.replies().await;
    world.publish_to(&world.queue("jobs.bulk"), body("b"), persistent()).await;
    assert_eq!(next(&mut replies).await.status(), "succeeded");
    let event = soon("its line", worker.event(|event| event["message"] == "job")).await;
    assert_eq!(event["job.lane"], "bulk");
    let (_, metrics) = worker.get("/metrics").await;
    assert!(
        metrics.contains(r#"checkout_worker_jobs_total{lane="bulk",status="succeeded"} 1"#),
        "{metrics}"
    );
}

#[tokio::test]
async fn replies_can_go_through_an_exchange_of_their_own() {
    let Some(mut world) = World::new("own_exchange").await else { return };
    let exchange = world.queue("reply");
    world.set("replies.exchange", &exchange).set("replies.allow", "shop.*");
    let _worker = world.worker().await;
    let (mut replies, mut dead) = (world.replies().await, world.dead().await);
    world.job("a").await;
    assert_eq!(next(&mut replies).await.status(), "succeeded");

    // A caller binds its queue to the exchange; one that did not is not reached past it.
    let mine = world.queue("shop");
    world
        .channel
        .queue_declare(mine.as_str().into(), QueueDeclareOptions::durable(), FieldTable::default())
        .await
        .unwrap();
    let asking = |address: &str| persistent().with_reply_to(address.into());
    world.publish(body("b"), asking(&mine)).await;
    assert_eq!(
        next(&mut dead).await.header("checkout-error-code").as_deref(),
        Some("reply_to_denied"),
        "the allow-list holds"
    );
    let (bind, arguments) = (QueueBindOptions::default(), FieldTable::default());
    world
        .channel
        .queue_bind(
            mine.as_str().into(),
            exchange.as_str().into(),
            "shop.1".into(),
            bind,
            arguments,
        )
        .await
        .unwrap();
    let mut answers = world.consume(&mine).await;
    world.publish(body("b"), asking("shop.1")).await;
    assert_eq!(next(&mut answers).await.status(), "succeeded");
    world.publish(body("b"), asking("shop.2")).await;
    assert_eq!(
        next(&mut dead).await.header("checkout-error-code").as_deref(),
        Some("reply_unroutable")
    );
    world.channel.queue_delete(mine.as_str().into(), QueueDeleteOptions::default()).await.unwrap();
}

#[tokio::test]
async fn a_worker_that_declares_nothing_waits_for_its_queues_and_serves_them() {
    let Some(mut world) = World::new("declares_nothing").await else { return };
    world.set("topology.declare", "false");
    let waiting = world.worker_unready(&[]);
    soon("it waits", waiting.logged("this lane cannot be consumed")).await;
    assert_eq!(waiting.get("/readyz").await.0, 503);
    waiting.kill().await;
    world.set("topology.declare", "true");
    world.worker().await.kill().await;
    world.set("topology.declare", "false");
    let _worker = world.worker().await;
    let mut replies = world.replies().await;
    world.job("a").await;
    assert_eq!(next(&mut replies).await.status(), "succeeded");
}

/// The wall clock, in milliseconds.
pub(crate) fn now() -> i64 {
    use creem_checkout_worker::clock::{Clock as _, SystemClock};
    SystemClock.now()
}

#[tokio::test]
async fn malformed_direct_addresses_cost_only_their_own_jobs() {
    let Some(world) = World::new("direct_flood").await else { return };
    let worker = world.worker().await;
    let mut replies = world.replies().await;
    // They have the form of an address, and RabbitMQ 3.10 closes the connection over them: one is no process,
    // the other one's node is unknown, as after a node was replaced.
    let malformed = [
        format!("amq.rabbitmq.reply-to.g{}.AAAA", "A".repeat(27)),
        "amq.rabbitmq.reply-to.g2dkABByZXBseUAxMTI1NDcyNzgAAAWLAAAAAGf6XGI=.KSBs+bZNr1VBrmZoo2fyqg==".to_owned(),
    ];
    for n in 0..24 {
        let properties = persistent().with_reply_to(malformed[n % 2].as_str().into());
        world.publish(body(&format!("bad_{n}")), properties).await;
        if n % 4 == 0 {
            world.job(&format!("good_{n}")).await;
        }
    }
    for _ in 0..6 {
        assert!(next(&mut replies).await.text("/request_id").starts_with("good_"));
    }
    // Whether the broker drops such a reply or closes the connection over it, its job is done with.
    for n in 0..24 {
        let key = format!("test/bad_{n}");
        let done = |event: &serde_json::Value| {
            event["message"] == "job"
                && event["job.key"] == key.as_str()
                && event["job.acked"] == true
        };
        soon("it is done with", worker.event(done)).await;
    }
    assert_eq!((world.posts(), worker.get("/readyz").await.0), (30, 200));
    // As a rule the first loss tells, and then nobody waits for more than another connection.
    let log = worker.log();
    let down: Vec<serde_json::Value> = log
        .iter()
        .filter_map(|line| serde_json::from_str(line).ok())
        .filter(|event: &serde_json::Value| event["message"] == "the publishing connection is down")
        .collect();
    assert!(down.len() <= 24, "{}", down.len());
    let by_one = |event: &&serde_json::Value| {
        event["error"].as_str().unwrap().starts_with("the broker met an internal error (541)")
    };
    assert!(down.is_empty() || down.iter().any(|event| by_one(&event)), "{down:?}");
    assert!(down.iter().filter(by_one).all(|event| event["delay_ms"] == 20), "{down:?}");
}

#[tokio::test]
async fn numbers_in_metadata_reach_creem_as_they_were_written() {
    let Some(world) = World::new("numbers").await else { return };
    let _worker = world.worker().await;
    let mut replies = world.replies().await;
    let digits = "7".repeat(4000);
    let metadata = format!(r#"{{"a":1e400,"b":1.50,"c":-0,"d":{digits},"e":[1E-9]}}"#);
    let job = format!(r#"{{"request_id":"n","product_id":"prod_1","metadata":{metadata}}}"#);
    world.publish(&job, persistent()).await;
    let reply = next(&mut replies).await;
    assert_eq!(reply.status(), "succeeded", "{}", String::from_utf8_lossy(&reply.body));
    assert!(world.simulator.log().posts()[0].body.contains(&metadata));
}
