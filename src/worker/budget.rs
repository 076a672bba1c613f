//! The budget that workers of one ledger share: blocks of places from it for the pacer, and what one
//! worker knows of Creem, told to all: that it asked for silence, or is down, and how fast it can be asked.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::engine::Engine;
use super::journey::Journey;
use crate::job::{Lane, Mode};
use crate::ledger::{Budget, LedgerError, News, Taught, Teaching, Wish};
use crate::pace::{LATELY, Pacer, Waiters};
use crate::retry::backoff;

/// What a block of places lasts at most: longer blocks mean fewer round trips, and a worker that stops takes one with it.
/// Without a ceiling as many are wished for at once as were given out in so long, which is why the two are one.
const BLOCK: Duration = LATELY;
/// Most places in a block.
const MAX_BLOCK: u32 = 64;
/// How far ahead bulk takes places: where there is a ceiling, a buyer stands behind no more than these. Where there is
/// none, nobody takes places further ahead, as the rate may be another by then.
const HORIZON: Duration = Duration::from_millis(80);
/// Where there is no ceiling: how much of what others have taken a buyer may overtake. That is all that bulk has, as a
/// block of it (half a horizon) may begin at the horizon. The price is that a moment may hold so many more calls.
const OVERTAKES: Duration = Duration::from_millis(120);
const _: () = assert!(OVERTAKES.as_millis() * 2 == HORIZON.as_millis() * 3);
/// Who got no place asks again after that at the soonest.
const SOONEST: Duration = Duration::from_millis(2);
/// Interactive that got none for so long takes one however far ahead it lies: others may be who take theirs so.
const PATIENCE: Duration = Duration::from_millis(400);
/// For how long the word of a worker holds that finds Creem down.
const DOWN_FOR: Duration = Duration::from_secs(2);
/// After the rate could not be told.
const TELL_AGAIN_AFTER: Duration = Duration::from_secs(1);
/// How often every worker asks what the others know.
const LISTEN_EVERY: Duration = Duration::from_millis(400);

/// Leases places as they are wanted; while the ledger is away, nobody gets any.
pub(super) async fn lease(engine: Arc<Engine>, budget: Arc<dyn Budget>) {
    let pacer = &engine.journey.pacer;
    loop {
        let Err(error) = grant(pacer, &*budget, engine.mode).await;
        engine.wait_for_the_ledger(&error).await;
        // Whoever waits still does, and asks again.
        pacer.grant([], false);
    }
}

/// Leases a block of places whenever somebody waits for one; ends with the ledger's error only.
///
/// | who | a block lasts | begins no further ahead than | overtakes |
/// |---|---|---|---|
/// | interactive, under a ceiling | 200 ms (`BLOCK`) | it may | nothing |
/// | interactive, without one | 80 ms | 80 ms (`HORIZON`), or two places; any time after 400 ms without one | 120 ms |
/// | bulk | 40 ms, or one place | 80 ms, or two places; any time for its guaranteed share | nothing |
///
/// So bulk keeps the line short, whichever worker it is that asks, and a buyer gets places soon. Without a ceiling
/// nobody takes any far ahead: while Creem says "slow down" they lie far apart, and would hold who has them, and all
/// behind, long after Creem takes calls again.
///
/// # Errors
/// See [`LedgerError`].
pub async fn grant(
    pacer: &Pacer,
    budget: &(impl Budget + ?Sized),
    mode: Mode,
) -> Result<Infallible, LedgerError> {
    let mut none: Option<NoPlace> = None;
    // As it was with the last places: what is learned here is known there sooner.
    let mut interval = pacer.shared_interval();
    loop {
        let waiters = wanted(pacer, none).await;
        let Some(wish) = wish(pacer, interval, waiters, none) else {
            // Whoever asked has given up.
            none = None;
            continue;
        };
        let asked = Instant::now();
        let places = budget.lease_places(mode, wish).await?;
        interval = places.interval;
        pacer.hear(Instant::now() + places.quiet);
        if places.count > 0 {
            none = None;
            let all = (0..places.count).map(|place| places.first + interval * place);
            pacer.grant(all, places.waited);
        } else {
            pacer.grant([], true);
            let lane = if wish.bulk_every.is_some() { Lane::Bulk } else { Lane::Interactive };
            // All who were told the same would come at the same moment.
            let apart = (horizon(interval) / 2).mul_f64(backoff::chance());
            let again = places.first.max(Instant::now() + SOONEST) + apart;
            let since = none.filter(|none| none.lane == lane).map_or(asked, |none| none.since);
            none = Some(NoPlace { lane, since, again });
        }
    }
}

