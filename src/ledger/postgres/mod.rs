//! The shared ledger: one PostgreSQL, many workers.
//!
//! Nothing is locked between two round trips, and no session keeps any state: a batch reads rows,
//! applies the state machine here, and writes each row only over the version that was read. Whoever
//! loses that race reads again. So a worker that stops in between holds nobody up, a pooler may
//! stand in between, and no transaction is ever open across a call to Creem.

mod batch;
mod budget;
mod connect;
mod index;
pub mod inspect;
mod itself;
mod migrate;
mod rate;
pub mod ready;
mod statements;
mod sweep;
mod time;

use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use deadpool_postgres::{Object, Pool};
use futures::FutureExt as _;
use futures::future::BoxFuture;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::budget::Reckoning;
use super::group::Commit;
use super::transition::Forgotten;
use super::{
    Answer, Budget, Command, Identity, Learned, Ledger, LedgerError, News, Orders, Places,
    Retention, Standing, Taught, Teaching, Wish,
};
use crate::clock::{Millis, SharedClock};
use crate::job::Mode;
use batch::{Batch, Memory};
pub use connect::{OpenError, Options};
use connect::{describe_pool, pool, pool_error, unavailable};
use itself::{Totals, about_itself, identity, orders, standing, totals};
pub use time::DatabaseClock;

/// Batches under way at once: while one waits for its commit, the next is on its way.
const BATCHES: usize = 4;
/// Most commands in one batch.
const MAX_BATCH: usize = 256;
/// For a batch. Whatever takes longer is asked again, under the same token.
const STATEMENT: Duration = Duration::from_secs(10);
/// For opening, a migration of another replica's included.
const OPEN: Duration = Duration::from_mins(2);
/// Longest time that is allowed for between a lease of places and its answer.
const LONGEST_LEAD: Duration = Duration::from_secs(1);
/// The same where there is no ceiling: a place is good for a while after its time.
const LONGEST_LEAD_FREE: Duration = Duration::from_millis(100);
/// What is allowed for before the first answer.
const FIRST_LEAD: Duration = Duration::from_millis(50);
/// How often a worker leaves a sign of life and reads the totals.
const HOUSEKEEPING: Duration = Duration::from_secs(5);
/// A ledger that was adopted less than this ago may still meet what another one knew, in
/// milliseconds: all workers begin at about the same time.
const ADOPTION: Millis = 60_000;

/// Whose clock leases are measured on.
#[derive(Debug, Clone)]
pub enum Time {
    /// The database's, which all workers share.
    Database,
    /// Another one; for tests that move it.
    Given(SharedClock),
}

/// What the ledger has to report, for metrics.
#[derive(Debug, Clone, Copy)]
pub enum Observation {
    /// A batch is durable.
    Commit(Commit),
    /// What all workers have recorded so far.
    Totals {
        /// Ambiguous attempts.
        ambiguous_attempts: u64,
        /// Orphan sessions.
        orphan_sessions: u64,
    },
}

/// A command, and who waits for its answer.
struct Work {
    command: Command,
    waiter: oneshot::Sender<Result<Answer, LedgerError>>,
}

/// An open shared ledger.
pub struct PostgresLedger {
    queue: mpsc::UnboundedSender<Work>,
    pool: Pool,
    identity: Identity,
    clock: SharedClock,
    /// How long the last lease of places took, in microseconds.
    lead: Arc<AtomicU64>,
    reckoning: Arc<Reckoning>,
    /// Ends with the ledger.
    _tasks: JoinSet<()>,
}

impl std::fmt::Debug for PostgresLedger {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PostgresLedger").finish_non_exhaustive()
    }
}

