//! A fleet without a ceiling, and a Creem that says "slow down" above a limit that nobody was told.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use creem_checkout_worker::job::Lane;
use creem_checkout_worker::pace::{Limits, Pacer};
use fastrand::Rng;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::fleet::{IN_THE_WORKS, Row, serve};

/// How long Creem takes for an answer.
const ANSWER: Duration = Duration::from_millis(50);
/// Until the limit is found: what the first refusals show may lie a tenth below it, and it grows slowly from there.
const FIRST: Duration = Duration::from_secs(25);
/// How long Creem is away, and how soon each worker hears that it is back.
const AWAY: Duration = Duration::from_secs(20);
const HEARS_WITHIN_MS: u64 = 500;

pub(crate) struct Learning {
    pub(crate) seed: u64,
    pub(crate) limit: f64,
    pub(crate) workers: usize,
    pub(crate) duration: Duration,
    /// Whether buyers come to all workers, and not to one that serves no campaign.
    pub(crate) mixed: bool,
}

/// What came of it, from a while after the begin on.
pub(crate) struct Learned {
    /// Share of the limit that was used.
    pub(crate) used: f64,
    /// Share of the calls that were answered with "slow down".
    pub(crate) refused: f64,
    /// How long buyers waited for a place, in order.
    pub(crate) waits: Vec<Duration>,
    /// How long after an outage nine tenths of the limit were used.
    pub(crate) recovered: Duration,
}

/// A Creem that takes so many calls in any second.
struct Creem {
    limit: usize,
    taken: VecDeque<Instant>,
    /// When each call was made, and whether it was taken.
    calls: Vec<(Instant, bool)>,
}

impl Creem {
    fn ask(&mut self) -> bool {
        let now = Instant::now();
        while self.taken.front().is_some_and(|at| now.duration_since(*at) >= Duration::from_secs(1))
        {
            self.taken.pop_front();
        }
        let takes = self.taken.len() < self.limit;
        if takes {
            self.taken.push_back(now);
        }
        self.calls.push((now, takes));
        takes
    }
}

/// What all callers share.
struct World {
    creem: Mutex<Creem>,
    away: AtomicBool,
    back: tokio::sync::Notify,
}

impl World {
    /// One call: whether it was taken.
    async fn call(&self, pacer: &Pacer, lane: Lane) -> bool {
        loop {
            // The gate, before and after it.
            while self.away.load(Ordering::Relaxed) {
                self.back.notified().await;
            }
            let place = pacer.admit(lane).await;
            if !self.away.load(Ordering::Relaxed) {
                pacer.pass(place).await;
                break;
            }
            pacer.put_back(place);
        }
        let asked = Instant::now();
        let taken = self.creem.lock().unwrap().ask();
        tokio::time::sleep(ANSWER).await;
        if taken {
            pacer.taken(asked);
        } else {
            pacer.slow_down(asked);
        }
        taken
    }
}

impl Learning {
    /// Calls a second that the workers could make if nobody held them.
    #[expect(clippy::cast_precision_loss, reason = "a few thousand")]
    pub(crate) fn capacity(&self) -> f64 {
        (self.workers * IN_THE_WORKS) as f64 / ANSWER.as_secs_f64()
    }

