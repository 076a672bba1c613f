//! `check`: everything that is wrong, at once.

use std::path::Path;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::look::{Look, shown};
use super::{Failure, Outcome, block_on, resolved, say};
use crate::clock::{Clock as _, SystemClock, as_duration, as_millis};
use crate::config::check::{Ledger, Resolved};
use crate::creem::{Client, KeyCheck};
use crate::job::reply::rfc3339;
use crate::job::{Lane, printable};
use crate::ledger::postgres::{self, ready::Ready};
use crate::ledger::sqlite::inspect::Inspector;
use crate::ledger::{CancelledCampaign, PausedLane};
use crate::observe::admin::LIVEZ;
use crate::rabbit::compare::{Differences, try_keeping_out};
use crate::rabbit::{Topology, link};

/// Check configuration and surroundings; works beside a running worker and changes nothing.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Read the whole ledger instead and verify every row.
    #[arg(long)]
    ledger: bool,
    /// Also try whether messages may be published: one to each exchange, which no queue should take and
    /// none keeps.
    #[arg(long, conflicts_with = "ledger")]
    publish: bool,
}

pub(super) fn run(file: Option<&Path>, arguments: &Arguments) -> Outcome {
    let settings =
        if arguments.ledger { super::resolved_without_key(file, None)? } else { resolved(file)? };
    if arguments.ledger {
        return whole_ledger(&settings);
    }
    say("ok       configuration");
    let mut wrong = 0;
    let mut report = |what: &str, result: Result<String, String>| match result {
        Ok(text) => say(&format!("ok       {what}: {text}")),
        Err(text) => {
            wrong += 1;
            say(&format!("WRONG    {what}: {text}"));
        }
    };
    let (ledger, broker, key, listen) = block_on(async {
        tokio::join!(
            async { within(ledger(&settings.ledger)).await.unwrap_or_else(Err) },
            async {
                let broker = within(broker(&settings, arguments.publish)).await;
                broker.unwrap_or_else(|silent| vec![("broker", Err(silent))])
            },
            key(&settings),
            listen(settings.listen)
        )
    })?;
    let there = ledger.is_ok();
    report("ledger", ledger);
    if there {
        let orders = block_on(within(orders(&settings.ledger)))?;
        for (what, line) in orders.unwrap_or_else(|silent| vec![("orders", Err(silent))]) {
            report(what, line);
        }
    }
    report("http.listen", listen);
    for (what, result) in broker {
        report(what, result);
    }
    report("creem", key);
    if wrong == 0 {
        Ok(())
    } else {
        Err(Failure::Failed(anyhow::anyhow!("{} wrong, see above", super::count(wrong, "thing"))))
    }
}

/// For how long it matters that clocks were seen to differ.
const SKEW_MATTERS: Duration = Duration::from_hours(24);

/// How long one part of the surroundings may take to be checked.
const PATIENCE: Duration = Duration::from_secs(20);

/// What `work` comes to, or that whatever it asks does not answer.
async fn within<T>(work: impl Future<Output = T>) -> Result<T, String> {
    let silent = |_| {
        let patience = humantime::format_duration(PATIENCE);
        format!(
            "it took the connection and did not answer within {patience}; is it frozen, or a proxy before it?"
        )
    };
    tokio::time::timeout(PATIENCE, work).await.map_err(silent)
}