/// What is to be wished for those who wait, if anybody does.
fn wish(
    pacer: &Pacer,
    interval: Duration,
    waiters: Waiters,
    none: Option<NoPlace>,
) -> Option<Wish> {
    // Under a ceiling a place is lost that nobody takes at once. Elsewhere it is kept for those who will come soon, as
    // each question costs the ledger a commit.
    let expected = |lane| if pacer.has_ceiling() { 0 } else { pacer.given_lately(lane) };
    let horizon = horizon(interval);
    let wish = |lane, waiting: usize| Wish {
        count: u32::try_from(waiting).unwrap_or(MAX_BLOCK).max(expected(lane)).min(MAX_BLOCK),
        lasting: BLOCK,
        least_interval: pacer.least_interval(),
        default_interval: pacer.shared_interval(),
        overtakes: Duration::ZERO,
        horizon: None,
        bulk_every: None,
    };
    if waiters.interactive > 0 {
        let wish = wish(Lane::Interactive, waiters.interactive);
        if pacer.has_ceiling() {
            // No second may hold more calls than it allows, whoever waits.
            return Some(wish);
        }
        let patient = none.is_none_or(|none| none.since.elapsed() < PATIENCE);
        let (lasting, overtakes) = (HORIZON, OVERTAKES);
        let horizon = patient.then_some(horizon);
        return Some(Wish { lasting, overtakes, horizon, ..wish });
    }
    let (wish, lasting) = (wish(Lane::Bulk, waiters.bulk), horizon / 2);
    let lasts = (interval * wish.count).min(lasting.max(interval));
    let bulk_every = Some(lasts.div_f64(pacer.bulk_share()));
    (waiters.bulk > 0).then_some(Wish { lasting, horizon: Some(horizon), bulk_every, ..wish })
}

/// How far ahead places are taken. At a slow pace that is the next place and the one after it.
fn horizon(interval: Duration) -> Duration {
    HORIZON.max(interval * 2)
}

/// Somebody waits for whom there was no place.
#[derive(Debug, Clone, Copy)]
struct NoPlace {
    lane: Lane,
    /// Since when there is none.
    since: Instant,
    /// When there may be one.
    again: Instant,
}

/// Waits until places are wanted. Where there was none, before it is time to ask again only somebody in the interactive
/// lane makes a difference, if it was bulk that got none.
async fn wanted(pacer: &Pacer, none: Option<NoPlace>) -> Waiters {
    let Some(NoPlace { lane, again, .. }) = none else { return pacer.wanted().await };
    let again = tokio::time::sleep_until(again);
    tokio::pin!(again);
    loop {
        tokio::select! {
            () = &mut again => return pacer.waiters(),
            waiters = pacer.wanted() => {
                if lane == Lane::Bulk && waiters.interactive > 0 {
                    return waiters;
                }
            }
        }
    }
}

/// Tells all workers what this one has seen of how fast Creem can be asked. A ledger that cannot be told of it is no
/// reason to pause by itself: whoever needs it for a job finds that out.
pub(super) async fn share_rate(engine: Arc<Engine>, budget: Arc<dyn Budget>) {
    loop {
        let Err(error) = teach(&engine.journey.pacer, &*budget, engine.mode).await;
        tracing::debug!(%error, "the rate could not be told to the other workers; trying again");
        tokio::time::sleep(TELL_AGAIN_AFTER).await;
    }
}

