//! `bulk`: a file of jobs into a file of links, in this process or by way of the workers.

mod arguments;
mod begin;
mod dry_run;
mod guard;
mod here;
mod open;
mod places;
mod progress;
mod queue;
mod sandbox;
mod summary;
mod verify;
mod written_over;

use std::path::Path;

use super::{Failure, Outcome, block_on, resolved, resolved_without_key};
use crate::config::check::{Ledger, Resolved};
use crate::observe::logging;
pub(super) use arguments::Arguments;
use sandbox::Sandbox;
pub(super) use sandbox::refuse_its_ledger;

pub(super) fn run(file: Option<&Path>, arguments: &Arguments) -> Outcome {
    arguments.check()?;
    let Some(out) = arguments.out.as_deref().filter(|_| !arguments.dry_run) else {
        return dry_run::run(&resolved_without_key(file, None)?, arguments);
    };
    if arguments.via_queue {
        let settings = resolved_without_key(file, None)?;
        places::check(arguments, out, None)?;
        log(&settings)?;
        return block_on(queue::run(&settings, arguments, out))?;
    }
    if arguments.sandbox {
        // Before anything is written.
        places::check(arguments, out, Some(&Ledger::File(sandbox::ledger_beside(out))))?;
    }
    block_on(async {
        let double = if arguments.sandbox { Some(Sandbox::start(arguments).await?) } else { None };
        let settings = match &double {
            Some(double) => double.settings(file, out)?,
            None if arguments.verify => resolved(file)?,
            None => resolved(file).map_err(sandbox::offer)?,
        };
        if !arguments.sandbox {
            refuse_its_ledger(&settings.ledger)?;
        }
        places::check(arguments, out, Some(&settings.ledger))?;
        log(&settings)?;
        if arguments.verify {
            return verify::run(&settings, arguments, out).await;
        }
        here::run(&settings, arguments, out).await
    })?
}

fn log(settings: &Resolved) -> Outcome {
    logging::install(settings.log.0, &settings.log.1)
        .map_err(|why| Failure::Usage(format!("the log: {why}")))
}
