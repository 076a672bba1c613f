//! What more workers bring, and how long a job waits whose worker is lost.
//!
//! Jobs a second of 1, 2 and 4 workers with one PostgreSQL and a Creem that takes 200 ms, interleaved,
//! three rounds each; defaults otherwise, so 64 calls in flight per worker. Then, with two workers that
//! hold 64 jobs each: one is killed, is frozen, or loses its way to the broker; measured is the time until the last
//! of the jobs is answered, beside its bound: the later of the lease (25 s) and two heartbeats (20 s),
//! plus a retry's back-off (a second at most here) and the call.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::disallowed_methods,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a benchmark program"
)]

#[path = "../tests/it/support/relay.rs"]
mod relay;
mod support;

use std::sync::Arc;
use std::time::{Duration, Instant};

use creem_checkout_worker::simulator::script::Script;
use creem_checkout_worker::simulator::{Options, Simulator};
use futures::StreamExt as _;
use lapin::options::{ConfirmSelectOptions, QueuePurgeOptions};
use lapin::{Channel, Consumer};
use relay::Relay;
use support::amqp::connect;
use support::private::{BROKER, POSTGRES, Private};
use support::{
    PREFIX, Setting, cpu_of, cpu_seconds, directory, median, peak_mib, publish, replies, signal,
    stat, stop, worker,
};
use tokio::process::Child;

/// What Creem takes for an answer.
const LATENCY_MS: u64 = 200;
/// Calls that a worker has in flight, by default.
const IN_FLIGHT: usize = 64;
/// Jobs per worker and round.
const PER_WORKER: usize = 4_000;

/// Everything but the workers.
struct Bench {
    /// The processes of the broker and of the database.
    servers: [u32; 2],
    setting: Setting,
    simulator: Arc<Simulator>,
    channel: Channel,
    replies: Consumer,
    round: usize,
}

#[tokio::main]
async fn main() {
    // `cargo test` runs this too, without `--bench`: then a few jobs show that it works.
    let real = std::env::args().any(|argument| argument == "--bench");
    let Some(broker) = BROKER.start("replicas").await else { return };
    let Some(server) = POSTGRES.start("replicas").await else { return };
    let mut bench = Bench::new(&broker, &server).await;
    let (rounds, per_worker) = if real { (3, PER_WORKER) } else { (1, 64) };
    let counts = [1, 2, 4];
    let mut all = counts.map(|_| Vec::new());
    for round in 1..=rounds {
        for (count, all) in counts.into_iter().zip(&mut all) {
            let drained = bench.drain(count, count * per_worker).await;
            println!("{count} workers, round {round}: {drained}");
            all.push(drained.per_second);
        }
    }
    let medians = all.map(|all| median(all.into_iter()));
    for (count, jobs) in counts.into_iter().zip(medians) {
        println!("{count} workers, median: {jobs:.0} jobs/s, {:.2} times one", jobs / medians[0]);
    }
    sizes(&server.url).await;
    if real {
        for loss in [Loss::Killed, Loss::Frozen, Loss::CutOff] {
            let took = bench.lose(&broker, loss).await;
            println!(
                "{loss:?}: its {IN_FLIGHT} jobs were answered within {:.1} s",
                took.as_secs_f64()
            );
        }
    }
    println!("bench: 1 passed, 0 failed");
}

/// How much a settled job takes in the database.
async fn sizes(url: &str) {
    let (client, connection) = tokio_postgres::connect(url, tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    let row = client
        .query_one(
            "SELECT count(*), pg_total_relation_size('checkout_worker.job'),
                    (pg_current_wal_lsn() - '0/0'::pg_lsn)::int8 FROM checkout_worker.job",
            &[],
        )
        .await
        .unwrap();
    let (rows, bytes, wal): (i64, i64, i64) = (row.get(0), row.get(1), row.get(2));
    println!(
        "PostgreSQL: {rows} jobs, {} bytes each with indexes and dead rows, {} bytes of WAL each",
        bytes / rows.max(1),
        wal / rows.max(1)
    );
}

/// What a drain took.
struct Drained {
    per_second: f64,
    /// CPU seconds per 1,000 jobs: of all workers, of the broker, of the database.
    cpu: [f64; 3],
    /// The most memory that one of the workers ever had.
    peak_mib: f64,
}

impl std::fmt::Display for Drained {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [workers, broker, database] = self.cpu;
        write!(
            f,
            "{:.0} jobs/s; CPU s per 1,000 jobs: workers {workers:.3}, RabbitMQ {broker:.3}, PostgreSQL {database:.3}; peak {:.0} MiB",
            self.per_second, self.peak_mib
        )
    }
}

/// The process that a server's script has started.
fn process_of(file: &std::path::Path) -> u32 {
    let text = std::fs::read_to_string(file).unwrap();
    text.lines().next().unwrap().trim().parse().unwrap()
}

/// Where the script keeps PostgreSQL's data.
fn data_of(server: &Private) -> std::path::PathBuf {
    let env = std::fs::read_to_string(server.directory.join("env")).unwrap();
    let line = env.lines().find_map(|line| line.strip_prefix("data='")).unwrap();
    std::path::Path::new(line.trim_end_matches('\'')).join("db")
}

