//! How fast Creem may be asked, by whom first, and silence where Creem asked for it.
//!
//! Calls have *places*: points in time, of which each call takes one. How far apart they are is what was
//! learned from Creem (see [`rate`]) or, if that is further, a ceiling. One worker by itself keeps that here;
//! workers that share a budget learn together (see [`together`]), and are granted places in small blocks by whoever
//! keeps it for all. The pacer knows nothing of HTTP: it is told that a call was taken, or "slow down".
//!
//! Interactive callers come first. Bulk takes the rest, and where both wait a small share of its own, so
//! that it is never starved. A call that was begun, and has lost its place, is first of all.

mod answers;
pub mod breaker;
mod kept;
mod lately;
pub mod rate;
pub mod retry_budget;
pub mod seen;
pub mod together;
pub mod usual;
mod waiting;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use crate::job::Lane;
pub use lately::LATELY;
use lately::Lately;
use rate::Rate;
use seen::Seen;
use usual::Usual;
pub use waiting::Waiters;
use waiting::Waiting;

/// How long after its time a place may still be used, where there is a ceiling. A ceiling's worth of places is spread over
/// a second and this, so that no second holds more calls even if its first one is late and its last one in time.
const LATENESS: Duration = Duration::from_millis(25);
/// Where places are granted, the workers' ideas of the time differ as well: that comes on top.
const CLOCKS: Duration = Duration::from_millis(35);
/// How long after its time a place may still be given out, where there is a ceiling: the rest of its lateness is for what
/// its caller does then.
const HAIR: Duration = Duration::from_millis(8);
/// Without a ceiling: for how long places that nobody took are kept, so that a few callers who come together
/// after an idle moment need not wait for each other.
const SAVED: Duration = Duration::from_millis(250);
/// How long before its time a place is given out at least: what a caller must do before its call it does then, and
/// where that takes longer, the lead does as well.
const LEAD: Duration = Duration::from_millis(10);
/// No place is given out earlier: whoever comes first in the meantime would stand behind it.
const LONGEST_LEAD: Duration = Duration::from_secs(1);
/// A granted place that lies no further ahead than this is no wait for the rate, but for the answer that granted it.
const ANSWER_SLACK: Duration = Duration::from_millis(5);

/// What a pacer is to keep.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Most calls a second.
    pub ceiling: Option<f64>,
    /// What part of the calls is bulk's where both lanes wait, above 0 and below 1.
    pub bulk_share: f64,
}

/// Gives out the right to make calls.
#[derive(Debug)]
pub struct Pacer {
    limits: Limits,
    /// Whether places are granted by whoever keeps a budget for all.
    granted: bool,
    /// Who waits for a place holds its lane's, so that one timer serves them all, and the others stand in line.
    lines: [tokio::sync::Mutex<()>; 2],
    /// The same for those who are ahead of all others.
    ahead: tokio::sync::Mutex<()>,
    /// How many callers wait in each lane.
    waiting: [AtomicUsize; 2],
    /// How many of them are ahead.
    waiting_ahead: AtomicUsize,
    state: Mutex<State>,
    /// Whoever waits may look again.
    changed: watch::Sender<()>,
    wanted: Notify,
    /// Until when Creem has told this worker, and not another one, to be quiet.
    silences: watch::Sender<Option<Instant>>,
    /// Something was seen that all who share the rate must be told of.
    saw: Notify,
}

#[derive(Debug)]
struct State {
    /// Where it is shared, as it was when it was last heard of.
    rate: Rate,
    /// Which one it is of those that were written down for all; they are numbered.
    version: i64,
    /// What nobody else knows yet, and when the others were last told something.
    seen: Seen,
    told_at: Instant,
    /// When the next place is, as far as this worker alone decides.
    next: Instant,
    /// Granted places that nobody has taken.
    places: VecDeque<Instant>,
    /// Whether the last answer shows that it is the rate that holds calls up: its places had others before them, or it
    /// had none. Else whoever waits for a place waits for the answer alone.
    waited: bool,
    /// Places that were taken and given back, the earliest first.
    returned: VecDeque<Instant>,
    /// Until when nobody may call at all.
    quiet_until: Instant,
    /// How many places bulk is owed; at one it is its turn.
    owed: f64,
    /// How long callers take from their place to their call.
    preparing: Usual,
    /// How many places each lane was given of late.
    given: [Lately; 2],
}

