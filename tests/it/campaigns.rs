//! Jobs that belong together: found, counted, cancelled and exported, with either ledger.

use std::collections::BTreeMap;

use crate::bulk::forget;
use crate::cli::command;
use crate::support::postgres::{database, shared};
use crate::support::{Process, World, body, eventually, header, next, soon};
use crate::worker::now;

const JOBS: usize = 5;

async fn told(world: &World, arguments: &[&str]) -> String {
    let (code, output, error) = command(arguments, world.environment(), "").await;
    assert_eq!(code, 0, "{output}{error}");
    output
}

async fn publish(world: &World, id: &str, campaign: &str, at: i64) {
    let seconds = u64::try_from(at / 1000).unwrap();
    let properties = header("checkout-campaign", campaign).with_timestamp(seconds);
    world.publish_to(&world.queue("jobs.bulk"), body(id), properties).await;
}

async fn a_cancelled_campaign(mut world: World) {
    // The first one is under way, and the others wait.
    world.set("lanes.bulk.concurrency", "1");
    world.script(r#"{"latency_ms":6000}"#);
    let worker = world.worker().await;
    let mut replies = world.replies().await;
    for number in 0..JOBS {
        publish(&world, &format!("job-{number}"), "Fair, 2026", now()).await;
    }
    soon("the first call", world.simulator.posts_arrived(1)).await;
    let (code, _, said) = command(&["campaign", "status", "Spring"], world.environment(), "").await;
    assert!(code == 1 && said.contains("no worker has taken a job of campaign Spring"), "{said}");
    // A mistyped name is noticed, and taken back.
    let said = told(&world, &["campaign", "cancel", "Spring"]).await;
    assert!(said.contains("no worker has taken a job of that name yet"), "{said}");
    assert!(told(&world, &["check"]).await.contains("Spring is cancelled"));
    told(&world, &["campaign", "cancel", "--undo", "Spring"]).await;
    assert!(!told(&world, &["check"]).await.contains("Spring"));
    let said = told(&world, &["campaign", "cancel", "Fair, 2026"]).await;
    assert!(said.contains("within two seconds"), "{said}");
    soon("the worker hears of it", worker.logged("a campaign is cancelled")).await;
    world.script(r#"{"latency_ms":0}"#);

    let mut statuses: BTreeMap<String, usize> = BTreeMap::new();
    for _ in 0..JOBS {
        let reply = next(&mut replies).await;
        *statuses.entry(reply.status()).or_default() += 1;
        if reply.status() == "cancelled" {
            assert_eq!(reply.text("/next"), "resend");
            assert_eq!(reply.text("/error/code"), "campaign_cancelled");
        }
    }
    assert_eq!(statuses, [("cancelled".to_owned(), JOBS - 1), ("succeeded".to_owned(), 1)].into());
    assert_eq!(world.posts(), 1);

    // A copy of what has a link gets it all the same, and what is published later is served.
    publish(&world, "job-0", "Fair, 2026", now()).await;
    assert_eq!(next(&mut replies).await.status(), "succeeded");
    publish(&world, "job-1", "Fair, 2026", now() + 2_000).await;
    assert_eq!(next(&mut replies).await.status(), "succeeded");
    publish(&world, "other", "Autumn", now()).await;
    assert_eq!(next(&mut replies).await.status(), "succeeded");
    assert_eq!(world.posts(), 3);

    let status = told(&world, &["campaign", "status", "Fair, 2026", "--json"]).await;
    let status: serde_json::Value = serde_json::from_str(&status).unwrap();
    assert_eq!(status["jobs"], JOBS);
    assert_eq!(status["states"], serde_json::json!({"cancelled": JOBS - 2, "succeeded": 2}));
    let list = told(&world, &["campaign", "list"]).await;
    let lines: Vec<&str> = list.lines().collect();
    assert!(lines[0].starts_with("Autumn: 1 job taken (1 succeeded)"), "{list}");
    assert!(lines[1].starts_with("Fair, 2026: 5 jobs taken (3 cancelled, 2 succeeded)"), "{list}");
    assert!(lines[1].contains("; cancelled for jobs until 20"), "{list}");
    assert!(told(&world, &["check"]).await.contains("Fair, 2026 is cancelled"));

    let table = told(&world, &["campaign", "export", "Fair, 2026"]).await;
    let lines: Vec<&str> = table.lines().collect();
    assert_eq!(lines.len(), JOBS + 1, "{table}");
    assert!(lines[0].starts_with("mode,request_id,status,checkout_id,checkout_url,"), "{table}");
    let first = world.simulator.log().sessions()[0].clone();
    let link = format!("test,job-0,succeeded,{},{},,,20", first.id, first.url);
    assert!(lines[1].starts_with(&link), "{table}");
    assert!(lines[3].starts_with("test,job-2,cancelled,,,campaign_cancelled,"), "{table}");
    worker.kill().await;
}

#[tokio::test]
async fn a_cancelled_campaign_gets_no_more_links() {
    let Some(world) = World::new("campaign_file").await else { return };
    a_cancelled_campaign(world).await;
}

#[tokio::test]
async fn a_cancelled_campaign_gets_no_more_links_from_any_worker_of_a_shared_ledger() {
    let Some(server) = shared("campaign_shared").await else { return };
    let url = database(&server).await;
    let Some(mut world) = World::new("campaign_shared").await else { return };
    world.settings.insert("LEDGER_URL".into(), url);
    a_cancelled_campaign(world).await;
}

#[tokio::test]
async fn jobs_that_wait_for_their_turn_are_cancelled_without_one() {
    let Some(mut world) = World::new("campaign_waiting").await else { return };
    world.set("rate_limit.per_second", "0.05");
    let _worker = world.worker().await;
    let mut replies = world.replies().await;
    for number in 0..3 {
        publish(&world, &format!("job-{number}"), "Fair", now()).await;
    }
    assert_eq!(next(&mut replies).await.status(), "succeeded");
    told(&world, &["campaign", "cancel", "Fair"]).await;
    for _ in 0..2 {
        assert_eq!(next(&mut replies).await.status(), "cancelled");
    }
    assert_eq!(world.posts(), 1);
}

#[tokio::test]
async fn a_file_goes_through_the_queue_and_comes_back_as_links_in_its_order() {
    let Some(world) = World::new("via_queue").await else { return };
    let worker = world.worker().await;
    world.script(r#"{"latency_ms":20}"#);
    let path = |name: &str| world.directory.path().join(name).display().to_string();
    let rows: Vec<String> = (0..300).map(|row| format!("r-{row},prod_1")).collect();
    std::fs::write(path("in.csv"), format!("request_id,product_id\n{}\n", rows.join("\n")))
        .unwrap();
    let (input, out) = (path("in.csv"), path("links.csv"));
    let bulk = ["bulk", &input, "--out", &out, "--via-queue", "--campaign", "Fair"];
    let mut settings = world.environment();
    settings.remove("CREEM_API_KEY");
    let process = Process::start(&bulk, &settings);
    soon("some calls", world.simulator.posts_arrived(50)).await;
    process.kill().await;
    // Its replies go on coming; the same command collects them.
    let (code, _, said) = command(&bulk, settings.clone(), "").await;
    assert_eq!(code, 0, "{said}");
    let text = std::fs::read_to_string(&out).unwrap();
    let lines: Vec<&str> = text.lines().skip(1).collect();
    assert_eq!(lines.len(), 300);
    for (row, line) in lines.iter().enumerate() {
        assert!(line.starts_with(&format!("r-{row},prod_1,succeeded,ch_")), "{line}");
    }
    assert_eq!((world.posts(), world.sessions()), (300, 300), "no link was made twice");
    let status = told(&world, &["campaign", "status", "Fair"]).await;
    assert!(status.starts_with("Fair: 300 jobs taken (300 succeeded)"), "{status}");
    assert_eq!(world.depth("dead").await, 0, "no reply was left without a queue");
    worker.kill().await;
    // Copies of what was sent twice are no matter of what follows. They come back when the broker has noticed.
    eventually("nothing is left", || async {
        let purge = lapin::options::QueuePurgeOptions::default();
        let queue = world.queue("jobs.bulk");
        world.channel.queue_purge(queue.as_str().into(), purge).await.unwrap();
        world.consumers("jobs.bulk").await == 0 && world.depth("jobs.bulk").await == 0
    })
    .await;

    // Workers with another ledger know none of these links, and are not asked to make them all again.
    std::fs::remove_file(world.ledger()).unwrap();
    let worker = world.worker_unready(&["--accept-empty-ledger"]);
    let (code, _, said) = command(&bulk, settings.clone(), "").await;
    assert!(code == 1 && said.contains("would be made a second time"), "{said}");
    assert_eq!(world.posts(), 300, "none is made");
    assert_eq!(std::fs::read_to_string(&out).unwrap(), text);

    // Nor do they go on with what workers with the other ledger have begun.
    let part = format!("{out}.part");
    let begun: Vec<&str> = text.lines().take(200).collect();
    std::fs::rename(&out, path("kept.csv")).unwrap();
    std::fs::write(&part, begun.join("\n") + "\n").unwrap();
    let (code, _, said) = command(&bulk, settings.clone(), "").await;
    assert!(code == 1 && said.contains("would be made a second time"), "{said}");
    assert_eq!(world.posts(), 300, "none is made");
    // Nor where no line of it is gone on behind, however often it is tried.
    let changed: String =
        std::fs::read_to_string(&input).unwrap().replace("r-0,prod_1", "r-0,prod_2");
    std::fs::write(&input, changed).unwrap();
    for _ in 0..2 {
        let (code, _, said) = command(&bulk, settings.clone(), "").await;
        assert!(code == 1 && said.contains("would be made a second time"), "{said}");
    }
    assert_eq!(world.posts(), 300, "none is made");
    worker.kill().await;
}

#[tokio::test]
async fn a_campaign_that_is_cancelled_is_sent_no_further() {
    let Some(world) = World::new("via_queue_cancelled").await else { return };
    let worker = world.worker().await;
    told(&world, &["pause", "--lane", "bulk"]).await;
    eventually("bulk is left", || async { world.consumers("jobs.bulk").await == 0 }).await;
    let path = |name: &str| world.directory.path().join(name).display().to_string();
    // More than are sent at once.
    let rows: Vec<String> = (0..3_000).map(|row| format!("r-{row},prod_1\n")).collect();
    std::fs::write(path("in.csv"), format!("request_id,product_id\n{}", rows.concat())).unwrap();
    let (input, out) = (path("in.csv"), path("links.csv"));
    let bulk = ["bulk", &input, "--out", &out, "--via-queue", "--campaign", "Fair"];
    let running = command(&bulk, world.environment(), "");
    let cancels = async {
        eventually("rows wait", || async { world.depth("jobs.bulk").await >= 2_048 }).await;
        told(&world, &["campaign", "cancel", "Fair"]).await;
        told(&world, &["resume", "--lane", "bulk"]).await;
    };
    let ((code, _, said), ()) = tokio::join!(running, cancels);
    assert!(code == 1 && said.contains("its campaign was cancelled"), "{said}");
    worker.kill().await;
    assert_eq!(world.posts(), 0);
    let undo = ["campaign", "cancel", "--undo", "Fayre"];
    let (code, _, said) = command(&undo, world.environment(), "").await;
    assert!(
        code == 1 && said.contains("was not cancelled") && said.contains("cancelled: Fair"),
        "{said}"
    );
}

#[tokio::test]
async fn a_link_that_the_workers_have_forgotten_is_not_made_again_by_way_of_the_queue() {
    let Some(world) = World::new("via_queue_forgotten").await else { return };
    let worker = world.worker().await;
    let path = |name: &str| world.directory.path().join(name).display().to_string();
    std::fs::write(path("in.csv"), "request_id,product_id\na,p\nb,p\nc,p\n").unwrap();
    let (input, out) = (path("in.csv"), path("links.csv"));
    let bulk = ["bulk", &input, "--out", &out, "--via-queue"];
    assert_eq!(command(&bulk, world.environment(), "").await.0, 0);
    let text = std::fs::read_to_string(&out).unwrap();
    // Again is the same, though each row was given a link.
    assert_eq!(command(&bulk, world.environment(), "").await.0, 0);
    assert_eq!(std::fs::read_to_string(&out).unwrap(), text);
    worker.kill().await;
    forget(&world.ledger(), "c");
    let worker = world.worker().await;
    let (code, _, said) = command(&bulk, world.environment(), "").await;
    assert!(code == 1 && said.contains("has a link for c that"), "{said}");
    assert_eq!((world.posts(), std::fs::read_to_string(&out).unwrap()), (3, text));
    worker.kill().await;
}
