//! The commands, as a user meets them.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Write as _};
use std::process::{Command, Output, Stdio};

use lapin::ExchangeKind;
use lapin::options::{
    BasicGetOptions, ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions,
    QueueDeleteOptions,
};
use lapin::types::FieldTable;

use crate::support::{World, body, next, persistent, postgres, soon};
use crate::worker::now;

fn run(arguments: &[&str], environment: &BTreeMap<String, String>, input: &str) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_checkout-worker"))
        .args(arguments)
        .env_clear()
        .envs(environment)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A program that refuses a line need not read to its end.
    if let Err(error) = child.stdin.take().unwrap().write_all(input.as_bytes()) {
        assert_eq!(error.kind(), ErrorKind::BrokenPipe, "{error}");
    }
    child.wait_with_output().unwrap()
}

pub(crate) async fn command(
    arguments: &[&str],
    environment: BTreeMap<String, String>,
    input: &str,
) -> (i32, String, String) {
    let arguments: Vec<String> = arguments.iter().map(|&argument| argument.to_owned()).collect();
    let input = input.to_owned();
    let output = tokio::task::spawn_blocking(move || {
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        run(&arguments, &environment, &input)
    })
    .await
    .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code().unwrap_or(-1), text(&output.stdout), text(&output.stderr))
}

#[tokio::test]
async fn exit_codes_tell_usage_and_configuration_apart() {
    let (code, _, error) = command(&["fly"], BTreeMap::new(), "").await;
    assert_eq!(code, 2, "{error}");
    let (code, _, error) = command(&["run"], BTreeMap::new(), "").await;
    assert_eq!(code, 78);
    assert!(error.contains("set CREEM_API_KEY"), "{error}");
    let wrong = [
        ("CREEM_API_KEY".to_owned(), "creem_test_canary".to_owned()),
        ("CREEM_BASE_URL".to_owned(), "https://api.creem.io".to_owned()),
        ("AMQP_URL".to_owned(), "amqp://guest:canary@/".to_owned()),
        ("CHECKOUT_WORKER__RETRY__MAX_ATTEMPTS".to_owned(), "0".to_owned()),
        ("CHECKOUT_WORKER__RETRY__MAX_ATTEMPS".to_owned(), "3".to_owned()),
    ];
    let (code, output, error) = command(&["check"], wrong.into(), "").await;
    assert_eq!(code, 78);
    assert!(error.contains("retry.max_attempts"), "{error}");
    assert!(!format!("{output}{error}").contains("canary"), "{error}");
    let (code, output, _) = command(&["--help"], BTreeMap::new(), "").await;
    assert_eq!(code, 0);
    for name in ["run", "check", "enqueue", "bulk", "show", "pause", "resume", "campaign", "ledger"]
    {
        assert!(output.lines().any(|line| line.trim_start().starts_with(name)), "{name}");
    }
}

#[tokio::test]
async fn a_reply_is_waited_for_through_an_exchange_of_the_replies_own_too() {
    let Some(mut world) = World::new("own_exchange").await else { return };
    let exchange = world.queue("reply");
    world.set("replies.exchange", &exchange);
    let _worker = world.worker().await;
    let flags = ["enqueue", "--wait", "--request-id", "order_1", "--product-id", "prod_1"];
    let (code, output, error) = command(&flags, world.environment(), "").await;
    assert_eq!(code, 0, "{error}");
    assert!(output.contains("succeeded"), "{output}");
}

