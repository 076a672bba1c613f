//! `make chaos`: thousands of jobs, faults of every kind at Creem, a worker that is killed again
//! and again, a broker that restarts; then the books are compared.
//!
//! The oracle knows four things the worker cannot influence: what was published and confirmed,
//! every session that the simulator made, every reply and parked copy that came out, and the
//! ledger file. It needs no test framework; it prints its figures and fails if one is wrong.
//!
//! `cargo test` runs a short form. Options: `--jobs N --kills N --restarts N --seed N --faults F`.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::disallowed_methods,
    clippy::print_stderr,
    clippy::print_stdout,
    reason = "a test program: it says what is wrong by failing"
)]

#[path = "../it/support/amqp.rs"]
mod amqp;
mod oracle;
#[path = "../it/support/private.rs"]
#[expect(dead_code, reason = "the tests use more of it")]
mod private;

use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use amqp::{connect, declared};
use creem_checkout_worker::simulator::script::Script;
use creem_checkout_worker::simulator::{Options, Simulator};
use futures::StreamExt as _;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, ConfirmSelectOptions,
    QueueDeclareOptions,
};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Channel};
use oracle::{Books, Message};
use private::{BROKER, Private};
use tokio::process::{Child, Command};
use tokio::sync::Mutex;

const PREFIX: &str = "chaos";

#[derive(Debug, Clone)]
struct Plan {
    jobs: usize,
    kills: usize,
    restarts: usize,
    seed: u64,
    faults: f64,
}

impl Plan {
    fn from_arguments() -> Self {
        let mut plan = Self { jobs: 600, kills: 3, restarts: 1, seed: 1, faults: 0.05 };
        let arguments: Vec<String> = std::env::args().skip(1).collect();
        for pair in arguments.chunks(2) {
            let [name, value] = pair else { continue };
            match name.as_str() {
                "--jobs" => plan.jobs = value.parse().unwrap(),
                "--kills" => plan.kills = value.parse().unwrap(),
                "--restarts" => plan.restarts = value.parse().unwrap(),
                "--seed" => plan.seed = value.parse().unwrap(),
                "--faults" => plan.faults = value.parse().unwrap(),
                _ => {}
            }
        }
        plan
    }

