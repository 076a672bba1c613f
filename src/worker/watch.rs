//! The watchers: each looks after one thing that can hold the gate, and opens it again.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::Instant;

use super::Shared;
use super::engine::Engine;
use super::gate::Reason;
use crate::clock::as_millis;
use crate::creem::KeyCheck;
use crate::ledger::{LedgerError, OwnCommand};
use crate::observe::metrics;
use crate::rabbit::publisher::State;
use crate::retry::{Backoff, backoff};

/// How often old rows are looked for.
const SWEEP_EVERY: Duration = Duration::from_mins(1);
/// How often it is said how long outcomes are kept.
const SAID_EVERY: Duration = Duration::from_mins(1);
/// How long after its start a worker removes nothing.
const FIRST_SWEEP: Duration = Duration::from_secs(3600);
/// How far the wall clock may run ahead of the monotonic one.
const CLOCK_JUMP: Duration = Duration::from_secs(3600);
/// How often gauges are refreshed.
const GAUGES_EVERY: Duration = Duration::from_secs(1);
/// A ledger that fails again at once must not make the gate flutter.
const STEADY: Duration = Duration::from_secs(1);
/// Between two batches of old rows: jobs come first.
const BETWEEN_SWEEPS: Duration = Duration::from_secs(1);

pub(super) fn spawn_all(shared: &Arc<Shared>, tasks: &mut JoinSet<()>) {
    shared.worker.engine.watch(tasks);
    shared.worker.engine.spawn(tasks, "publishing", publishing(shared.clone()));
    tasks.spawn(sweep(shared.clone()));
    tasks.spawn(gauges(shared.clone()));
    let skew = shared.clone();
    tasks.spawn(async move { skew.skew.tell(&*skew.worker.engine.journey.ledger).await });
}

/// While the ledger is away, asks whether it is back.
pub(super) async fn ledger(engine: Arc<Engine>) {
    loop {
        engine.gate().closed_by(Reason::Ledger).await;
        let mut tries = 0;
        loop {
            match engine.journey.ledger.tell(OwnCommand::Probe).await {
                Ok(()) => break,
                Err(
                    error @ (LedgerError::Damaged(_)
                    | LedgerError::Stopped(_)
                    | LedgerError::DamagedRow(_)),
                ) => {
                    engine.end(super::Fatal::Broken(error.to_string()));
                    return;
                }
                Err(error @ LedgerError::Unavailable(_)) => {
                    engine.health.set_ledger(Err(error.to_string()));
                    tries += 1;
                    let delay = Backoff::of_reconnects().reconnect(tries, backoff::chance());
                    tokio::time::sleep(delay).await;
                }
            }
        }
        tokio::time::sleep(STEADY).await;
        tracing::info!("the ledger can be written again; intake goes on");
        engine.health.set_ledger(Ok(()));
        engine.gate().open(Reason::Ledger);
    }
}

/// While Creem refuses the key, asks with a harmless GET whether it still does.
pub(super) async fn key(engine: Arc<Engine>) {
    let journey = &engine.journey;
    loop {
        engine.gate().closed_by(Reason::Key).await;
        let mut tries = 0;
        while engine.gate().is_closed_by(Reason::Key) {
            tries += 1;
            tokio::time::sleep(Backoff::of_reconnects().ceiling(tries)).await;
            let reason = match journey.creem.check_key().await {
                KeyCheck::Accepted => {
                    tracing::info!("Creem accepts the API key; intake goes on");
                    engine.gate().open(Reason::Key);
                    break;
                }
                KeyCheck::Refused(status) => format!(
                    "Creem refuses the API key (HTTP {status}): check CREEM_API_KEY and that it belongs to creem.base_url"
                ),
                KeyCheck::Unknown(reason) => {
                    format!("whether Creem accepts the API key is not known: {reason}")
                }
            };
            engine.health.set_key(Err(reason));
        }
        // Whoever has opened the gate: no older answer may stand.
        engine.health.set_key(Ok(()));
    }
}

/// No call is made whose reply could not be published.
async fn publishing(shared: Arc<Shared>) {
    let mut state = shared.worker.settler.publisher.state();
    loop {
        let now = state.borrow_and_update().clone();
        match now {
            State::Up => {
                shared.worker.engine.health.set_publishing(Ok(()));
                shared.gate.open(Reason::Publishing);
            }
            State::Down(reason) | State::Blocked(reason) => {
                shared.worker.engine.health.set_publishing(Err(reason));
                shared.gate.close(Reason::Publishing);
            }
        }
        if state.changed().await.is_err() {
            if shared.stop.is_cancelled() {
                return;
            }
            let text = "the task that publishes has ended (a bug)";
            return shared.worker.engine.end(super::Fatal::Broken(text.to_owned()));
        }
    }
}

/// Says again and again how long this process keeps outcomes, for whoever removes old ones meanwhile.
pub(super) async fn retention(engine: Arc<Engine>) {
    loop {
        if let Err(error) = engine.tell_retention().await {
            tracing::warn!(%error, "the ledger was not told how long outcomes are kept");
        }
        tokio::time::sleep(SAID_EVERY).await;
    }
}

/// Removes outcomes that are older than retention, a small batch at a time.
async fn sweep(shared: Arc<Shared>) {
    let (wall, monotonic) = (shared.worker.engine.journey.clock.now(), Instant::now());
    // Jobs that waited while no worker ran come first: some may need rows that are old by now. And workers
    // of an earlier version do not look for what this one says was swept; an upgrade is over by then.
    tokio::time::sleep(FIRST_SWEEP).await;
    loop {
        let now = shared.worker.engine.journey.clock.now();
        if now - wall - as_millis(monotonic.elapsed()) > as_millis(CLOCK_JUMP) {
            // Outcomes would be removed that are not old at all.
            tracing::warn!("the clock has jumped forward; no outcomes are removed until a restart");
            return;
        }
        let retention = shared.worker.engine.retention();
        match shared.worker.engine.journey.ledger.sweep(retention).await {
            Ok(0) => tokio::time::sleep(SWEEP_EVERY).await,
            Ok(swept) => {
                tracing::debug!(swept, "outcomes older than ledger.retention were removed");
                tokio::time::sleep(BETWEEN_SWEEPS).await;
            }
            Err(error) => {
                tracing::warn!(%error, "old outcomes could not be removed");
                tokio::time::sleep(SWEEP_EVERY).await;
            }
        }
    }
}

async fn gauges(shared: Arc<Shared>) {
    loop {
        metrics::oldest_unsettled(shared.worker.engine.health.oldest());
        shared.worker.engine.tell_rate();
        for lane in shared.worker.lanes.iter().map(|size| size.lane) {
            metrics::jobs_in_flight(lane, shared.worker.engine.health.in_flight(lane));
        }
        tokio::time::sleep(GAUGES_EVERY).await;
    }
}
