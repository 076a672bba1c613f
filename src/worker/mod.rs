//! The work: takes deliveries lane by lane, bounded by permits, and brings each to its end.
//!
//! [`intake`] reads, [`journey`] decides, [`settle`] acts; this file keeps them going: sessions
//! with the broker that come back for ever, the watchers that close and open the [`gate`], and
//! an end that loses nothing.

pub mod gate;
pub mod intake;
pub mod journey;
pub mod settle;
pub mod turns;
mod watch;

use std::collections::VecDeque;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt as _;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::clock::SharedClock;
use crate::job::{Lane, Status};
use crate::ledger::{Command, Ledger};
use crate::observe::health::Health;
use crate::observe::metrics;
use crate::rabbit::consumer::{OpenError, Plan};
use crate::rabbit::{Delivery, LinkError, Session};
use crate::retry::{Backoff, backoff};
use gate::{Gate, Reason};
use intake::{Intake, Read, Unfit};
use journey::{Journey, Verdict};
use settle::{Settler, Summary};

/// After this long a session is taken for a good one.
const LONG_SESSION: Duration = Duration::from_secs(30);

/// While deliveries are taken one at a time, the longest pause between two sessions: every job
/// waits behind the one that breaks them, until the delivery limit has taken it away.
const CAREFUL_PAUSE: Duration = Duration::from_millis(250);
/// Beyond a call to Creem: how long what was sent may take to be settled when everything ends.
const SETTLING: Duration = Duration::from_secs(5);

/// What has been decided about a new ledger.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Adoption {
    /// No job has come yet.
    Undecided,
    /// It serves.
    Adopted,
    /// It met jobs that another ledger may know.
    Refused,
}

/// Whether deliveries are taken one at a time, because one of them breaks the connection.
///
/// A message that lapin cannot read ends the connection, and the broker counts that against
/// every delivery that was out. One at a time, it is counted against the culprit alone, which
/// the delivery limit then takes away.
#[derive(Debug, Default)]
struct Care {
    garbled: bool,
    short: u32,
}

impl Care {
    fn needed(&self) -> bool {
        self.garbled || self.short >= 3
    }

    /// Learns from a session's end. Often the real reason shows only as a session that is over
    /// before it has begun.
    fn note(&mut self, ended: &LinkError, lasted: Duration) {
        if lasted >= LONG_SESSION {
            *self = Self::default();
        } else {
            self.garbled |= matches!(ended, LinkError::Garbled(_));
            self.short += 1;
        }
    }
}

/// A lane and how many of its jobs may be in the works at once.
#[derive(Debug, Clone, Copy)]
pub struct LaneSize {
    /// Which.
    pub lane: Lane,
    /// How many.
    pub concurrency: u16,
}

/// Why the worker ended by itself. Each says what to do.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Fatal {
    /// See the text.
    #[error(
        "the ledger is new, but the broker redelivers jobs that some worker had taken before: links of theirs may exist that this ledger does not know. Restore the old ledger, or start with --accept-empty-ledger if it is right that there is none"
    )]
    EmptyLedger,
    /// Something that everything depends on is broken.
    #[error("{0}")]
    Broken(String),
}

/// Everything that serves.
pub struct Worker {
    /// The broker's side.
    pub plan: Plan,
    /// The lanes.
    pub lanes: Vec<LaneSize>,
    /// Reads deliveries.
    pub intake: Intake,
    /// Decides.
    pub journey: Journey<dyn Ledger>,
    /// Acts.
    pub settler: Settler,
    /// Between two tries to reach the broker.
    pub backoff: Backoff,
    /// How long outcomes are kept.
    pub retention: Duration,
    /// What `/readyz` says.
    pub health: Health,
    /// Wall-clock time.
    pub clock: SharedClock,
    /// Whether a new ledger may meet redelivered jobs.
    pub accept_empty_ledger: bool,
}

impl std::fmt::Debug for Worker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Worker").field("lanes", &self.lanes).finish_non_exhaustive()
    }
}

/// What the tasks of a worker share.
struct Shared {
    worker: Worker,
    gate: Arc<Gate>,
    jobs: TaskTracker,
    permits: Vec<(LaneSize, Arc<Semaphore>)>,
    stop: CancellationToken,
    /// What has been decided about a new ledger.
    adoption: tokio::sync::Mutex<Adoption>,
    /// Set once; ends everything.
    fatal: tokio::sync::watch::Sender<Option<Fatal>>,
}

