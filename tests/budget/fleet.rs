//! One simulated fleet.

use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use creem_checkout_worker::job::{Lane, Mode};
use creem_checkout_worker::ledger::budget::Reckoning;
use creem_checkout_worker::ledger::{
    Budget, Learned, LedgerError, News, Places, Taught, Teaching, Wish,
};
use creem_checkout_worker::pace::{Limits, Pacer};
use creem_checkout_worker::worker::budget::{grant, listen, teach};
use fastrand::Rng;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::line::{Leased, Line, micros};

/// Jobs that each worker has in the works, as by default.
pub(crate) const IN_THE_WORKS: usize = 64;
/// How long Creem takes for an answer.
const ANSWER_MS: Range<u32> = 50..400;
/// What Creem asks for, once.
const SILENCE: Duration = Duration::from_secs(3);

pub(crate) struct Fleet {
    pub(crate) seed: u64,
    pub(crate) per_second: f64,
    pub(crate) workers: usize,
    pub(crate) duration: Duration,
    /// Whose callers they are that could use the whole budget.
    pub(crate) lane: Lane,
}

/// What came of buyers who come now and then, beside a campaign that wants the whole budget.
pub(crate) struct Waited {
    pub(crate) most_in_a_second: usize,
    /// Share of the budget that was used.
    pub(crate) used: f64,
    /// How long each buyer waited for a place, in order.
    pub(crate) waits: Vec<Duration>,
}

/// What came of it.
pub(crate) struct Ran {
    pub(crate) most_in_a_second: usize,
    /// Share of the budget that was used while nobody was silent.
    pub(crate) used: f64,
    /// Jain's index of the shares of the workers that were there all the time: 1 means equal.
    pub(crate) fairness: f64,
    pub(crate) shares: Vec<usize>,
    /// Calls in the silence, from a second after it was asked for.
    pub(crate) in_silence: usize,
}

/// The database's row.
#[derive(Debug)]
pub(crate) struct Row {
    /// When its clock showed nothing.
    started: Instant,
    line: Line,
    /// What was learned, when that was written, and how far apart places are by it.
    learned: Option<(i64, String, Instant, Duration)>,
}

impl Row {
    pub(crate) fn new(started: Instant) -> Self {
        Self { started, line: Line::default(), learned: None }
    }

    /// What its clock shows.
    fn now(&self) -> i64 {
        micros(self.started.elapsed())
    }

    /// For how long all are quiet.
    fn quiet(&self) -> Duration {
        let left = self.line.quiet_until.saturating_sub(self.now());
        Duration::from_micros(left.try_into().unwrap_or(0))
    }

    fn learned(&self) -> Option<Learned> {
        let (version, text, at, _) = self.learned.clone()?;
        Some(Learned { version, text, age: at.elapsed() })
    }
}

/// A worker's way to it.
#[derive(Debug)]
struct Seat {
    row: Arc<Mutex<Row>>,
    random: Arc<Mutex<Rng>>,
    lead: Arc<Mutex<Duration>>,
    reckoning: Arc<Reckoning>,
}

impl Seat {
    /// Asks the clock a few times, where the program would.
    fn clock_questions(&self) -> impl Future<Output = ()> + use<> {
        let asks = if self.reckoning.should_try() { 5 } else { 0 };
        let ways: Vec<_> = (0..asks).map(|_| (self.way(), self.way())).collect();
        let (row, reckoning) = (self.row.clone(), self.reckoning.clone());
        async move {
            for (there, back) in ways {
                let asked = Instant::now();
                tokio::time::sleep(there).await;
                let now = row.lock().unwrap().now();
                tokio::time::sleep(back).await;
                reckoning.hear(now, asked);
            }
        }
    }

    fn way(&self) -> Duration {
        way(&mut self.random.lock().unwrap())
    }
}

/// One way over the network: mostly short, now and then very long.
fn way(random: &mut Rng) -> Duration {
    let micros =
        if random.u8(..) == 0 { random.u64(20_000..120_000) } else { random.u64(200..3_000) };
    Duration::from_micros(micros)
}

