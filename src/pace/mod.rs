//! How fast Creem may be asked: a ceiling on calls a second, and silence where Creem asked for it.
//!
//! The ceiling is kept by *places*: points in time, evenly spaced, of which each call takes one. One
//! worker by itself makes its own; workers that share a budget are granted theirs in small blocks by
//! whoever keeps it for all. The pacer knows nothing of HTTP: it is told only for how long to be silent.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::time::Instant;

/// How late a call may be for its place. Places are that much further apart in a second, so that late
/// calls and those that are in time still keep the ceiling together.
const LATENESS: Duration = Duration::from_millis(25);
/// Where places are granted, the workers' ideas of the time differ as well: that comes on top.
const CLOCKS: Duration = Duration::from_millis(35);
/// How old a place may be when it is given out: most of its lateness is for what comes then.
const HAIR: Duration = Duration::from_millis(8);
/// How long before its time a place is given out: what a caller must do before its call it does then.
const LEAD: Duration = Duration::from_millis(25);

/// Where places come from.
#[derive(Debug)]
enum Source {
    /// No ceiling.
    Free,
    /// Made here.
    Own { interval: Duration, next: Instant },
    /// Granted.
    Granted,
}

/// Gives out the right to make calls.
#[derive(Debug)]
pub struct Pacer {
    /// Whether there is a ceiling at all.
    ceiling: bool,
    /// Whoever waits for a place holds this, so that one timer serves them all, and the others stand
    /// in line.
    line: tokio::sync::Mutex<Source>,
    /// Granted places that nobody has taken.
    places: Mutex<VecDeque<Instant>>,
    /// How many callers wait.
    waiting: AtomicUsize,
    wanted: Notify,
    granted: Notify,
    /// Until when nobody may call at all.
    quiet_until: Mutex<Instant>,
    /// Until when Creem has told this worker, and not another one, to be quiet.
    told: watch::Sender<Option<Instant>>,
}

/// Counts a caller as long as it waits.
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The right to make one call, at its time.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    at: Instant,
    /// After which it is lost.
    latest: Instant,
}

impl Place {
    /// Waits for its time, which is soon.
    pub async fn come(&self) {
        tokio::time::sleep_until(self.at).await;
    }
}

impl Pacer {
    /// A pacer with a ceiling of its own in calls a second, or without one.
    #[must_use]
    pub fn new(per_second: Option<f64>) -> Self {
        Self::with(per_second.map_or(Source::Free, |rate| Source::Own {
            interval: interval(rate, LATENESS),
            next: Instant::now(),
        }))
    }

    /// A pacer whose places are granted, [`Pacer::shared_interval`] apart.
    #[must_use]
    pub fn shared() -> Self {
        Self::with(Source::Granted)
    }

    fn with(source: Source) -> Self {
        Self {
            ceiling: !matches!(source, Source::Free),
            line: tokio::sync::Mutex::new(source),
            places: Mutex::default(),
            waiting: AtomicUsize::new(0),
            wanted: Notify::new(),
            granted: Notify::new(),
            quiet_until: Mutex::new(Instant::now()),
            told: watch::Sender::new(None),
        }
    }

    /// How far apart the places of a shared budget lie.
    #[must_use]
    pub fn shared_interval(per_second: f64) -> Duration {
        interval(per_second, LATENESS + CLOCKS)
    }

    /// Waits for the right to make one call, first come, first served; it comes a little before the
    /// time of the call.
    ///
    /// Calls are spaced evenly, so that no second holds more than the ceiling (rounded up to whole
    /// calls), after an idle time neither. A caller that gives up while it waits has taken nothing.
    pub async fn admit(&self) -> Place {
        let _waiting = Waiting::new(&self.waiting);
        let mut source = self.line.lock().await;
        loop {
            let now = Instant::now();
            let earliest = now.max(*self.quiet_until());
            // A place that was missed by a hair is still one.
            let recent = now.checked_sub(HAIR).unwrap_or(now).max(*self.quiet_until());
            let at = match &*source {
                Source::Free => Some(earliest),
                Source::Own { next, .. } => Some(recent.max(*next)),
                Source::Granted => self.next_place(recent),
            };
            match at {
                None => {
                    self.wanted.notify_one();
                    self.granted.notified().await;
                }
                Some(at) if at <= now + LEAD => {
                    match &mut *source {
                        Source::Free => {}
                        Source::Own { interval, next } => *next = at + *interval,
                        Source::Granted => drop(self.places().pop_front()),
                    }
                    return Place { at, latest: at + LATENESS };
                }
                Some(at) => tokio::time::sleep_until(at - LEAD).await,
            }
        }
    }

