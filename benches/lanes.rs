//! `make bench`: whether a buyer who waits is behind a campaign, and whether a limit that nobody has
//! configured is found and kept, and whether jobs that nobody waits for cost a call.
//!
//! Four runs against a simulated Creem at 50 ms:
//!
//! 1. Interactive jobs at a steady 20 a second, on an idle worker and then beside a backlog of bulk jobs, under a ceiling
//!    of 400 calls a second: their time from publish to reply, and how much of the ceiling is used.
//! 2. More bulk jobs than can be made before their deadlines: what each comes to, and whether one costs a call whose
//!    deadline had passed.
//! 3. A Creem that answers 429 above 300 calls a second, of which nobody is told, that goes away for a minute and comes back.
//! 4. The first one at such a Creem, with a worker for each lane and a PostgreSQL that they share.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::disallowed_methods,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a benchmark program"
)]

#[expect(dead_code, reason = "other benchmarks use more of it")]
mod support;
#[path = "support/svg.rs"]
mod svg;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use creem_checkout_worker::simulator::script::Script;
use creem_checkout_worker::simulator::{Options, Simulator};
use futures::StreamExt as _;
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Connection};
use support::amqp::connect;
use support::private::{BROKER, POSTGRES, Private};
use support::{PREFIX, Setting, directory, replies, stop, worker_of};
use svg::{Chart, Curve};
use tokio::process::Child;
use tokio::sync::watch;

const LATENCY_MS: u64 = 50;

/// How large it all is.
struct Sizes {
    backlog: usize,
    /// Interactive jobs, idle and beside the backlog.
    buyers: usize,
    /// How long the unknown limit is looked for, then how long Creem is away.
    seconds: u64,
    outage: u64,
    /// Over how many seconds deadlines are spread.
    deadlines: u64,
    /// Whether it is more than a try.
    real: bool,
}

#[tokio::main]
async fn main() {
    // `cargo test` runs this too, without `--bench`: then a few jobs show that it works.
    let real = std::env::args().any(|argument| argument == "--bench");
    let sizes = if real {
        Sizes { backlog: 100_000, buyers: 1_200, seconds: 60, outage: 60, deadlines: 30, real }
    } else {
        Sizes { backlog: 300, buyers: 20, seconds: 2, outage: 2, deadlines: 1, real }
    };
    let Some(broker) = BROKER.start("bench-lanes").await else { return };
    two_lanes(&broker, &sizes).await;
    expiry(&broker, &sizes).await;
    unknown_limit(&broker, &sizes).await;
    if let Some(server) = POSTGRES.start("bench-lanes").await {
        lanes_apart(&broker, &server.url, &sizes).await;
    }
    println!("bench: 1 passed, 0 failed");
}

/// Workers with their broker and their Creem, and the replies as they come.
struct Stage {
    simulator: Arc<Simulator>,
    connection: Connection,
    workers: Vec<Child>,
    /// When each reply came, by `request_id`.
    answered: watch::Receiver<HashMap<String, Answer>>,
    collecting: tokio::task::JoinHandle<()>,
}

#[derive(Debug, Clone, Copy)]
struct Answer {
    at: Instant,
    expired: bool,
}

impl Stage {
    /// One worker of both lanes, with a ledger of its own.
    async fn new(broker: &Private, script: Script, settings: &[(&str, &str)]) -> Self {
        Self::with(broker, None, &["interactive,bulk"], script, settings).await
    }

