//! `ledger`: what an operator tells the ledger.

use std::path::Path;
use std::sync::Arc;

use anyhow::anyhow;

use super::look::{Look, shown};
use super::{Failure, Outcome, block_on, resolved_without_key, say, say_error};
use crate::clock::{Clock as _, Millis, SharedClock, SystemClock};
use crate::config::check;
use crate::job::reply::rfc3339;
use crate::ledger::postgres::{PostgresLedger, Time};
use crate::ledger::sqlite::SqliteLedger;
use crate::ledger::{Ledger, OwnCommand};

/// Tell the ledger what only an operator knows.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, clap::Subcommand)]
enum Action {
    /// The ledger was restored from a backup, or lost commits in a failover: until TIME, jobs may have
    /// been done that it has forgotten. A job that was published until then, or is redelivered, and that
    /// it does not know, ends `unresolved` instead of being given a link that may be its second.
    ///
    /// Stop the workers, restore, run this, start the workers. TIME is when the workers were stopped.
    RestoredTo {
        /// RFC 3339, e.g. 2026-11-22T18:00:00Z, or `now`.
        #[arg(value_name = "TIME", value_parser = time)]
        until: When,
    },
}

/// A time, or now by the ledger's own clock.
#[derive(Debug, Clone, Copy)]
enum When {
    Now,
    At(Millis),
}

fn time(text: &str) -> Result<When, String> {
    if text == "now" {
        return Ok(When::Now);
    }
    let time: jiff::Timestamp =
        text.parse().map_err(|_| "give a time like 2026-11-22T18:00:00Z, or now".to_owned())?;
    let until = time.as_millisecond();
    if until > SystemClock.now() {
        return Err("that is in the future: every job until then would end unresolved".to_owned());
    }
    Ok(When::At(until))
}

pub(super) fn run(file: Option<&Path>, arguments: &Arguments) -> Outcome {
    let settings = resolved_without_key(file, None)?;
    let Action::RestoredTo { until } = arguments.action;
    let (until, before) = block_on(tell(&settings.ledger, until))??;
    if let Some(before) = before.filter(|before| *before > until) {
        say_error(&format!(
            "an earlier time takes nothing back: it was told {} before, and that holds",
            rfc3339(before)
        ));
    }
    let until = before.map_or(until, |before| until.max(before));
    say(&format!(
        "{}: jobs published until {} that it does not know, or whose row is as old, end unresolved; `show REQUEST_ID` and the dead queue tell which",
        shown(&settings.ledger),
        rfc3339(until)
    ));
    Ok(())
}

/// Returns the time that was told, and the one that it was told before.
async fn tell(ledger: &check::Ledger, until: When) -> Result<(Millis, Option<Millis>), Failure> {
    // Only one that is there: a mistyped name must not make a new one, and leave the right one untold.
    drop(Look::open(ledger).await?);
    let (ledger, clock): (Arc<dyn Ledger>, SharedClock) = match ledger {
        check::Ledger::File(path) if !path.exists() => {
            return Err(Failure::Failed(anyhow!("there is no ledger at {}", path.display())));
        }
        check::Ledger::File(path) => {
            let clock: SharedClock = Arc::new(SystemClock);
            (Arc::new(SqliteLedger::open(path, clock.clone(), |_| {})?), clock)
        }
        check::Ledger::Database(options) => {
            let ledger = PostgresLedger::open(options, Time::Database, |_| {}).await?;
            let clock = ledger.clock();
            (Arc::new(ledger), clock)
        }
    };
    let until = match until {
        When::Now => clock.now(),
        When::At(until) => until,
    };
    ledger.tell(OwnCommand::Restored { until }).await?;
    Ok((until, ledger.identity().restored))
}