/// User and system time of a process and its children so far.
fn cpu_of_family(parent: u32) -> f64 {
    let all = std::fs::read_dir("/proc").unwrap().flatten();
    let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let of_it = |pid: &u32| {
        *pid == parent || stat(*pid).is_some_and(|fields| fields[1] == parent.to_string())
    };
    pids.filter(of_it).map(cpu_of).sum()
}

/// What happens to a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Loss {
    /// kill -9: the broker sees at once that it is gone.
    Killed,
    /// SIGSTOP: the broker hears no heartbeat.
    Frozen,
    /// It lives, and what it sends to the broker does not arrive, nor the other way round.
    CutOff,
}

impl Bench {
    async fn new(broker: &Private, server: &Private) -> Self {
        let script = Script { latency_ms: LATENCY_MS, ..Script::default() };
        let options = Options { script, ..Options::default() };
        let (simulator, serve) =
            Simulator::start(([127, 0, 0, 1], 0).into(), options).await.unwrap();
        tokio::spawn(serve);
        let setting = Setting {
            amqp: broker.url.clone(),
            creem: simulator.url(),
            ledger: server.url.clone(),
            directory: directory("bench-replicas"),
            preload: None,
        };
        let connection = connect(&broker.url).await;
        let channel = connection.create_channel().await.unwrap();
        channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
        // A first start declares the queues.
        let mut child = worker(&setting, "first");
        let replies = replies(&connection).await;
        stop(&mut child).await;
        let servers = [
            process_of(&broker.directory.join("pid")),
            process_of(&data_of(server).join("postmaster.pid")),
        ];
        Self { servers, setting, simulator, channel, replies, round: 0 }
    }

    async fn publish(&mut self, jobs: usize) {
        self.round += 1;
        publish(&self.channel, self.round, 0..jobs, None).await;
    }

    async fn answers(&mut self, count: usize) {
        for _ in 0..count {
            drop(self.replies.next().await.unwrap().unwrap());
        }
    }

    /// From the first answer to the last.
    async fn drain(&mut self, count: usize, jobs: usize) -> Drained {
        let mut workers: Vec<Child> =
            (0..count).map(|number| worker(&self.setting, &format!("worker-{number}"))).collect();
        // All of them serve before it counts.
        self.warm_up(count).await;
        let servers = self.servers;
        let cpu = |workers: &[Child]| {
            let [broker, database] = servers.map(cpu_of_family);
            [workers.iter().map(cpu_seconds).sum(), broker, database]
        };
        let before: [f64; 3] = cpu(&workers);
        self.publish(jobs).await;
        self.answers(1).await;
        let started = Instant::now();
        self.answers(jobs - 1).await;
        let took = started.elapsed().as_secs_f64();
        let after: [f64; 3] = cpu(&workers);
        let peak = workers.iter().map(peak_mib).fold(0.0, f64::max);
        for worker in &mut workers {
            stop(worker).await;
        }
        let jobs = f64::from(u32::try_from(jobs).unwrap());
        let cpu = [0, 1, 2].map(|of| (after[of] - before[of]) * 1000.0 / jobs);
        Drained { per_second: jobs / took, cpu, peak_mib: peak }
    }

    /// Lets so many workers fill up: only when all of them serve are so many calls in flight.
    async fn warm_up(&mut self, count: usize) {
        let all = count * IN_FLIGHT;
        self.simulator.set_script(Script { latency_ms: 3_000, ..Script::default() });
        let before = self.simulator.log().posts().len();
        self.publish(all).await;
        self.simulator.posts_arrived(before + all).await;
        self.simulator.set_script(Script { latency_ms: LATENCY_MS, ..Script::default() });
        self.answers(all).await;
    }

    /// How long it takes until the jobs of a worker that is lost are answered by another.
    async fn lose(&mut self, broker: &Private, loss: Loss) -> Duration {
        let (_, address) = broker.url.rsplit_once('@').unwrap();
        let (address, vhost) = address.split_once('/').unwrap();
        let relay = Relay::start(address.to_owned()).await;
        let amqp = broker
            .url
            .replace(&format!("{address}/{vhost}"), &format!("{}/{vhost}", relay.address));
        let lost_one = Setting { amqp, ..self.setting.clone() };
        let mut victim = worker(&lost_one, "lost");
        self.warm_up(1).await;
        // Its calls hang: what is in flight when it is lost stays so.
        self.simulator.set_script(Script { latency_ms: 3_000, ..Script::default() });
        let before = self.simulator.log().posts().len();
        self.publish(IN_FLIGHT).await;
        self.simulator.posts_arrived(before + IN_FLIGHT).await;
        let mut other = worker(&self.setting, "other");
        let started = Instant::now();
        match loss {
            Loss::Killed => victim.kill().await.unwrap(),
            Loss::Frozen => signal(&victim, "STOP"),
            Loss::CutOff => relay.freeze(true),
        }
        self.simulator.set_script(Script { latency_ms: LATENCY_MS, ..Script::default() });
        self.answers(IN_FLIGHT).await;
        let took = started.elapsed();
        stop(&mut other).await;
        if loss == Loss::Frozen {
            signal(&victim, "CONT");
        }
        drop(victim.kill().await);
        let purge = QueuePurgeOptions::default();
        self.channel.queue_purge(format!("{PREFIX}.replies").as_str().into(), purge).await.unwrap();
        took
    }
}
