//! What brings jobs to their ends, wherever they come from: the journey, and the watchers that hold it back
//! and let it go on.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use futures::FutureExt as _;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::budget;
use super::gate::{Gate, Reason};
use super::journey::Journey;
use super::{Fatal, watch as watchers};
use crate::clock::as_millis;
use crate::job::Mode;
use crate::ledger::{Budget, LedgerError, OwnCommand, Retention};
use crate::observe::health::{Health, Rate};
use crate::observe::metrics;

/// A journey, with what holds it back, and what is shared with other workers.
#[derive(Debug)]
pub struct Engine {
    /// Decides.
    pub journey: Journey,
    /// What `/readyz` says.
    pub health: Health,
    /// What is shared with the other workers of this ledger, where it is not this process's alone.
    pub budget: Option<Arc<dyn Budget>>,
    /// Creem's world.
    pub mode: Mode,
    /// Set once; ends everything.
    fatal: watch::Sender<Option<Fatal>>,
}

impl Engine {
    /// Puts it together; nothing runs yet.
    #[must_use]
    pub fn new(
        journey: Journey,
        health: Health,
        budget: Option<Arc<dyn Budget>>,
        mode: Mode,
    ) -> Self {
        Self { journey, health, budget, mode, fatal: watch::Sender::new(None) }
    }

    /// What holds calls back.
    #[must_use]
    pub fn gate(&self) -> &Gate {
        &self.journey.gate
    }

    /// Ends everything, for that reason.
    pub fn end(&self, fatal: Fatal) {
        tracing::error!(error = %fatal, "stopping: going on would not be safe");
        self.fatal.send_modify(|slot| {
            slot.get_or_insert(fatal);
        });
    }

    /// Why everything is to end, if it is.
    #[must_use]
    pub fn fatal(&self) -> Option<Fatal> {
        self.fatal.borrow().clone()
    }

    /// Waits until everything is to end.
    pub async fn broken(&self) {
        let mut fatal = self.fatal.subscribe();
        // The sender lives as long as `self`.
        drop(fatal.wait_for(Option::is_some).await);
    }

    /// What operators have told the ledger so far: before a job is taken of a lane that was paused long ago.
    pub async fn look(&self) {
        let journey = &self.journey;
        journey.orders.look(&*journey.ledger, &self.health).await;
    }

    /// How long it keeps outcomes.
    #[must_use]
    pub fn retention(&self) -> Retention {
        Retention { mode: self.mode, keep: as_millis(self.journey.rules.retention) }
    }

    /// Says so to the ledger.
    ///
    /// # Errors
    /// See [`LedgerError`].
    pub async fn tell_retention(&self) -> Result<(), LedgerError> {
        self.journey.ledger.tell(OwnCommand::Keep(self.retention())).await
    }

    /// Starts what looks after the things that can hold the gate, and what shares a budget.
    pub fn watch(self: &Arc<Self>, tasks: &mut JoinSet<()>) {
        self.spawn(tasks, "ledger", watchers::ledger(self.clone()));
        self.spawn(tasks, "key", watchers::key(self.clone()));
        self.spawn(tasks, "retention", watchers::retention(self.clone()));
        let orders = self.clone();
        self.spawn(tasks, "orders", async move {
            orders.journey.orders.follow(&*orders.journey.ledger, &orders.health).await;
        });
        let circuit = self.clone();
        self.spawn(tasks, "circuit", async move { circuit.journey.circuit.keep_time().await });
        if let Some(budget) = &self.budget {
            self.spawn(tasks, "news", budget::share_news(self.clone(), budget.clone()));
            self.spawn(tasks, "places", budget::lease(self.clone(), budget.clone()));
            self.spawn(tasks, "rate", budget::share_rate(self.clone(), budget.clone()));
        }
    }

    /// Starts a task without which no job may be served: a bug in it ends everything, as nobody would notice that it
    /// is gone.
    pub(super) fn spawn(
        self: &Arc<Self>,
        tasks: &mut JoinSet<()>,
        what: &'static str,
        task: impl Future<Output = ()> + Send + 'static,
    ) {
        let engine = self.clone();
        tasks.spawn(async move {
            // The hook has logged it.
            if AssertUnwindSafe(task).catch_unwind().await.is_err() {
                let text = format!("a bug has ended what looks after {what}: see the log above");
                engine.end(Fatal::Broken(text));
            }
        });
    }

    /// Says how fast Creem is asked, and what holds that where it is.
    pub fn tell_rate(&self) {
        let (per_second, because) = self.journey.pacer.explain();
        metrics::rate_limit(per_second);
        self.health.set_calls(Rate { per_second, because }, self.journey.circuit.open_for());
    }

    /// Waits until the ledger can be written again, after it could not.
    pub(super) async fn wait_for_the_ledger(&self, error: &LedgerError) {
        self.gate().close_for_the_ledger(error);
        self.gate().free_of(Reason::Ledger).await;
    }
}