impl PostgresLedger {
    /// Connects, brings the schema up to date, and reads what the ledger knows of itself.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub async fn open(
        options: &Options,
        time: Time,
        observe: impl Fn(Observation) + Send + Sync + 'static,
    ) -> Result<Self, OpenError> {
        let opened = tokio::time::timeout(OPEN, Self::open_patiently(options, time, observe)).await;
        opened.unwrap_or_else(|_| {
            let took = humantime::format_duration(OPEN);
            Err(OpenError::Unreachable(format!("it did not answer within {took}")))
        })
    }

    async fn open_patiently(
        options: &Options,
        time: Time,
        observe: impl Fn(Observation) + Send + Sync + 'static,
    ) -> Result<Self, OpenError> {
        let pool = pool(options)?;
        let mut client = pool.get().await.map_err(pool_error)?;
        let asked = Instant::now();
        let heard = ready::durable_time(&client).await?;
        let mut secret = [0; 32];
        getrandom::fill(&mut secret)
            .map_err(|_| OpenError::Options("the operating system gives no random bytes".into()))?;
        migrate::migrate(&mut client, &secret).await?;
        let database = Arc::new(DatabaseClock::new(heard, asked));
        let (clock, heard): (SharedClock, _) = match time {
            Time::Database => (database.clone(), Some(database)),
            Time::Given(clock) => (clock, None),
        };
        let identity = identity(&client, clock.now()).await?;
        let forgotten = totals(&client, clock.now()).await?.forgotten;
        drop(client);
        let (queue, work) = mpsc::unbounded_channel();
        let parts = Arc::new(Parts {
            pool: pool.clone(),
            clock: clock.clone(),
            heard,
            memory: Mutex::default(),
            forgotten: Mutex::new(forgotten),
            work: tokio::sync::Mutex::new(work),
            observe: Box::new(observe),
        });
        let mut tasks = JoinSet::new();
        for _ in 0..BATCHES {
            tasks.spawn(parts.clone().serve());
        }
        tasks.spawn(parts.keep_house());
        tasks.spawn(index::keep(pool.clone()));
        let (lead, reckoning) = (Arc::default(), Arc::default());
        Ok(Self { queue, pool, identity, clock, lead, reckoning, _tasks: tasks })
    }

    /// The clock that leases are measured on.
    #[must_use]
    pub fn clock(&self) -> SharedClock {
        self.clock.clone()
    }
}

impl Budget for PostgresLedger {
    fn lease_places(
        &self,
        mode: Mode,
        wish: Wish,
    ) -> BoxFuture<'static, Result<Places, LedgerError>> {
        let (pool, lead) = (self.pool.clone(), self.lead.clone());
        let reckoning = self.reckoning.clone();
        async move {
            // Before the first answer nobody knows how long one takes.
            let last = match lead.load(Ordering::Relaxed) {
                0 => FIRST_LEAD,
                micros => Duration::from_micros(micros),
            };
            // Where no call is late, nobody needs to wait for whoever has a long way.
            let longest =
                if wish.least_interval.is_zero() { LONGEST_LEAD_FREE } else { LONGEST_LEAD };
            let (places, took) = ask(&pool, async |client| {
                budget::lease(client, mode, wish, last.min(longest), &reckoning).await
            })
            .await?;
            lead.store(u64::try_from(took.as_micros()).unwrap_or(0), Ordering::Relaxed);
            Ok(places)
        }
        .boxed()
    }

    fn share(
        &self,
        mode: Mode,
        news: News,
    ) -> BoxFuture<'static, Result<(News, Option<Learned>), LedgerError>> {
        let (pool, reckoning) = (self.pool.clone(), self.reckoning.clone());
        async move {
            ask(&pool, async |client| budget::share(client, mode, news, &reckoning).await).await
        }
        .boxed()
    }

    fn teach(
        &self,
        mode: Mode,
        teaching: Teaching<'_>,
    ) -> BoxFuture<'static, Result<Taught, LedgerError>> {
        let (pool, reckoning) = (self.pool.clone(), self.reckoning.clone());
        let (Teaching { version, at, interval, .. }, text) = (teaching, teaching.text.to_owned());
        async move {
            let teaching = Teaching { version, text: &text, at, interval };
            ask(&pool, async |client| rate::teach(client, mode, teaching, &reckoning).await).await
        }
        .boxed()
    }
}

impl Ledger for PostgresLedger {
    fn execute(&self, command: Command) -> BoxFuture<'static, Result<Answer, LedgerError>> {
        let (waiter, answer) = oneshot::channel();
        let sent = self.queue.send(Work { command, waiter }).is_ok();
        async move {
            let gone = || LedgerError::Unavailable("its task has ended".to_owned());
            if sent { answer.await.unwrap_or_else(|_| Err(gone())) } else { Err(gone()) }
        }
        .boxed()
    }

    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn standing(&self) -> BoxFuture<'static, Result<Standing, LedgerError>> {
        let (pool, now) = (self.pool.clone(), self.clock.now());
        async move { ask(&pool, async |client| standing(client, now).await).await }.boxed()
    }

    fn orders(&self) -> BoxFuture<'static, Result<Orders, LedgerError>> {
        let pool = self.pool.clone();
        async move { ask(&pool, async |client| orders(client).await).await }.boxed()
    }

    fn sweep(&self, retention: Retention) -> BoxFuture<'static, Result<usize, LedgerError>> {
        let (pool, now) = (self.pool.clone(), self.clock.now());
        async move { ask(&pool, async |client| sweep::sweep(client, retention, now).await).await }
            .boxed()
    }
}

