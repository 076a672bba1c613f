//! `pause` and `resume`: whether workers take the jobs of a lane.

use std::path::Path;

use super::look::shown;
use super::tell::tell;
use super::{Outcome, resolved_without_key, say};
use crate::job::Lane;
use crate::ledger::OwnCommand;

/// Which lane.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// `interactive` or `bulk`.
    #[arg(long, value_parser = super::lane)]
    lane: Lane,
}

pub(super) fn pause(file: Option<&Path>, arguments: &Arguments) -> Outcome {
    let lane = arguments.lane;
    let settings = resolved_without_key(file, None)?;
    tell(&settings, |_| OwnCommand::PauseLane(lane))?;
    say(&format!(
        "lane {lane} is paused for all workers of the ledger {}: within two seconds they take no more of its jobs, which wait in RabbitMQ; calls that are under way are finished. Go on with: checkout-worker resume --lane {lane}",
        shown(&settings.ledger)
    ));
    Ok(())
}

pub(super) fn resume(file: Option<&Path>, arguments: &Arguments) -> Outcome {
    let lane = arguments.lane;
    let settings = resolved_without_key(file, None)?;
    tell(&settings, |_| OwnCommand::ResumeLane(lane))?;
    let ledger = shown(&settings.ledger);
    say(&format!("lane {lane} is taken again by all workers of the ledger {ledger}"));
    Ok(())
}
