//! The circuit breaker between jobs and Creem, and the budget of repeats: what all journeys of a worker
//! know together of how Creem is.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use super::gate::{Gate, Reason};
use crate::creem::Answer;
use crate::observe::metrics;
use crate::pace::Pacer;
use crate::pace::breaker::{Breaker, Change};
use crate::pace::repeats::RetryBudget;
use crate::retry::backoff;

/// Follows the answers of all jobs, and holds calls back while Creem is down.
#[derive(Debug)]
pub struct Circuit {
    breaker: Mutex<Breaker>,
    repeats: Mutex<RetryBudget>,
    /// When the next probe is due; `None` while the circuit is closed.
    due: watch::Sender<Option<Instant>>,
    /// The right to be the probe.
    right: Notify,
    /// Since when another worker finds Creem down: it makes the probes, and this one waits.
    by_others: Mutex<Option<Instant>>,
}

impl Default for Circuit {
    fn default() -> Self {
        let now = Instant::now();
        Self {
            breaker: Mutex::new(Breaker::new(now)),
            repeats: Mutex::new(RetryBudget::new(now)),
            due: watch::Sender::new(None),
            right: Notify::new(),
            by_others: Mutex::default(),
        }
    }
}

/// The right to make the one call that shows whether Creem is back; somebody else's if it is not used.
#[derive(Debug)]
pub struct Probe<'a> {
    circuit: &'a Circuit,
    used: bool,
}

impl Drop for Probe<'_> {
    fn drop(&mut self) {
        if !self.used {
            self.circuit.right.notify_one();
        }
    }
}