/// Asks on a connection of the pool, within the time for a statement.
async fn ask<T>(
    pool: &Pool,
    question: impl AsyncFnOnce(&Object) -> Result<T, tokio_postgres::Error>,
) -> Result<T, LedgerError> {
    let client =
        pool.get().await.map_err(|error| LedgerError::Unavailable(describe_pool(&error)))?;
    let error = match tokio::time::timeout(STATEMENT, question(&client)).await {
        Ok(Ok(answer)) => return Ok(answer),
        Ok(Err(error)) => unavailable(&error),
        Err(_) => late(),
    };
    // Whatever is still under way on it must not meet the next question.
    drop(Object::take(client));
    Err(error)
}

fn late() -> LedgerError {
    LedgerError::Unavailable(format!(
        "the database did not answer within {}",
        humantime::format_duration(STATEMENT)
    ))
}

/// What the tasks share.
struct Parts {
    pool: Pool,
    clock: SharedClock,
    /// To be told the database's time, where that is the clock.
    heard: Option<Arc<DatabaseClock>>,
    memory: Mutex<Memory>,
    forgotten: Mutex<Forgotten>,
    work: tokio::sync::Mutex<mpsc::UnboundedReceiver<Work>>,
    observe: Box<dyn Fn(Observation) + Send + Sync>,
}

impl Parts {
    /// Takes whatever is waiting, batch after batch.
    async fn serve(self: Arc<Self>) {
        loop {
            let mut work = Vec::new();
            if self.work.lock().await.recv_many(&mut work, MAX_BATCH).await == 0 {
                return;
            }
            let (commands, waiters): (Vec<_>, Vec<_>) =
                work.into_iter().map(|Work { command, waiter }| (command, waiter)).unzip();
            let carried = AssertUnwindSafe(self.carry_out(&commands)).catch_unwind().await;
            let answers = carried.unwrap_or_else(|_panic| {
                // The hook has logged it. Asked again, under its token, nothing counts twice.
                let bug = || Err(LedgerError::Unavailable("a batch met a bug".to_owned()));
                commands.iter().map(|_| bug()).collect()
            });
            for (waiter, answer) in waiters.into_iter().zip(answers) {
                // Whoever stopped waiting finds the result in the ledger when it asks again.
                drop(waiter.send(answer));
            }
        }
    }

    async fn carry_out(&self, commands: &[Command]) -> Vec<Result<Answer, LedgerError>> {
        let failed = |error: LedgerError| commands.iter().map(|_| Err(error.clone())).collect();
        let client = match self.pool.get().await {
            Ok(client) => client,
            Err(error) => return failed(LedgerError::Unavailable(describe_pool(&error))),
        };
        let started = Instant::now();
        let carried = tokio::time::timeout(STATEMENT, self.batch(&client, commands)).await;
        let error = match carried {
            Ok(Ok(answers)) => {
                (self.observe)(Observation::Commit(Commit {
                    size: commands.len(),
                    took: started.elapsed(),
                    ambiguous: 0,
                    orphans: 0,
                }));
                return answers;
            }
            Ok(Err(error)) => unavailable(&error),
            Err(_) => late(),
        };
        // Whatever is still under way on it must not meet the next batch.
        drop(Object::take(client));
        failed(error)
    }

    async fn batch(
        &self,
        client: &Object,
        commands: &[Command],
    ) -> Result<Vec<Result<Answer, LedgerError>>, tokio_postgres::Error> {
        for command in commands {
            if let Command::Own(command) = command {
                about_itself(client, command, self.clock.now()).await?;
            }
        }
        let heard = self.heard.as_deref();
        let forgotten = *self.forgotten.lock().unwrap_or_else(PoisonError::into_inner);
        Batch::new(client, &*self.clock, heard, &self.memory, commands, forgotten).run().await
    }

    /// Leaves a sign of life, and reads what all workers have recorded.
    async fn keep_house(self: Arc<Self>) {
        loop {
            let now = self.clock.now();
            let totals = ask(&self.pool, async |client| totals(client, now).await).await;
            if let Ok(Totals { ambiguous_attempts, orphan_sessions, forgotten }) = totals {
                *self.forgotten.lock().unwrap_or_else(PoisonError::into_inner) = forgotten;
                (self.observe)(Observation::Totals { ambiguous_attempts, orphan_sessions });
            }
            tokio::time::sleep(HOUSEKEEPING).await;
        }
    }
}
