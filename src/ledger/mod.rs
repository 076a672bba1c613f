//! The ledger: the only thing between a retry and two payable links.
//!
//! Creem does not deduplicate on `request_id` and cannot be asked about it afterwards, so
//! before a call the intent is made durable here, and after it the outcome with the very bytes
//! of the reply, before anything is published.
//!
//! ```text
//!  absent ──claim──▶ sending ──link──────────────────────────────▶ succeeded (never changes)
//!                    ▲  │ │ ├─refused, and no attempt ambiguous──▶ rejected ┐
//!                    │  │ │ ├─budget spent, none ambiguous───────▶ failed   ├─ sent again:
//!   not_before over, │  │ │ ├─deadline passed, none ambiguous────▶ expired  ┘  claimed afresh
//!                    │  │ │ ├─campaign cancelled, none ambiguous─▶ cancelled ─ as those
//!   or lease dead    │  │ │ └─any of these after an ambiguous one▶ unresolved ─ `retry`: same body
//!   (ambiguous + 1)  │  ▼ │                                          only; `park`: an operator
//!                    └ waiting   (an unknown answer: ambiguous + 1; throttled or not sent: + 0)
//! ```
//!
//! Two rules carry the promises. Every result is compare-and-set on the `fence`, which each claim
//! raises: a worker that was taken for dead finds its fence stale, touches no row, and what it
//! brought back is recorded as an orphan and never published. And every ending passes
//! [`crate::job::Ending::honest`], so that "no session exists" is said only where that is known.
//!
//! The state machine itself is [`transition`]: pure, one for all back-ends. A back-end only
//! loads rows, applies commands in order, and makes the result durable before it answers.

pub mod budget;
pub mod command;
pub mod group;
pub mod postgres;
pub mod report;
pub mod retention;
pub mod row;
pub mod sqlite;
pub mod transition;

use futures::future::BoxFuture;

use crate::clock::Millis;
use crate::job::{Key, LedgerSecret};

pub use budget::{Budget, Learned, News, Places, Taught, Teaching, Wish};
pub use command::*;
use command::{CANCELLED, PAUSED, SKEW, SKEW_AT, WAS_PAUSED, pause_name, was_paused_prefix};
pub use report::{Campaign, KnownOrphan, Report};
pub use retention::Retention;
pub use row::{Row, State};

/// Why the ledger did not answer, sorted by what the caller does.
#[derive(Debug, Clone, thiserror::Error)]
pub enum LedgerError {
    /// It cannot be read or written now. Whether the command took effect is unknown; asking
    /// again with the same token is safe. Nothing may be acked or failed meanwhile.
    #[error("the ledger is unavailable: {0}")]
    Unavailable(String),
    /// One job's row is damaged: what it said of links is not known, so that job needs a person;
    /// the others do not.
    #[error("{0}")]
    DamagedRow(String),
    /// What is stored is whole, as far as is known, and this process cannot go on with it: after a sync
    /// that failed only a new one knows what is on the disk.
    #[error("the ledger cannot go on: {0}")]
    Stopped(String),
    /// The file is damaged. Going on could hand out a second link.
    #[error(
        "the ledger is damaged: {0}; run `checkout-worker check --ledger` and restore it from a backup"
    )]
    Damaged(String),
}

/// What is known of a ledger's right to serve.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// It was taken into use so recently that another one may have been lost.
    New,
    /// A worker met jobs that another ledger may know: it serves nobody until an operator says so.
    Refused,
    /// It serves.
    Established,
}

/// What a ledger knows of itself when it is opened.
#[derive(Debug, Clone)]
pub struct Identity {
    /// The secret of fingerprints and hops.
    pub secret: LedgerSecret,
    /// Its right to serve, when it was opened.
    pub standing: Standing,
    /// Ambiguous attempts recorded so far.
    pub ambiguous_attempts: u64,
    /// Orphan sessions recorded so far.
    pub orphan_sessions: u64,
    /// Times in which nothing could be tried.
    pub pauses: Vec<(Millis, Millis)>,
    /// Until when it was restored to, if it ever was.
    pub restored: Option<Millis>,
}