    /// A worker for each of these lanes, with that ledger.
    async fn with(
        broker: &Private,
        ledger: Option<&str>,
        lanes: &[&str],
        script: Script,
        settings: &[(&str, &str)],
    ) -> Self {
        let listen = "127.0.0.1:0".parse().unwrap();
        let (simulator, serve) = Simulator::start(listen, Options::default()).await.unwrap();
        tokio::spawn(serve);
        simulator.set_script(script);
        let connection = connect(&broker.url).await;
        let directory = directory("bench-lanes");
        let own = || format!("sqlite:{}", directory.join("ledger.db").display());
        let setting = Setting {
            amqp: broker.url.clone(),
            creem: simulator.url(),
            ledger: ledger.map_or_else(own, str::to_owned),
            directory: directory.clone(),
            preload: None,
        };
        let start = |lanes: &&str| worker_of(lanes, &setting, &format!("worker-{lanes}"), settings);
        let workers = lanes.iter().map(start).collect();
        let mut replies = replies(&connection).await;
        let (tell, answered) = watch::channel(HashMap::new());
        let collecting = tokio::spawn(async move {
            while let Some(Ok(reply)) = replies.next().await {
                let reply: serde_json::Value = serde_json::from_slice(&reply.data).unwrap();
                let expired = reply["status"] == "expired";
                assert!(expired || reply["status"] == "succeeded", "{reply}");
                let id = reply["request_id"].as_str().unwrap().to_owned();
                let answer = Answer { at: Instant::now(), expired };
                tell.send_modify(|answered| {
                    answered.entry(id).or_insert(answer);
                });
            }
        });
        Self { simulator, connection, workers, answered, collecting }
    }

    async fn channel(&self) -> Channel {
        let channel = self.connection.create_channel().await.unwrap();
        channel.confirm_select(ConfirmSelectOptions { nowait: false }).await.unwrap();
        channel
    }

    async fn answers(&self, count: usize) {
        let mut answered = self.answered.clone();
        answered.wait_for(|answered| answered.len() >= count).await.unwrap();
    }

    async fn end(mut self) {
        for worker in &mut self.workers {
            stop(worker).await;
        }
        // Delay queues first, which lead to the others: the next stage has another ledger.
        let delays = ["1s", "5s", "30s", "2m", "10m"];
        let lanes = ["interactive", "bulk"];
        let delayed =
            lanes.iter().flat_map(|lane| delays.map(|delay| format!("retry.{lane}.{delay}")));
        for queue in delayed.chain(["jobs", "jobs.bulk", "replies"].map(str::to_owned)) {
            let name = format!("{PREFIX}.{queue}");
            let channel = self.connection.create_channel().await.unwrap();
            let options = lapin::options::QueuePurgeOptions { nowait: false };
            channel.queue_purge(name.as_str().into(), options).await.unwrap();
        }
        // Its consumer must take none of the next stage's replies. Channels that are closing by themselves
        // make this an error, which changes nothing.
        self.collecting.abort();
        drop(self.connection.close(200, "done".into()).await);
    }
}

