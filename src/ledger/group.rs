//! Group commit: one thread owns the store, takes every command that is ready, and makes them
//! durable together.
//!
//! Why a thread and not a lock? A durable write waits for the disk; with one writer that never
//! lingers, the jobs that arrive during one sync share the next, so the cost of a sync is
//! divided by the load and an idle worker still answers at once.

use std::thread;

use futures::FutureExt as _;
use futures::future::BoxFuture;
use tokio::sync::{mpsc, oneshot};

use super::{Answer, Command, LedgerError, Orders, Retention};

/// Most commands in one commit: past it the sync's share per command is below the cost of the
/// command itself, and the first of the batch would only wait longer.
const MOST: usize = 256;

/// A store that applies commands in order and makes them durable together.
pub trait Store: Send + 'static {
    /// Applies a batch. The outer error is the whole batch's: nothing of it may be relied on.
    ///
    /// # Errors
    /// See [`LedgerError`].
    fn commit(&mut self, batch: &[Command]) -> Result<Committed, LedgerError>;

    /// What operators have told it.
    ///
    /// # Errors
    /// See [`LedgerError`].
    fn orders(&mut self) -> Result<Orders, LedgerError>;

    /// Removes a small batch of old rows.
    ///
    /// # Errors
    /// See [`LedgerError`].
    fn sweep(&mut self, retention: Retention) -> Result<usize, LedgerError>;
}

/// What a batch came to.
#[derive(Debug)]
pub struct Committed {
    /// One answer a command, in order.
    pub answers: Vec<Result<Answer, LedgerError>>,
    /// By how many the count of ambiguous attempts grew.
    pub ambiguous: u64,
    /// How many orphan sessions are new.
    pub orphans: u64,
}

type Waiter<T> = oneshot::Sender<Result<T, LedgerError>>;

enum Work {
    Apply(Command, Waiter<Answer>),
    Sweep(Retention, Waiter<usize>),
    Orders(Waiter<Orders>),
}

/// The way to a store's thread. Dropping it waits until the thread has closed the store.
#[derive(Debug)]
pub struct Group {
    queue: Option<mpsc::UnboundedSender<Work>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Drop for Group {
    fn drop(&mut self) {
        self.queue = None;
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has told so by the hook.
            drop(thread.join());
        }
    }
}

impl std::fmt::Debug for Work {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Work")
    }
}

/// What a commit took, for metrics.
#[derive(Debug, Clone, Copy)]
pub struct Commit {
    /// Commands in it.
    pub size: usize,
    /// From the first command's turn to durability.
    pub took: std::time::Duration,
    /// By how many the count of ambiguous attempts grew.
    pub ambiguous: u64,
    /// How many orphan sessions are new.
    pub orphans: u64,
}

impl Group {
    /// Starts the store's thread. The queue needs no bound of its own: each job in flight has at
    /// most one command in it.
    ///
    /// # Errors
    /// If the operating system gives no thread.
    pub fn start(
        mut store: impl Store,
        observe: impl Fn(Commit) + Send + 'static,
    ) -> std::io::Result<Self> {
        let (queue, mut work) = mpsc::unbounded_channel();
        let thread = thread::Builder::new().name("ledger".to_owned()).spawn(move || {
            while let Some(first) = work.blocking_recv() {
                turn(&mut store, first, &mut work, &observe);
            }
        })?;
        Ok(Self { queue: Some(queue), thread: Some(thread) })
    }

    /// Carries a command out; the answer comes after the sync.
    #[must_use]
    pub fn execute(&self, command: Command) -> BoxFuture<'static, Result<Answer, LedgerError>> {
        let (waiter, answer) = oneshot::channel();
        wait(self.send(Work::Apply(command, waiter)), answer)
    }

    /// Removes a small batch of old rows.
    #[must_use]
    pub fn sweep(&self, retention: Retention) -> BoxFuture<'static, Result<usize, LedgerError>> {
        let (waiter, answer) = oneshot::channel();
        wait(self.send(Work::Sweep(retention, waiter)), answer)
    }

    /// What operators have told it.
    #[must_use]
    pub fn orders(&self) -> BoxFuture<'static, Result<Orders, LedgerError>> {
        let (waiter, answer) = oneshot::channel();
        wait(self.send(Work::Orders(waiter)), answer)
    }

    fn send(&self, work: Work) -> bool {
        self.queue.as_ref().is_some_and(|queue| queue.send(work).is_ok())
    }
}

fn wait<T: Send + 'static>(
    sent: bool,
    answer: oneshot::Receiver<Result<T, LedgerError>>,
) -> BoxFuture<'static, Result<T, LedgerError>> {
    async move {
        let gone =
            || LedgerError::Stopped("its thread has ended (a bug); restart the worker".to_owned());
        if sent { answer.await.unwrap_or_else(|_| Err(gone())) } else { Err(gone()) }
    }
    .boxed()
}

fn turn(
    store: &mut impl Store,
    first: Work,
    work: &mut mpsc::UnboundedReceiver<Work>,
    observe: &impl Fn(Commit),
) {
    let (mut commands, mut waiters) = (Vec::new(), Vec::new());
    let (mut sweeps, mut questions) = (Vec::new(), Vec::new());
    let mut next = Some(first);
    while let Some(item) = next {
        match item {
            Work::Apply(command, waiter) => {
                commands.push(command);
                waiters.push(waiter);
            }
            Work::Sweep(retention, waiter) => sweeps.push((retention, waiter)),
            Work::Orders(waiter) => questions.push(waiter),
        }
        next = if commands.len() < MOST { work.try_recv().ok() } else { None };
    }
    if !commands.is_empty() {
        let started = tokio::time::Instant::now();
        match store.commit(&commands) {
            Ok(Committed { answers, ambiguous, orphans }) => {
                observe(Commit {
                    size: commands.len(),
                    took: started.elapsed(),
                    ambiguous,
                    orphans,
                });
                for (waiter, answer) in waiters.into_iter().zip(answers) {
                    give(waiter, answer);
                }
            }
            Err(error) => waiters.into_iter().for_each(|waiter| give(waiter, Err(error.clone()))),
        }
    }
    for (retention, waiter) in sweeps {
        give(waiter, store.sweep(retention));
    }
    for waiter in questions {
        give(waiter, store.orders());
    }
}

/// Answers; whoever stopped waiting finds the result in the ledger when it asks again.
fn give<T>(waiter: Waiter<T>, answer: Result<T, LedgerError>) {
    drop(waiter.send(answer));
}