impl Worker {
    /// Serves until `stop` is cancelled, then finishes what was sent.
    ///
    /// `now` ends it at once: what was not settled will be delivered again.
    ///
    /// # Errors
    /// See [`Fatal`].
    pub async fn run(self, stop: CancellationToken, now: CancellationToken) -> Result<(), Fatal> {
        let gate = self.journey.gate.clone();
        gate.close(Reason::Broker);
        let permits = self
            .lanes
            .iter()
            .map(|size| (*size, Arc::new(Semaphore::new(usize::from(size.concurrency)))))
            .collect();
        let shared = Arc::new(Shared {
            worker: self,
            gate,
            jobs: TaskTracker::new(),
            permits,
            stop: stop.clone(),
            adoption: tokio::sync::Mutex::new(Adoption::Undecided),
            fatal: tokio::sync::watch::Sender::new(None),
        });
        let mut watchers = JoinSet::new();
        watch::spawn_all(&shared, &mut watchers);
        let mut fatal = shared.fatal.subscribe();
        let broken = async {
            drop(fatal.wait_for(Option::is_some).await);
            // What was sent may still be settled; where it cannot be, this is not waited out.
            shared.stop.cancel();
            tokio::time::sleep(shared.worker.journey.rules.request_timeout + SETTLING).await;
        };
        tokio::select! {
            () = shared.clone().keep_sessions() => {}
            () = now.cancelled() => {}
            () = broken => {}
        }
        watchers.shutdown().await;
        let ended = shared.fatal.borrow().clone();
        ended.map_or(Ok(()), Err)
    }
}

impl Shared {
    /// Session after session, until the stop; then what was sent is finished.
    async fn keep_sessions(self: Arc<Self>) {
        let session = self.sessions_until_the_stop().await;
        tracing::info!(jobs = self.jobs.len(), "stopping: finishing what was sent");
        self.jobs.close();
        self.jobs.wait().await;
        if let Some(session) = session {
            session.close().await;
        }
        tracing::info!("stopped");
    }

    /// The last session, if there is one at the stop.
    async fn sessions_until_the_stop(self: &Arc<Self>) -> Option<Arc<Session>> {
        let mut failures = 0;
        let mut care = Care::default();
        while !self.stop.is_cancelled() {
            let opened = tokio::select! {
                opened = self.open_session() => opened,
                () = self.stop.cancelled() => return None,
            };
            let reason = match opened {
                Ok(session) => {
                    let session = Arc::new(session);
                    let began = Instant::now();
                    let ended = self.serve(&session, care.needed()).await;
                    self.not_consuming("the session with the broker is over");
                    if self.stop.is_cancelled() {
                        return Some(session);
                    }
                    session.close().await;
                    care.note(&ended, began.elapsed());
                    if began.elapsed() > LONG_SESSION {
                        failures = 0;
                    }
                    ended.to_string()
                }
                Err(error) => {
                    if let OpenError::Guarded(..) = error {
                        self.worker.health.set_waiting(Some(error.to_string()));
                    }
                    error.to_string()
                }
            };
            failures += 1;
            let delay = self.worker.backoff.delay(failures, None, backoff::chance());
            let delay = if care.needed() { delay.min(CAREFUL_PAUSE) } else { delay };
            self.worker.health.set_broker(Err(reason.clone()));
            tracing::warn!(
                reason,
                retry_in_ms = u64::try_from(delay.as_millis()).unwrap_or(u64::MAX),
                "not consuming; trying again"
            );
            tokio::select! {
                () = tokio::time::sleep(delay) => {}
                () = self.stop.cancelled() => {}
            }
        }
        None
    }

    /// Opens a session, once there is a use for one: deliveries that are taken only to be held
    /// through a pause would count against their delivery limit when the broker takes them back.
    async fn open_session(&self) -> Result<Session, OpenError> {
        self.gate.free_of(Reason::Ledger).await;
        self.gate.free_of(Reason::Publishing).await;
        Session::open(&self.worker.plan).await
    }

