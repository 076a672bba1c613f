//! `show`: what the ledger knows of one job.

use std::path::Path;

use serde_json::{Value, json};

use super::look::Look;
use super::{Failure, Outcome, block_on, resolved_without_key, say};
use crate::config::check::Ledger;
use crate::job::reply::rfc3339;
use crate::job::{Key, Mode, RequestId, printable};
use crate::ledger::{KnownOrphan, Row};

/// Tell what the ledger knows; works beside a running worker.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The job.
    request_id: String,
    /// Which of Creem's worlds; without it, the one of the configured key.
    #[arg(long, value_parser = ["test", "prod"])]
    mode: Option<String>,
    /// One JSON object instead of text.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(file: Option<&Path>, arguments: &Arguments) -> Outcome {
    let settings = resolved_without_key(file, arguments.mode.as_deref())?;
    let request_id = RequestId::parse(&arguments.request_id).map_err(|code| {
        Failure::Usage(format!("that is no request_id ({code}): 1-128 of A-Z a-z 0-9 . _ : -"))
    })?;
    let key = Key { mode: settings.creem.mode, request_id };
    let (row, orphans) = block_on(find(&settings.ledger, &key))??;
    let reply = row.reply.as_deref().and_then(|bytes| serde_json::from_slice(bytes).ok());
    let known = Known { key, row, orphans, reply };
    if arguments.json {
        say(&known.as_json().to_string());
    } else {
        known.print();
    }
    Ok(())
}

async fn find(ledger: &Ledger, key: &Key) -> Result<(Row, Vec<KnownOrphan>), Failure> {
    let look = Look::open(ledger).await?;
    if let Some(row) = look.row(key).await? {
        return Ok((row, look.orphans(key).await?));
    }
    let other = match key.mode {
        Mode::Test => Mode::Live,
        Mode::Live => Mode::Test,
    };
    let elsewhere = look.row(&Key { mode: other, ..key.clone() }).await?.is_some();
    let hint = if elsewhere {
        format!(" (but there is one of mode {other}: add --mode {other})")
    } else {
        String::new()
    };
    Err(Failure::Failed(anyhow::anyhow!(
        "the ledger knows no {key}{hint}: it was never taken, was refused as invalid, or is older than ledger.retention"
    )))
}

/// What the ledger knows of one job.
struct Known {
    key: Key,
    row: Row,
    orphans: Vec<KnownOrphan>,
    reply: Option<Value>,
}

impl Known {
    fn as_json(&self) -> Value {
        let Self { key, row, .. } = self;
        let orphans: Vec<Value> = self
            .orphans
            .iter()
            .map(|orphan| {
                json!({
                    "checkout_id": orphan.checkout_id,
                    "reason": orphan.reason,
                    "found_at": rfc3339(orphan.found_at),
                })
            })
            .collect();
        json!({
            "mode": key.mode.as_str(),
            "request_id": key.request_id.as_str(),
            "state": row.state.as_str(),
            "lane": row.lane.as_str(),
            "campaign": row.campaign,
            "product_id": row.product_id,
            "attempts": row.attempts,
            "free": row.free,
            "ambiguous_attempts": row.ambiguous,
            "fence": row.fence,
            "first_seen_at": rfc3339(row.created_at),
            "updated_at": rfc3339(row.updated_at),
            "reply": self.reply,
            "parked": row.parked,
            "orphan_sessions": orphans,
        })
    }

    /// A field of the reply, or of its error.
    fn text(&self, path: &str) -> Option<&str> {
        self.reply.as_ref()?.pointer(path)?.as_str()
    }

    fn print(&self) {
        let Self { key, row, .. } = self;
        let line = |name: &str, value: &str| say(&format!("  {name:<20}{value}"));
        say(&format!("{key}: {}", row.state.as_str()));
        line("lane", row.lane.as_str());
        line("product", &row.product_id);
        if let Some(campaign) = &row.campaign {
            line("campaign", &printable(campaign, 64));
        }
        line("first seen", &rfc3339(row.created_at));
        line("last change", &rfc3339(row.updated_at));
        line(
            "calls to Creem",
            &format!("{} ({} of them throttled or not sent)", row.attempts, row.free),
        );
        line("ambiguous calls", &row.ambiguous.to_string());
        for (name, path) in [
            ("link", "/checkout_url"),
            ("error", "/error/code"),
            ("", "/error/message"),
            ("Creem's trace id", "/error/trace_id"),
            ("the producer should", "/next"),
        ] {
            if let Some(text) = self.text(path) {
                line(name, text);
            }
        }
        if row.parked {
            line("parked", "a copy of the job is in the dead queue");
        }
        for orphan in &self.orphans {
            let found = rfc3339(orphan.found_at);
            line("orphan session", &format!("{} ({}, {found})", orphan.checkout_id, orphan.reason));
        }
    }
}
