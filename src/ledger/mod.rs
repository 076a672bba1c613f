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
pub mod group;
pub mod postgres;
pub mod report;
pub mod row;
pub mod sqlite;
pub mod transition;

use std::time::Duration;

use futures::future::BoxFuture;

use crate::clock::Millis;
use crate::job::{Ending, Fingerprint, FingerprintKey, Key, Lane, Status};

pub use budget::{Budget, Places};
pub use report::{KnownOrphan, Report};
pub use row::{Row, State};

/// A claim's token: says whose intent a row holds, so that a claim whose commit's answer was
/// lost can be asked again without counting as a second attempt.
pub type Token = [u8; 16];

/// A fresh random token.
#[must_use]
pub fn token() -> Token {
    let mut token = [0_u8; 16];
    getrandom::fill(&mut token).expect("the operating system gives random bytes");
    token
}

/// What may follow an attempt nobody knows the outcome of (`creem.on_unknown`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnUnknown {
    /// Ask again; at most one link is ever handed out, Creem may hold an extra session.
    Retry,
    /// Never ask twice: the job is unresolved until an operator decides.
    Park,
}

/// Who asks, and what for.
#[derive(Debug, Clone)]
pub struct Claimant {
    /// The row.
    pub key: Key,
    /// The body, as a fingerprint.
    pub fingerprint: Fingerprint,
    /// For the reply.
    pub product_id: String,
    /// Where the job came from.
    pub lane: Lane,
    /// The campaign it belongs to.
    pub campaign: Option<String>,
    /// When the producer says it was published.
    pub published_at: Option<Millis>,
    /// When this copy of the job was first picked up by a worker.
    pub picked_up_at: Millis,
    /// Whether the broker delivered this copy before: then it never counts as sent again. A copy
    /// that comes back from a delay queue is known by its first pickup.
    pub redelivered: bool,
    /// Whether it bears the mark of another ledger's delay queue, which may know a link for it. Only that
    /// ledger's workers make such a mark; a producer that forges one hurts its own job.
    pub elsewhere: bool,
    /// What may follow an unknown answer.
    pub on_unknown: OnUnknown,
}

/// A claim: the durable intent to call Creem.
#[derive(Debug, Clone)]
pub struct ClaimRequest {
    /// Who asks.
    pub claimant: Claimant,
    /// Names this claim.
    pub token: Token,
    /// How long the call may take before others may take the job over.
    pub lease: Duration,
    /// Most calls for one outcome; a takeover past it ends the job.
    pub max_attempts: u32,
}

/// The right to call Creem once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lease {
    /// Raised by every claim.
    pub fence: u64,
    /// The claim's name.
    pub token: Token,
    /// This call's number, from 1.
    pub attempt: u32,
    /// How many calls were throttled so far.
    pub throttled: u32,
    /// Earlier calls whose outcome nobody knows.
    pub ambiguous: u32,
    /// When the job was first picked up for this outcome.
    pub opened_at: Millis,
}

/// An outcome as it is stored: the reply's bytes never change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    /// The ending's word.
    pub status: Status,
    /// The reply.
    pub reply: Vec<u8>,
    /// The reply's `message_id`.
    pub message_id: String,
    /// When it was made.
    pub ended_at: Millis,
    /// The row's fence when it was read.
    pub fence: u64,
    /// Calls counted for it.
    pub attempts: u32,
    /// Whether a copy of the job was parked for it already.
    pub parked: bool,
    /// `error.code`, where there is an error.
    pub code: Option<String>,
}

/// The answer to a claim.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Claim {
    /// The intent is durable: call.
    Granted(Lease),
    /// There is an outcome already: publish it, do not call.
    Settled(Stored),
    /// The id has, or may have, a link for another body; the fields that differ.
    Conflict(Vec<String>),
    /// Another claim is alive.
    Busy {
        /// When its lease ends at the latest.
        until: Millis,
    },
    /// A retry is due, but not yet.
    Waiting {
        /// When.
        until: Millis,
    },
}

/// How an attempt went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Attempt {
    /// It does not count: nothing was sent (a stop, a lease too short), or the API key was refused,
    /// which is not the job's doing. Certainly no session.
    GivenBack,
    /// It counts, and what came of it is known: the link of the ending, or certainly no session.
    Counted,
    /// It counts as a throttled one, which eats time but no attempt; certainly no session.
    Throttled,
    /// It counts, and a session may exist; its id, if it could be read.
    Ambiguous {
        /// The session that nobody is given.
        checkout_id: Option<String>,
        /// Why it is not handed out.
        reason: String,
    },
}

/// What follows the attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Next {
    /// This is how the job ends.
    End(Ending),
    /// Try again, not before that time.
    Wait {
        /// When.
        until: Millis,
    },
}

/// The result of an attempt, under its lease.
#[derive(Debug, Clone)]
pub struct SettleRequest {
    /// The row.
    pub key: Key,
    /// The lease's fence and token.
    pub lease: Lease,
    /// How it went.
    pub attempt: Attempt,
    /// What follows.
    pub next: Next,
    /// What may follow an unknown answer.
    pub on_unknown: OnUnknown,
}

/// The answer to a settle.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Settle {
    /// The outcome is durable: publish these bytes.
    Ended(Stored),
    /// The row waits.
    Waiting {
        /// Until when.
        until: Millis,
    },
    /// The lease was lost. No row was touched; publish nothing.
    Zombie,
}

