//! What benchmarks share: the worker as a process, jobs in and replies out, and what a process costs.

#[path = "../../tests/it/support/amqp.rs"]
pub(crate) mod amqp;
#[path = "../../tests/it/support/private.rs"]
#[expect(dead_code, reason = "the tests use more of it")]
pub(crate) mod private;

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Instant;

use amqp::declared;
use lapin::options::{BasicConsumeOptions, BasicPublishOptions};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Channel, Connection, Consumer};
use tokio::process::{Child, Command};

/// The first word of all names.
pub(crate) const PREFIX: &str = "bench";

/// Where a worker finds everything.
#[derive(Debug, Clone)]
pub(crate) struct Setting {
    pub(crate) amqp: String,
    pub(crate) creem: String,
    pub(crate) ledger: String,
    /// For its log.
    pub(crate) directory: PathBuf,
    /// A library to load first.
    pub(crate) preload: Option<PathBuf>,
}

/// A worker as users run it: every promise is on, metrics and JSON logs too.
pub(crate) fn worker(setting: &Setting, name: &str) -> Child {
    worker_with(setting, name, &[])
}

/// A worker with settings of its own, each `SECTION__KEY`.
pub(crate) fn worker_with(setting: &Setting, name: &str, settings: &[(&str, &str)]) -> Child {
    worker_of("interactive,bulk", setting, name, settings)
}

/// The same that serves those lanes.
pub(crate) fn worker_of(
    lanes: &str,
    setting: &Setting,
    name: &str,
    settings: &[(&str, &str)],
) -> Child {
    let log = std::fs::File::create(setting.directory.join(format!("{name}.log"))).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_checkout-worker"));
    command
        .args(["run", "--lanes", lanes])
        .env_clear()
        .env("AMQP_URL", &setting.amqp)
        .env("CREEM_API_KEY", "creem_test_bench")
        .env("CREEM_BASE_URL", &setting.creem)
        .env("LEDGER_URL", &setting.ledger)
        .env("CHECKOUT_WORKER__TOPOLOGY__PREFIX", PREFIX)
        .env("CHECKOUT_WORKER__HTTP__LISTEN", "127.0.0.1:0")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .kill_on_drop(true);
    for (key, value) in settings {
        command.env(format!("CHECKOUT_WORKER__{key}"), value);
    }
    if let Some(library) = &setting.preload {
        command.env("LD_PRELOAD", library);
    }
    command.spawn().unwrap()
}

pub(crate) fn signal(child: &Child, name: &str) {
    let pid = child.id().unwrap().to_string();
    let sent = std::process::Command::new("kill").args([&format!("-{name}"), &pid]).status();
    assert!(sent.unwrap().success());
}

/// Stops it as a user would.
pub(crate) async fn stop(child: &mut Child) {
    signal(child, "TERM");
    child.wait().await.unwrap();
}

/// An empty directory of the benchmark's own.
pub(crate) fn directory(name: &str) -> PathBuf {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("target").join(name);
    drop(std::fs::remove_dir_all(&directory));
    std::fs::create_dir_all(&directory).unwrap();
    directory
}

/// Consumes the reply queue, once the worker has declared it.
pub(crate) async fn replies(connection: &Connection) -> Consumer {
    declared(connection, PREFIX).await;
    let channel = connection.create_channel().await.unwrap();
    let options = BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() };
    let name = format!("{PREFIX}.replies");
    channel
        .basic_consume(name.as_str().into(), "".into(), options, FieldTable::default())
        .await
        .unwrap()
}

pub(crate) async fn publish(
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

/// User and system time of a process so far.
pub(crate) fn cpu_seconds(child: &Child) -> f64 {
    cpu_of(child.id().unwrap())
}

/// The fields of a process behind its name, as proc(5) has them.
pub(crate) fn stat(pid: u32) -> Option<Vec<String>> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, after) = stat.rsplit_once(')')?;
    Some(after.split_whitespace().map(str::to_owned).collect())
}

pub(crate) fn cpu_of(pid: u32) -> f64 {
    let Some(fields) = stat(pid) else { return 0.0 };
    let ticks: f64 = fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap();
    // Linux reports these in units of 1/100 s to every program.
    ticks / 100.0
}

pub(crate) fn peak_mib(child: &Child) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", child.id().unwrap())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM")).unwrap();
    let kib: f64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    kib / 1024.0
}

pub(crate) fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