    /// Waits for the time of the call; if its place is lost by then, for another one.
    pub async fn pass(&self, mut place: Place) {
        loop {
            place.come().await;
            if !self.is_lost(&place) {
                return;
            }
            place = self.admit().await;
        }
    }

    /// Whether a place is lost: its time is over, or Creem has asked for silence since.
    #[must_use]
    pub fn is_lost(&self, place: &Place) -> bool {
        let now = Instant::now();
        (self.ceiling && now > place.latest) || now < *self.quiet_until()
    }

    /// The first granted place from then on; those before it are lost.
    fn next_place(&self, earliest: Instant) -> Option<Instant> {
        let mut places = self.places();
        while places.front().is_some_and(|place| *place < earliest) {
            places.pop_front();
        }
        places.front().copied()
    }

    /// Waits until somebody wants a granted place; how many callers wait, at least one.
    pub async fn wanted(&self) -> usize {
        self.wanted.notified().await;
        self.waiting.load(Ordering::Relaxed).max(1)
    }

    /// Grants places.
    pub fn grant(&self, places: impl IntoIterator<Item = Instant>) {
        self.places().extend(places);
        self.granted.notify_one();
    }

    /// Creem asked this worker for silence: nobody calls until it is over.
    pub fn quiet(&self, duration: Duration) {
        let until = Instant::now() + duration;
        self.hear(until);
        self.told.send_replace(Some(until));
    }

    /// Creem asked another worker for silence.
    pub fn hear(&self, until: Instant) {
        let mut quiet_until = self.quiet_until();
        *quiet_until = (*quiet_until).max(until);
    }

    /// Until when Creem has asked this worker for silence, and when that changes.
    #[must_use]
    pub fn told(&self) -> watch::Receiver<Option<Instant>> {
        self.told.subscribe()
    }

    fn quiet_until(&self) -> MutexGuard<'_, Instant> {
        self.quiet_until.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn places(&self) -> MutexGuard<'_, VecDeque<Instant>> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn interval(per_second: f64, slack: Duration) -> Duration {
    (Duration::from_secs(1) + slack).div_f64(per_second)
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt as _;

    /// The most calls that any second holds.
    fn most_in_a_second(calls: &[Duration]) -> usize {
        let within = |from: &Duration| {
            let later = calls.iter().filter(|call| *call >= from);
            later.filter(|call| call.saturating_sub(*from) < Duration::from_secs(1)).count()
        };
        calls.iter().map(within).max().unwrap_or(0)
    }

