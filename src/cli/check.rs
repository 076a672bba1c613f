//! `check`: everything that is wrong, at once.

use std::path::Path;

use super::{Failure, Outcome, block_on, resolved, say};
use crate::config::check::Resolved;
use crate::creem::{Client, KeyCheck};
use crate::job::Lane;
use crate::ledger::sqlite::Inspector;
use crate::rabbit::{Topology, link};

/// Check configuration and surroundings; works beside a running worker and changes nothing.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Read the whole ledger instead and verify every row.
    #[arg(long)]
    ledger: bool,
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
    report("ledger", ledger(&settings));
    let (broker, key) = block_on(async { tokio::join!(broker(&settings), key(&settings)) })?;
    for (what, result) in broker {
        report(what, result);
    }
    report("creem", key);
    if wrong == 0 {
        Ok(())
    } else {
        Err(Failure::Failed(anyhow::anyhow!("{wrong} of the surroundings are wrong, see above")))
    }
}

fn ledger(settings: &Resolved) -> Result<String, String> {
    let path = &settings.ledger;
    if path.exists() {
        return Inspector::open(path)
            .map(|_| format!("{} is a ledger", path.display()))
            .map_err(|error| error.to_string());
    }
    let parent = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty())
        .unwrap_or_else(|| Path::new("."));
    let existing =
        parent.ancestors().find(|directory| directory.exists() || directory.as_os_str().is_empty());
    let writable = existing.is_some_and(|directory| {
        let directory = if directory.as_os_str().is_empty() { Path::new(".") } else { directory };
        directory.metadata().is_ok_and(|metadata| !metadata.permissions().readonly())
    });
    if writable {
        Ok(format!("{} will be created", path.display()))
    } else {
        Err(format!(
            "{} cannot be created: make its directory writable for this user",
            path.display()
        ))
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
            "{place} gave no usable answer: {reason}; check the network, creem.proxy and creem.ca_file"
        )),
    }
}

async fn broker(settings: &Resolved) -> Vec<(&'static str, Result<String, String>)> {
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
    found.push(match settings.topology.missing(&connection).await {
        Ok(missing) if missing.is_empty() => {
            ("topology", Ok("every queue and exchange is there".to_owned()))
        }
        Ok(missing) if settings.declare => {
            ("topology", Ok(format!("{} not there yet; `run` declares them", missing.len())))
        }
        Ok(missing) => (
            "topology",
            Err(format!(
                "{}; import the definitions, or set topology.declare = true",
                missing.join("; ")
            )),
        ),
        Err(error) => ("topology", Err(error.to_string())),
    });
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

fn whole_ledger(settings: &Resolved) -> Outcome {
    let report = Inspector::open(&settings.ledger)?.report();
    say(&format!("{}: {} rows", settings.ledger.display(), report.rows));
    for (state, count) in &report.states {
        say(&format!("  {state}: {count}"));
    }
    say(&format!("  ambiguous attempts: {}", report.ambiguous_attempts));
    say(&format!("  orphan sessions known: {}", report.orphan_sessions));
    if report.damage.is_empty() {
        say("no damage found");
        return Ok(());
    }
    for line in &report.damage {
        say(&format!("DAMAGED  {line}"));
    }
    Err(Failure::Failed(anyhow::anyhow!(
        "the ledger is damaged: stop the worker, keep this file, restore a backup"
    )))
}
