//! `campaign`: what became of the jobs that belong together, and the end of those that are yet to come.

use std::path::Path;

use serde_json::{Value, json};

use super::look::{Look, shown};
use super::tell::tell;
use super::{Failure, Outcome, block_on, count, resolved_without_key, say, say_error};
use crate::bulk::inside::read_reply;
use crate::bulk::table;
use crate::config::check::Resolved;
use crate::job::reply::rfc3339;
use crate::job::{Key, printable};
use crate::ledger::{Campaign, LedgerError, OwnCommand, Row};

/// Most campaigns that are named where one is not known.
const NAMED: usize = 10;

/// Jobs that carry the same `checkout-campaign`.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// The campaigns that the ledger knows, one a line.
    List {
        /// One JSON object a line.
        #[arg(long)]
        json: bool,
    },
    /// What became of the jobs of a campaign that a worker has taken so far.
    Status {
        /// The campaign.
        #[arg(value_parser = super::campaign)]
        name: String,
        /// One JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Cancel the jobs of a campaign that were published until now: whatever has no outcome yet ends as
    /// `cancelled`, without a call. Jobs that are published later are served.
    Cancel {
        /// The campaign.
        #[arg(value_parser = super::campaign)]
        name: String,
        /// Take it back: jobs without an outcome are served again. Those that ended as `cancelled` have to be sent
        /// again.
        #[arg(long)]
        undo: bool,
    },
    /// The jobs of a campaign and their links as a table (CSV).
    Export {
        /// The campaign.
        #[arg(value_parser = super::campaign)]
        name: String,
    },
}

pub(super) fn run(file: Option<&Path>, arguments: &Arguments) -> Outcome {
    let settings = resolved_without_key(file, None)?;
    match &arguments.command {
        Command::List { json } => block_on(list(&settings, None, *json))?,
        Command::Status { name, json } => block_on(list(&settings, Some(name), *json))?,
        Command::Cancel { name, undo: false } => cancel(&settings, name),
        Command::Cancel { name, undo: true } => reinstate(&settings, name),
        Command::Export { name } => block_on(export(&settings, name))?,
    }
}

fn cancel(settings: &Resolved, name: &str) -> Outcome {
    let campaign = name.to_owned();
    tell(settings, |now| OwnCommand::CancelCampaign { campaign, before: now })?;
    say(&format!(
        "campaign {} is cancelled for all workers of the ledger {}: within two seconds none of its jobs that were published until now is begun, and each gets the reply `cancelled`; calls that are under way are finished, and links that were made stay",
        printable(name, 64),
        shown(&settings.ledger)
    ));
    let known = block_on(async {
        let look = Look::open(&settings.ledger).await?;
        Ok::<_, Failure>(look.campaigns(None).await?)
    })??;
    if !known.contains_key(name) {
        let mut others: Vec<String> =
            known.keys().take(NAMED).map(|name| printable(name, 64)).collect();
        if known.len() > NAMED {
            others.push(format!("and {} more", known.len() - NAMED));
        }
        let others = if others.is_empty() { "none".to_owned() } else { others.join(", ") };
        say(&format!(
            "no worker has taken a job of that name yet: is it the right one? The ledger knows these: {others}. If it is not, `campaign cancel --undo {}` takes it back",
            printable(name, 64)
        ));
    }
    Ok(())
}

fn reinstate(settings: &Resolved, name: &str) -> Outcome {
    let cancelled = block_on(async {
        Ok::<_, Failure>(Look::open(&settings.ledger).await?.orders().await?.cancelled)
    })??;
    if !cancelled.iter().any(|order| order.campaign == name) {
        let names: Vec<String> =
            cancelled.iter().map(|order| printable(&order.campaign, 64)).collect();
        let names = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
        return Err(Failure::Failed(anyhow::anyhow!(
            "campaign {} was not cancelled; the ledger {} has these cancelled: {names}",
            printable(name, 64),
            shown(&settings.ledger)
        )));
    }
    tell(settings, |_| OwnCommand::ReinstateCampaign { campaign: name.to_owned() })?;
    say(&format!(
        "campaign {} is not cancelled for any worker of the ledger {}: within two seconds its jobs are served again; what has ended as `cancelled` has to be sent again",
        printable(name, 64),
        shown(&settings.ledger)
    ));
    Ok(())
}