impl Circuit {
    /// Waits for the right to be the probe, while nothing but an open circuit holds the gate.
    pub async fn probe(&self, gate: &Gate) -> Probe<'_> {
        loop {
            gate.held_only_by(Reason::Circuit).await;
            self.right.notified().await;
            let probe = Probe { circuit: self, used: false };
            if gate.is_held_only_by(Reason::Circuit) {
                return probe;
            }
        }
    }

    /// Takes note of what a call came to.
    pub fn note(&self, answer: &Answer, probe: Option<Probe<'_>>, gate: &Gate, pacer: &Pacer) {
        let now = Instant::now();
        self.repeats().call(now);
        // To be asked to slow down is no failure, and what a single job is refused says nothing about others.
        let failed = matches!(answer, Answer::NotMade { .. } | Answer::Unknown { .. });
        let chance = backoff::chance();
        let outcome = match probe {
            Some(mut probe) => {
                probe.used = true;
                self.breaker().note_probe(failed, now, chance)
            }
            None => self.breaker().note(failed, now, chance),
        };
        match outcome {
            Change::Same => {}
            Change::Pause(pause) => {
                self.due.send_replace(Some(now + pause));
                metrics::circuit_open(true);
                if gate.close(Reason::Circuit) {
                    tracing::error!(
                        "intake is paused: at least half of the last calls to Creem failed. Jobs wait unharmed; one call now and then shows whether Creem is back. Check the network and Creem's status page"
                    );
                }
            }
            Change::Closed => {
                self.due.send_replace(None);
                if self.by_others().is_none() {
                    go_on(gate, pacer);
                }
            }
        }
    }

    /// Whether this worker's own calls show that Creem is down.
    #[must_use]
    pub fn finds_creem_down(&self) -> bool {
        self.due.borrow().is_some()
    }

    /// Hears whether another worker finds Creem down: each would need calls of its own to find out.
    pub fn hear(&self, down: bool, gate: &Gate, pacer: &Pacer) {
        // What this one has told comes back to it.
        let down = down && !self.finds_creem_down();
        {
            let mut by_others = self.by_others();
            if by_others.is_some() == down {
                return;
            }
            *by_others = down.then(Instant::now);
        }
        if down {
            metrics::circuit_open(true);
            if gate.close(Reason::Circuit) {
                tracing::warn!(
                    "intake is paused: another worker of this ledger finds that most calls to Creem fail"
                );
            }
        } else if !self.finds_creem_down() {
            go_on(gate, pacer);
        }
    }

    /// Takes a repeat from the budget, and says how long it has to wait for it.
    pub fn repeat(&self) -> Duration {
        self.repeats().take(Instant::now())
    }

    /// For how long the circuit has been open, if it is.
    #[must_use]
    pub fn open_for(&self) -> Option<Duration> {
        let now = Instant::now();
        let by_others = self.by_others().map(|since| now.saturating_duration_since(since));
        self.breaker().open_for(now).or(by_others)
    }

    /// Gives the right to be the probe whenever one is due; never ends.
    pub async fn keep_time(&self) {
        let mut due = self.due.subscribe();
        loop {
            let at = *due.borrow_and_update();
            let wait = async {
                match at {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                // The sender lives as long as `self`.
                _ = due.changed() => continue,
                () = wait => self.right.notify_one(),
            }
            drop(due.changed().await);
        }
    }

    fn by_others(&self) -> MutexGuard<'_, Option<Instant>> {
        self.by_others.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn breaker(&self) -> MutexGuard<'_, Breaker> {
        self.breaker.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn repeats(&self) -> MutexGuard<'_, RetryBudget> {
        self.repeats.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Creem is back.
fn go_on(gate: &Gate, pacer: &Pacer) {
    metrics::circuit_open(false);
    pacer.restart();
    gate.open(Reason::Circuit);
    tracing::info!("Creem is back; intake goes on, slowly at first");
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use futures::FutureExt as _;

    use super::*;
    use crate::clock::SystemClock;
    use crate::job::Problem;
    use crate::pace::Limits;
    use crate::pace::breaker::FEWEST;
    use crate::retry::Pauses;

    fn failed() -> Answer {
        Answer::NotMade { reason: "connection refused".to_owned() }
    }

    /// A circuit that is open, and what it works on.
    fn open() -> (Circuit, Gate, Pacer) {
        let gate = Gate::recording(Arc::new(SystemClock), Pauses::default(), |_, _| {});
        let pacer = Pacer::new(Limits { ceiling: None, bulk_share: 0.05 });
        let circuit = Circuit::default();
        for _ in 0..FEWEST {
            circuit.note(&failed(), None, &gate, &pacer);
        }
        assert!(gate.is_held_only_by(Reason::Circuit));
        (circuit, gate, pacer)
    }

    #[tokio::test(start_paused = true)]
    async fn one_probe_after_another_until_creem_is_back() {
        let (circuit, gate, pacer) = open();
        let work = async {
            for _ in 0..5 {
                let probe = circuit.probe(&gate).await;
                assert!(circuit.probe(&gate).now_or_never().is_none(), "one at a time");
                circuit.note(&failed(), Some(probe), &gate, &pacer);
            }
            let probe = circuit.probe(&gate).await;
            // What one job is refused shows that Creem answers.
            let refused = Answer::Refused(Problem::new("creem_rejected", "no such product"));
            circuit.note(&refused, Some(probe), &gate, &pacer);
        };
        tokio::select! {
            () = work => {}
            () = circuit.keep_time() => unreachable!("it never ends"),
            () = tokio::time::sleep(Duration::from_secs(60)) => panic!("no more probes came"),
        }
        assert!(gate.is_open() && circuit.open_for().is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_probe_that_is_given_up_is_somebody_elses() {
        let (circuit, gate, _pacer) = open();
        let work = async {
            drop(circuit.probe(&gate).await);
            assert!(circuit.probe(&gate).now_or_never().is_some(), "at once, not at the next");
        };
        tokio::select! {
            () = work => {}
            () = circuit.keep_time() => unreachable!("it never ends"),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_probe_waits_for_whatever_else_holds_the_gate() {
        let (circuit, gate, _pacer) = open();
        gate.close(Reason::Ledger);
        let work = async {
            let held = tokio::time::timeout(Duration::from_secs(60), circuit.probe(&gate));
            assert!(held.await.is_err());
            gate.open(Reason::Ledger);
            circuit.probe(&gate).await;
        };
        tokio::select! {
            () = work => {}
            () = circuit.keep_time() => unreachable!("it never ends"),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_another_worker_finds_holds_this_one_and_it_makes_no_probe() {
        let gate = Gate::recording(Arc::new(SystemClock), Pauses::default(), |_, _| {});
        let pacer = Pacer::new(Limits { ceiling: None, bulk_share: 0.05 });
        let circuit = Circuit::default();
        circuit.hear(true, &gate, &pacer);
        assert!(gate.is_held_only_by(Reason::Circuit) && !circuit.finds_creem_down());
        tokio::select! {
            _ = circuit.probe(&gate) => panic!("it made a probe of its own"),
            () = circuit.keep_time() => unreachable!("it never ends"),
            () = tokio::time::sleep(Duration::from_secs(60)) => {}
        }
        circuit.hear(false, &gate, &pacer);
        assert!(gate.is_open());

        // Its own finding outlives what it hears, and what it told does not come back to it.
        let (circuit, gate, pacer) = open();
        circuit.hear(true, &gate, &pacer);
        circuit.hear(false, &gate, &pacer);
        assert!(gate.is_held_only_by(Reason::Circuit) && circuit.finds_creem_down());
    }
}