/// Tells it whenever there is something to tell; ends with the ledger's error only.
///
/// # Errors
/// See [`LedgerError`].
pub async fn teach(
    pacer: &Pacer,
    budget: &(impl Budget + ?Sized),
    mode: Mode,
) -> Result<Infallible, LedgerError> {
    loop {
        let lesson = pacer.lesson().await;
        let (version, at, interval) = (lesson.version, lesson.at, lesson.interval);
        let teaching = Teaching { version, text: &lesson.text, at, interval };
        match budget.teach(mode, teaching).await {
            Ok(Taught::Written) => pacer.written(lesson),
            Ok(Taught::Other(other)) => {
                // It is told again at once: with a pause of 40 ms at most, 64 workers used 84 % of a limit instead of 94 %.
                pacer.corrected(&lesson, other.version, &other.text, other.age);
            }
            Ok(Taught::Busy) => pacer.untold(&lesson),
            Err(error) => {
                pacer.untold(&lesson);
                return Err(error);
            }
        }
    }
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
    let mut told = pacer.silences();
    loop {
        let until = *told.borrow_and_update();
        let quiet =
            until.map_or(Duration::ZERO, |until| until.saturating_duration_since(Instant::now()));
        let down = if down() { DOWN_FOR } else { Duration::ZERO };
        let (news, learned) = budget.share(mode, News { quiet, down }).await?;
        if let Some(learned) = learned {
            pacer.learn(learned.version, &learned.text, learned.age);
        }
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
    use crate::ledger::{Learned, Places};
    use crate::pace::Limits;

    const LIMITS: Limits = Limits { ceiling: Some(100.0), bulk_share: 0.05 };

    /// A budget that loses the first word of silence.
    #[derive(Debug, Default)]
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

        fn teach(
            &self,
            _mode: Mode,
            _teaching: Teaching<'_>,
        ) -> BoxFuture<'static, Result<Taught, LedgerError>> {
            unreachable!("nobody makes a call")
        }

        fn share(
            &self,
            _mode: Mode,
            news: News,
        ) -> BoxFuture<'static, Result<(News, Option<Learned>), LedgerError>> {
            let mut told = self.told.lock().unwrap();
            told.push(news.quiet);
            let silences = told.iter().filter(|silence| !silence.is_zero()).count();
            let answer = if silences == 1 && !news.quiet.is_zero() {
                Err(LedgerError::Unavailable("it restarts".to_owned()))
            } else {
                Ok((news, None))
            };
            std::future::ready(answer).boxed()
        }
    }

    #[tokio::test(start_paused = true)]
    async fn bulks_share_of_places_is_the_configured_one() {
        let interval = Duration::from_millis(10);
        for (bulk_share, every) in [(0.05, 800), (0.2, 200), (0.5, 80)] {
            let pacer = Pacer::shared(Limits { ceiling: Some(100.0), bulk_share });
            let waiters = Waiters { interactive: 0, bulk: 64 };
            let wish = wish(&pacer, interval, waiters, None).unwrap();
            // Four places of 10 ms.
            assert_eq!(wish.lasting, Duration::from_millis(40));
            assert_eq!(wish.bulk_every, Some(Duration::from_millis(every)));
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

    /// A budget that has places for everybody, and counts who asks.
    #[derive(Debug, Default)]
    struct Generous {
        asked: Mutex<u32>,
    }

    impl Budget for Generous {
        fn lease_places(
            &self,
            _mode: Mode,
            wish: Wish,
        ) -> BoxFuture<'static, Result<Places, LedgerError>> {
            *self.asked.lock().unwrap() += 1;
            let interval = Duration::from_millis(2);
            let places = Places {
                first: Instant::now() + interval,
                count: wish.count,
                interval,
                waited: false,
                quiet: Duration::ZERO,
            };
            let trip = tokio::time::sleep(interval);
            trip.map(move |()| Ok(places)).boxed()
        }

        fn teach(
            &self,
            _mode: Mode,
            _teaching: Teaching<'_>,
        ) -> BoxFuture<'static, Result<Taught, LedgerError>> {
            unreachable!("nobody makes a call")
        }

        fn share(
            &self,
            _mode: Mode,
            _news: News,
        ) -> BoxFuture<'static, Result<(News, Option<Learned>), LedgerError>> {
            unreachable!("nobody tells anything")
        }
    }

    #[tokio::test(start_paused = true)]
    async fn callers_who_come_one_by_one_cost_no_question_each() {
        for (every, questions) in [(10, 110), (50, 60), (1_000, 10)] {
            let pacer = Pacer::shared(Limits { ceiling: None, bulk_share: 0.05 });
            let budget = Generous::default();
            let callers = async {
                for _ in 0..10_000 / every {
                    let came = Instant::now();
                    pacer.admit(Lane::Interactive).await.come().await;
                    assert!(came.elapsed() < Duration::from_millis(10), "{:?}", came.elapsed());
                    tokio::time::sleep(Duration::from_millis(every)).await;
                }
            };
            tokio::select! {
                () = callers => {}
                _ = grant(&pacer, &budget, Mode::Test) => unreachable!("it never ends"),
            }
            let asked = *budget.asked.lock().unwrap();
            assert!(asked <= questions, "every {every} ms: {asked} questions in ten seconds");
        }
    }

    /// A budget in which lessons meet whatever they may meet.
    #[derive(Debug, Default)]
    struct Stubborn {
        lessons: Mutex<Vec<String>>,
    }

    impl Budget for Stubborn {
        fn lease_places(
            &self,
            _mode: Mode,
            _wish: Wish,
        ) -> BoxFuture<'static, Result<Places, LedgerError>> {
            unreachable!("nobody asks for a place")
        }

        fn teach(
            &self,
            _mode: Mode,
            teaching: Teaching<'_>,
        ) -> BoxFuture<'static, Result<Taught, LedgerError>> {
            let mut lessons = self.lessons.lock().unwrap();
            lessons.push(teaching.text.to_owned());
            let other =
                || Learned { version: 9, text: teaching.text.to_owned(), age: Duration::ZERO };
            let met = match lessons.len() {
                1 => Ok(Taught::Busy),
                2 => Err(LedgerError::Unavailable("it restarts".to_owned())),
                3 => Ok(Taught::Other(other())),
                _ => Ok(Taught::Written),
            };
            std::future::ready(met).boxed()
        }

        fn share(
            &self,
            _mode: Mode,
            _news: News,
        ) -> BoxFuture<'static, Result<(News, Option<Learned>), LedgerError>> {
            unreachable!("nobody listens")
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_seen_is_told_until_it_is_written() {
        let pacer = Pacer::shared(Limits { ceiling: None, bulk_share: 0.05 });
        let budget = Stubborn::default();
        pacer.slow_down(Instant::now());
        pacer.slow_down(Instant::now());
        let teaching = async || {
            let teaching = teach(&pacer, &budget, Mode::Test);
            tokio::time::timeout(Duration::from_secs(60), teaching).await
        };
        assert!(matches!(teaching().await, Ok(Err(_))), "the ledger is away");
        assert!(teaching().await.is_err(), "nothing more is to be told");
        let refused = |text: &String| {
            let kept: serde_json::Value = serde_json::from_str(text).unwrap();
            kept["refused"].as_array().unwrap().iter().filter_map(serde_json::Value::as_u64).sum()
        };
        let told: Vec<u64> = budget.lessons.lock().unwrap().iter().map(refused).collect();
        assert_eq!(told, [2, 2, 2, 4], "the last one goes on with what the other one wrote");
    }
}
