//! `make bench`: what the worker takes per job, as a whole process, on a real broker.
//!
//! Prints jobs a second and the worker's CPU seconds per 1,000 jobs while it drains a backlog
//! (simulated Creem at 0 ms), and the time from publish to reply at a steady 200 jobs a second.
//! Every promise is on: a sync per commit, quorum queues, confirms, metrics, JSON logs. The embedded
//! ledger and, where there is a PostgreSQL, the shared one, interleaved, three rounds each; quote the
//! medians, and compare only runs of one machine.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::disallowed_methods,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a benchmark program"
)]

#[path = "../tests/it/support/amqp.rs"]
mod amqp;
#[path = "../tests/it/support/private.rs"]
#[expect(dead_code, reason = "the tests use more of it")]
mod private;

use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use amqp::{connect, declared};
use creem_checkout_worker::simulator::{Options, Simulator};
use futures::StreamExt as _;
use lapin::options::{
    BasicConsumeOptions, BasicPublishOptions, ConfirmSelectOptions, QueuePurgeOptions,
};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Channel, Connection, Consumer};
use private::{BROKER, POSTGRES, Private};
use tokio::process::{Child, Command};

const PREFIX: &str = "bench";

struct Round {
    jobs_per_second: f64,
    cpu_per_thousand: f64,
    peak_mib: f64,
    p50: Duration,
    p99: Duration,
}

/// A ledger to be measured: its name and its URL, or the embedded one in the round's own directory.
struct Subject {
    name: &'static str,
    url: Option<String>,
}

#[tokio::main]
async fn main() {
    // `cargo test` runs this too, without `--bench`: then a few jobs show that it works.
    let real = std::env::args().any(|argument| argument == "--bench");
    let (rounds, backlog, paced) = if real { (3, 20_000, 2_000) } else { (1, 300, 50) };
    let Some(broker) = BROKER.start("bench").await else { return };
    let mut subjects = vec![Subject { name: "sqlite", url: None }];
    // Without one, what it says is the reason.
    let server = POSTGRES.start("bench").await;
    subjects.extend(
        server.iter().map(|server| Subject { name: "postgres", url: Some(server.url.clone()) }),
    );
    println!("drain of {backlog} jobs at 0 ms, then {paced} jobs at 200/s; quorum queues");
    let mut all: Vec<Vec<Round>> = subjects.iter().map(|_| Vec::new()).collect();
    for number in 0..rounds {
        // Interleaved, so that whatever else the machine does meets them alike.
        for (at, subject) in subjects.iter().enumerate() {
            let round =
                run(&broker, subject, number * subjects.len() + at + 1, backlog, paced).await;
            println!("{}, round {}: {round}", subject.name, number + 1);
            all[at].push(round);
        }
    }
    for (subject, rounds) in subjects.iter().zip(&all) {
        println!(
            "{}, median: {:.0} jobs/s, {:.3} CPU s per 1,000 jobs",
            subject.name,
            median(rounds.iter().map(|round| round.jobs_per_second)),
            median(rounds.iter().map(|round| round.cpu_per_thousand))
        );
    }
    if let [sqlite, postgres] = all.as_slice() {
        let ratios: Vec<f64> = sqlite
            .iter()
            .zip(postgres)
            .map(|(sqlite, postgres)| postgres.cpu_per_thousand / sqlite.cpu_per_thousand)
            .collect();
        println!(
            "worker CPU per job, postgres to sqlite: median {:.2}, from {:.2} to {:.2}",
            median(ratios.iter().copied()),
            ratios.iter().copied().fold(f64::INFINITY, f64::min),
            ratios.iter().copied().fold(0.0, f64::max)
        );
    }
    println!("bench: 1 passed, 0 failed");
}

impl std::fmt::Display for Round {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{:.0} jobs/s, {:.3} CPU s per 1,000 jobs, peak {:.0} MiB, publish to reply p50 {:.1} ms p99 {:.1} ms",
            self.jobs_per_second,
            self.cpu_per_thousand,
            self.peak_mib,
            self.p50.as_secs_f64() * 1000.0,
            self.p99.as_secs_f64() * 1000.0,
        )
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

async fn run(
    broker: &Private,
    subject: &Subject,
    number: usize,
    backlog: usize,
    paced: usize,
) -> Round {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/bench");
    drop(std::fs::remove_dir_all(&directory));
    std::fs::create_dir_all(&directory).unwrap();
    let embedded = format!("sqlite:{}", directory.join("ledger.db").display());
    let ledger = subject.url.as_deref().unwrap_or(&embedded);
    let (simulator, serve) =
        Simulator::start(([127, 0, 0, 1], 0).into(), Options::default()).await.unwrap();
    let serving = tokio::spawn(serve);
    let connection = connect(&broker.url).await;
    let channel = connection.create_channel().await.unwrap();
    channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();

    // A first start declares the queues; the backlog is published while no worker runs.
    let mut child = worker(&broker.url, &simulator.url(), ledger, &directory);
    let mut replies = replies(&connection).await;
    stop(&mut child).await;
    publish(&channel, number, 0..backlog, None).await;

    let mut child = worker(&broker.url, &simulator.url(), ledger, &directory);
    let first = replies.next().await.unwrap().unwrap();
    drop(first);
    let started = Instant::now();
    let before = cpu_seconds(&child);
    for _ in 1..backlog {
        drop(replies.next().await.unwrap().unwrap());
    }
    let took = started.elapsed().as_secs_f64();
    let cpu = cpu_seconds(&child) - before;

    let mut times = paced_latency(&channel, &mut replies, number, backlog..backlog + paced).await;
    times.sort();
    let peak_mib = peak_mib(&child);
    stop(&mut child).await;
    let purge = QueuePurgeOptions::default();
    channel.queue_purge(format!("{PREFIX}.replies").as_str().into(), purge).await.unwrap();
    serving.abort();
    let counted = f64::from(u32::try_from(backlog - 1).unwrap());
    Round {
        jobs_per_second: counted / took,
        cpu_per_thousand: cpu * 1000.0 / counted,
        peak_mib,
        p50: times[times.len() / 2],
        p99: times[times.len() * 99 / 100],
    }
}