/// A line for each lane that is paused and each campaign that is cancelled: that is no fault, but explains
/// much.
async fn orders(ledger: &Ledger) -> Vec<(&'static str, Result<String, String>)> {
    // A ledger that is yet to be made has none.
    let Ok(look) = Look::open(ledger).await else { return Vec::new() };
    let orders = match look.orders().await {
        Ok(orders) => orders,
        Err(error) => return vec![("orders", Err(error.to_string()))],
    };
    let lane = |PausedLane { lane, since }: &PausedLane| {
        let since = rfc3339(*since);
        let text = format!(
            "{lane} is paused since {since}; checkout-worker resume --lane {lane} ends that"
        );
        ("lanes", Ok(text))
    };
    let campaign = |CancelledCampaign { campaign, before }: &CancelledCampaign| {
        let (campaign, before) = (printable(campaign, 64), rfc3339(*before));
        let text =
            format!("{campaign} is cancelled: its jobs published before {before} get no link");
        ("campaigns", Ok(text))
    };
    let mut lines: Vec<_> = orders.paused_lanes.iter().map(lane).collect();
    lines.extend(orders.cancelled.iter().map(campaign));
    let now = SystemClock.now();
    if let Some((ahead, at)) = orders.skew.filter(|(_, at)| now - at < as_millis(SKEW_MATTERS)) {
        let ahead = humantime::format_duration(Duration::from_secs(as_duration(ahead).as_secs()));
        let at = rfc3339(at);
        lines.push((
            "clocks",
            Err(format!(
                "at {at} a worker was given a job that was published {ahead} in the future (24h stand for any more): set the clocks of producers and workers by NTP, for deadlines and max_age are judged by them"
            )),
        ));
    }
    lines
}

async fn ledger(ledger: &Ledger) -> Result<String, String> {
    match ledger {
        Ledger::File(path) => file(path),
        Ledger::Database(options) => match postgres::ready::ready(options).await {
            Ok(Ready::Ledger) => Ok(format!("{} has a ledger", options.shown())),
            Ok(Ready::ToBeMade) => {
                Ok(format!("{} answers; `run` makes the ledger in it", options.shown()))
            }
            Err(error) => Err(format!("{}: {error}", options.shown())),
        },
    }
}

fn file(path: &Path) -> Result<String, String> {
    if path.exists() {
        Inspector::open(path).map_err(|error| error.to_string())?;
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        for place in [path, parent.unwrap_or_else(|| Path::new("."))] {
            // Beside the ledger lie its lock and its write-ahead log.
            rustix::fs::access(place, rustix::fs::Access::WRITE_OK).map_err(|error| {
                format!("{} is not writable for this user ({error})", place.display())
            })?;
        }
        return Ok(format!("{} is a ledger", path.display()));
    }
    let nearest = path.ancestors().skip(1).map(|directory| {
        // The parent of a bare file name is written as nothing.
        if directory.as_os_str().is_empty() { Path::new(".") } else { directory }
    });
    let Some(nearest) = nearest.into_iter().find(|directory| directory.exists()) else {
        return Err(format!("{} cannot be created: no directory above it exists", path.display()));
    };
    if !nearest.is_dir() {
        return Err(format!(
            "{} cannot be created: {} is a file; set ledger.url to another path",
            path.display(),
            nearest.display()
        ));
    }
    match rustix::fs::access(nearest, rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK) {
        Ok(()) => Ok(format!("{} will be created", path.display())),
        Err(error) => Err(format!(
            "{} cannot be created: {} is not writable for this user ({error})",
            path.display(),
            nearest.display()
        )),
    }
}

async fn key(settings: &Resolved) -> Result<String, String> {
    let client = Client::new(&settings.creem).map_err(|error| error.to_string())?;
    let place = format!("{} (mode {})", settings.creem.base_url, settings.creem.mode);
    match client.check_key().await {
        KeyCheck::Accepted => Ok(format!("{place} accepts the key")),
        KeyCheck::Refused(status) => Err(format!(
            "{place} refuses the key (HTTP {status}): check CREEM_API_KEY, and that it is of this world"
        )),
        KeyCheck::Unknown(reason) => Err(format!(
            "{place} gave no usable answer: {reason}; check CREEM_BASE_URL, the network, creem.proxy and creem.ca_file"
        )),
    }
}

