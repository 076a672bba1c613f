//! `pause` and `resume`: whether workers take the jobs of a lane.

use std::path::Path;

use super::look::{Look, shown};
use super::{Outcome, block_on, resolved_without_key, say};
use crate::clock::{Clock as _, SystemClock};
use crate::config::check::Ledger as Place;
use crate::job::Lane;
use crate::ledger::postgres::{PostgresLedger, Time};
use crate::ledger::sqlite::beside;
use crate::ledger::{Ledger, OwnCommand};

/// Which lane.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// `interactive` or `bulk`.
    #[arg(long, value_parser = super::lane)]
    lane: Lane,
}

pub(super) fn pause(file: Option<&Path>, arguments: &Arguments) -> Outcome {
    let lane = arguments.lane;
    tell(file, OwnCommand::PauseLane(lane))?;
    say(&format!(
        "lane {lane} is paused for all workers of this ledger: within two seconds they take no more of its jobs, which wait in RabbitMQ; calls that are under way are finished. Go on with: checkout-worker resume --lane {lane}"
    ));
    Ok(())
}

pub(super) fn resume(file: Option<&Path>, arguments: &Arguments) -> Outcome {
    let lane = arguments.lane;
    tell(file, OwnCommand::ResumeLane(lane))?;
    say(&format!("lane {lane} is taken again by all workers of this ledger"));
    Ok(())
}

fn tell(file: Option<&Path>, command: OwnCommand) -> Outcome {
    let settings = resolved_without_key(file, None)?;
    let told = async {
        match &settings.ledger {
            Place::File(path) => beside::tell(path, command, SystemClock.now())?,
            Place::Database(options) => {
                // Only one that is there: a mistyped name must not make a new one.
                drop(Look::open(&settings.ledger).await?);
                let ledger = PostgresLedger::open(options, Time::Database, |_| {}).await?;
                let ledger: &dyn Ledger = &ledger;
                ledger.tell(command).await?;
            }
        }
        Ok(())
    };
    block_on(told)?.map_err(|error: super::Failure| match error {
        super::Failure::Failed(error) => {
            super::Failure::Failed(error.context(shown(&settings.ledger)))
        }
        other @ (super::Failure::Usage(_) | super::Failure::Configuration(_)) => other,
    })
}
