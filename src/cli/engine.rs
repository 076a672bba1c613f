//! What `run` and `bulk` put together alike: the ledger, and the engine that works with it.

use std::path::Path;
use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::Failure;
use crate::clock::{SharedClock, SystemClock, as_millis};
use crate::config::check::{self as config, Resolved};
use crate::creem::Client;
use crate::ledger::postgres::{self, Observation, PostgresLedger, Time};
use crate::ledger::sqlite::SqliteLedger;
use crate::ledger::{Budget, Ledger};
use crate::lifecycle::Stages;
use crate::observe::health::Health;
use crate::observe::metrics;
use crate::pace::Pacer;
use crate::retry::{Backoff, backoff};
use crate::worker::call_time::CallTime;
use crate::worker::circuit::Circuit;
use crate::worker::engine::Engine;
use crate::worker::gate::Gate;
use crate::worker::journey::Journey;
use crate::worker::orders::Orders;
use crate::worker::trouble::Trouble;
use crate::worker::turns::Turns;

/// An open ledger.
pub(super) struct Opened {
    pub(super) ledger: Arc<dyn Ledger>,
    /// The clock that its leases are on.
    pub(super) clock: SharedClock,
    /// The budget that it shares among workers.
    budget: Option<Arc<dyn Budget>>,
}

/// Opens the ledger; `None` if the program is stopped before it is there.
pub(super) async fn open(
    ledger: &config::Ledger,
    health: &Health,
    stages: &Stages,
) -> Result<Option<Opened>, Failure> {
    match ledger {
        config::Ledger::File(path) => Ok(Some(open_file(path)?)),
        config::Ledger::Database(options) => open_database(options, health, stages).await,
    }
}

/// An engine that works with that ledger, until `stop` is cancelled.
pub(super) fn engine(
    settings: &Resolved,
    Opened { ledger, clock, budget }: Opened,
    health: Health,
    stop: CancellationToken,
) -> Result<Engine, Failure> {
    let journey = Journey {
        rules: settings.journey,
        creem: Client::new(&settings.creem)?,
        pacer: match &budget {
            Some(_) => Pacer::shared(settings.limits),
            None => Pacer::new(settings.limits),
        },
        gate: Arc::new(Gate::new(clock.clone(), ledger.clone())),
        orders: Orders::default(),
        circuit: Circuit::new(settings.journey.request_timeout),
        call_time: CallTime::new(settings.journey.request_timeout),
        turns: Turns::default(),
        trouble: Trouble::default(),
        key_accepted_at: tokio::sync::Mutex::default(),
        clock,
        stop,
        ledger,
    };
    Ok(Engine::new(journey, health, budget, settings.creem.mode))
}

fn open_file(path: &Path) -> Result<Opened, Failure> {
    let clock: SharedClock = Arc::new(SystemClock);
    let ledger = SqliteLedger::open(path, clock.clone(), |commit| {
        metrics::ledger_commit(commit.size, commit.took, commit.ambiguous, commit.orphans);
    })?;
    let identity = ledger.identity();
    metrics::ledger_totals(identity.ambiguous_attempts, identity.orphan_sessions);
    Ok(Opened { ledger: Arc::new(ledger), clock, budget: None })
}

/// Opens the database, however long it takes to come; `None` if the worker is stopped first.
async fn open_database(
    options: &postgres::Options,
    health: &Health,
    stages: &Stages,
) -> Result<Option<Opened>, Failure> {
    let mut tries = 0;
    loop {
        let observe = |observation| match observation {
            Observation::Commit(commit) => metrics::ledger_commit(commit.size, commit.took, 0, 0),
            Observation::Totals { ambiguous_attempts, orphan_sessions } => {
                metrics::ledger_totals(ambiguous_attempts, orphan_sessions);
            }
        };
        let opened = tokio::select! {
            opened = PostgresLedger::open(options, Time::Database, observe) => opened,
            () = stages.soft.cancelled() => return Ok(None),
        };
        let error = match opened {
            Ok(ledger) => {
                health.set_ledger(Ok(()));
                let clock = ledger.clock();
                let ledger = Arc::new(ledger);
                let budget: Arc<dyn Budget> = ledger.clone();
                return Ok(Some(Opened { ledger, clock, budget: Some(budget) }));
            }
            Err(error) if error.is_passing() => error,
            Err(error) => return Err(error.into()),
        };
        tries += 1;
        let delay = Backoff::of_reconnects().reconnect(tries, backoff::chance());
        tracing::warn!(%error, delay_ms = as_millis(delay), "the ledger is not there; trying again");
        health.set_ledger(Err(error.to_string()));
        tokio::select! {
            () = tokio::time::sleep(delay) => {}
            () = stages.soft.cancelled() => return Ok(None),
        }
    }
}