impl Budget for Seat {
    fn lease_places(
        &self,
        _mode: Mode,
        wish: Wish,
    ) -> BoxFuture<'static, Result<Places, LedgerError>> {
        let (there, back) = (self.way(), self.way());
        let (row, lead) = (self.row.clone(), self.lead.clone());
        let reckoning = self.reckoning.clone();
        let clock = self.clock_questions();
        async move {
            clock.await;
            let asked = Instant::now();
            let expected = *lead.lock().unwrap();
            tokio::time::sleep(there).await;
            let (leased, now, quiet) = {
                let mut row = row.lock().unwrap();
                let (now, learned) = (row.now(), row.learned.as_ref().map(|learned| learned.3));
                (row.line.lease(wish, now, expected, learned), now, row.quiet())
            };
            tokio::time::sleep(back).await;
            *lead.lock().unwrap() = asked.elapsed();
            reckoning.hear(now, asked);
            let Leased { count, first, interval, waited } = leased;
            let first = reckoning.instant(first).unwrap();
            Ok(Places { first, count, interval, waited, quiet })
        }
        .boxed()
    }

    fn teach(
        &self,
        _mode: Mode,
        Teaching { version, text, at, interval }: Teaching<'_>,
    ) -> BoxFuture<'static, Result<Taught, LedgerError>> {
        let (there, back, row) = (self.way(), self.way(), self.row.clone());
        let text = text.to_owned();
        async move {
            tokio::time::sleep(there).await;
            let taught = {
                let mut row = row.lock().unwrap();
                match row.learned() {
                    Some(other) if other.version != version => Taught::Other(other),
                    _ => {
                        row.learned = Some((version + 1, text, at, interval));
                        Taught::Written
                    }
                }
            };
            tokio::time::sleep(back).await;
            Ok(taught)
        }
        .boxed()
    }

    fn share(
        &self,
        _mode: Mode,
        news: News,
    ) -> BoxFuture<'static, Result<(News, Option<Learned>), LedgerError>> {
        let (there, back, row) = (self.way(), self.way(), self.row.clone());
        async move {
            tokio::time::sleep(there).await;
            let (quiet, learned) = {
                let mut row = row.lock().unwrap();
                if !news.quiet.is_zero() {
                    row.line.quiet_until = row.line.quiet_until.max(row.now() + micros(news.quiet));
                }
                (row.quiet(), row.learned())
            };
            tokio::time::sleep(back).await;
            Ok((News { quiet, ..news }, learned))
        }
        .boxed()
    }
}

/// Lets a worker take places from the row and share what it knows; the randomness that is its own.
pub(crate) fn serve(
    tasks: &mut JoinSet<()>,
    pacer: &Arc<Pacer>,
    row: &Arc<Mutex<Row>>,
    random: Rng,
) -> Arc<Mutex<Rng>> {
    let random = Arc::new(Mutex::new(random));
    let seat = || Seat {
        row: row.clone(),
        random: random.clone(),
        lead: Arc::default(),
        reckoning: Arc::default(),
    };
    let (leasing, listening, teaching) = (seat(), seat(), seat());
    let (for_grants, for_silence, for_rate) = (pacer.clone(), pacer.clone(), pacer.clone());
    tasks.spawn(async move {
        grant(&for_grants, &leasing, Mode::Test).await.unwrap();
    });
    tasks.spawn(async move {
        teach(&for_rate, &teaching, Mode::Test).await.unwrap();
    });
    tasks.spawn(async move {
        listen(&for_silence, &listening, Mode::Test, || false, |_| {}).await.unwrap();
    });
    random
}

/// What was called: when, and by whom.
type Calls = Arc<Mutex<Vec<(Duration, usize)>>>;

impl Fleet {
    /// Calls a second that the workers could make if nobody held them.
    #[expect(clippy::cast_precision_loss, reason = "a few thousand")]
    pub(crate) fn capacity(&self) -> f64 {
        let answer = f64::from(ANSWER_MS.start + ANSWER_MS.end) / 2.0 / 1_000.0;
        (self.workers * IN_THE_WORKS) as f64 / answer
    }

    pub(crate) fn run(&self) -> Ran {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .unwrap();
        runtime.block_on(self.simulate())
    }

    /// Buyers at a tenth of the budget, at any worker and at one that has no bulk at all.
    pub(crate) fn with_buyers(&self) -> Waited {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .unwrap();
        runtime.block_on(self.simulate_buyers())
    }

    #[expect(clippy::cast_precision_loss, reason = "a few thousand")]
    async fn simulate_buyers(&self) -> Waited {
        let started = Instant::now();
        let row = Arc::new(Mutex::new(Row::new(started)));
        let calls: Calls = Arc::default();
        let mut random = Rng::with_seed(self.seed);
        let mut workers: Vec<_> = (0..self.workers)
            .map(|number| self.worker(number, &row, &calls, started, random.fork()))
            .collect();
        let idle = Fleet { lane: Lane::Interactive, ..*self };
        let apart = idle.worker_of(0, self.workers, &row, &calls, started, random.fork());
        workers.push(apart);
        // Until the campaign is in full swing.
        tokio::time::sleep(Duration::from_secs(2)).await;
        let waits: Arc<Mutex<Vec<Duration>>> = Arc::default();
        let mut buyers = JoinSet::new();
        while started.elapsed() < self.duration {
            let pause = -(1.0 - random.f64()).ln() / (self.per_second / 10.0);
            tokio::time::sleep(Duration::from_secs_f64(pause)).await;
            // Half of them where no bulk is.
            let at = if random.bool() { self.workers } else { random.usize(0..self.workers) };
            let (pacer, calls, waits) = (workers[at].0.clone(), calls.clone(), waits.clone());
            buyers.spawn(async move {
                let came = Instant::now();
                pacer.pass(pacer.admit(Lane::Interactive).await).await;
                waits.lock().unwrap().push(came.elapsed());
                calls.lock().unwrap().push((started.elapsed(), at));
            });
        }
        let busy = started.elapsed().as_secs_f64();
        while buyers.join_next().await.is_some() {}
        drop(workers);
        let mut waits = std::mem::take(&mut *waits.lock().unwrap());
        waits.sort_unstable();
        let mut times: Vec<Duration> = calls.lock().unwrap().iter().map(|call| call.0).collect();
        times.sort_unstable();
        Waited {
            most_in_a_second: most_in_a_second(&times),
            used: times.len() as f64 / (busy * self.per_second),
            waits,
        }
    }