async fn list(settings: &Resolved, name: Option<&str>, as_json: bool) -> Outcome {
    let look = Look::open(&settings.ledger).await?;
    let campaigns = look.campaigns(name).await?;
    let orders = look.orders().await?;
    let cancelled = |name: &str| {
        orders.cancelled.iter().find(|order| order.campaign == name).map(|order| order.before)
    };
    if let Some(name) = name.filter(|name| !campaigns.contains_key(*name)) {
        let text = match cancelled(name) {
            Some(before) => format!("; it is cancelled, for jobs until {}", rfc3339(before)),
            None => String::new(),
        };
        return Err(Failure::Failed(anyhow::anyhow!(
            "no worker has taken a job of campaign {} yet{text}",
            printable(name, 64)
        )));
    }
    if campaigns.is_empty() {
        say_error(&format!("no campaign in the ledger {}", shown(&settings.ledger)));
    }
    for (name, campaign) in &campaigns {
        let cancelled = cancelled(name);
        if as_json {
            say(&as_object(name, campaign, cancelled).to_string());
        } else {
            say(&in_words(name, campaign, cancelled));
        }
    }
    Ok(())
}

fn as_object(name: &str, campaign: &Campaign, cancelled: Option<i64>) -> Value {
    json!({
        "campaign": name,
        "jobs": campaign.states.values().sum::<u64>(),
        "states": campaign.states,
        "first_change": rfc3339(campaign.first_change),
        "last_change": rfc3339(campaign.last_change),
        "cancelled_until": cancelled.map(rfc3339),
    })
}

fn in_words(name: &str, campaign: &Campaign, cancelled: Option<i64>) -> String {
    let jobs: u64 = campaign.states.values().sum();
    let states: Vec<String> =
        campaign.states.iter().map(|(state, jobs)| format!("{jobs} {state}")).collect();
    let cancelled =
        cancelled.map(|before| format!("; cancelled for jobs until {}", rfc3339(before)));
    format!(
        "{}: {} taken ({}), from {} to {}{}",
        printable(name, 64),
        count(jobs, "job"),
        states.join(", "),
        rfc3339(campaign.first_change),
        rfc3339(campaign.last_change),
        cancelled.unwrap_or_default()
    )
}

async fn export(settings: &Resolved, name: &str) -> Outcome {
    let look = Look::open(&settings.ledger).await?;
    let mut table = table::Writer::new(std::io::stdout().lock());
    let (mut jobs, mut damaged, mut broken) = (0_u64, 0_u64, None);
    let mut line = |table: &mut table::Writer<_>, cells: [&str; 8]| {
        if broken.is_none() {
            broken = table.line(&cells).err();
        }
    };
    line(
        &mut table,
        [
            "mode",
            "request_id",
            "status",
            "checkout_id",
            "checkout_url",
            "error_code",
            "error_message",
            "updated_at",
        ],
    );
    look.jobs_of(name, |job: Result<(Key, Row), LedgerError>| {
        let Ok((key, row)) = job else {
            damaged += 1;
            return;
        };
        jobs += 1;
        let outcome = row.reply.as_deref().and_then(read_reply);
        let cell = |of: Option<&Option<String>>| of.cloned().flatten().unwrap_or_default();
        let outcome = outcome.as_ref();
        line(
            &mut table,
            [
                key.mode.as_str(),
                key.request_id.as_str(),
                row.state.as_str(),
                &cell(outcome.map(|outcome| &outcome.checkout_id)),
                &cell(outcome.map(|outcome| &outcome.checkout_url)),
                &cell(outcome.map(|outcome| &outcome.error_code)),
                &cell(outcome.map(|outcome| &outcome.error_message)),
                &rfc3339(row.updated_at),
            ],
        );
    })
    .await?;
    let ended = table.finish().err();
    match broken.or(ended) {
        // A reader that went away (`| head`) is no error of ours.
        Some(error) if error.kind() == std::io::ErrorKind::BrokenPipe => return Ok(()),
        Some(error) => return Err(Failure::Failed(anyhow::anyhow!("standard output: {error}"))),
        None => {}
    }
    if damaged > 0 {
        let text = format!(
            "{damaged} rows are damaged and left out: `checkout-worker check --ledger` lists them"
        );
        return Err(Failure::Failed(anyhow::anyhow!(text)));
    }
    if jobs == 0 {
        let name = printable(name, 64);
        let text = format!("no worker has taken a job of campaign {name} yet");
        return Err(Failure::Failed(anyhow::anyhow!(text)));
    }
    say_error(&count(jobs, "job"));
    Ok(())
}
