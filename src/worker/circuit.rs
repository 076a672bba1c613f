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
}

impl Default for Circuit {
    fn default() -> Self {
        let now = Instant::now();
        Self {
            breaker: Mutex::new(Breaker::new(now)),
            repeats: Mutex::new(RetryBudget::new(now)),
            due: watch::Sender::new(None),
            right: Notify::new(),
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
                metrics::circuit_open(false);
                pacer.restart();
                gate.open(Reason::Circuit);
                tracing::info!("Creem is back; intake goes on, slowly at first");
            }
        }
    }

    /// Takes a repeat from the budget, and says how long it has to wait for it.
    pub fn repeat(&self) -> Duration {
        self.repeats().take(Instant::now())
    }

    /// For how long the circuit has been open, if it is.
    #[must_use]
    pub fn open_for(&self) -> Option<Duration> {
        self.breaker().open_for(Instant::now())
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

    fn breaker(&self) -> MutexGuard<'_, Breaker> {
        self.breaker.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn repeats(&self) -> MutexGuard<'_, RetryBudget> {
        self.repeats.lock().unwrap_or_else(PoisonError::into_inner)
    }
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
}
