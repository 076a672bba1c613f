//! The work: takes deliveries lane by lane, bounded by permits, and brings each to its end.
//!
//! [`intake`] reads, [`journey`] decides, [`settle`] acts; this file puts them together for one
//! delivery, and `sessions` keeps deliveries coming. The watchers close and open the [`gate`].

mod adoption;
pub mod ask;
pub mod budget;
pub mod call_time;
mod care;
pub mod circuit;
pub mod engine;
pub mod gate;
pub mod intake;
pub mod journey;
pub mod orders;
pub mod rules;
mod sessions;
pub mod settle;
mod skew;
pub mod trouble;
pub mod turns;
mod watch;

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt as _;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::clock::as_millis;
use crate::job::{Lane, Status};
use crate::ledger::Adoption;
use crate::observe::metrics;
use crate::rabbit::consumer::Plan;
use crate::rabbit::hop::Hop;
use crate::rabbit::{Delivery, Envelope};
use crate::retry::Backoff;
use engine::Engine;
use gate::{Gate, Reason};
use intake::{Intake, Read, Unfit};
use journey::Verdict;
use settle::{Case, Settler, Summary};

/// Beyond a call to Creem: how long what was sent may take to be settled when everything ends.
pub const SETTLING: Duration = Duration::from_secs(5);

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
    /// A new ledger met jobs that another ledger may know.
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
    pub engine: Arc<Engine>,
    /// Acts.
    pub settler: Settler,
    /// Between two tries to reach the broker.
    pub backoff: Backoff,
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
    /// Cancelled when nothing new is begun.
    stop: CancellationToken,
    /// How far producers' clocks are ahead.
    skew: skew::Skew,
    /// What has been decided about a new ledger.
    adoption: tokio::sync::Mutex<Option<Adoption>>,
}

impl Worker {
    /// Serves until `soft` is cancelled, then finishes what was sent.
    ///
    /// `hard` ends it at once: what was not settled will be delivered again.
    ///
    /// # Errors
    /// See [`Fatal`].
    pub async fn run(self, soft: CancellationToken, hard: CancellationToken) -> Result<(), Fatal> {
        let gate = self.engine.journey.gate.clone();
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
            stop: soft,
            skew: skew::Skew::default(),
            adoption: tokio::sync::Mutex::default(),
        });
        shared.begin_with_the_ledger().await;
        let engine = &shared.worker.engine;
        engine.look().await;
        let mut watchers = JoinSet::new();
        watch::spawn_all(&shared, &mut watchers);
        let broken = async {
            engine.broken().await;
            // What was sent may still be settled; where it cannot be, this is not waited out.
            shared.stop.cancel();
            tokio::time::sleep(engine.journey.rules.request_timeout + SETTLING).await;
        };
        tokio::select! {
            () = shared.clone().keep_sessions() => {}
            () = hard.cancelled() => {}
            () = broken => {}
        }
        watchers.shutdown().await;
        engine.fatal().map_or(Ok(()), Err)
    }
}

impl Shared {
    /// One delivery, from its arrival to its ack.
    async fn handle(
        self: Arc<Self>,
        delivery: Delivery,
        permits: Arc<Semaphore>,
        permit: OwnedSemaphorePermit,
    ) {
        let started = Instant::now();
        let lane = delivery.lane;
        let _in_flight = self.worker.engine.health.begin(lane);
        let handled =
            AssertUnwindSafe(self.bring_to_its_end(&delivery, &permits)).catch_unwind().await;
        let (key, summary) = match handled {
            Ok(done) => done,
            Err(_panic) => (None, self.set_aside(&delivery).await),
        };
        drop(permit);
        metrics::job(lane, summary.verdict, started.elapsed());
        tracing::info!(
            job.key = key.as_deref().unwrap_or("-"),
            job.lane = lane.as_str(),
            attempt = summary.attempts,
            verdict = summary.verdict,
            job.code = summary.code,
            job.acked = summary.left == settle::Left::Acked,
            duration_ms = as_millis(started.elapsed()),
            "job"
        );
    }

    /// Parks a delivery that a bug has met outside of its journey. If that meets a bug as well, the
    /// session is given up, and with it the delivery's place in the prefetch window.
    async fn set_aside(&self, delivery: &Delivery) -> Summary {
        let envelope = Envelope::default();
        let case = Case { delivery, envelope: &envelope, request_id: None };
        let parked = AssertUnwindSafe(self.worker.settler.park_panicked(case)).catch_unwind().await;
        parked.unwrap_or_else(|_panic| {
            delivery.session.cancel();
            Summary {
                verdict: "abandoned",
                code: None,
                attempts: 0,
                left: settle::Left::ComesAgain,
            }
        })
    }

    async fn bring_to_its_end(
        &self,
        delivery: &Delivery,
        permits: &Arc<Semaphore>,
    ) -> (Option<String>, Summary) {
        let worker = &self.worker;
        let now = worker.engine.journey.clock.now();
        let Read { envelope, job } = worker.intake.read(delivery, now, permits);
        self.skew.note(envelope.timestamp, now);
        let ask = match job {
            Ok(ask) => ask,
            Err(unfit) => {
                let (Unfit::Invalid(why) | Unfit::Unanswerable(why)) = &unfit;
                let key = why.request_id.as_ref().map(|id| format!("{}/{id}", worker.intake.mode));
                let request_id = why.request_id.clone();
                let case = Case { delivery, envelope: &envelope, request_id: request_id.as_ref() };
                return (key, worker.settler.refuse(case, unfit).await);
            }
        };
        let (verdict, turn) = worker.engine.journey.run(&ask).await;
        if let Verdict::Fatal(error) = &verdict {
            worker.engine.end(Fatal::Broken(error.to_string()));
        }
        // Copies of an unresolved job wait until its one parked copy is noted.
        let unresolved =
            matches!(&verdict, Verdict::Reply(stored) if stored.status == Status::Unresolved);
        let _turn = turn.filter(|_| unresolved);
        let hop = Hop { first_picked_up_at: ask.picked_up_at, redelivered: ask.redelivered };
        let request_id = Some(&ask.key.request_id);
        let case = Case { delivery, envelope: &envelope, request_id };
        let summary = worker.settler.carry_out(case, &ask.key, hop, verdict).await;
        (Some(ask.key.to_string()), summary)
    }
}
