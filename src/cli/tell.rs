//! What an operator tells a ledger while workers have it.

use super::look::{Look, shown};
use super::{Failure, Outcome, block_on};
use crate::clock::{Clock as _, Millis, SystemClock};
use crate::config::check::{Ledger as Place, Resolved};
use crate::ledger::postgres::{PostgresLedger, Time};
use crate::ledger::sqlite::beside;
use crate::ledger::{Ledger, OwnCommand};

/// Tells the ledger; `command` is given the time on the ledger's clock.
pub(super) fn tell(settings: &Resolved, command: impl FnOnce(Millis) -> OwnCommand) -> Outcome {
    let told = async {
        match &settings.ledger {
            Place::File(path) => {
                let now = SystemClock.now();
                beside::tell(path, &command(now), now)?;
            }
            Place::Database(options) => {
                // Only one that is there: a mistyped name must not make a new one.
                drop(Look::open(&settings.ledger).await?);
                let ledger = PostgresLedger::open(options, Time::Database, |_| {}).await?;
                let now = ledger.clock().now();
                let ledger: &dyn Ledger = &ledger;
                ledger.tell(command(now)).await?;
            }
        }
        Ok(())
    };
    block_on(told)?.map_err(|error: Failure| match error {
        Failure::Failed(error) => Failure::Failed(error.context(shown(&settings.ledger))),
        other @ (Failure::Usage(_) | Failure::Configuration(_)) => other,
    })
}