fn worker(amqp: &str, creem: &str, ledger: &str, directory: &Path) -> Child {
    let log = std::fs::File::create(directory.join("worker.log")).unwrap();
    Command::new(env!("CARGO_BIN_EXE_checkout-worker"))
        .arg("run")
        .env_clear()
        .env("AMQP_URL", amqp)
        .env("CREEM_API_KEY", "creem_test_bench")
        .env("CREEM_BASE_URL", creem)
        .env("LEDGER_URL", ledger)
        .env("CHECKOUT_WORKER__TOPOLOGY__PREFIX", PREFIX)
        .env("CHECKOUT_WORKER__HTTP__LISTEN", "127.0.0.1:0")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .kill_on_drop(true)
        .spawn()
        .unwrap()
}

async fn stop(child: &mut Child) {
    let pid = child.id().unwrap().to_string();
    std::process::Command::new("kill").args(["-TERM", &pid]).status().unwrap();
    child.wait().await.unwrap();
}

/// Consumes the reply queue, once the worker has declared it.
async fn replies(connection: &Connection) -> Consumer {
    declared(connection, PREFIX).await;
    let channel = connection.create_channel().await.unwrap();
    let options = BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() };
    let name = format!("{PREFIX}.replies");
    channel
        .basic_consume(name.as_str().into(), "".into(), options, FieldTable::default())
        .await
        .unwrap()
}

async fn publish(
    channel: &Channel,
    round: usize,
    jobs: std::ops::Range<usize>,
    at: Option<Instant>,
) {
    let mut confirms = Vec::new();
    for job in jobs {
        let body = format!(
            r#"{{"request_id":"r{round}-{job}","product_id":"prod_1","units":2,"customer":{{"email":"buyer{job}@example.com"}},"success_url":"https://shop.example/thanks","metadata":{{"order":{job},"note":"a benchmark's job of about three hundred bytes"}}}}"#
        );
        let sent = at.map_or_else(String::new, |at| at.elapsed().as_nanos().to_string());
        let properties = BasicProperties::default()
            .with_delivery_mode(2)
            .with_correlation_id(sent.as_str().into());
        let queue = format!("{PREFIX}.jobs");
        let options = BasicPublishOptions::default();
        confirms.push(
            channel
                .basic_publish(
                    "".into(),
                    queue.as_str().into(),
                    options,
                    body.as_bytes(),
                    properties,
                )
                .await
                .unwrap(),
        );
    }
    for confirm in confirms {
        assert!(confirm.await.unwrap().is_ack());
    }
}

/// Publishes at a steady pace whatever the worker does, so that a stall is not hidden by
/// publishing less, and returns each job's time from its publish to its reply.
async fn paced_latency(
    channel: &Channel,
    replies: &mut Consumer,
    round: usize,
    jobs: std::ops::Range<usize>,
) -> Vec<Duration> {
    let count = jobs.len();
    let origin = Instant::now();
    let publisher = channel.clone();
    let publishing = tokio::spawn(async move {
        let mut tick = tokio::time::interval(Duration::from_millis(5));
        for job in jobs {
            tick.tick().await;
            publish_one(&publisher, round, job, origin).await;
        }
    });
    let mut times = Vec::with_capacity(count);
    while times.len() < count {
        let reply = replies.next().await.unwrap().unwrap();
        let sent: u64 =
            reply.properties.correlation_id().as_ref().unwrap().as_str().parse().unwrap();
        times.push(origin.elapsed().saturating_sub(Duration::from_nanos(sent)));
    }
    publishing.await.unwrap();
    times
}

async fn publish_one(channel: &Channel, round: usize, job: usize, origin: Instant) {
    publish(channel, round, job..job + 1, Some(origin)).await;
}

/// User and system time of a process so far.
fn cpu_seconds(child: &Child) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", child.id().unwrap())).unwrap();
    let after = stat.rsplit_once(')').unwrap().1;
    let fields: Vec<&str> = after.split_whitespace().collect();
    let ticks: f64 = fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap();
    // Linux reports these in units of 1/100 s to every program.
    ticks / 100.0
}

fn peak_mib(child: &Child) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", child.id().unwrap())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM")).unwrap();
    let kib: f64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    kib / 1024.0
}