#[tokio::test]
async fn jobs_are_enqueued_from_flags_and_lines_and_their_replies_printed() {
    let Some(world) = World::new("enqueue").await else { return };
    let _worker = world.worker().await;
    let flags = [
        "enqueue",
        "--wait",
        "--request-id",
        "order_1",
        "--product-id",
        "prod_1",
        "--metadata",
        "a=b",
    ];
    let (code, output, error) = command(&flags, world.environment(), "").await;
    assert_eq!(code, 0, "{error}");
    let reply: serde_json::Value = serde_json::from_str(output.trim()).unwrap();
    assert_eq!(reply["status"], "succeeded");

    // What Windows writes in front of a file is no part of its first job.
    let lines = format!(
        "\u{feff}{}\n\n{}\r\n{}",
        body("order_2"),
        body("order_3"),
        r#"{"request_id":"order_4"}"#
    );
    let (code, output, error) =
        command(&["enqueue", "-", "--wait", "--lane", "bulk"], world.environment(), &lines).await;
    assert_eq!(code, 1, "one got no link: {error}");
    assert_eq!(output.lines().count(), 3, "{output}");
    assert!(error.contains("3 jobs answered, 2 of them with a link"), "{error}");

    let mut keyless = world.environment();
    keyless.remove("CREEM_API_KEY");
    keyless.insert("CHECKOUT_WORKER__CREEM__API_KEY_FILE".into(), "/nonexistent".into());
    let (code, output, error) = command(&["show", "order_1"], keyless, "").await;
    assert_eq!(code, 0, "it needs no key: {error}");
    assert!(output.contains("succeeded") && output.contains("/checkout/prod_1/"), "{output}");
    let (_, output, _) = command(&["show", "order_1", "--json"], world.environment(), "").await;
    let shown: serde_json::Value = serde_json::from_str(&output).unwrap();
    assert_eq!(
        (shown["attempts"].clone(), shown["reply"]["status"].clone()),
        (1.into(), "succeeded".into())
    );
    let (code, _, error) = command(&["show", "order_99"], world.environment(), "").await;
    assert_eq!(code, 1);
    assert!(error.contains("knows no test/order_99"), "{error}");
}

#[tokio::test]
async fn a_wrong_job_by_hand_is_refused_before_it_is_sent() {
    let Some(world) = World::new("enqueue_wrong").await else { return };
    let flags = ["enqueue", "--request-id", "a b", "--product-id", "prod_1"];
    let (code, _, error) = command(&flags, world.environment(), "").await;
    assert_eq!(code, 2);
    assert!(error.contains("request_id_charset"), "{error}");
    let flags = ["enqueue", "--request-id", "a", "--product-id", "prod_1"];
    let (code, _, error) = command(&flags, world.environment(), "").await;
    assert_eq!(code, 1, "there is no queue yet");
    assert!(error.contains("start the worker once"), "{error}");
}

#[tokio::test]
async fn check_names_all_that_is_wrong_around_it_and_works_beside_a_worker() {
    let Some(world) = World::new("check").await else { return };
    let _worker = world.worker().await;
    let (code, output, error) = command(&["check"], world.environment(), "").await;
    assert_eq!(code, 0, "{output}{error}");
    let (code, output, _) = command(&["check", "--ledger"], world.environment(), "").await;
    assert_eq!(code, 0);
    assert!(output.contains("no damage found"), "{output}");

    // A queue with other arguments, where the worker declares: said before `run` stumbles over it.
    let channel = world.connection.create_channel().await.unwrap();
    channel
        .queue_declare("x.replies".into(), QueueDeclareOptions::durable(), FieldTable::default())
        .await
        .unwrap();
    let mut other = world.environment();
    other.insert("CHECKOUT_WORKER__REPLIES__QUEUE".into(), "x.replies".into());
    let file = world.directory.path().join("file");
    std::fs::write(&file, "x").unwrap();
    other.insert("LEDGER_URL".into(), format!("sqlite:{}/ledger.db", file.display()));
    other.insert("CHECKOUT_WORKER__HTTP__LISTEN".into(), "192.0.2.1:9464".into());
    let (code, output, _) = command(&["check"], other, "").await;
    channel.queue_delete("x.replies".into(), QueueDeleteOptions::default()).await.unwrap();
    assert_eq!(code, 1);
    for wrong in ["WRONG    topology: x.replies", "WRONG    ledger", "WRONG    http.listen"] {
        assert!(output.contains(wrong), "{wrong}: {output}");
    }

    let mut wrong = world.environment();
    wrong.insert("AMQP_URL".into(), "amqp://guest:canary@127.0.0.1:1/%2f".into());
    world.simulator.accept_only("creem_test_other");
    let (code, output, error) = command(&["check"], wrong, "").await;
    assert_eq!(code, 1);
    assert!(output.contains("WRONG    broker") && output.contains("WRONG    creem"), "{output}");
    assert!(!format!("{output}{error}").contains("canary"), "{output}{error}");
}

