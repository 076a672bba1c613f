//! The budget that workers of one ledger share: blocks of places from it for the pacer, and what one
//! worker knows of Creem, told to all: that it asked for silence, or is down.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::engine::Engine;
use super::journey::Journey;
use crate::job::Mode;
use crate::ledger::{Budget, BulkTerms, LedgerError, News, Wish};
use crate::pace::{Pacer, Waiters};
use crate::retry::backoff;

/// What a block of places lasts at the ceiling: longer blocks mean fewer round trips, and a worker
/// that stops takes up to one with it.
const BLOCK: Duration = Duration::from_millis(200);
/// Most places in a block.
const MAX_BLOCK: u32 = 64;
/// How far ahead bulk takes places: for so long somebody who waits may be behind it.
const HORIZON: Duration = Duration::from_millis(80);
/// Bulk that got no place asks again after that at the soonest.
const SOONEST: Duration = Duration::from_millis(2);
/// For how long the word of a worker holds that finds Creem down.
const DOWN_FOR: Duration = Duration::from_secs(2);
/// How often every worker asks what the others know.
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
/// Who has somebody behind them gets places at once, at the end of the line. Bulk keeps that line short: it
/// takes no place that lies further ahead than 80 ms (`HORIZON`), or two places where they lie further apart, whichever
/// worker it is that asks, and gets its guaranteed share at the end of the line.
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
    // At a slow pace that is the next place and the one after it.
    let horizon = HORIZON.max(interval * 2);
    let (most, most_bulk) = (block(BLOCK, interval), block(horizon / 2, interval));
    let mut bulk_from = None;
    loop {
        let Waiters { interactive, bulk } = wanted(pacer, bulk_from).await;
        let count = |waiting: usize, most: u32| u32::try_from(waiting).unwrap_or(most).min(most);
        let wish = if interactive > 0 {
            Wish { count: count(interactive, most), interval, bulk: None }
        } else if bulk > 0 {
            let count = count(bulk, most_bulk);
            let every = (interval * count).div_f64(pacer.bulk_share());
            Wish { count, interval, bulk: Some(BulkTerms { horizon, every }) }
        } else {
            // Whoever asked has given up.
            bulk_from = None;
            continue;
        };
        let places = budget.lease_places(mode, wish).await?;
        pacer.hear(Instant::now() + places.quiet);
        if places.count > 0 {
            bulk_from = None;
            pacer.grant((0..places.count).map(|place| places.first + interval * place));
        } else {
            // All who were told the same would come at the same moment.
            let apart = (horizon / 2).mul_f64(backoff::chance());
            bulk_from = Some(places.first.max(Instant::now() + SOONEST) + apart);
        }
    }
}

/// Waits until places are wanted. `bulk_from` says that bulk waits, and when it may ask again; before that
/// only somebody in the other lane makes a difference.
async fn wanted(pacer: &Pacer, bulk_from: Option<Instant>) -> Waiters {
    let Some(bulk_from) = bulk_from else { return pacer.wanted().await };
    let again = tokio::time::sleep_until(bulk_from);
    tokio::pin!(again);
    loop {
        tokio::select! {
            () = &mut again => return pacer.waiters(),
            waiters = pacer.wanted() => {
                if waiters.interactive > 0 {
                    return waiters;
                }
            }
        }
    }
}

/// How many places fit into so long, at least one.
fn block(duration: Duration, interval: Duration) -> u32 {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a cast to an integer saturates, and bounds follow"
    )]
    let places = duration.div_duration_f64(interval) as u32;
    places.clamp(1, MAX_BLOCK)
}

/// Tells all workers what this one knows of Creem, and hears what others know. A ledger that is away pauses
/// this worker too, though it may have no job that would notice.
pub(super) async fn share_news(engine: Arc<Engine>, budget: Arc<dyn Budget>) {
    let Journey { pacer, circuit, gate, .. } = &engine.journey;
    let down = || circuit.finds_creem_down();
    let hear = |down| circuit.hear(down, gate, pacer);
    while let Err(error) = listen(pacer, &*budget, engine.mode, down, hear).await {
        engine.wait_for_the_ledger(&error).await;
    }
}

/// Tells and hears for as long as there is a pacer: what this worker was told is told again with every
/// question until it is over, as any answer may have been lost. `down` says whether this worker finds Creem
/// down by itself, and `hear` is told whether some worker does.
///
/// # Errors
/// See [`LedgerError`].
pub async fn listen(
    pacer: &Pacer,
    budget: &(impl Budget + ?Sized),
    mode: Mode,
    down: impl Fn() -> bool,
    hear: impl Fn(bool),
) -> Result<(), LedgerError> {
    let mut told = pacer.told();
    loop {
        let until = *told.borrow_and_update();
        let quiet =
            until.map_or(Duration::ZERO, |until| until.saturating_duration_since(Instant::now()));
        let down = if down() { DOWN_FOR } else { Duration::ZERO };
        let news = budget.share(mode, News { quiet, down }).await?;
        if !news.quiet.is_zero() {
            pacer.hear(Instant::now() + news.quiet);
        }
        hear(!news.down.is_zero());
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
            _wish: Wish,
        ) -> BoxFuture<'static, Result<Places, LedgerError>> {
            unreachable!("nobody asks for a place")
        }

        fn share(&self, _mode: Mode, news: News) -> BoxFuture<'static, Result<News, LedgerError>> {
            let mut told = self.told.lock().unwrap();
            told.push(news.quiet);
            let silences = told.iter().filter(|silence| !silence.is_zero()).count();
            let answer = if silences == 1 && !news.quiet.is_zero() {
                Err(LedgerError::Unavailable("it restarts".to_owned()))
            } else {
                Ok(news)
            };
            std::future::ready(answer).boxed()
        }
    }

    #[tokio::test(start_paused = true)]
    async fn silence_is_told_until_it_is_heard() {
        let (pacer, budget) = (Pacer::shared(LIMITS), Forgetful::default());
        pacer.quiet(Duration::from_secs(10));
        let listen = || listen(&pacer, &budget, Mode::Test, || false, |_| {});
        assert!(listen().await.is_err());
        tokio::time::advance(Duration::from_secs(1)).await;
        drop(tokio::time::timeout(Duration::from_millis(1), listen()).await);
        let told = budget.told.lock().unwrap();
        assert_eq!(*told, [Duration::from_secs(10), Duration::from_secs(9)]);
    }
}
