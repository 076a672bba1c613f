//! What operators have told all workers, by the ledger: lanes that are paused, campaigns that are cancelled.

use std::collections::HashMap;
use std::time::Duration;

use tokio::sync::watch;

use super::ask::Ask;
use crate::clock::Millis;
use crate::job::{Lane, Problem, printable, reply};
use crate::ledger::{LanePause, Ledger, PausedLane};
use crate::observe::health::Health;
use crate::observe::metrics;
use crate::retry::Pauses;

/// How often the ledger is asked.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// The orders that hold.
#[derive(Debug)]
pub struct Orders(watch::Sender<Known>);

#[derive(Debug, Default, PartialEq, Eq)]
struct Known {
    paused: Vec<Lane>,
    /// When lanes were paused, and are.
    pauses: HashMap<Lane, Pauses>,
    /// Until when jobs of a campaign were published that is cancelled.
    cancelled: HashMap<String, Millis>,
}

impl Known {
    /// When the job's campaign was cancelled, if that is about it. A job that does not say when it was
    /// published is as old as its first pickup.
    fn cancels(&self, ask: &Ask) -> Option<Millis> {
        let before = *self.cancelled.get(ask.campaign.as_ref()?)?;
        (ask.published_at.unwrap_or(ask.picked_up_at) < before).then_some(before)
    }
}

impl Default for Orders {
    fn default() -> Self {
        Self(watch::Sender::new(Known::default()))
    }
}

impl Orders {
    /// Whether a lane is paused.
    #[must_use]
    pub fn is_paused(&self, lane: Lane) -> bool {
        self.0.borrow().paused.contains(&lane)
    }

    /// When a lane was paused, as long ago as the ledger knows jobs.
    #[must_use]
    pub fn pauses(&self, lane: Lane) -> Pauses {
        self.0.borrow().pauses.get(&lane).cloned().unwrap_or_default()
    }

    /// Waits until a lane is paused.
    pub async fn paused(&self, lane: Lane) {
        self.wait(|known| known.paused.contains(&lane)).await;
    }

    /// Waits until a lane is not paused.
    pub async fn resumed(&self, lane: Lane) {
        self.wait(|known| !known.paused.contains(&lane)).await;
    }

    /// Why a job is not wanted any more, if it is not.
    #[must_use]
    pub fn cancels(&self, ask: &Ask) -> Option<Problem> {
        let before = self.0.borrow().cancels(ask)?;
        let campaign = printable(ask.campaign.as_deref().unwrap_or_default(), 64);
        let text = format!("its campaign {campaign} was cancelled at {}", reply::rfc3339(before));
        Some(Problem::new("campaign_cancelled", text))
    }

    /// Waits until a job is not wanted any more.
    pub async fn cancelled(&self, ask: &Ask) {
        if ask.campaign.is_none() {
            return std::future::pending().await;
        }
        self.wait(|known| known.cancels(ask).is_some()).await;
    }

    async fn wait(&self, until: impl Fn(&Known) -> bool) {
        let mut known = self.0.subscribe();
        // The sender lives as long as `self`.
        drop(known.wait_for(until).await);
    }

    /// Asks the ledger, once. While it does not answer, what it said last holds.
    pub async fn look(&self, ledger: &dyn Ledger, health: &Health) {
        let Ok(orders) = ledger.orders().await else { return };
        let paused: Vec<Lane> = orders.paused_lanes.iter().map(|paused| paused.lane).collect();
        health.set_paused_lanes(paused.clone());
        for lane in Lane::ALL {
            metrics::lane_paused(lane, paused.contains(&lane));
        }
        let cancelled = orders.cancelled.into_iter();
        let cancelled = cancelled.map(|cancelled| (cancelled.campaign, cancelled.before)).collect();
        let mut times: HashMap<Lane, Pauses> = HashMap::new();
        for LanePause { lane, from, to } in orders.lane_pauses {
            times.entry(lane).or_default().add(from, to);
        }
        for PausedLane { lane, since } in orders.paused_lanes {
            times.entry(lane).or_default().begin(since);
        }
        let new = Known { paused, pauses: times, cancelled };
        self.0.send_if_modified(|known| {
            if known.paused != new.paused {
                let names = |lanes: &[Lane]| {
                    let names: Vec<&str> = lanes.iter().map(|lane| lane.as_str()).collect();
                    names.join(" ")
                };
                let (lanes, before) = (names(&new.paused), names(&known.paused));
                tracing::info!(lanes, before, "paused lanes");
            }
            for (campaign, before) in &new.cancelled {
                if known.cancelled.get(campaign) != Some(before) {
                    let campaign = printable(campaign, 64);
                    let before = reply::rfc3339(*before);
                    tracing::info!(campaign, before, "a campaign is cancelled");
                }
            }
            let changed = *known != new;
            *known = new;
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