    /// Consumes every lane until one of them breaks; returns why.
    ///
    /// `careful` takes one delivery at a time: the last session broke over a message that cannot
    /// be read, and each break counts against every delivery that was out.
    async fn serve(self: &Arc<Self>, session: &Arc<Session>, careful: bool) -> LinkError {
        let mut lanes = JoinSet::new();
        // What a new ledger's first session is redelivered was taken by a worker with another one.
        let fresh = self.worker.journey.ledger.identity().empty
            && !self.worker.accept_empty_ledger
            && *self.adoption.lock().await != Adoption::Adopted;
        let (subscribed, mut subscriptions) = mpsc::channel(self.permits.len());
        for (size, permits) in &self.permits {
            let lane = LaneLoop {
                shared: self.clone(),
                session: session.clone(),
                lane: size.lane,
                prefetch: if careful { 1 } else { size.concurrency },
                permits: permits.clone(),
                fresh,
            };
            lanes.spawn(lane.run(subscribed.clone()));
        }
        drop(subscribed);
        let all_subscribed = async {
            for _ in &self.permits {
                // A lane that fails instead ends the session; nothing more comes then.
                if subscriptions.recv().await.is_none() {
                    return std::future::pending().await;
                }
            }
        };
        let ended = tokio::select! {
            ended = lanes.join_next() => ended,
            () = async { all_subscribed.await; self.consuming(); std::future::pending().await } => None,
            () = tokio::time::sleep(LONG_SESSION), if careful => {
                Some(Ok(Some(LinkError::Broken("taking many deliveries at a time again".to_owned()))))
            }
        };
        let reason = match ended {
            Some(Ok(Some(error))) => error,
            Some(Ok(None)) | None => LinkError::Broken("stopping".to_owned()),
            Some(Err(error)) => LinkError::Broken(format!("a lane's task died: {error}")),
        };
        if self.stop.is_cancelled() {
            // Each lane gives back what it has not begun.
            while lanes.join_next().await.is_some() {}
        } else {
            session.over.cancel();
            lanes.shutdown().await;
        }
        reason
    }

    /// Holds the empty-ledger guard, and takes note once that a new ledger serves.
    ///
    /// `fresh` says that the session is the first that serves with a new ledger: what is
    /// redelivered in it was taken by a worker with another ledger.
    async fn may_serve(&self, delivery: &Delivery, fresh: bool) -> bool {
        let ledger = &self.worker.journey.ledger;
        if !ledger.identity().empty {
            return true;
        }
        // Held over the write, so that no lane's yes can come after another lane's no.
        let mut adoption = self.adoption.lock().await;
        if *adoption == Adoption::Refused {
            return false;
        }
        if fresh && self.worker.intake.was_taken_before(delivery) {
            *adoption = Adoption::Refused;
            // Until an operator has decided, the next start must ask again.
            drop(ledger.execute(Command::Adopt(false)).await);
            self.end(Fatal::EmptyLedger);
            return false;
        }
        if *adoption == Adoption::Undecided {
            // A ledger that cannot be written pauses the job that follows, and says so; the next
            // one tries again.
            if ledger.execute(Command::Adopt(true)).await.is_ok() {
                *adoption = Adoption::Adopted;
            }
        }
        true
    }

    fn consuming(&self) {
        self.worker.health.set_broker(Ok(()));
        self.worker.health.set_waiting(None);
        for size in &self.worker.lanes {
            metrics::consuming(size.lane, true);
        }
        metrics::broker_connected(true);
        tracing::info!(lanes = ?self.worker.lanes.iter().map(|size| size.lane.as_str()).collect::<Vec<_>>(), "consuming");
        self.worker.journey.reopen(Reason::Broker);
    }

    fn not_consuming(&self, why: &str) {
        self.gate.close(Reason::Broker);
        metrics::paused(Reason::Broker.as_str(), true);
        for size in &self.worker.lanes {
            metrics::consuming(size.lane, false);
        }
        metrics::broker_connected(false);
        self.worker.health.set_broker(Err(why.to_owned()));
    }

    fn end(&self, fatal: Fatal) {
        tracing::error!(error = %fatal, "stopping: going on would not be safe");
        self.fatal.send_modify(|slot| {
            slot.get_or_insert(fatal);
        });
    }