    async fn simulate(&self) -> Ran {
        let started = Instant::now();
        let row = Arc::new(Mutex::new(Row::new(started)));
        let calls: Calls = Arc::default();
        let mut random = Rng::with_seed(self.seed);
        let mut workers = Vec::new();
        for number in 0..self.workers {
            workers.push(self.worker(number, &row, &calls, started, random.fork()));
        }
        // One more that dies with places in its hand, and one that takes its place.
        let half = self.duration / 2;
        let (_, dying) = self.worker(self.workers, &row, &calls, started, random.fork());
        let dies = half.mul_f64(0.5 + random.f64() / 2.0);
        tokio::time::sleep(dies).await;
        drop(dying);
        tokio::time::sleep_until(started + half).await;
        // Creem asks one of them for silence.
        workers[random.usize(0..self.workers)].0.quiet(SILENCE);
        let told = started.elapsed();
        tokio::time::sleep(SILENCE).await;
        let newcomer = self.worker(self.workers + 1, &row, &calls, started, random.fork());
        tokio::time::sleep_until(started + self.duration).await;
        drop((workers, newcomer));
        let calls = std::mem::take(&mut *calls.lock().unwrap());
        self.judge(&calls, told)
    }

    /// A worker with as many jobs as it takes at once; its tasks end when the set is dropped.
    fn worker(
        &self,
        number: usize,
        row: &Arc<Mutex<Row>>,
        calls: &Calls,
        started: Instant,
        random: Rng,
    ) -> (Arc<Pacer>, JoinSet<()>) {
        self.worker_of(IN_THE_WORKS, number, row, calls, started, random)
    }

    /// The same with so many jobs.
    fn worker_of(
        &self,
        jobs: usize,
        number: usize,
        row: &Arc<Mutex<Row>>,
        calls: &Calls,
        started: Instant,
        random: Rng,
    ) -> (Arc<Pacer>, JoinSet<()>) {
        let limits = Limits { ceiling: Some(self.per_second), bulk_share: 0.05 };
        let pacer = Arc::new(Pacer::shared(limits));
        let mut tasks = JoinSet::new();
        let random = serve(&mut tasks, &pacer, row, random);
        let lane = self.lane;
        for _ in 0..jobs {
            let (pacer, calls, random) = (pacer.clone(), calls.clone(), random.clone());
            tasks.spawn(async move {
                loop {
                    pacer.pass(pacer.admit(lane).await).await;
                    calls.lock().unwrap().push((started.elapsed(), number));
                    let answer = random.lock().unwrap().u32(ANSWER_MS);
                    tokio::time::sleep(Duration::from_millis(answer.into())).await;
                }
            });
        }
        (pacer, tasks)
    }

    #[expect(clippy::cast_precision_loss, reason = "a few thousand")]
    fn judge(&self, calls: &[(Duration, usize)], told: Duration) -> Ran {
        let times: Vec<Duration> = calls.iter().map(|call| call.0).collect();
        let mut shares = vec![0_usize; self.workers];
        for (_, worker) in calls {
            if let Some(share) = shares.get_mut(*worker) {
                *share += 1;
            }
        }
        let (sum, squares) = shares
            .iter()
            .map(|share| *share as f64)
            .fold((0.0, 0.0), |(sum, squares), share| (sum + share, squares + share * share));
        let second = Duration::from_secs(1);
        // Until the silence is over, and a second that it takes to begin again.
        let busy = self.duration.saturating_sub(SILENCE).as_secs_f64();
        let silence = told + second..told + SILENCE;
        Ran {
            most_in_a_second: most_in_a_second(&times),
            used: calls.len() as f64 / (busy * self.per_second),
            fairness: sum * sum / (self.workers as f64 * squares),
            shares,
            in_silence: times.iter().filter(|time| silence.contains(*time)).count(),
        }
    }
}

/// The most calls that any second holds; the calls are in order.
fn most_in_a_second(times: &[Duration]) -> usize {
    let mut first = 0;
    let mut most = 0;
    for (at, time) in times.iter().enumerate() {
        while time.saturating_sub(times[first]) >= Duration::from_secs(1) {
            first += 1;
        }
        most = most.max(at - first + 1);
    }
    most
}
