//! `make chaos` and `make chaos-fleet`: thousands of jobs, faults of every kind at Creem, workers that
//! are killed again and again or frozen, brokers and a database that restart or die; then the books
//! are compared.
//!
//! The oracle knows four things the worker cannot influence: what was published and confirmed,
//! every session that the simulator made, every reply and parked copy that came out, and the
//! ledger. It needs no test framework; it prints its figures and fails if one is wrong.
//!
//! `cargo test` runs a short form of the first, and a cluster of brokers in trouble. Options: `--jobs N
//! --seed N --faults F`; for one worker `--workers 0 --kills N --restarts N`; for a fleet `--workers N --freezes N --restarts N --rate F`.

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
mod cluster;
mod fleet;
mod oracle;
#[path = "../it/support/private.rs"]
mod private;
mod single;
mod traffic;
mod workers;

use std::path::Path;
use std::time::Instant;

use creem_checkout_worker::simulator::script::Script;
use creem_checkout_worker::simulator::{Options, Simulator};

#[derive(Debug, Clone)]
struct Plan {
    jobs: usize,
    /// Times a worker is killed with kill -9; a fleet's are killed one every two seconds instead.
    kills: usize,
    /// Times the broker is restarted or killed.
    restarts: usize,
    seed: u64,
    /// Share of the calls that meet a fault.
    faults: f64,
    /// Workers of a fleet; 0 means one with the embedded ledger.
    workers: Option<usize>,
    /// Times a worker of the fleet is frozen beyond its lease.
    freezes: usize,
    /// Jobs a second that the fleet is given.
    rate: usize,
}

impl Plan {
    fn from_arguments() -> Self {
        let mut plan = Self {
            jobs: 600,
            kills: 3,
            restarts: 1,
            seed: 1,
            faults: 0.05,
            workers: None,
            freezes: 1,
            rate: 100,
        };
        let arguments: Vec<String> = std::env::args().skip(1).collect();
        for pair in arguments.chunks(2) {
            let [name, value] = pair else { continue };
            match name.as_str() {
                "--jobs" => plan.jobs = value.parse().unwrap(),
                "--kills" => plan.kills = value.parse().unwrap(),
                "--restarts" => plan.restarts = value.parse().unwrap(),
                "--seed" => plan.seed = value.parse().unwrap(),
                "--faults" => plan.faults = value.parse().unwrap(),
                "--workers" => plan.workers = Some(value.parse().unwrap()),
                "--freezes" => plan.freezes = value.parse().unwrap(),
                "--rate" => plan.rate = value.parse().unwrap(),
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
    let mut kinds = Vec::new();
    // Without a word about the workers, the short forms of two.
    match plan.workers {
        None => kinds.extend([Kind::Single, Kind::Cluster]),
        Some(0) => kinds.push(Kind::Single),
        Some(_) => kinds.push(Kind::Fleet),
    }
    let mut wrong = Vec::new();
    for kind in kinds {
        wrong.extend(run(kind, &plan).await);
    }
    for line in &wrong {
        eprintln!("WRONG: {line}");
    }
    if !wrong.is_empty() {
        println!("chaos: failed");
        std::process::exit(1);
    }
    println!("chaos: passed");
}

/// What is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// One worker with the embedded ledger.
    Single,
    /// Several with PostgreSQL and a cluster of brokers.
    Fleet,
    /// Nothing goes wrong but in the cluster of brokers.
    Cluster,
}

/// Runs it, prints its figures, and returns what is wrong.
async fn run(kind: Kind, plan: &Plan) -> Vec<String> {
    let name = format!("chaos-{}", format!("{kind:?}").to_lowercase());
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("target").join(name);
    drop(std::fs::remove_dir_all(&directory));
    std::fs::create_dir_all(&directory).unwrap();
    let script = if kind == Kind::Cluster { Script::default() } else { plan.script() };
    let options = Options { script, ..Options::default() };
    let (simulator, serve) = Simulator::start(([127, 0, 0, 1], 0).into(), options).await.unwrap();
    tokio::spawn(serve);
    let started = Instant::now();
    let calm = Plan { jobs: 3_000, ..plan.clone() };
    let (plan, books) = match kind {
        Kind::Single => (plan, single::run(plan, &simulator, &directory).await),
        Kind::Fleet => (plan, fleet::run(plan, &simulator, &directory).await),
        Kind::Cluster => (&calm, cluster::run(calm.jobs, &simulator, &directory).await),
    };
    let Some(books) = books else {
        println!("chaos: {kind:?} was skipped");
        return Vec::new();
    };
    println!("chaos, {kind:?}:");
    books.report(plan, kind == Kind::Cluster, started.elapsed())
}