async fn broker(settings: &Resolved, publish: bool) -> Vec<(&'static str, Result<String, String>)> {
    let connection = match link::connect(&settings.amqp, "checkout-worker check").await {
        Ok(connection) => connection,
        Err(error) => {
            return vec![(
                "broker",
                Err(format!(
                    "{error}; check AMQP_URL, and that the broker runs and lets this user in"
                )),
            )];
        }
    };
    let mut found = vec![("broker", Ok("connected".to_owned()))];
    let (topology, nothing_wrong) =
        match settings.topology.compare(&connection, settings.declare, publish).await {
            Ok(found) => {
                let nothing_wrong = found.wrong.is_empty();
                let topology = ("topology", judge(&found, settings.declare));
                (topology, nothing_wrong)
            }
            Err(error) => (("topology", Err(error.to_string())), false),
        };
    found.push(topology);
    if matches!(settings.ledger, Ledger::File(_)) {
        match try_keeping_out(&connection, &settings.topology).await {
            Ok(None) => {}
            Ok(Some(why)) => found.push(("guard", Err(why))),
            Err(error) => found.push(("guard", Err(error.to_string()))),
        }
    }
    if publish && nothing_wrong {
        found.push(("publishing", Ok("every exchange takes messages of this user".to_owned())));
    }
    for (what, queue) in [
        ("jobs", settings.topology.jobs(Lane::Interactive)),
        ("bulk jobs", settings.topology.jobs(Lane::Bulk)),
        ("parked", settings.topology.dead()),
    ] {
        if let Ok(Some(depth)) = Topology::depth(&connection, &queue).await {
            found.push((what, Ok(format!("{depth} waiting in {queue}"))));
        }
    }
    found
}

fn judge(found: &Differences, declare: bool) -> Result<String, String> {
    let Differences { missing, wrong } = found;
    if !wrong.is_empty() {
        return Err(wrong.join("; "));
    }
    match missing.len() {
        0 => Ok("every queue and exchange is there".to_owned()),
        count if declare => Ok(format!(
            "{} not there yet; `run` declares what is missing",
            super::count(count as u64, "object")
        )),
        _ => Err(format!(
            "not there: {}; import the definitions, or set topology.declare = true",
            missing.join(", ")
        )),
    }
}

/// Whether the HTTP server could be bound now; nothing is left behind.
async fn listen(address: std::net::SocketAddr) -> Result<String, String> {
    match tokio::net::TcpListener::bind(address).await {
        Ok(_) => Ok(format!("{address} is free")),
        // Beside a running worker that is as it should be.
        Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => {
            if is_a_worker(address).await {
                Ok(format!("{address} is in use by a running worker"))
            } else {
                Err(format!("{address} is in use by another program; give another address"))
            }
        }
        Err(error) => Err(format!(
            "{address} cannot be bound: {error}; give an address of this machine and a port above 1023"
        )),
    }
}

/// Asks whoever listens there whether it is one of us.
async fn is_a_worker(address: std::net::SocketAddr) -> bool {
    let ask = async {
        let mut stream = tokio::net::TcpStream::connect(address).await?;
        stream.write_all(b"GET /livez HTTP/1.0\r\n\r\n").await?;
        let mut answer = String::new();
        stream.take(4096).read_to_string(&mut answer).await?;
        Ok::<_, std::io::Error>(answer.ends_with(LIVEZ))
    };
    tokio::time::timeout(Duration::from_secs(2), ask)
        .await
        .is_ok_and(|asked| asked.unwrap_or(false))
}

fn whole_ledger(settings: &Resolved) -> Outcome {
    let report =
        block_on(async { Ok::<_, Failure>(Look::open(&settings.ledger).await?.report().await?) })??;
    say(&format!("{}: {} rows", shown(&settings.ledger), report.rows));
    for (state, count) in &report.states {
        say(&format!("  {state}: {count}"));
    }
    say(&format!("  ambiguous attempts: {}", report.ambiguous_attempts));
    say(&format!("  orphan sessions known: {}", report.orphan_sessions));
    if let Some(until) = report.restored {
        let until = rfc3339(until);
        say(&format!(
            "  restored to {until}: it may have forgotten jobs that were published until then"
        ));
    }
    if report.damage.is_empty() {
        say("no damage found");
        return Ok(());
    }
    for line in &report.damage {
        say(&format!("DAMAGED  {line}"));
    }
    Err(Failure::Failed(anyhow::anyhow!(
        "the ledger is damaged: stop the workers, keep it as it is, restore a backup"
    )))
}
