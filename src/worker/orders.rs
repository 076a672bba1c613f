//! Lanes that an operator has paused: for all workers, by the ledger.

use std::time::Duration;

use tokio::sync::watch;

use crate::job::Lane;
use crate::ledger::{Ledger, PausedLane};
use crate::observe::health::Health;
use crate::observe::metrics;

/// How often the ledger is asked.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Which lanes are paused.
#[derive(Debug)]
pub struct Lanes(watch::Sender<Vec<Lane>>);

impl Default for Lanes {
    fn default() -> Self {
        Self(watch::Sender::new(Vec::new()))
    }
}

impl Lanes {
    /// Whether a lane is paused.
    #[must_use]
    pub fn is_paused(&self, lane: Lane) -> bool {
        self.0.borrow().contains(&lane)
    }

    /// Waits until a lane is paused.
    pub async fn paused(&self, lane: Lane) {
        self.wait(|paused| paused.contains(&lane)).await;
    }

    /// Waits until a lane is not paused.
    pub async fn resumed(&self, lane: Lane) {
        self.wait(|paused| !paused.contains(&lane)).await;
    }

    async fn wait(&self, until: impl Fn(&Vec<Lane>) -> bool) {
        let mut paused = self.0.subscribe();
        // The sender lives as long as `self`.
        drop(paused.wait_for(until).await);
    }

    /// Asks the ledger, once. While it does not answer, what it said last holds.
    pub async fn look(&self, ledger: &dyn Ledger, health: &Health) {
        let Ok(paused) = ledger.paused_lanes().await else { return };
        let lanes: Vec<Lane> = paused.iter().map(|PausedLane { lane, .. }| *lane).collect();
        health.set_paused_lanes(lanes.clone());
        for lane in Lane::ALL {
            metrics::lane_paused(lane, lanes.contains(&lane));
        }
        self.0.send_if_modified(|before| {
            let changed = *before != lanes;
            if changed {
                tracing::info!(lanes = ?lanes, before = ?before, "paused lanes");
                *before = lanes;
            }
            changed
        });
    }

    /// Follows the ledger; never ends.
    pub async fn follow(&self, ledger: &dyn Ledger, health: &Health) {
        loop {
            self.look(ledger, health).await;
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
}