    /// Every kind of fault, each with the same share of the calls.
    fn script(&self) -> Script {
        let kinds = [
            r#""kind":"throttle""#,
            r#""kind":"throttle","retry_after":"1""#,
            r#""kind":"status","status":500"#,
            r#""kind":"status","status":503"#,
            r#""kind":"status","status":422"#,
            r#""kind":"duplicate""#,
            r#""kind":"hang""#,
            r#""kind":"cut""#,
            r#""kind":"status_after","status":502"#,
            r#""kind":"hang_after""#,
            r#""kind":"cut_after""#,
            r#""kind":"cut_body""#,
            r#""kind":"drip","milliseconds":20"#,
            r#""kind":"garbage""#,
            r#""kind":"html""#,
            r#""kind":"huge""#,
            r#""kind":"wrong_id""#,
            r#""kind":"wrong_mode""#,
            r#""kind":"plain_url""#,
            r#""kind":"no_url""#,
        ];
        let share = self.faults / f64::from(u8::try_from(kinds.len()).unwrap());
        let faults: Vec<String> =
            kinds.iter().map(|kind| format!(r#"{{{kind},"weight":{share}}}"#)).collect();
        let text =
            format!(r#"{{"latency_ms":20,"seed":{},"faults":[{}]}}"#, self.seed, faults.join(","));
        Script::parse(text.as_bytes()).unwrap()
    }
}

#[tokio::main]
async fn main() {
    if std::env::args().any(|argument| argument == "--list") {
        println!("chaos: test");
        return;
    }
    let plan = Plan::from_arguments();
    let Some(broker) = BROKER.start("chaos").await else {
        println!("0 passed, 0 failed, 1 skipped");
        return;
    };
    let started = Instant::now();
    let books = run(&plan, &broker).await;
    let wrong = books.report(&plan, started.elapsed());
    drop(broker);
    if wrong.is_empty() {
        println!("chaos: 1 passed, 0 failed");
        return;
    }
    for line in &wrong {
        eprintln!("WRONG: {line}");
    }
    println!("chaos: 0 passed, 1 failed");
    std::process::exit(1);
}

async fn run(plan: &Plan, broker: &Private) -> Books {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/chaos");
    drop(std::fs::remove_dir_all(&directory));
    std::fs::create_dir_all(&directory).unwrap();
    let options = Options { script: plan.script(), ..Options::default() };
    let (simulator, serve) = Simulator::start(([127, 0, 0, 1], 0).into(), options).await.unwrap();
    tokio::spawn(serve);
    let worker = Worker {
        directory: directory.clone(),
        simulator: simulator.clone(),
        url: broker.url.clone(),
    };
    let mut child = worker.start();

    let books = Arc::new(Mutex::new(Books::default()));
    let confirmed = Arc::new(AtomicUsize::new(0));
    let done = Arc::new(AtomicBool::new(false));
    for queue in ["replies", "dead"] {
        tokio::spawn(collect(broker.url.clone(), queue, books.clone(), done.clone()));
    }
    let publishing = tokio::spawn(publish_all(broker.url.clone(), plan.jobs, confirmed.clone()));

    // Faults, spread over the jobs: each comes when its share of them has been answered.
    let mut random = plan.seed;
    let events = plan.kills + plan.restarts;
    for event in 0..events {
        // Somewhere in its share of the run, as the seed has it.
        random =
            random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let share = plan.jobs / (events + 1);
        let within = usize::try_from(random >> 33).unwrap() % share.max(1);
        let due = share * event + share / 2 + within;
        wait_for_answers(&books, due.min(plan.jobs.saturating_sub(1)), &mut child, &worker).await;
        // The restarts lie evenly among the kills.
        let restarts_by = |event: usize| event * plan.restarts / events;
        if restarts_by(event + 1) > restarts_by(event) {
            broker.act(if event % 2 == 0 { "restart" } else { "kill" }).await;
            broker.act("start").await;
        } else {
            child.kill().await.unwrap();
            child = worker.start();
        }
    }
    publishing.await.unwrap();
    let jobs = plan.jobs;
    wait_for_answers(&books, jobs, &mut child, &worker).await;
    drain(&broker.url, &mut child, &worker).await;
    done.store(true, Ordering::SeqCst);
    let mut books = std::mem::take(&mut *books.lock().await);
    books.kills = plan.kills;
    books.restarts = plan.restarts;
    books.published = confirmed.load(Ordering::SeqCst);
    books.close(&simulator, &directory.join("ledger.db"));
    books
}

struct Worker {
    directory: std::path::PathBuf,
    simulator: Arc<Simulator>,
    url: String,
}

impl Worker {
    fn start(&self) -> Child {
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.directory.join("worker.log"))
            .unwrap();
        Command::new(env!("CARGO_BIN_EXE_checkout-worker"))
            .arg("run")
            .env_clear()
            .env("AMQP_URL", &self.url)
            .env("CREEM_API_KEY", "creem_test_chaos")
            .env("CREEM_BASE_URL", self.simulator.url())
            .env("LEDGER_URL", format!("sqlite:{}", self.directory.join("ledger.db").display()))
            .env("CHECKOUT_WORKER__TOPOLOGY__PREFIX", PREFIX)
            .env("CHECKOUT_WORKER__HTTP__LISTEN", "127.0.0.1:0")
            .env("CHECKOUT_WORKER__CREEM__REQUEST_TIMEOUT", "2s")
            .env("CHECKOUT_WORKER__RETRY__LONGEST", "4s")
            .env("CHECKOUT_WORKER__AMQP__HEARTBEAT", "5s")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .kill_on_drop(true)
            .spawn()
            .unwrap()
    }
}

/// Waits until so many distinct jobs have an answer; a worker that ends by itself is an error.
async fn wait_for_answers(books: &Mutex<Books>, count: usize, child: &mut Child, worker: &Worker) {
    let (mut last, mut since) = (0, Instant::now());
    loop {
        let answered = books.lock().await.answered();
        if answered >= count {
            return;
        }
        if answered > last {
            (last, since) = (answered, Instant::now());
        }
        if let Some(status) = child.try_wait().unwrap() {
            panic!("the worker ended by itself ({status}); see {}", worker.directory.display());
        }
        assert!(
            since.elapsed() < Duration::from_secs(120),
            "no new answer for two minutes ({answered} of {count}); see {}",
            worker.directory.display()
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Waits until the job and delay queues are empty, and stops the worker as a user would.
async fn drain(url: &str, child: &mut Child, worker: &Worker) {
    let started = Instant::now();
    loop {
        let connection = connect(url).await;
        let mut waiting = 0;
        for queue in [
            "jobs",
            "jobs.bulk",
            "retry.interactive.1s",
            "retry.interactive.5s",
            "retry.bulk.1s",
            "retry.bulk.5s",
        ] {
            let channel = connection.create_channel().await.unwrap();
            let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::durable() };
            let name = format!("{PREFIX}.{queue}");
            let state = channel
                .queue_declare(name.as_str().into(), passive, FieldTable::default())
                .await
                .unwrap();
            waiting += state.message_count();
        }
        if waiting == 0 {
            break;
        }
        assert!(
            started.elapsed() < Duration::from_secs(120),
            "{waiting} messages are left in the queues"
        );
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let pid = child.id().unwrap().to_string();
    assert!(std::process::Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    let status = tokio::time::timeout(Duration::from_secs(40), child.wait()).await;
    let status = status
        .unwrap_or_else(|_| panic!("the worker does not stop; see {}", worker.directory.display()));
    assert!(status.unwrap().success(), "the worker's end");
}

/// Publishes every job until the broker has confirmed it; lanes alternate.
async fn publish_all(url: String, jobs: usize, confirmed: Arc<AtomicUsize>) {
    declared(&connect(&url).await, PREFIX).await;
    let mut left: Vec<usize> = (0..jobs).collect();
    while !left.is_empty() {
        let connection = connect(&url).await;
        let Ok(channel) = connection.create_channel().await else { continue };
        if channel.confirm_select(ConfirmSelectOptions::default()).await.is_err() {
            continue;
        }
        left = publish_some(&channel, left, &confirmed).await;
    }
}

/// Publishes what it can; returns what was not confirmed.
async fn publish_some(channel: &Channel, jobs: Vec<usize>, confirmed: &AtomicUsize) -> Vec<usize> {
    let mut left = Vec::new();
    for batch in jobs.chunks(200) {
        let mut confirms = Vec::new();
        for &job in batch {
            let lane = if job % 2 == 0 { "jobs" } else { "jobs.bulk" };
            let queue = format!("{PREFIX}.{lane}");
            let body = format!(
                r#"{{"request_id":"job-{job}","product_id":"prod_{}","units":{}}}"#,
                job % 7,
                job % 9 + 1
            );
            let properties = BasicProperties::default()
                .with_delivery_mode(2)
                .with_correlation_id(format!("job-{job}").into());
            let options = BasicPublishOptions { mandatory: true, immediate: false };
            match channel
                .basic_publish(
                    "".into(),
                    queue.as_str().into(),
                    options,
                    body.as_bytes(),
                    properties,
                )
                .await
            {
                Ok(confirm) => confirms.push((job, Some(confirm))),
                Err(_) => confirms.push((job, None)),
            }
        }
        for (job, confirm) in confirms {
            let confirmation = match confirm {
                Some(confirm) => confirm.await.ok(),
                None => None,
            };
            if confirmation.is_some_and(|confirmation| confirmation.is_ack()) {
                confirmed.fetch_add(1, Ordering::SeqCst);
            } else {
                left.push(job);
            }
        }
    }
    left
}

/// Takes every message of a queue into the books, across restarts of the broker.
async fn collect(
    url: String,
    queue: &'static str,
    books: Arc<Mutex<Books>>,
    done: Arc<AtomicBool>,
) {
    while !done.load(Ordering::SeqCst) {
        let connection = connect(&url).await;
        let Ok(channel) = connection.create_channel().await else { continue };
        let name = format!("{PREFIX}.{queue}");
        let consumer = channel
            .basic_consume(
                name.as_str().into(),
                "".into(),
                BasicConsumeOptions::default(),
                FieldTable::default(),
            )
            .await;
        let Ok(mut consumer) = consumer else {
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        while let Some(Ok(delivery)) = consumer.next().await {
            books.lock().await.note(Message {
                parked: queue == "dead",
                id: delivery
                    .properties
                    .correlation_id()
                    .as_ref()
                    .map_or_else(String::new, ToString::to_string),
                reply_id: delivery
                    .properties
                    .message_id()
                    .as_ref()
                    .map_or_else(String::new, ToString::to_string),
                body: delivery.data.clone(),
            });
            // Taken first, acked after: what the books have seen twice is counted as a repeat.
            if delivery.ack(BasicAckOptions::default()).await.is_err() {
                break;
            }
        }
    }
}
