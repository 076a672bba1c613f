//! Alive, ready, and the sentence that says why not.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::job::Lane;

/// What the parts of the worker report about themselves. Cheap to clone; all clones are one.
#[derive(Debug, Clone, Default)]
pub struct Health(Arc<Mutex<Parts>>);

#[derive(Debug)]
struct Parts {
    broker: Result<(), String>,
    publishing: Result<(), String>,
    ledger: Result<(), String>,
    key: Result<(), String>,
    rate: Rate,
    circuit: Option<OpenCircuit>,
    paused_lanes: Vec<Lane>,
    stopping: bool,
    next: u64,
    in_flight: HashMap<u64, (Lane, Instant)>,
}

impl Default for Parts {
    fn default() -> Self {
        Self {
            broker: Err("no session with the broker yet".to_owned()),
            publishing: Err("no publishing connection yet".to_owned()),
            ledger: Ok(()),
            key: Ok(()),
            rate: Rate::default(),
            circuit: None,
            paused_lanes: Vec::new(),
            stopping: false,
            next: 0,
            in_flight: HashMap::new(),
        }
    }
}

/// A circuit that is open: at least half of the last calls to Creem failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OpenCircuit {
    /// For how long.
    pub time: Duration,
    /// Whether it is another worker of the ledger that finds Creem down, and not this one.
    pub by_others: bool,
}

/// How fast Creem is asked.
#[derive(Debug, Clone, Default)]
pub struct Rate {
    /// Most calls a second.
    pub per_second: f64,
    /// What holds it there.
    pub because: String,
}

/// One delivery in the works; ends when it is dropped.
#[derive(Debug)]
pub struct InFlight {
    health: Health,
    number: u64,
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.health.locked().in_flight.remove(&self.number);
    }
}

impl Health {
    /// The session that takes jobs.
    pub fn set_broker(&self, state: Result<(), String>) {
        self.locked().broker = state;
    }

    /// The connection that publishes.
    pub fn set_publishing(&self, state: Result<(), String>) {
        self.locked().publishing = state;
    }

    /// The ledger.
    pub fn set_ledger(&self, state: Result<(), String>) {
        self.locked().ledger = state;
    }

    /// Creem's opinion of the key.
    pub fn set_key(&self, state: Result<(), String>) {
        self.locked().key = state;
    }

    /// How fast Creem is asked, and for how long it has not been because at least half of the last calls failed.
    pub fn set_calls(&self, rate: Rate, circuit: Option<OpenCircuit>) {
        let mut parts = self.locked();
        parts.rate = rate;
        parts.circuit = circuit;
    }

    /// See [`Health::set_calls`].
    #[must_use]
    pub fn calls(&self) -> (Rate, Option<OpenCircuit>) {
        let parts = self.locked();
        (parts.rate.clone(), parts.circuit)
    }

    /// The lanes that an operator has paused.
    pub fn set_paused_lanes(&self, lanes: Vec<Lane>) {
        self.locked().paused_lanes = lanes;
    }

    /// See [`Health::set_paused_lanes`].
    #[must_use]
    pub fn paused_lanes(&self) -> Vec<Lane> {
        self.locked().paused_lanes.clone()
    }

    /// The worker stops: no longer ready.
    pub fn set_stopping(&self) {
        self.locked().stopping = true;
    }

    /// A delivery is being worked on.
    #[must_use]
    pub fn begin(&self, lane: Lane) -> InFlight {
        let mut parts = self.locked();
        let number = parts.next;
        parts.next += 1;
        parts.in_flight.insert(number, (lane, Instant::now()));
        drop(parts);
        InFlight { health: self.clone(), number }
    }

    /// How many deliveries of a lane are in the works.
    #[must_use]
    pub fn in_flight(&self, lane: Lane) -> usize {
        self.locked().in_flight.values().filter(|(of, _)| *of == lane).count()
    }

    /// Age of the oldest delivery in the works; zero without one.
    #[must_use]
    pub fn oldest(&self) -> Duration {
        self.locked().in_flight.values().map(|(_, since)| since.elapsed()).max().unwrap_or_default()
    }

    /// Why the worker is not ready, a sentence each; nothing if it is.
    #[must_use]
    pub fn not_ready(&self) -> Vec<String> {
        let parts = self.locked();
        if parts.stopping {
            // All the rest follows from it.
            return vec!["the worker is stopping".to_owned()];
        }
        let named = [
            ("broker", &parts.broker),
            ("publishing", &parts.publishing),
            ("ledger", &parts.ledger),
            ("creem key", &parts.key),
        ];
        named
            .into_iter()
            .filter_map(|(name, state)| state.as_ref().err().map(|why| format!("{name}: {why}")))
            .collect()
    }

    fn locked(&self) -> MutexGuard<'_, Parts> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