async fn send(channel: &Channel, queue: &str, id: &str, deadline: Option<i64>) {
    let body = format!(r#"{{"request_id":"{id}","product_id":"prod_1"}}"#);
    let queue = format!("{PREFIX}.{queue}");
    let mut headers = FieldTable::default();
    if let Some(deadline) = deadline {
        headers.insert("checkout-deadline".into(), AMQPValue::LongLongInt(deadline));
    }
    let properties = BasicProperties::default().with_delivery_mode(2).with_headers(headers);
    let options = BasicPublishOptions::default();
    let sent = channel.basic_publish(
        "".into(),
        queue.as_str().into(),
        options,
        body.as_bytes(),
        properties,
    );
    assert!(sent.await.unwrap().await.unwrap().is_ack());
}

/// Publishes without waiting for each confirm.
async fn backlog(channel: &Channel, name: &str, jobs: usize) {
    let mut sending = futures::stream::iter(0..jobs)
        .map(|job| async move { send(channel, "jobs.bulk", &format!("{name}-{job}"), None).await })
        .buffer_unordered(512);
    while sending.next().await.is_some() {}
}

/// Interactive jobs at 20 a second, whatever becomes of them; when each was sent, and how long it took.
async fn buyers(stage: &Stage, name: &str, count: usize) -> Vec<(Instant, Duration)> {
    let channel = stage.channel().await;
    let mut tick = tokio::time::interval(Duration::from_millis(50));
    let mut sent = HashMap::new();
    for buyer in 0..count {
        tick.tick().await;
        let id = format!("{name}-{buyer}");
        sent.insert(id.clone(), Instant::now());
        send(&channel, "jobs", &id, None).await;
    }
    let mut answered = stage.answered.clone();
    answered.wait_for(|answered| sent.keys().all(|id| answered.contains_key(id))).await.unwrap();
    let answered = answered.borrow();
    let mut times: Vec<(Instant, Duration)> =
        sent.iter().map(|(id, sent)| (*sent, answered[id].at.duration_since(*sent))).collect();
    times.sort_unstable();
    times
}

fn sorted(times: &[(Instant, Duration)]) -> Vec<Duration> {
    let mut sorted: Vec<Duration> = times.iter().map(|time| time.1).collect();
    sorted.sort_unstable();
    sorted
}

/// What is measured of each second: its values, in order.
fn by_second(began: Instant, values: impl Iterator<Item = (Instant, f64)>) -> Vec<(f64, Vec<f64>)> {
    let mut seconds: BTreeMap<u64, Vec<f64>> = BTreeMap::new();
    for (at, value) in values {
        seconds.entry(at.saturating_duration_since(began).as_secs()).or_default().push(value);
    }
    let second = |(second, mut values): (u64, Vec<f64>)| {
        values.sort_by(f64::total_cmp);
        (f64::from(u32::try_from(second).unwrap()), values)
    };
    seconds.into_iter().map(second).collect()
}

/// A picture for the README, where it was a real run.
fn picture(real: bool, name: &str, chart: &Chart) {
    if real {
        let directory = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/pictures");
        std::fs::create_dir_all(&directory).unwrap();
        std::fs::write(directory.join(name), chart.draw()).unwrap();
    }
}

fn at(times: &[Duration], percent: usize) -> f64 {
    times[(times.len() * percent / 100).min(times.len() - 1)].as_secs_f64() * 1000.0
}

fn rate(count: usize, seconds: f64) -> f64 {
    f64::from(u32::try_from(count).unwrap()) / seconds
}

async fn two_lanes(broker: &Private, sizes: &Sizes) {
    const CEILING: f64 = 400.0;
    let script = Script { latency_ms: LATENCY_MS, ..Script::default() };
    let stage = Stage::new(broker, script, &[("RATE_LIMIT__PER_SECOND", "400")]).await;
    let start = Instant::now();
    let idle_times = buyers(&stage, "idle", sizes.buyers).await;
    let queued = Instant::now();
    backlog(&stage.channel().await, "campaign", sizes.backlog).await;
    let (calls, began) = (stage.simulator.log().posts().len(), Instant::now());
    let busy_times = buyers(&stage, "busy", sizes.buyers).await;
    let used = rate(stage.simulator.log().posts().len() - calls, began.elapsed().as_secs_f64());
    let (idle, busy) = (sorted(&idle_times), sorted(&busy_times));
    println!(
        "two lanes: {} bulk jobs queued, interactive at 20/s: idle p50 {:.1} ms p99 {:.1} ms; beside the campaign p50 {:.1} ms p99 {:.1} ms ({:.2}x); {used:.0} calls/s of {CEILING:.0} ({:.1} %)",
        sizes.backlog,
        at(&idle, 50),
        at(&idle, 99),
        at(&busy, 50),
        at(&busy, 99),
        at(&busy, 99) / at(&idle, 99),
        used / CEILING * 100.0,
    );
    let interactive =
        idle_times.iter().chain(&busy_times).map(|(at, took)| (*at, took.as_secs_f64()));
    let interactive = by_second(start, interactive);
    let bulk: Vec<(Instant, f64)> = {
        let answered = stage.answered.borrow();
        let of_campaign = answered.iter().filter(|(id, _)| id.starts_with("campaign-"));
        of_campaign
            .map(|(_, answer)| (answer.at, answer.at.duration_since(queued).as_secs_f64()))
            .collect()
    };
    let middle = |seconds: &[(f64, Vec<f64>)], part: usize| {
        let of = |values: &Vec<f64>| values[(values.len() * part / 100).min(values.len() - 1)];
        seconds.iter().map(|(second, values)| (*second, of(values))).collect()
    };
    let chart = Chart {
        title: format!(
            "Buyers at 20/s, and a campaign of {} jobs that comes in between",
            sizes.backlog
        ),
        x: "seconds",
        y: "publish to reply (s)",
        logarithmic: true,
        curves: vec![
            Curve { name: "interactive, median", color: "#0a7", points: middle(&interactive, 50) },
            Curve {
                name: "interactive, slowest of the second",
                color: "#f80",
                points: middle(&interactive, 100),
            },
            Curve {
                name: "bulk, median",
                color: "#36c",
                points: middle(&by_second(start, bulk.into_iter()), 50),
            },
        ],
    };
    picture(sizes.real, "lanes.svg", &chart);
    stage.end().await;
}

/// Jobs that nobody waits for any more cost no call.
async fn expiry(broker: &Private, sizes: &Sizes) {
    let script = Script { latency_ms: LATENCY_MS, ..Script::default() };
    let stage = Stage::new(broker, script, &[("RATE_LIMIT__PER_SECOND", "400")]).await;
    let channel = stage.channel().await;
    let spread = Duration::from_secs(sizes.deadlines);
    // Twice as many as can be made until the last deadline.
    let jobs = 800 * usize::try_from(sizes.deadlines).unwrap();
    let (began, clock) = (Instant::now(), SystemTime::now());
    let deadline = |job: usize| spread.mul_f64(rate(job * 7919 % jobs, rate(jobs, 1.0)));
    let mut sending = futures::stream::iter(0..jobs)
        .map(|job| {
            let at = (clock + deadline(job)).duration_since(SystemTime::UNIX_EPOCH).unwrap();
            let (channel, at) = (&channel, i64::try_from(at.as_millis()).unwrap());
            async move { send(channel, "jobs.bulk", &format!("late-{job}"), Some(at)).await }
        })
        .buffer_unordered(512);
    while sending.next().await.is_some() {}
    drop(sending);
    stage.answers(jobs).await;
    let (made, in_vain) = {
        let log = stage.simulator.log();
        let first = log.began().unwrap().into_std();
        let in_vain = log.posts().iter().filter(|post| {
            let job: usize = post.request_id.strip_prefix("late-").unwrap().parse().unwrap();
            first + Duration::from_micros(post.arrived_us) > began + deadline(job)
        });
        (log.posts().len(), in_vain.count())
    };
    let answered = stage.answered.borrow().clone();
    let expired = answered.values().filter(|answer| answer.expired).count();
    println!(
        "expiry: {jobs} bulk jobs at once, their deadlines spread over {} s, 400 calls/s: {made} calls, {} links, {expired} expired; calls for jobs whose deadline had passed: {in_vain}",
        sizes.deadlines,
        jobs - expired,
    );
    let counted = |expired: bool| {
        let of = answered.values().filter(|answer| answer.expired == expired);
        let seconds = by_second(began, of.map(|answer| (answer.at, 1.0)));
        seconds.into_iter().map(|(second, values)| (second, rate(values.len(), 1.0))).collect()
    };
    let chart = Chart {
        title: format!(
            "{jobs} bulk jobs whose deadlines are spread over {} s, at 400 calls a second",
            sizes.deadlines
        ),
        x: "seconds",
        y: "replies a second",
        logarithmic: false,
        curves: vec![
            Curve { name: "links", color: "#0a7", points: counted(false) },
            Curve { name: "expired, without a call", color: "#c33", points: counted(true) },
        ],
    };
    picture(sizes.real, "expiry.svg", &chart);
    stage.end().await;
}

async fn unknown_limit(broker: &Private, sizes: &Sizes) {
    const LIMIT: usize = 300;
    let taking =
        || Script { latency_ms: LATENCY_MS, limit_per_second: Some(LIMIT), ..Script::default() };
    let stage = Stage::new(broker, taking(), &[]).await;
    let all = usize::try_from(sizes.seconds * 2 + 30).unwrap() * LIMIT;
    let channel = stage.channel().await;
    let filling = tokio::spawn(async move { backlog(&channel, "found", all).await });
    stage.answers(1).await;
    let calls = |stage: &Stage| {
        let log = stage.simulator.log();
        (log.posts().len(), log.sessions().len())
    };
    let limit = f64::from(u32::try_from(LIMIT).unwrap());
    let before = calls(&stage);
    let began = Instant::now();
    tokio::time::sleep(Duration::from_secs(sizes.seconds)).await;
    let (posts, sessions) = calls(&stage);
    let taken = rate(sessions - before.1, began.elapsed().as_secs_f64());
    let refused = posts - before.0 - (sessions - before.1);
    println!(
        "unknown limit of {LIMIT}/s, {} s from the start: {taken:.0} calls/s taken ({:.1} %), 429s {:.2} % of calls",
        sizes.seconds,
        taken / limit * 100.0,
        rate(refused, 1.0) / rate(posts - before.0, 1.0) * 100.0,
    );

    let away = r#"{"latency_ms":50,"faults":[{"weight":1.0,"kind":"status","status":503}]}"#;
    stage.simulator.set_script(Script::parse(away.as_bytes()).unwrap());
    let before = calls(&stage);
    tokio::time::sleep(Duration::from_secs(sizes.outage)).await;
    let during = calls(&stage).0 - before.0;
    stage.simulator.set_script(taking());
    let back = Instant::now();
    let mut full = None;
    while full.is_none() && back.elapsed() < Duration::from_secs(60) {
        let before = calls(&stage).1;
        let began = Instant::now();
        tokio::time::sleep(Duration::from_secs(1)).await;
        let taken = rate(calls(&stage).1 - before, began.elapsed().as_secs_f64());
        full = (taken >= limit * 0.9).then(|| back.elapsed().as_secs_f64() - 1.0);
    }
    let usual = rate(LIMIT, 1.0) * f64::from(u32::try_from(sizes.outage).unwrap());
    println!(
        "an outage of {} s: {during} calls in it ({:.1} % of what it would have taken); {} after it is over",
        sizes.outage,
        rate(during, 1.0) / usual * 100.0,
        full.map_or_else(
            || "no full speed within 60 s".to_owned(),
            |seconds| format!("full speed (90 % of {LIMIT}/s) {seconds:.1} s"),
        ),
    );
    filling.abort();
    stage.end().await;
}

/// Each lane has a worker of its own, and nobody has told them what Creem takes.
async fn lanes_apart(broker: &Private, ledger: &str, sizes: &Sizes) {
    const LIMIT: usize = 300;
    let script =
        Script { latency_ms: LATENCY_MS, limit_per_second: Some(LIMIT), ..Script::default() };
    let stage = Stage::with(broker, Some(ledger), &["interactive", "bulk"], script, &[]).await;
    // What they learn from is not what is measured.
    let (seconds, warm) = (sizes.buyers / 20, if sizes.real { 5_000 } else { 100 });
    backlog(&stage.channel().await, "warm", warm).await;
    stage.answers(warm).await;
    let idle = sorted(&buyers(&stage, "apart-idle", sizes.buyers).await);
    let jobs = if sizes.real { LIMIT * seconds * 2 } else { sizes.backlog };
    backlog(&stage.channel().await, "apart", jobs).await;
    let calls = |stage: &Stage| {
        let log = stage.simulator.log();
        (log.posts().len(), log.sessions().len())
    };
    let (before, began) = (calls(&stage), Instant::now());
    let busy = sorted(&buyers(&stage, "apart-busy", sizes.buyers).await);
    let (posts, sessions) = calls(&stage);
    let (posts, taken) = (posts - before.0, sessions - before.1);
    let used = rate(taken, began.elapsed().as_secs_f64());
    println!(
        "a worker for each lane, one PostgreSQL, unknown limit of {LIMIT}/s: idle p50 {:.1} ms p99 {:.1} ms; beside a campaign p50 {:.1} ms p99 {:.1} ms ({:.2}x); {used:.0} calls/s taken ({:.1} %), 429s {:.2} % of calls",
        at(&idle, 50),
        at(&idle, 99),
        at(&busy, 50),
        at(&busy, 99),
        at(&busy, 99) / at(&idle, 99),
        used / rate(LIMIT, 1.0) * 100.0,
        rate(posts - taken, 1.0) / rate(posts, 1.0) * 100.0,
    );
    stage.end().await;
}
