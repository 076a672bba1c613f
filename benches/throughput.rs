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

mod support;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use creem_checkout_worker::simulator::{Options, Simulator};
use futures::StreamExt as _;
use lapin::options::{ConfirmSelectOptions, QueuePurgeOptions};
use lapin::{Channel, Consumer};
use support::amqp::connect;
use support::private::{BROKER, POSTGRES, Private};
use support::{
    PREFIX, Setting, cpu_seconds, directory, median, peak_mib, publish, replies, stop, worker,
};

struct Round {
    jobs_per_second: f64,
    cpu_per_thousand: f64,
    peak_mib: f64,
    p50: Duration,
    p99: Duration,
}

/// A ledger to be measured.
struct Subject {
    name: &'static str,
    /// Its URL, or the embedded one in the round's own directory.
    url: Option<String>,
    /// Makes the worker's own syncs slow.
    preload: Option<PathBuf>,
}

impl Subject {
    fn new(name: &'static str, url: Option<&str>) -> Self {
        Self { name, url: url.map(str::to_owned), preload: None }
    }
}

#[tokio::main]
async fn main() {
    // `cargo test` runs this too, without `--bench`: then a few jobs show that it works.
    let real = std::env::args().any(|argument| argument == "--bench");
    let (rounds, backlog, paced) = if real { (3, 20_000, 2_000) } else { (1, 300, 50) };
    let Some(broker) = BROKER.start("bench").await else { return };
    println!("drain of {backlog} jobs at 0 ms, then {paced} jobs at 200/s; quorum queues");
    // Without a server, what it says is the reason.
    let server = POSTGRES.start("bench").await;
    let server = server.as_ref().map(|server| server.url.as_str());
    let mut subjects = vec![Subject::new("sqlite", None)];
    subjects.extend(server.map(|url| Subject::new("postgres", Some(url))));
    measure(&broker, &subjects, rounds, backlog, paced).await;
    if real {
        slow_disks(&broker, rounds, paced).await;
    }
    println!("bench: 1 passed, 0 failed");
}

/// The same on disks whose syncs take 3 ms, which is what many in production take.
async fn slow_disks(broker: &Private, rounds: usize, paced: usize) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/slow-sync");
    let made = std::process::Command::new(script).output().unwrap();
    let Some(server) = POSTGRES.start("bench-slow").await else { return };
    if !made.status.success() || server.ask("slow", &[]).await.is_err() {
        println!("no slow disks: {}", String::from_utf8_lossy(&made.stderr));
        return;
    }
    let preload = PathBuf::from(String::from_utf8(made.stdout).unwrap().trim());
    println!("on disks of 3 ms per sync:");
    let sqlite = Subject { name: "sqlite, slow disk", preload: Some(preload), url: None };
    let postgres = Subject::new("postgres, slow disk", Some(&server.url));
    measure(broker, &[sqlite, postgres], rounds, 10_000, paced).await;
}

/// Measures the subjects, interleaved, so that whatever else the machine does meets them alike.
async fn measure(
    broker: &Private,
    subjects: &[Subject],
    rounds: usize,
    backlog: usize,
    paced: usize,
) {
    let mut all: Vec<Vec<Round>> = subjects.iter().map(|_| Vec::new()).collect();
    for number in 1..=rounds {
        for (subject, rounds) in subjects.iter().zip(&mut all) {
            let round = run(broker, subject, backlog, paced).await;
            println!("{}, round {number}: {round}", subject.name);
            rounds.push(round);
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
    if let [first, second] = all.as_slice() {
        let ratios: Vec<f64> = first
            .iter()
            .zip(second)
            .map(|(first, second)| second.cpu_per_thousand / first.cpu_per_thousand)
            .collect();
        println!(
            "worker CPU per job, {} to {}: median {:.2}, from {:.2} to {:.2}",
            subjects[1].name,
            subjects[0].name,
            median(ratios.iter().copied()),
            ratios.iter().copied().fold(f64::INFINITY, f64::min),
            ratios.iter().copied().fold(0.0, f64::max)
        );
    }
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

async fn run(broker: &Private, subject: &Subject, backlog: usize, paced: usize) -> Round {
    /// No two rounds have the same jobs.
    static ROUNDS: AtomicUsize = AtomicUsize::new(0);
    let number = ROUNDS.fetch_add(1, Ordering::Relaxed);
    let directory = directory("bench");
    let (simulator, serve) =
        Simulator::start(([127, 0, 0, 1], 0).into(), Options::default()).await.unwrap();
    let serving = tokio::spawn(serve);
    let embedded = format!("sqlite:{}", directory.join("ledger.db").display());
    let setting = Setting {
        amqp: broker.url.clone(),
        creem: simulator.url(),
        ledger: subject.url.clone().unwrap_or(embedded),
        directory,
        preload: subject.preload.clone(),
    };
    let connection = connect(&broker.url).await;
    let channel = connection.create_channel().await.unwrap();
    channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();

    // A first start declares the queues; the backlog is published while no worker runs.
    let mut child = worker(&setting, "worker");
    let mut replies = replies(&connection).await;
    stop(&mut child).await;
    publish(&channel, number, 0..backlog, None).await;

    let mut child = worker(&setting, "worker");
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