impl State {
    fn lead(&self) -> Duration {
        self.preparing.most().clamp(LEAD, LONGEST_LEAD)
    }
}

/// What a caller at the head of its line does next.
enum Step {
    Take(Place),
    /// The time of a place is not yet near.
    Sleep(Instant),
    /// The other lane comes first, or no place is granted yet.
    Wait,
}

/// The right to make one call, at its time.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    given_at: Instant,
    at: Instant,
    /// After which it is lost.
    latest: Option<Instant>,
    lane: Lane,
    /// What it has changed in what bulk is owed.
    owed: f64,
}

impl Place {
    /// Waits for its time, which is soon.
    pub async fn come(&self) {
        tokio::time::sleep_until(self.at).await;
    }
}

const fn index(lane: Lane) -> usize {
    match lane {
        Lane::Interactive => 0,
        Lane::Bulk => 1,
    }
}

impl Pacer {
    /// A pacer that keeps its limits by itself.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self::with(limits, false)
    }

    /// A pacer whose places are granted, [`Pacer::least_interval`] apart or more.
    #[must_use]
    pub fn shared(limits: Limits) -> Self {
        Self::with(limits, true)
    }

    fn with(limits: Limits, granted: bool) -> Self {
        let now = Instant::now();
        Self {
            limits,
            granted,
            lines: Default::default(),
            ahead: tokio::sync::Mutex::default(),
            waiting: Default::default(),
            waiting_ahead: AtomicUsize::new(0),
            state: Mutex::new(State {
                rate: if granted {
                    Rate::shared(limits.ceiling, now)
                } else {
                    Rate::new(limits.ceiling, now)
                },
                version: 0,
                seen: Seen::default(),
                told_at: now,
                next: now,
                places: VecDeque::new(),
                waited: false,
                returned: VecDeque::new(),
                quiet_until: now,
                owed: 0.0,
                preparing: Usual::default(),
                given: [Lately::new(now); 2],
            }),
            changed: watch::Sender::new(()),
            wanted: Notify::new(),
            silences: watch::Sender::new(None),
            saw: Notify::new(),
        }
    }

    /// Whether there is a number of calls that no second may hold more of.
    #[must_use]
    pub const fn has_ceiling(&self) -> bool {
        self.limits.ceiling.is_some()
    }

    /// How far apart the places of a shared budget lie at least, by the ceiling.
    #[must_use]
    pub fn least_interval(&self) -> Duration {
        self.limits.ceiling.map_or(Duration::ZERO, |rate| interval(rate, LATENESS + CLOCKS))
    }

    /// How far apart the places of a shared budget lie, by all that this worker has heard.
    #[must_use]
    pub fn shared_interval(&self) -> Duration {
        self.state().rate.interval().max(self.least_interval())
    }

    /// Waits for the right to make one call: in each lane first come, first served. It comes a little before
    /// the time of the call.
    ///
    /// Calls are spaced evenly, so that no second holds more than the ceiling (rounded up to whole
    /// calls), after an idle time neither. A caller that gives up while it waits has taken nothing.
    pub async fn admit(&self, lane: Lane) -> Place {
        let _waiting = Waiting::new(self, lane, false);
        let _line = self.lines[index(lane)].lock().await;
        self.place(lane, false).await
    }

    /// The same ahead of all who wait in line: for a call without which one that was made would be in vain, or whose
    /// place was lost while its caller prepared it. Whoever holds something meanwhile, as a lease, must not stand
    /// behind those who do not.
    pub async fn admit_ahead(&self, lane: Lane) -> Place {
        let _waiting = Waiting::new(self, lane, true);
        // Those who are first in their lines look again.
        self.changed.send_replace(());
        let _line = self.ahead.lock().await;
        self.place(lane, true).await
    }

    async fn place(&self, lane: Lane, ahead: bool) -> Place {
        loop {
            let mut changed = self.changed.subscribe();
            match self.step(lane, ahead) {
                Step::Take(place) => return place,
                Step::Sleep(until) => {
                    tokio::select! {
                        () = tokio::time::sleep_until(until) => {}
                        _ = changed.changed() => {}
                    }
                }
                Step::Wait => drop(changed.changed().await),
            }
        }
    }

    fn step(&self, lane: Lane, ahead: bool) -> Step {
        let now = Instant::now();
        let mut state = self.state();
        if !ahead && self.waiting_ahead.load(Ordering::Relaxed) > 0 {
            // Whoever grants places may have one for this lane where there is none for the other.
            let own = self.freshest(&state).max(state.next);
            if self.granted && state.places.iter().chain(&state.returned).all(|place| *place < own)
            {
                self.wanted.notify_one();
            }
            return Step::Wait;
        }
        let lead = state.lead();
        let recent = self.freshest(&state);
        while state.returned.front().is_some_and(|place| *place < recent) {
            state.returned.pop_front();
        }
        let returned = state.returned.front().copied();
        let own = recent.max(state.next);
        if own > now {
            self.press(&mut state, now);
        }
        if returned.is_none() && own > now + lead {
            return Step::Sleep(own - lead);
        }
        let at = if returned.is_some() {
            returned
        } else if self.granted {
            while state.places.front().is_some_and(|place| *place < own) {
                state.places.pop_front();
            }
            let granted = state.places.front().copied();
            if state.waited && granted.is_none_or(|place| place > now + ANSWER_SLACK) {
                self.press(&mut state, now);
            }
            granted
        } else {
            Some(own)
        };
        let Some(at) = at else {
            self.wanted.notify_one();
            return Step::Wait;
        };
        let contested = self.waiting[1 - index(lane)].load(Ordering::Relaxed) > 0;
        if contested && !ahead && (lane == Lane::Bulk) != (state.owed >= 1.0) {
            return Step::Wait;
        }
        if at > now + lead {
            return Step::Sleep(at - lead);
        }
        if returned.is_some() {
            state.returned.pop_front();
        } else if self.granted {
            // How far apart they are is for whoever grants them.
            state.places.pop_front();
        } else {
            let least = self.limits.ceiling.map(|rate| interval(rate, LATENESS));
            state.next = at + state.rate.interval().max(least.unwrap_or_default());
        }
        let share = self.limits.bulk_share;
        let owed = match lane {
            _ if !contested => 0.0,
            Lane::Interactive => share / (1.0 - share),
            Lane::Bulk => -1.0,
        };
        state.owed += owed;
        state.given[index(lane)].count(now);
        let latest = self.limits.ceiling.map(|_| at + LATENESS);
        Step::Take(Place { given_at: now, at, latest, lane, owed })
    }

    /// Gives a place back at which no call was made; the next one who wants a place has it, if its time is not over.
    pub fn put_back(&self, place: Place) {
        let mut state = self.state();
        if place.at < self.freshest(&state) {
            // It is lost, and was somebody's.
            return;
        }
        state.owed -= place.owed;
        let behind = state.returned.partition_point(|other| *other < place.at);
        state.returned.insert(behind, place.at);
        drop(state);
        self.changed.send_replace(());
    }

    /// How long Creem wants silence still.
    #[must_use]
    pub fn silence(&self) -> Duration {
        self.state().quiet_until.saturating_duration_since(Instant::now())
    }

    /// The earliest place that may be given out now.
    fn freshest(&self, state: &State) -> Instant {
        let now = Instant::now();
        let saved = if self.limits.ceiling.is_some() { HAIR } else { SAVED };
        now.checked_sub(saved).unwrap_or(now).max(state.quiet_until)
    }

    /// Waits for the time of the call; if its place is lost by then, for another one. Returns the one of the call.
    pub async fn pass(&self, place: Place) -> Place {
        self.state().preparing.note(place.given_at.elapsed());
        self.keep(place).await
    }

    /// The same for a call that needs no preparing.
    pub async fn keep(&self, mut place: Place) -> Place {
        loop {
            place.come().await;
            if !self.is_lost(&place) {
                return place;
            }
            place = self.admit_ahead(place.lane).await;
        }
    }

    /// Whether a place is lost: its time is over, or Creem has asked for silence since.
    #[must_use]
    pub fn is_lost(&self, place: &Place) -> bool {
        let now = Instant::now();
        place.latest.is_some_and(|latest| now > latest) || now < self.state().quiet_until
    }

    /// What part of the calls is bulk's where both lanes wait.
    #[must_use]
    pub const fn bulk_share(&self) -> f64 {
        self.limits.bulk_share
    }

    /// Waits until somebody wants a granted place; how many callers wait then.
    pub async fn wanted(&self) -> Waiters {
        self.wanted.notified().await;
        self.waiters()
    }

    /// How many callers wait for a place.
    #[must_use]
    pub fn waiters(&self) -> Waiters {
        let [interactive, bulk] =
            self.waiting.each_ref().map(|count| count.load(Ordering::Relaxed));
        Waiters { interactive, bulk }
    }

    /// How many places a lane was given of late, in [`LATELY`] or less.
    #[must_use]
    pub fn given_lately(&self, lane: Lane) -> u32 {
        self.state().given[index(lane)].lately(Instant::now())
    }

    /// Grants places; `waited` says whether they had others before them, or there are none.
    pub fn grant(&self, places: impl IntoIterator<Item = Instant>, waited: bool) {
        let mut state = self.state();
        for place in places {
            // A buyer's may lie before those that bulk has.
            let behind = state.places.partition_point(|other| *other <= place);
            state.places.insert(behind, place);
        }
        state.waited = waited;
        drop(state);
        self.changed.send_replace(());
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn interval(per_second: f64, slack: Duration) -> Duration {
    (Duration::from_secs(1) + slack).div_f64(per_second)
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt as _;

    fn own(ceiling: Option<f64>) -> Pacer {
        Pacer::new(Limits { ceiling, bulk_share: 0.05 })
    }

    fn granted() -> Pacer {
        Pacer::shared(Limits { ceiling: Some(1e6), bulk_share: 0.05 })
    }

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
            let pacer = own(Some(rate));
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
                pacer.admit(Lane::Interactive).await.come().await;
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
        let pacer = own(Some(1.0));
        pacer.admit(Lane::Interactive).await;
        let started = Instant::now();
        let (first, second, third) = (
            pacer.admit(Lane::Interactive),
            pacer.admit(Lane::Interactive),
            pacer.admit(Lane::Interactive),
        );
        let given_up = async {
            drop(tokio::time::timeout(Duration::from_millis(500), second).await);
        };
        tokio::join!(first, given_up, third);
        assert!(started.elapsed() < Duration::from_millis(2_100), "{:?}", started.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn silence_holds_for_everybody() {
        for lane in Lane::ALL {
            let pacer = own(None);
            pacer.quiet(Duration::from_secs(3));
            assert!(pacer.admit(lane).now_or_never().is_none());
            assert!(pacer.admit_ahead(lane).now_or_never().is_none());
            let started = Instant::now();
            let (place, ahead) = tokio::join!(pacer.admit(lane), pacer.admit_ahead(lane));
            tokio::join!(place.come(), ahead.come());
            assert!(started.elapsed() >= Duration::from_secs(3));
        }
    }

    /// Whoever keeps the budget for all, in one process: grants blocks of places in order.
    async fn keep(pacers: &[Pacer], rate: f64) {
        let next = Mutex::new(Instant::now());
        let serve = |pacer| {
            let next = &next;
            async move {
                let pacer: &Pacer = pacer;
                loop {
                    let Waiters { interactive, bulk } = pacer.wanted().await;
                    let wanted = interactive + bulk;
                    // A round trip.
                    tokio::time::sleep(Duration::from_millis(2)).await;
                    let interval = interval(rate, LATENESS + CLOCKS);
                    let count = u32::try_from(wanted.min(8)).unwrap();
                    let first = {
                        let mut next = next.lock().unwrap();
                        let first = (*next).max(Instant::now());
                        *next = first + interval * count;
                        first
                    };
                    pacer.grant((0..count).map(|place| first + interval * place), true);
                }
            }
        };
        futures::future::join_all(pacers.iter().map(serve)).await;
    }

    #[tokio::test(start_paused = true)]
    async fn workers_that_share_a_budget_keep_it_together_and_share_it_fairly() {
        for workers in [1_usize, 4, 16] {
            let rate = 100.0;
            let pacers: Vec<Pacer> = (0..workers).map(|_| granted()).collect();
            let calls = Mutex::new(vec![Vec::new(); workers]);
            let started = Instant::now();
            let call = |worker: usize| {
                let (pacers, calls) = (&pacers, &calls);
                async move {
                    loop {
                        pacers[worker].admit(Lane::Interactive).await.come().await;
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

    /// Lets a backlog of bulk callers and interactive ones compete; how long each interactive one waited, and
    /// how many calls bulk had in a second.
    async fn compete(pacer: &Pacer, every: Duration, interactive: u32) -> (Vec<Duration>, f64) {
        let bulk = AtomicUsize::new(0);
        let started = Instant::now();
        let backlogs = futures::future::join_all((0..64).map(|_| async {
            loop {
                pacer.admit(Lane::Bulk).await.come().await;
                bulk.fetch_add(1, Ordering::Relaxed);
            }
        }));
        let buyers = futures::future::join_all((0..interactive).map(|number| async move {
            tokio::time::sleep(every * number).await;
            let came = Instant::now();
            pacer.admit(Lane::Interactive).await.come().await;
            came.elapsed()
        }));
        let waited = tokio::select! {
            _ = backlogs => unreachable!("it never ends"),
            waited = buyers => waited,
        };
        let calls = f64::from(u32::try_from(bulk.load(Ordering::Relaxed)).unwrap());
        (waited, calls / started.elapsed().as_secs_f64())
    }

    #[tokio::test(start_paused = true)]
    async fn a_buyer_waits_for_two_places_at_most_whatever_the_backlog() {
        let pacer = own(Some(100.0));
        let (waited, bulk) = compete(&pacer, Duration::from_millis(50), 200).await;
        let longest = waited.iter().max().unwrap();
        // The place under way, its own, and now and then one that bulk is owed.
        assert!(*longest <= Duration::from_millis(60), "{longest:?}");
        assert!(bulk >= 75.0, "bulk takes all the rest: {bulk}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_flood_of_buyers_leaves_bulk_its_share() {
        let pacer = Pacer::new(Limits { ceiling: Some(100.0), bulk_share: 0.1 });
        let (_, bulk) = compete(&pacer, Duration::from_millis(1), 2_000).await;
        assert!((8.0..=12.0).contains(&bulk), "{bulk}");
    }

    #[tokio::test(start_paused = true)]
    async fn bulk_goes_on_when_a_buyer_gives_up() {
        let pacer = own(Some(1.0));
        pacer.admit(Lane::Bulk).await;
        let started = Instant::now();
        let buyer =
            tokio::time::timeout(Duration::from_millis(500), pacer.admit(Lane::Interactive));
        let (buyer, _) = tokio::join!(buyer, pacer.admit(Lane::Bulk));
        assert!(buyer.is_err() && started.elapsed() < Duration::from_millis(1_100));
    }

    #[tokio::test(start_paused = true)]
    async fn a_granted_place_that_is_over_is_not_taken() {
        let pacer = granted();
        let now = Instant::now();
        pacer.grant([now, now + Duration::from_millis(100)], false);
        tokio::time::advance(Duration::from_millis(50)).await;
        pacer.admit(Lane::Interactive).await.come().await;
        assert_eq!(now.elapsed(), Duration::from_millis(100), "the first one is lost");
        assert!(pacer.admit(Lane::Interactive).now_or_never().is_none());
        let nobody = Waiters { interactive: 0, bulk: 0 };
        assert_eq!(pacer.wanted().now_or_never(), Some(nobody), "who asked has given up");
    }

    #[tokio::test(start_paused = true)]
    async fn a_place_that_lies_before_others_is_given_out_before_them() {
        let pacer = granted();
        let now = Instant::now();
        let after = |millis| now + Duration::from_millis(millis);
        // Bulk's, and then a buyer's, who overtakes.
        pacer.grant([after(50), after(60)], true);
        pacer.grant([after(10), after(55)], true);
        for millis in [10, 50, 55, 60] {
            pacer.admit(Lane::Interactive).await.come().await;
            assert_eq!(Instant::now(), after(millis));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_another_worker_was_told_is_not_told_on() {
        let pacer = own(None);
        let mut told = pacer.silences();
        pacer.hear(Instant::now() + Duration::from_secs(3));
        assert!(!told.has_changed().unwrap());
        pacer.quiet(Duration::from_secs(5));
        assert_eq!(*told.borrow_and_update(), Some(Instant::now() + Duration::from_secs(5)));
        let started = Instant::now();
        pacer.admit(Lane::Interactive).await.come().await;
        assert_eq!(started.elapsed(), Duration::from_secs(5));
    }

    /// How many calls a second callers make who do something first that takes so long; whoever waits too long for a
    /// place after it gives up, and begins again.
    async fn calls_of_callers_who_prepare(pacer: &Pacer, preparing: Duration) -> f64 {
        const SECONDS: u32 = 600;
        let calls = AtomicUsize::new(0);
        let callers = futures::future::join_all((0..64).map(|_| async {
            loop {
                let place = pacer.admit(Lane::Interactive).await;
                tokio::time::sleep(preparing).await;
                let passed = tokio::time::timeout(Duration::from_secs(8), pacer.pass(place));
                calls.fetch_add(usize::from(passed.await.is_ok()), Ordering::Relaxed);
            }
        }));
        drop(tokio::time::timeout(Duration::from_secs(SECONDS.into()), callers).await);
        f64::from(u32::try_from(calls.load(Ordering::Relaxed)).unwrap()) / f64::from(SECONDS)
    }

    #[tokio::test(start_paused = true)]
    async fn callers_who_prepare_their_calls_slowly_lose_hardly_a_place() {
        for rate in [1.0, 5.0, 20.0] {
            for millis in [10, 55, 200, 900] {
                let pacer = own(Some(rate));
                let calls =
                    calls_of_callers_who_prepare(&pacer, Duration::from_millis(millis)).await;
                assert!(calls >= rate * 0.9, "{rate} a second, {millis} ms: {calls}");
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn callers_who_take_longer_than_any_lead_still_come_to_their_calls() {
        for rate in [1.0, 5.0, 20.0] {
            let calls =
                calls_of_callers_who_prepare(&own(Some(rate)), Duration::from_secs(2)).await;
            assert!(calls >= rate * 0.4, "{rate} a second: {calls}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_begun_goes_ahead_of_both_lines() {
        let pacer = own(Some(10.0));
        let line = |lane| {
            let pacer = &pacer;
            futures::future::join_all((0..64).map(move |_| async move {
                loop {
                    pacer.admit(lane).await.come().await;
                }
            }))
        };
        let begun = async {
            tokio::time::sleep(Duration::from_secs(10)).await;
            for lane in Lane::ALL {
                let came = Instant::now();
                pacer.admit_ahead(lane).await.come().await;
                assert!(came.elapsed() <= Duration::from_millis(250), "{:?}", came.elapsed());
            }
            // One that gives up holds nobody.
            let ahead = pacer.admit_ahead(Lane::Bulk);
            drop(tokio::time::timeout(Duration::from_millis(1), ahead).await);
        };
        tokio::select! {
            _ = futures::future::join(line(Lane::Interactive), line(Lane::Bulk)) => unreachable!(),
            () = begun => {}
        }
        let place = tokio::time::timeout(Duration::from_secs(1), pacer.admit(Lane::Bulk)).await;
        assert!(place.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn a_buyer_is_granted_a_place_while_a_call_of_bulks_that_was_begun_is_not() {
        let pacer = granted();
        let began = Instant::now();
        // Others' buyers have the places that bulk could have.
        let grants = async {
            loop {
                let waiters = pacer.wanted().await;
                let now = Instant::now();
                let bulk_may = now >= began + Duration::from_secs(8);
                if waiters.interactive > 0 || bulk_may {
                    pacer.grant(
                        [now + Duration::from_millis(10), now + Duration::from_millis(20)],
                        true,
                    );
                }
            }
        };
        let ahead = async { pacer.admit_ahead(Lane::Bulk).await };
        let buyer = async {
            tokio::time::sleep(Duration::from_millis(100)).await;
            let came = Instant::now();
            pacer.admit(Lane::Interactive).await.come().await;
            came.elapsed()
        };
        let waited = tokio::select! {
            (_, waited) = futures::future::join(ahead, buyer) => waited,
            () = grants => unreachable!("it never ends"),
        };
        assert!(waited < Duration::from_millis(300), "{waited:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn no_more_places_are_wanted_than_there_are_callers_though_some_go_ahead() {
        let pacer = granted();
        let mut granted = 0_u32;
        let grants = async {
            let mut next = Instant::now();
            loop {
                let Waiters { interactive, bulk } = pacer.wanted().await;
                for _ in 0..(interactive + bulk).min(8) {
                    next = next.max(Instant::now()) + Duration::from_millis(20);
                    pacer.grant([next], true);
                    granted += 1;
                }
            }
        };
        let calls = futures::future::join_all((0..200).map(async |number| {
            if number % 2 == 0 {
                pacer.admit(Lane::Interactive).await.come().await;
            } else {
                pacer.admit_ahead(Lane::Interactive).await.come().await;
            }
        }));
        tokio::select! {
            _ = calls => {}
            () = grants => unreachable!("it never ends"),
        }
        assert!((200..=216).contains(&granted), "{granted} places for 200 calls");
    }

    #[tokio::test(start_paused = true)]
    async fn a_silence_holds_whoever_has_a_place_already() {
        let pacer = own(Some(2.0));
        pacer.admit_ahead(Lane::Interactive).await.come().await;
        let place = pacer.admit_ahead(Lane::Interactive).await;
        pacer.quiet(Duration::from_secs(30));
        let told = Instant::now();
        pacer.keep(place).await;
        assert!(told.elapsed() >= Duration::from_secs(30), "{:?}", told.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn a_place_is_lost_when_its_time_is_over_or_creem_asks_for_silence() {
        let pacer = own(Some(10.0));
        let place = pacer.admit(Lane::Interactive).await;
        assert!(!pacer.is_lost(&place));
        tokio::time::advance(LATENESS + Duration::from_millis(2)).await;
        assert!(pacer.is_lost(&place));
        let place = pacer.admit(Lane::Interactive).await;
        place.come().await;
        assert!(!pacer.is_lost(&place));
        pacer.quiet(Duration::from_secs(1));
        assert!(pacer.is_lost(&place));

        let free = own(None);
        let place = free.admit(Lane::Interactive).await;
        tokio::time::advance(Duration::from_secs(60)).await;
        assert!(!free.is_lost(&place), "where there is no ceiling, no call is late");
    }
}