#[tokio::test]
async fn nothing_is_told_to_a_ledger_that_is_not_there() {
    let Some(server) = postgres::shared("restored_nothing").await else { return };
    let url = postgres::database(&server).await;
    let settings = |ledger: &str| {
        let given = [("CREEM_API_KEY", "creem_test_x"), ("LEDGER_URL", ledger)];
        given.map(|(name, value)| (name.to_owned(), value.to_owned())).into()
    };
    let (code, _, error) = command(&["ledger", "restored-to", "now"], settings(&url), "").await;
    assert!(code == 1 && error.contains("there is no ledger in the database"), "{error}");
    let client = postgres::connect(&url).await;
    let made = "SELECT 1 FROM pg_namespace WHERE nspname = 'checkout_worker'";
    assert!(
        client.query_opt(made, &[]).await.unwrap().is_none(),
        "a mistyped name makes no ledger"
    );

    let directory = tempfile::TempDir::new().unwrap();
    let file = directory.path().join("ledger.db");
    let given = settings(&format!("sqlite:{}", file.display()));
    let (code, _, error) = command(&["ledger", "restored-to", "now"], given, "").await;
    assert!(code == 1 && !file.exists(), "{error}");
}

#[tokio::test]
async fn check_waits_for_nobody_for_ever() {
    // Takes connections and never says a word, as something frozen does.
    let mute = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let at = mute.local_addr().unwrap();
    let settings = BTreeMap::from(
        [
            ("CREEM_API_KEY", "creem_test_canary".to_owned()),
            ("CREEM_BASE_URL", format!("http://{at}")),
            ("CHECKOUT_WORKER__CREEM__REQUEST_TIMEOUT", "2s".to_owned()),
            ("CHECKOUT_WORKER__HTTP__LISTEN", "127.0.0.1:0".to_owned()),
            ("AMQP_URL", format!("amqp://guest:guest@{at}/%2f")),
            ("LEDGER_URL", format!("postgres://someone@{at}/checkout?sslmode=disable")),
        ]
        .map(|(name, value)| (name.to_owned(), value)),
    );
    let (code, output, _) = soon("an end", command(&["check"], settings, "")).await;
    assert_eq!(code, 1);
    for what in ["ledger", "broker", "creem"] {
        assert!(output.contains(&format!("WRONG    {what}")), "{output}");
    }
}

#[tokio::test]
async fn check_touches_no_message_that_waits() {
    let Some(world) = World::new("check_waiting").await else { return };
    world.worker().await.kill().await;
    world.publish(body("waiting"), persistent()).await;
    let (code, output, _) = command(&["check", "--publish"], world.environment(), "").await;
    assert_eq!(code, 0, "{output}");
    assert!(output.contains("1 waiting in"), "{output}");
    let got = world
        .channel
        .basic_get(world.queue("jobs").as_str().into(), BasicGetOptions { no_ack: true })
        .await
        .unwrap()
        .expect("it waits");
    assert!(!got.delivery.redelivered, "nobody has taken it");
}