    pub(crate) fn run(&self) -> Learned {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .unwrap();
        runtime.block_on(self.simulate())
    }

    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "a few hundred thousand"
    )]
    async fn simulate(&self) -> Learned {
        let started = Instant::now();
        let mut random = Rng::with_seed(self.seed);
        let row = Arc::new(Mutex::new(Row::new(started)));
        let creem = Creem { limit: self.limit as usize, taken: VecDeque::new(), calls: Vec::new() };
        let (away, back) = (AtomicBool::new(false), tokio::sync::Notify::new());
        let world = Arc::new(World { creem: Mutex::new(creem), away, back });
        let mut tasks = JoinSet::new();
        let limits = Limits { ceiling: None, bulk_share: 0.05 };
        let pacers: Vec<Arc<Pacer>> = (0..=self.workers)
            .map(|_| {
                let pacer = Arc::new(Pacer::shared(limits));
                serve(&mut tasks, &pacer, &row, random.fork());
                pacer
            })
            .collect();
        // The last one serves no campaign.
        for pacer in &pacers[..self.workers] {
            for _ in 0..IN_THE_WORKS {
                let (pacer, world) = (pacer.clone(), world.clone());
                tasks.spawn(async move {
                    loop {
                        world.call(&pacer, Lane::Bulk).await;
                    }
                });
            }
        }
        let waits: Arc<Mutex<Vec<Duration>>> = Arc::default();
        let (mixed, apart) = (self.mixed, self.workers);
        let buyers = pacers.clone();
        let (for_buyers, waited, buyers_a_second) =
            (world.clone(), waits.clone(), self.limit / 15.0);
        let mut arrivals = random.fork();
        tasks.spawn(async move {
            let mut under_way = JoinSet::new();
            loop {
                let pause = -(1.0 - arrivals.f64()).ln() / buyers_a_second;
                tokio::time::sleep(Duration::from_secs_f64(pause)).await;
                while under_way.try_join_next().is_some() {}
                let at = if mixed { arrivals.usize(0..apart) } else { apart };
                let (world, pacer, waited) =
                    (for_buyers.clone(), buyers[at].clone(), waited.clone());
                under_way.spawn(async move {
                    let came = Instant::now();
                    world.call(&pacer, Lane::Interactive).await;
                    if came > started + FIRST && !world.away.load(Ordering::Relaxed) {
                        waited.lock().unwrap().push(came.elapsed().saturating_sub(ANSWER));
                    }
                });
            }
        });
        tokio::time::sleep_until(started + self.duration).await;
        let waits = {
            let mut waits = std::mem::take(&mut *waits.lock().unwrap());
            waits.sort_unstable();
            waits
        };
        let (used, refused) = {
            let creem = world.creem.lock().unwrap();
            let later = || creem.calls.iter().filter(|call| call.0 > started + FIRST);
            let taken = later().filter(|call| call.1).count() as f64;
            let seconds = self.duration.saturating_sub(FIRST).as_secs_f64();
            (taken / (seconds * self.limit), 1.0 - taken / later().count() as f64)
        };
        let recovered = self.outage(&world, &pacers, random).await;
        Learned { used, refused, waits, recovered }
    }

    /// Creem goes away, and each worker finds it back by itself; how long it takes until it is used as before.
    #[expect(clippy::cast_precision_loss, reason = "a few thousand")]
    async fn outage(&self, world: &Arc<World>, pacers: &[Arc<Pacer>], mut random: Rng) -> Duration {
        world.away.store(true, Ordering::Relaxed);
        tokio::time::sleep(AWAY).await;
        let back = Instant::now();
        world.away.store(false, Ordering::Relaxed);
        let mut hearing = JoinSet::new();
        for pacer in pacers {
            let (pacer, after) = (pacer.clone(), random.u64(..HEARS_WITHIN_MS));
            hearing.spawn(async move {
                tokio::time::sleep(Duration::from_millis(after)).await;
                pacer.restart();
            });
        }
        world.back.notify_waiters();
        let look = Duration::from_millis(100);
        loop {
            tokio::time::sleep(look).await;
            world.back.notify_waiters();
            let since = Instant::now().checked_sub(Duration::from_secs(1)).unwrap();
            let creem = world.creem.lock().unwrap();
            let lately = creem.calls.iter().rev().take_while(|call| call.0 > since);
            let taken = lately.filter(|call| call.1).count() as f64;
            if taken >= self.limit * 0.9 && since >= back || back.elapsed() > AWAY {
                return back.elapsed();
            }
        }
    }

    /// A few calls a second for some minutes, which no limit holds up: what the rate has become.
    pub(crate) fn quiet(seed: u64, workers: usize) -> f64 {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .unwrap();
        runtime.block_on(async {
            let mut random = Rng::with_seed(seed);
            let row = Arc::new(Mutex::new(Row::new(Instant::now())));
            let limits = Limits { ceiling: None, bulk_share: 0.05 };
            let mut tasks = JoinSet::new();
            let mut pacers = Vec::new();
            for _ in 0..workers {
                let pacer = Arc::new(Pacer::shared(limits));
                serve(&mut tasks, &pacer, &row, random.fork());
                pacers.push(pacer.clone());
                let mut arrivals = random.fork();
                tasks.spawn(async move {
                    loop {
                        tokio::time::sleep(Duration::from_secs_f64(arrivals.f64() / 2.0)).await;
                        pacer.pass(pacer.admit(Lane::Interactive).await).await;
                        let asked = Instant::now();
                        tokio::time::sleep(ANSWER).await;
                        pacer.taken(asked);
                    }
                });
            }
            tokio::time::sleep(Duration::from_secs(300)).await;
            pacers[0].explain().0
        })
    }
}