    /// One delivery, from its arrival to its ack.
    async fn handle(
        self: Arc<Self>,
        delivery: Delivery,
        permits: Arc<Semaphore>,
        permit: OwnedSemaphorePermit,
    ) {
        let started = Instant::now();
        let lane = delivery.lane;
        let _in_flight = self.worker.health.begin(lane);
        let handled =
            AssertUnwindSafe(self.bring_to_its_end(&delivery, &permits)).catch_unwind().await;
        let (key, summary) = match handled {
            Ok(done) => done,
            Err(_panic) => {
                // The hook has logged it. One job is set aside; the others go on.
                let left = self.worker.settler.park_panicked(&delivery).await;
                (
                    None,
                    Summary {
                        verdict: "parked",
                        code: Some("worker_panicked".into()),
                        attempts: 0,
                        left,
                    },
                )
            }
        };
        drop(permit);
        metrics::job(lane, summary.verdict, started.elapsed());
        let duration_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
        tracing::info!(
            job.key = key.as_deref().unwrap_or("-"),
            job.lane = lane.as_str(),
            attempt = summary.attempts,
            verdict = summary.verdict,
            code = summary.code.as_deref().unwrap_or(""),
            acked = summary.left == settle::Left::Acked,
            duration_ms,
            "job"
        );
    }

    async fn bring_to_its_end(
        &self,
        delivery: &Delivery,
        permits: &Arc<Semaphore>,
    ) -> (Option<String>, Summary) {
        let worker = &self.worker;
        let Read { envelope, job } = worker.intake.read(delivery, self.worker.clock.now(), permits);
        let ask = match job {
            Ok(ask) => ask,
            Err(unfit) => {
                let (Unfit::Invalid(why) | Unfit::Unanswerable(why)) = &unfit;
                let key = why.request_id.as_ref().map(|id| format!("{}/{id}", worker.intake.mode));
                return (key, worker.settler.refuse(delivery, &envelope, unfit).await);
            }
        };
        let (verdict, turn) = worker.journey.run(&ask).await;
        if let Verdict::Fatal(error) = &verdict {
            self.end(Fatal::Broken(error.to_string()));
        }
        // Copies of an unresolved job wait until its one parked copy is noted.
        let unresolved =
            matches!(&verdict, Verdict::Reply(stored) if stored.status == Status::Unresolved);
        let _turn = turn.filter(|_| unresolved);
        let summary = worker
            .settler
            .carry_out(delivery, &envelope, &ask.key, ask.picked_up_at, verdict)
            .await;
        if summary.left == settle::Left::Acked
            && let Some(age) = worker.settler.age(&envelope)
        {
            metrics::latency(ask.lane, age);
        }
        (Some(ask.key.to_string()), summary)
    }
}

/// One lane of one session.
struct LaneLoop {
    shared: Arc<Shared>,
    session: Arc<Session>,
    lane: Lane,
    prefetch: u16,
    permits: Arc<Semaphore>,
    /// Whether the ledger is new, so that redelivered jobs are a sign that another was lost.
    fresh: bool,
}

impl LaneLoop {
    /// Takes deliveries until the session breaks (then why) or the worker stops.
    async fn run(self, subscribed: mpsc::Sender<()>) -> Option<LinkError> {
        let topology = &self.shared.worker.plan.topology;
        let consume = self.session.consume(topology, self.lane, self.prefetch);
        let mut intake = tokio::select! {
            intake = consume => match intake {
                Ok(intake) => intake,
                Err(error) => return Some(error),
            },
            () = self.session.over.cancelled() => return None,
        };
        // The receiver is gone only when the session is.
        if subscribed.send(()).await.is_err() {
            return None;
        }
        let mut waiting = VecDeque::new();
        let mut permit = None;
        loop {
            tokio::select! {
                biased;
                () = self.shared.stop.cancelled() => break,
                () = self.session.over.cancelled() => return None,
                granted = self.permits.clone().acquire_owned(), if permit.is_none() => {
                    permit = Some(granted.ok()?);
                }
                // Read even while the lane is full, or a broken session would go unnoticed. What
                // waits here is bounded by the prefetch.
                delivery = intake.next() => match delivery {
                    Ok(delivery) if self.shared.may_serve(&delivery, self.fresh).await => waiting.push_back(delivery),
                    Ok(_) => return None,
                    Err(error) => return Some(error),
                },
            }
            if permit.is_some()
                && let Some(delivery) = waiting.pop_front()
                && let Some(permit) = permit.take()
            {
                let shared = self.shared.clone();
                self.shared.jobs.spawn(shared.handle(delivery, self.permits.clone(), permit));
            }
        }
        intake.cancel(waiting).await;
        None
    }
}

/// The lane sizes as `lane=concurrency`, for a log line.
#[must_use]
pub fn describe(lanes: &[LaneSize]) -> String {
    lanes
        .iter()
        .map(|size| format!("{}={}", size.lane, size.concurrency))
        .collect::<Vec<_>>()
        .join(" ")
}