#[tokio::test]
async fn check_tells_an_exchange_that_leads_where_no_queue_is_bound() {
    let Some(mut world) = World::new("fanout").await else { return };
    let exchange = world.queue("fan");
    let declared =
        ExchangeDeclareOptions { auto_delete: true, ..ExchangeDeclareOptions::default() };
    world
        .channel
        .exchange_declare(
            exchange.as_str().into(),
            ExchangeKind::Fanout,
            declared,
            FieldTable::default(),
        )
        .await
        .unwrap();
    let queue = world
        .channel
        .queue_declare(
            "".into(),
            QueueDeclareOptions { exclusive: true, ..QueueDeclareOptions::default() },
            FieldTable::default(),
        )
        .await
        .unwrap();
    world
        .channel
        .queue_bind(
            queue.name().clone(),
            exchange.as_str().into(),
            "".into(),
            QueueBindOptions::default(),
            FieldTable::default(),
        )
        .await
        .unwrap();
    world.set("replies.exchange", &exchange);
    let (code, output, _) = command(&["check"], world.environment(), "").await;
    assert_eq!(code, 1);
    assert!(output.contains("WRONG    topology") && output.contains("direct"), "{output}");
    world.set("topology.declare", "false");
    let (code, output, _) = command(&["check", "--publish"], world.environment(), "").await;
    assert_eq!(code, 1);
    assert!(output.contains("routes what no queue was bound for"), "{output}");
}

#[tokio::test]
async fn after_a_restore_a_job_that_may_be_forgotten_is_unresolved_and_a_new_one_is_served() {
    let Some(world) = World::new("restored").await else { return };
    world.worker().await.kill().await;
    let (code, _, error) =
        command(&["ledger", "restored-to", "tomorrow"], world.environment(), "").await;
    assert_eq!(code, 2, "{error}");
    let (code, _, error) =
        command(&["ledger", "restored-to", "2999-01-01T00:00:00Z"], world.environment(), "").await;
    assert!(code == 2 && error.contains("in the future"), "{error}");
    let (code, output, error) =
        command(&["ledger", "restored-to", "now"], world.environment(), "").await;
    assert_eq!(code, 0, "{error}");
    assert!(output.contains("end unresolved"), "{output}");
    let (_, output, _) = command(&["check", "--ledger"], world.environment(), "").await;
    assert!(output.contains("restored to 20"), "{output}");
    let earlier = ["ledger", "restored-to", "2026-01-01T00:00:00Z"];
    let (code, output, error) = command(&earlier, world.environment(), "").await;
    assert!(code == 0 && error.contains("takes nothing back"), "{error}");
    assert!(!output.contains("2026-01-01"), "it says what holds: {output}");

    let mut worker = world.worker().await;
    let (mut replies, mut dead) = (world.replies().await, world.dead().await);
    let an_hour_ago = u64::try_from(now() / 1000 - 3600).unwrap();
    world.publish(body("old"), persistent().with_timestamp(an_hour_ago)).await;
    let reply = next(&mut replies).await;
    assert_eq!(
        (reply.status(), reply.text("/error/code")),
        ("unresolved".into(), "ledger_restored".into())
    );
    assert_eq!(next(&mut dead).await.body, body("old").into_bytes());
    assert_eq!(world.posts(), 0);
    let later = u64::try_from(now() / 1000 + 2).unwrap();
    world.publish(body("new"), persistent().with_timestamp(later)).await;
    assert_eq!(next(&mut replies).await.status(), "succeeded");

    // Beside a running worker with an embedded ledger it is refused.
    let (code, _, error) =
        command(&["ledger", "restored-to", "now"], world.environment(), "").await;
    assert!(code == 1 && error.contains("in use by another worker"), "{error}");
    worker.signal("TERM");
    assert_eq!(worker.ended().await, 0);
}

#[tokio::test]
async fn a_line_that_never_ends_is_refused_and_what_was_sent_before_is_told() {
    let Some(world) = World::new("long_line").await else { return };
    let _worker = world.worker().await;
    let lines = format!("{}\n{}", body("first"), "x".repeat(4 * 1024 * 1024));
    let (code, _, error) = command(&["enqueue", "-"], world.environment(), &lines).await;
    assert_eq!(code, 1);
    assert!(error.contains("line 2 is larger than 65536 bytes"), "{error}");
    assert!(error.contains("stopped after 1 job had been enqueued"), "{error}");
    let flags =
        ["--request-id", "a", "--product-id", "p", "--metadata", "k=1", "--metadata", "k=2"];
    let flags: Vec<&str> = std::iter::once("enqueue").chain(flags).collect();
    let (code, _, error) = command(&flags, world.environment(), "").await;
    assert!(code == 2 && error.contains("twice"), "{error}");
}