/// Ends a job without a call, unless the ledger knows better.
#[derive(Debug, Clone)]
pub struct CloseRequest {
    /// Who asks.
    pub claimant: Claimant,
    /// How it ends if nothing is known of it.
    pub ending: Ending,
}

/// What has been decided about a new ledger, which redelivered jobs may tell that another was lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Adoption {
    /// It serves.
    Adopted,
    /// It met jobs that another ledger may know: it serves nobody until an operator says so.
    Refused,
    /// An operator says so.
    Accepted,
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

/// Everything a ledger can be told.
#[derive(Debug, Clone)]
pub enum Command {
    /// Make an intent durable.
    Claim(Box<ClaimRequest>),
    /// Make an attempt's result durable.
    Settle(Box<SettleRequest>),
    /// End a job without a call.
    Close(Box<CloseRequest>),
    /// A parked copy of an unresolved job is confirmed.
    Parked {
        /// The row.
        key: Key,
        /// The outcome it belongs to.
        fence: u64,
    },
    /// Whether there is a row.
    Knows {
        /// Whose.
        key: Key,
    },
    /// A time in which nothing could be tried.
    Pause {
        /// Its beginning.
        from: Millis,
        /// Its end.
        to: Millis,
    },
    /// Proves that the ledger can write.
    Probe,
    /// The ledger was restored: it may have forgotten what was done until then.
    Restored {
        /// When.
        until: Millis,
    },
    /// What has been decided about a new ledger.
    Adopt(Adoption),
}

impl Command {
    /// The row that the command is about.
    #[must_use]
    pub fn key(&self) -> Option<&Key> {
        match self {
            Self::Claim(request) => Some(&request.claimant.key),
            Self::Settle(request) => Some(&request.key),
            Self::Close(request) => Some(&request.claimant.key),
            Self::Parked { key, .. } | Self::Knows { key } => Some(key),
            Self::Pause { .. } | Self::Probe | Self::Restored { .. } | Self::Adopt(_) => None,
        }
    }
}

/// The answer to a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// To a claim or a close.
    Claim(Claim),
    /// To a settle.
    Settle(Settle),
    /// Whether there is a row.
    Knows(bool),
    /// Done.
    Done,
}

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

/// What a ledger knows of itself when it is opened.
#[derive(Debug, Clone)]
pub struct Identity {
    /// The secret of fingerprints and hops.
    pub key: FingerprintKey,
    /// Whether this ledger has never served a job.
    pub empty: bool,
    /// Whether it met jobs that another ledger may know, and no operator has decided since.
    pub refused: bool,
    /// Ambiguous attempts recorded so far.
    pub ambiguous_attempts: u64,
    /// Orphan sessions recorded so far.
    pub orphan_sessions: u64,
    /// Times in which nothing could be tried.
    pub pauses: Vec<(Millis, Millis)>,
}

/// A store of jobs' states. See the module's text for what it promises.
pub trait Ledger: Budget + std::fmt::Debug + 'static {
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

    /// Removes rows that ended before that time and cannot hide a session; at most a small
    /// batch. Returns how many went.
    ///
    /// # Errors
    /// See [`LedgerError`].
    fn sweep(&self, before: Millis) -> BoxFuture<'static, Result<usize, LedgerError>>;
}

impl dyn Ledger {
    /// Whether there is a row of that key.
    ///
    /// # Errors
    /// See [`LedgerError`]; a damaged row is a row.
    pub async fn knows(&self, key: Key) -> Result<bool, LedgerError> {
        match self.execute(Command::Knows { key }).await {
            Ok(Answer::Knows(known)) => Ok(known),
            Ok(Answer::Claim(_) | Answer::Settle(_) | Answer::Done) => Err(mismatch()),
            Err(LedgerError::DamagedRow(_)) => Ok(true),
            Err(error) => Err(error),
        }
    }

    /// Claims the right to call Creem.
    ///
    /// # Errors
    /// See [`LedgerError`].
    pub async fn claim(&self, request: ClaimRequest) -> Result<Claim, LedgerError> {
        expect_claim(self.execute(Command::Claim(Box::new(request))).await?)
    }

    /// Ends a job without a call.
    ///
    /// # Errors
    /// See [`LedgerError`].
    pub async fn close(&self, request: CloseRequest) -> Result<Claim, LedgerError> {
        expect_claim(self.execute(Command::Close(Box::new(request))).await?)
    }

    /// Stores an attempt's result.
    ///
    /// # Errors
    /// See [`LedgerError`].
    pub async fn settle(&self, request: SettleRequest) -> Result<Settle, LedgerError> {
        match self.execute(Command::Settle(Box::new(request))).await? {
            Answer::Settle(settle) => Ok(settle),
            Answer::Claim(_) | Answer::Knows(_) | Answer::Done => Err(mismatch()),
        }
    }
}

fn expect_claim(answer: Answer) -> Result<Claim, LedgerError> {
    match answer {
        Answer::Claim(claim) => Ok(claim),
        Answer::Settle(_) | Answer::Knows(_) | Answer::Done => Err(mismatch()),
    }
}

fn mismatch() -> LedgerError {
    LedgerError::Unavailable("it answered another question than it was asked (a bug)".to_owned())
}
