//! The circuit breaker between jobs and Creem, and the retry budget: what all journeys of a worker
//! know together of how Creem is.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::FutureExt as _;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use super::gate::{Gate, Reason};
use crate::creem::Answer;
use crate::job::Lane;
use crate::observe::health::OpenCircuit;
use crate::observe::metrics;
use crate::pace::Pacer;
use crate::pace::breaker::{Breaker, Change};
use crate::pace::retry_budget::RetryBudget;
use crate::retry::backoff;

/// For how long after its last failed call, beyond what a call may take, a worker still tells the others that Creem is
/// down: longer than the longest pause between probes, so that its word does not lapse between two of them.
const WORD_HOLDS: Duration = Duration::from_secs(10);
/// How often a worker that is held by another one's word looks for itself, at most: it may be the other one's own way
/// to Creem that is broken.
const LOOK_FOR_ITSELF: Duration = Duration::from_secs(5);
/// For how long a worker that has seen Creem answer believes no other one; twice as long each time, as the other one's
/// own way to Creem may stay broken.
const BELIEVES_ITSELF: Duration = Duration::from_secs(30);
/// And no longer.
const BELIEVES_ITSELF_MOST: Duration = Duration::from_mins(8);

/// Follows the answers of all jobs, and holds calls back while Creem is down.
#[derive(Debug)]
pub struct Circuit {
    /// All that holds or opens the gate here changes under this lock, the gate included.
    state: Mutex<State>,
    retries: Mutex<RetryBudget>,
    /// When the next probe is due; `None` while the circuit is closed.
    due: watch::Sender<Option<Instant>>,
    /// The right to be the probe.
    right: Notify,
    /// How long a call may take.
    request_timeout: Duration,
}

