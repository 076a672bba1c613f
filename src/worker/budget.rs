//! The budget that workers of one ledger share: blocks of places from it for the pacer, and silence
//! that Creem asked one worker for, told to all.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::engine::Engine;
use crate::job::Mode;
use crate::ledger::{Budget, LedgerError};
use crate::pace::Pacer;

/// What a block of places lasts at the ceiling: longer blocks mean fewer round trips, and a worker
/// that stops takes up to one with it.
const BLOCK: Duration = Duration::from_millis(200);
/// Most places in a block.
const MAX_BLOCK: usize = 64;
/// How often every worker asks whether all are to be quiet.
const LISTEN_EVERY: Duration = Duration::from_millis(400);

/// The budget of all workers of a ledger.
#[derive(Clone)]
pub struct SharedBudget {
    /// Who keeps it.
    pub store: Arc<dyn Budget>,
    /// Most calls a second of all workers together; `None` where there is no ceiling, and silence alone
    /// is shared.
    pub per_second: Option<f64>,
}

impl std::fmt::Debug for SharedBudget {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SharedBudget").field("per_second", &self.per_second).finish_non_exhaustive()
    }
}

/// Leases places as they are wanted; while the ledger is away, nobody gets any.
pub(super) async fn lease(engine: Arc<Engine>, budget: Arc<dyn Budget>, per_second: f64) {
    let pacer = &engine.journey.pacer;
    loop {
        let Err(error) = grant(pacer, &*budget, engine.mode, per_second).await;
        engine.wait_for_the_ledger(&error).await;
        // Whoever waits still does, and asks again.
        pacer.grant([]);
    }
}

/// Leases a block of places whenever somebody waits for one; ends with the ledger's error only.
///
/// # Errors
/// See [`LedgerError`].
pub async fn grant(
    pacer: &Pacer,
    budget: &(impl Budget + ?Sized),
    mode: Mode,
    per_second: f64,
) -> Result<Infallible, LedgerError> {
    let interval = Pacer::shared_interval(per_second);
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a cast to an integer saturates, and bounds follow"
    )]
    let block = ((per_second * BLOCK.as_secs_f64()) as usize).clamp(1, MAX_BLOCK);
    loop {
        let wanted = pacer.wanted().await;
        let count = u32::try_from(wanted.min(block)).unwrap_or(1);
        let places = budget.lease_places(mode, count, interval).await?;
        pacer.hear(Instant::now() + places.quiet);
        pacer.grant((0..places.count).map(|place| places.first + interval * place));
    }
}

/// Tells all workers what Creem asked this one for, and hears what it asked others for. A ledger that
/// is away pauses this worker too, though it may have no job that would notice.
pub(super) async fn share_silence(engine: Arc<Engine>, budget: Arc<dyn Budget>) {
    while let Err(error) = listen(&engine.journey.pacer, &*budget, engine.mode).await {
        engine.wait_for_the_ledger(&error).await;
    }
}

/// Tells and hears of silence for as long as there is a pacer: what this worker was told is told again
/// with every question until it is over, as any answer may have been lost.
///
/// # Errors
/// See [`LedgerError`].
pub async fn listen(
    pacer: &Pacer,
    budget: &(impl Budget + ?Sized),
    mode: Mode,
) -> Result<(), LedgerError> {
    let mut told = pacer.told();
    loop {
        let until = *told.borrow_and_update();
        let at_least =
            until.map_or(Duration::ZERO, |until| until.saturating_duration_since(Instant::now()));
        let quiet = budget.quiet(mode, at_least).await?;
        if !quiet.is_zero() {
            pacer.hear(Instant::now() + quiet);
        }
        tokio::select! {
            changed = told.changed() => {
                if changed.is_err() {
                    return Ok(());
                }
            }
            () = tokio::time::sleep(LISTEN_EVERY) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use futures::FutureExt as _;
    use futures::future::BoxFuture;

    use super::*;
    use crate::ledger::Places;
    use crate::pace::Limits;

    const LIMITS: Limits = Limits { ceiling: Some(100.0), bulk_share: 0.05 };

    /// A budget that loses the first word of silence.
    #[derive(Default)]
    struct Forgetful {
        told: Mutex<Vec<Duration>>,
    }

    impl Budget for Forgetful {
        fn lease_places(
            &self,
            _mode: Mode,
            _count: u32,
            _interval: Duration,
        ) -> BoxFuture<'static, Result<Places, LedgerError>> {
            unreachable!("nobody asks for a place")
        }

        fn quiet(
            &self,
            _mode: Mode,
            at_least: Duration,
        ) -> BoxFuture<'static, Result<Duration, LedgerError>> {
            let mut told = self.told.lock().unwrap();
            told.push(at_least);
            let silences = told.iter().filter(|silence| !silence.is_zero()).count();
            let answer = if silences == 1 && !at_least.is_zero() {
                Err(LedgerError::Unavailable("it restarts".to_owned()))
            } else {
                Ok(at_least)
            };
            std::future::ready(answer).boxed()
        }
    }

    #[tokio::test(start_paused = true)]
    async fn silence_is_told_until_it_is_heard() {
        let (pacer, budget) = (Pacer::shared(LIMITS), Forgetful::default());
        pacer.quiet(Duration::from_secs(10));
        assert!(listen(&pacer, &budget, Mode::Test).await.is_err());
        tokio::time::advance(Duration::from_secs(1)).await;
        let listening = listen(&pacer, &budget, Mode::Test);
        drop(tokio::time::timeout(Duration::from_millis(1), listening).await);
        let told = budget.told.lock().unwrap();
        assert_eq!(*told, [Duration::from_secs(10), Duration::from_secs(9)]);
    }
}