/// A store of jobs' states. See the module's text for what it promises.
pub trait Ledger: Send + Sync + std::fmt::Debug + 'static {
    /// Carries a command out and answers once the result is durable.
    ///
    /// # Errors
    /// See [`LedgerError`].
    fn execute(&self, command: Command) -> BoxFuture<'static, Result<Answer, LedgerError>>;

    /// Whether this ledger may have taken the place of a lost one, as far as is known now: where many
    /// workers share a ledger, another one may have begun to serve with it since, or have refused it.
    ///
    /// # Errors
    /// See [`LedgerError`].
    fn standing(&self) -> BoxFuture<'static, Result<Standing, LedgerError>>;

    /// What the ledger knew of itself when it was opened.
    fn identity(&self) -> &Identity;

    /// What operators have told it.
    ///
    /// # Errors
    /// See [`LedgerError`].
    fn orders(&self) -> BoxFuture<'static, Result<Orders, LedgerError>>;

    /// Removes rows that ended longer ago than outcomes of their mode are kept, and that cannot hide a session;
    /// at most a small batch of each mode. Returns how many went. See [`retention`].
    ///
    /// # Errors
    /// See [`LedgerError`].
    fn sweep(&self, retention: Retention) -> BoxFuture<'static, Result<usize, LedgerError>>;
}

impl dyn Ledger {
    fn job(&self, command: JobCommand) -> BoxFuture<'static, Result<Answer, LedgerError>> {
        self.execute(Command::Job(command))
    }

    /// Tells the ledger something about itself.
    ///
    /// # Errors
    /// See [`LedgerError`].
    pub async fn tell(&self, command: OwnCommand) -> Result<(), LedgerError> {
        self.execute(Command::Own(command)).await.map(|_| ())
    }

    /// Takes note that a parked copy of an unresolved job is confirmed.
    ///
    /// # Errors
    /// See [`LedgerError`].
    pub async fn parked(&self, key: Key, fence: u64) -> Result<(), LedgerError> {
        self.job(JobCommand::Parked { key, fence }).await.map(|_| ())
    }

    /// Whether there is a row of that key.
    ///
    /// # Errors
    /// See [`LedgerError`]; a damaged row is a row.
    pub async fn knows(&self, key: Key) -> Result<bool, LedgerError> {
        match self.known(key).await {
            Ok(known) => Ok(known.is_some()),
            Err(LedgerError::DamagedRow(_)) => Ok(true),
            Err(error) => Err(error),
        }
    }

    /// What is known of a job's link, if there is a row of that key.
    ///
    /// # Errors
    /// See [`LedgerError`].
    pub async fn known(&self, key: Key) -> Result<Option<Known>, LedgerError> {
        match self.job(JobCommand::Knows { key }).await? {
            Answer::Knows(known) => Ok(known),
            Answer::Claim(_) | Answer::Settle(_) | Answer::Look(_) | Answer::Done => {
                Err(mismatch())
            }
        }
    }

    /// What a claim would be answered that is not granted, where it would change nothing: an outcome, a conflict,
    /// or that there is nothing to do yet.
    ///
    /// # Errors
    /// See [`LedgerError`].
    pub async fn look(&self, who: Claimant) -> Result<Option<Claim>, LedgerError> {
        match self.job(JobCommand::Look(Box::new(who))).await? {
            Answer::Look(claim) => Ok(claim),
            Answer::Claim(_) | Answer::Settle(_) | Answer::Knows(_) | Answer::Done => {
                Err(mismatch())
            }
        }
    }

    /// Claims the right to call Creem.
    ///
    /// # Errors
    /// See [`LedgerError`].
    pub async fn claim(&self, request: ClaimRequest) -> Result<Claim, LedgerError> {
        expect_claim(self.job(JobCommand::Claim(Box::new(request))).await?)
    }

    /// Ends a job without a call.
    ///
    /// # Errors
    /// See [`LedgerError`].
    pub async fn close(&self, request: CloseRequest) -> Result<Claim, LedgerError> {
        expect_claim(self.job(JobCommand::Close(Box::new(request))).await?)
    }

    /// Stores an attempt's result.
    ///
    /// # Errors
    /// See [`LedgerError`].
    pub async fn settle(&self, request: SettleRequest) -> Result<Settle, LedgerError> {
        match self.job(JobCommand::Settle(Box::new(request))).await? {
            Answer::Settle(settle) => Ok(settle),
            Answer::Claim(_) | Answer::Look(_) | Answer::Knows(_) | Answer::Done => Err(mismatch()),
        }
    }
}

fn expect_claim(answer: Answer) -> Result<Claim, LedgerError> {
    match answer {
        Answer::Claim(claim) => Ok(claim),
        Answer::Settle(_) | Answer::Look(_) | Answer::Knows(_) | Answer::Done => Err(mismatch()),
    }
}

fn mismatch() -> LedgerError {
    LedgerError::Unavailable("it answered another question than it was asked (a bug)".to_owned())
}