#[derive(Debug)]
struct State {
    breaker: Breaker,
    /// When a call of this worker's last showed that Creem is down.
    found_at: Option<Instant>,
    /// Since when another worker finds Creem down.
    by_others: Option<Instant>,
    /// Whether a call of its own has failed since.
    bears_them_out: bool,
    /// Until when it believes no other worker.
    believes_itself_until: Option<Instant>,
    /// For how long it will when it has seen Creem answer again.
    believes_itself: Duration,
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
    /// One that is closed, where a call may take so long.
    #[must_use]
    pub fn new(request_timeout: Duration) -> Self {
        let now = Instant::now();
        let state = State {
            breaker: Breaker::new(now),
            found_at: None,
            by_others: None,
            bears_them_out: false,
            believes_itself_until: None,
            believes_itself: BELIEVES_ITSELF,
        };
        Self {
            state: Mutex::new(state),
            retries: Mutex::new(RetryBudget::new(now)),
            due: watch::Sender::new(None),
            right: Notify::new(),
            request_timeout,
        }
    }

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
        self.retries().deposit(now);
        // To be asked to slow down is no failure, and what a single job is refused says nothing about others.
        let failed = matches!(answer, Answer::NotMade { .. } | Answer::Unknown { .. });
        let chance = backoff::chance();
        let mut state = self.state();
        let is_probe = probe.is_some();
        let outcome = match probe {
            Some(mut probe) => {
                probe.used = true;
                state.breaker.note_probe(failed, now, chance)
            }
            None => state.breaker.note(failed, now, chance),
        };
        match outcome {
            // Held by another one's word alone: it has looked for itself.
            Change::Same if is_probe && state.by_others.is_some() => {
                if failed {
                    state.bears_them_out = true;
                    self.due.send_replace(Some(now + LOOK_FOR_ITSELF));
                } else {
                    self.close(&mut state, now, gate, pacer);
                }
            }
            Change::Same => {}
            Change::Pause(pause) => {
                if state.found_at.is_none() {
                    self.forget_right();
                }
                (state.found_at, state.bears_them_out) = (Some(now), true);
                state.believes_itself = BELIEVES_ITSELF;
                self.due.send_replace(Some(now + pause));
                metrics::circuit_open(true);
                if gate.close(Reason::Circuit) {
                    tracing::error!(
                        "intake is paused: at least half of the last calls to Creem failed. Jobs wait unharmed; one call now and then shows whether Creem is back. Check the network and Creem's status page"
                    );
                }
            }
            Change::Closed => self.close(&mut state, now, gate, pacer),
        }
    }

    /// Creem has answered this worker: whatever others say.
    fn close(&self, state: &mut State, now: Instant, gate: &Gate, pacer: &Pacer) {
        state.believes_itself_until = Some(now + state.believes_itself);
        if !state.bears_them_out {
            state.believes_itself = (state.believes_itself * 2).min(BELIEVES_ITSELF_MOST);
            self.hold_no_more(state, gate);
            tracing::info!("Creem answers this worker, whatever another one finds; intake goes on");
            return;
        }
        self.go_on(state, gate, pacer);
    }

    fn go_on(&self, state: &mut State, gate: &Gate, pacer: &Pacer) {
        pacer.restart();
        self.hold_no_more(state, gate);
        tracing::info!("Creem is back; intake goes on, slowly at first");
    }

    fn hold_no_more(&self, state: &mut State, gate: &Gate) {
        (state.found_at, state.by_others, state.bears_them_out) = (None, None, false);
        self.due.send_replace(None);
        metrics::circuit_open(false);
        gate.open(Reason::Circuit);
    }

    /// Forgets the right to be the probe that nobody has used while the circuit was open before.
    fn forget_right(&self) {
        let _unused = self.right.notified().now_or_never();
    }

    /// Whether this worker's own calls show that Creem is down. It holds no longer than they are made: a worker
    /// without a job, without a broker or with a refused key has nothing to say.
    #[must_use]
    pub fn finds_creem_down(&self) -> bool {
        self.state()
            .found_at
            .is_some_and(|found_at| found_at.elapsed() < WORD_HOLDS + self.request_timeout)
    }

    /// Hears whether another worker finds Creem down: each would need a hundred calls of its own to find out.
    pub fn hear(&self, down: bool, gate: &Gate, pacer: &Pacer) {
        let now = Instant::now();
        let mut state = self.state();
        // What this one has told comes back to it.
        if state.breaker.open_for(now).is_some() {
            state.by_others = None;
            return;
        }
        let down = down && state.believes_itself_until.is_none_or(|until| now >= until);
        if state.by_others.is_some() == down {
            return;
        }
        if !down {
            return self.go_on(&mut state, gate, pacer);
        }
        state.by_others = Some(now);
        self.forget_right();
        let look = LOOK_FOR_ITSELF.mul_f64(0.5 + backoff::chance() / 2.0);
        self.due.send_replace(Some(now + look));
        metrics::circuit_open(true);
        if gate.close(Reason::Circuit) {
            tracing::warn!(
                "intake is paused: another worker of this ledger finds that at least half of its last calls to Creem failed"
            );
        }
    }

    /// How long a retry has to wait; none where that is longer than `most`. See [`RetryBudget::promise`].
    #[must_use]
    pub fn promise_retry(&self, lane: Lane, most: Duration) -> Option<Duration> {
        self.retries().promise(lane, most, Instant::now())
    }

    /// Takes a retry that is made now; says whether there was one.
    #[must_use]
    pub fn spend_retry(&self, lane: Lane) -> bool {
        self.retries().spend(lane, Instant::now())
    }

    /// For how long the circuit has been open, if it is, and who has found Creem down.
    #[must_use]
    pub fn open_for(&self) -> Option<OpenCircuit> {
        let (now, state) = (Instant::now(), self.state());
        let own = state.breaker.open_for(now).map(|time| OpenCircuit { time, by_others: false });
        let others = state.by_others.map(|since| now.saturating_duration_since(since));
        own.or(others.map(|time| OpenCircuit { time, by_others: true }))
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

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn retries(&self) -> MutexGuard<'_, RetryBudget> {
        self.retries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

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
        let circuit = Circuit::new(Duration::from_secs(10));
        for _ in 0..FEWEST {
            circuit.note(&failed(), None, &gate, &pacer);
        }
        assert!(gate.is_held_only_by(Reason::Circuit));
        (circuit, gate, pacer)
    }

    #[tokio::test(start_paused = true)]
    async fn one_probe_after_another_until_creem_is_back() {
        let (circuit, gate, pacer) = open();
        let before = pacer.explain().0;
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
        let rate = pacer.explain().0;
        assert!(rate <= before / 9.0, "it begins slowly: {rate} of {before}");
    }

    #[tokio::test(start_paused = true)]
    async fn neither_slow_down_nor_what_single_jobs_are_refused_opens_it() {
        let gate = Gate::recording(Arc::new(SystemClock), Pauses::default(), |_, _| {});
        let pacer = Pacer::new(Limits { ceiling: None, bulk_share: 0.05 });
        let circuit = Circuit::new(Duration::from_secs(10));
        let refused = Answer::Refused(Problem::new("creem_rejected", "no such product"));
        for answer in [Answer::Throttled { retry_after: None }, refused] {
            for _ in 0..2 * FEWEST {
                circuit.note(&answer, None, &gate, &pacer);
            }
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
    async fn what_another_worker_finds_holds_this_one_until_it_has_seen_for_itself() {
        let gate = Gate::recording(Arc::new(SystemClock), Pauses::default(), |_, _| {});
        let pacer = Pacer::new(Limits { ceiling: None, bulk_share: 0.05 });
        let circuit = Circuit::new(Duration::from_secs(10));
        circuit.hear(true, &gate, &pacer);
        assert!(gate.is_held_only_by(Reason::Circuit) && !circuit.finds_creem_down());
        assert!(circuit.open_for().unwrap().by_others);
        circuit.hear(false, &gate, &pacer);
        assert!(gate.is_open(), "it is over when nobody says so any more");

        // The other one's own way is broken, and it says so for ever.
        circuit.hear(true, &gate, &pacer);
        let looks = async {
            let probe = circuit.probe(&gate).await;
            circuit.note(&failed(), Some(probe), &gate, &pacer);
            assert!(!gate.is_open() && !circuit.finds_creem_down());
            let probe = circuit.probe(&gate).await;
            let refused = Answer::Refused(Problem::new("creem_rejected", "no such product"));
            circuit.note(&refused, Some(probe), &gate, &pacer);
        };
        tokio::select! {
            () = looks => {}
            () = circuit.keep_time() => unreachable!("it never ends"),
            () = tokio::time::sleep(Duration::from_secs(30)) => panic!("it never looked for itself"),
        }
        assert!(gate.is_open());
        circuit.hear(true, &gate, &pacer);
        assert!(gate.is_open(), "it has seen Creem answer");
        tokio::time::advance(BELIEVES_ITSELF).await;
        circuit.hear(true, &gate, &pacer);
        assert!(!gate.is_open());
    }

    #[tokio::test(start_paused = true)]
    async fn what_only_another_worker_finds_slows_this_one_hardly_and_ever_more_seldom() {
        let gate = Gate::recording(Arc::new(SystemClock), Pauses::default(), |_, _| {});
        let pacer = Pacer::new(Limits { ceiling: Some(1_000.0), bulk_share: 0.05 });
        let rate = pacer.explain().0;
        let circuit = Circuit::new(Duration::from_secs(10));
        let mut looked = 0;
        let looks = async {
            loop {
                circuit.hear(true, &gate, &pacer);
                if gate.is_open() {
                    tokio::time::sleep(Duration::from_secs(1)).await;
                    continue;
                }
                let probe = circuit.probe(&gate).await;
                let answered = Answer::Throttled { retry_after: None };
                circuit.note(&answered, Some(probe), &gate, &pacer);
                assert!(pacer.explain().0 >= rate, "Creem was never away");
                looked += 1;
            }
        };
        tokio::select! {
            () = looks => {}
            () = circuit.keep_time() => unreachable!("it never ends"),
            () = tokio::time::sleep(Duration::from_hours(1)) => {}
        }
        assert!((8..=12).contains(&looked), "{looked} times in an hour");
    }

    #[tokio::test(start_paused = true)]
    async fn a_right_to_probe_that_was_not_used_is_forgotten() {
        let gate = Gate::recording(Arc::new(SystemClock), Pauses::default(), |_, _| {});
        let pacer = Pacer::new(Limits { ceiling: None, bulk_share: 0.05 });
        let circuit = Circuit::new(Duration::from_secs(10));
        circuit.hear(true, &gate, &pacer);
        tokio::select! {
            probe = circuit.probe(&gate) => {
                circuit.hear(false, &gate, &pacer);
                drop(probe);
            }
            () = circuit.keep_time() => unreachable!("it never ends"),
        }
        for _ in 0..FEWEST {
            circuit.note(&failed(), None, &gate, &pacer);
        }
        assert!(circuit.probe(&gate).now_or_never().is_none(), "its pause is not over");
    }

    #[tokio::test(start_paused = true)]
    async fn a_worker_that_makes_no_probe_has_nothing_to_say_after_a_while() {
        let (circuit, gate, pacer) = open();
        // Its own finding outlives what it hears, and what it told does not come back to it.
        circuit.hear(true, &gate, &pacer);
        circuit.hear(false, &gate, &pacer);
        assert!(gate.is_held_only_by(Reason::Circuit) && circuit.finds_creem_down());
        tokio::time::advance(WORD_HOLDS + circuit.request_timeout).await;
        assert!(!circuit.finds_creem_down());
    }
}
