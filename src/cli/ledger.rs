//! `ledger`: what an operator tells the ledger.

use std::path::Path;
use std::sync::Arc;

use anyhow::anyhow;

use super::look::{Look, shown};
use super::{Failure, Outcome, block_on, resolved_without_key, say};
use crate::clock::{Clock as _, Millis, SystemClock};
use crate::config::check;
use crate::job::reply::rfc3339;
use crate::ledger::postgres::{PostgresLedger, Time};
use crate::ledger::sqlite::SqliteLedger;
use crate::ledger::transition::DOUBT_LASTS;
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
        until: Millis,
    },
}

fn time(text: &str) -> Result<Millis, String> {
    let now = SystemClock.now();
    if text == "now" {
        return Ok(now);
    }
    let time: jiff::Timestamp =
        text.parse().map_err(|_| "give a time like 2026-11-22T18:00:00Z, or now".to_owned())?;
    let until = time.as_millisecond();
    if until > now {
        return Err("that is in the future: every job until then would end unresolved".to_owned());
    }
    if until < now - DOUBT_LASTS {
        return Err("that is more than 30 days ago, and no job is doubted for longer".to_owned());
    }
    Ok(until)
}

pub(super) fn run(file: Option<&Path>, arguments: &Arguments) -> Outcome {
    let settings = resolved_without_key(file, None)?;
    let Action::RestoredTo { until } = arguments.action;
    block_on(tell(&settings.ledger, OwnCommand::Restored { until }))??;
    say(&format!(
        "{}: jobs published until {} that it does not know, or whose row is as old, end unresolved; `show REQUEST_ID` and the dead queue tell which",
        shown(&settings.ledger),
        rfc3339(until)
    ));
    Ok(())
}

async fn tell(ledger: &check::Ledger, command: OwnCommand) -> Result<(), Failure> {
    // Only one that is there: a mistyped name must not make a new one, and leave the right one untold.
    drop(Look::open(ledger).await?);
    let ledger: Arc<dyn Ledger> = match ledger {
        check::Ledger::File(path) if !path.exists() => {
            return Err(Failure::Failed(anyhow!("there is no ledger at {}", path.display())));
        }
        check::Ledger::File(path) => {
            Arc::new(SqliteLedger::open(path, Arc::new(SystemClock), |_| {})?)
        }
        check::Ledger::Database(options) => {
            Arc::new(PostgresLedger::open(options, Time::Database, |_| {}).await?)
        }
    };
    ledger.tell(command).await?;
    Ok(())
}