    #[tokio::test(start_paused = true)]
    async fn no_second_holds_more_calls_than_the_ceiling() {
        for (rate, most) in [(1.0, 1), (10.0, 10), (333.0, 333), (0.5, 1), (2.5, 3)] {
            let pacer = Pacer::new(Some(rate));
            let started = Instant::now();
            let mut calls = Vec::new();
            let count = if rate < 5.0 { 20 } else { 700 };
            for call in 0..count {
                // Idle for a while, then late again and again.
                if call == count / 2 {
                    tokio::time::advance(Duration::from_secs(60)).await;
                }
                if call % 3 == 0 {
                    tokio::time::advance(Duration::from_millis(7)).await;
                }
                pacer.admit().await.come().await;
                calls.push(started.elapsed());
            }
            assert!(most_in_a_second(&calls) <= most, "{rate}: {}", most_in_a_second(&calls));
            let busy = started.elapsed().checked_sub(Duration::from_secs(60)).unwrap();
            let least = f64::from(count - 2) / busy.as_secs_f64();
            assert!(least >= rate * 0.9, "{rate}: only {least} a second");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_gives_up_in_line_takes_nothing_and_those_behind_keep_their_places() {
        let pacer = Pacer::new(Some(1.0));
        pacer.admit().await;
        let started = Instant::now();
        let (first, second, third) = (pacer.admit(), pacer.admit(), pacer.admit());
        let given_up = async {
            drop(tokio::time::timeout(Duration::from_millis(500), second).await);
        };
        tokio::join!(first, given_up, third);
        assert!(started.elapsed() < Duration::from_millis(2_100), "{:?}", started.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn silence_holds_for_everybody() {
        let pacer = Pacer::new(None);
        pacer.quiet(Duration::from_secs(3));
        assert!(pacer.admit().now_or_never().is_none());
        let started = Instant::now();
        pacer.admit().await.come().await;
        assert!(started.elapsed() >= Duration::from_secs(3));
    }

    /// Whoever keeps the budget for all, in one process: grants blocks of places in order.
    async fn keep(pacers: &[Pacer], rate: f64) {
        let next = Mutex::new(Instant::now());
        let serve = |pacer| {
            let next = &next;
            async move {
                let pacer: &Pacer = pacer;
                loop {
                    let wanted = pacer.wanted().await;
                    // A round trip.
                    tokio::time::sleep(Duration::from_millis(2)).await;
                    let interval = Pacer::shared_interval(rate);
                    let count = u32::try_from(wanted.min(8)).unwrap();
                    let first = {
                        let mut next = next.lock().unwrap();
                        let first = (*next).max(Instant::now());
                        *next = first + interval * count;
                        first
                    };
                    pacer.grant((0..count).map(|place| first + interval * place));
                }
            }
        };
        futures::future::join_all(pacers.iter().map(serve)).await;
    }

    #[tokio::test(start_paused = true)]
    async fn workers_that_share_a_budget_keep_it_together_and_share_it_fairly() {
        for workers in [1_usize, 4, 16] {
            let rate = 100.0;
            let pacers: Vec<Pacer> = (0..workers).map(|_| Pacer::shared()).collect();
            let calls = Mutex::new(vec![Vec::new(); workers]);
            let started = Instant::now();
            let call = |worker: usize| {
                let (pacers, calls) = (&pacers, &calls);
                async move {
                    loop {
                        pacers[worker].admit().await.come().await;
                        calls.lock().unwrap()[worker].push(started.elapsed());
                        tokio::time::sleep(Duration::from_millis(200)).await;
                    }
                }
            };
            // Each could use the whole budget by itself.
            let callers = (0..workers).flat_map(|worker| (0..64).map(move |_| worker)).map(call);
            let all =
                futures::future::join(futures::future::join_all(callers), keep(&pacers, rate));
            drop(tokio::time::timeout(Duration::from_secs(20), all).await);
            let calls = calls.into_inner().unwrap();
            let mut together: Vec<Duration> = calls.iter().flatten().copied().collect();
            together.sort_unstable();
            assert!(
                most_in_a_second(&together) <= 100,
                "{workers}: {}",
                most_in_a_second(&together)
            );
            assert!(together.len() >= 1_800, "{workers}: {} of 2000", together.len());
            let shares: Vec<usize> = calls.iter().map(Vec::len).collect();
            let (least, most) = (shares.iter().min().unwrap(), shares.iter().max().unwrap());
            assert!(most - least <= 16, "{workers}: {shares:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_granted_place_that_is_over_is_not_taken() {
        let pacer = Pacer::shared();
        let now = Instant::now();
        pacer.grant([now, now + Duration::from_millis(100)]);
        tokio::time::advance(Duration::from_millis(50)).await;
        pacer.admit().await.come().await;
        assert_eq!(now.elapsed(), Duration::from_millis(100), "the first one is lost");
        assert!(pacer.admit().now_or_never().is_none());
        assert_eq!(pacer.wanted().now_or_never(), Some(1));
    }

    #[tokio::test(start_paused = true)]
    async fn what_another_worker_was_told_is_not_told_on() {
        let pacer = Pacer::new(None);
        let mut told = pacer.told();
        pacer.hear(Instant::now() + Duration::from_secs(3));
        assert!(!told.has_changed().unwrap());
        pacer.quiet(Duration::from_secs(5));
        assert_eq!(*told.borrow_and_update(), Some(Instant::now() + Duration::from_secs(5)));
        let started = Instant::now();
        pacer.admit().await.come().await;
        assert_eq!(started.elapsed(), Duration::from_secs(5));
    }

    #[tokio::test(start_paused = true)]
    async fn a_place_is_lost_when_its_time_is_over_or_creem_asks_for_silence() {
        let pacer = Pacer::new(Some(10.0));
        let place = pacer.admit().await;
        assert!(!pacer.is_lost(&place));
        tokio::time::advance(LATENESS + Duration::from_millis(2)).await;
        assert!(pacer.is_lost(&place));
        let place = pacer.admit().await;
        place.come().await;
        assert!(!pacer.is_lost(&place));
        pacer.quiet(Duration::from_secs(1));
        assert!(pacer.is_lost(&place));

        let free = Pacer::new(None);
        let place = free.admit().await;
        tokio::time::advance(Duration::from_secs(60)).await;
        assert!(!free.is_lost(&place), "where there is no ceiling, no call is late");
    }
}
