//! What a ledger can be told, and what it answers.

use std::time::Duration;

use super::Retention;
use crate::clock::Millis;
use crate::job::{Ending, Fingerprint, Key, Lane, Status};

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
    /// How many calls were free so far: see [`Attempt::Free`].
    pub free: u32,
    /// Earlier calls whose outcome nobody knows.
    pub ambiguous: u32,
    /// When the job was first picked up for this outcome; later by what was told not to count: see [`Next::Wait`].
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
    /// Creem was not reached, or said "slow down": it costs time, but no attempt; certainly no session.
    Free,
    /// A call that was made to see whether Creem is back, and whose outcome nobody knows: no attempt of the job's,
    /// as it was not made for its sake; but a session may exist.
    Probed {
        /// What came of it.
        reason: String,
    },
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
        /// By how much later the job counts as opened from then on, in milliseconds: part of the wait is no time in
        /// which it was tried.
        uncounted: Millis,
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

/// Everything a ledger can be told.
#[derive(Debug, Clone)]
pub enum Command {
    /// About one job's row.
    Job(JobCommand),
    /// About the ledger itself.
    Own(OwnCommand),
}

impl Command {
    /// The row that the command is about.
    #[must_use]
    pub fn key(&self) -> Option<&Key> {
        match self {
            Self::Job(command) => Some(command.key()),
            Self::Own(_) => None,
        }
    }
}

/// What a ledger can be told about one job's row.
#[derive(Debug, Clone)]
pub enum JobCommand {
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
    /// What a claim would be answered that is not granted; changes nothing.
    Look(Box<Claimant>),
    /// What the row says of its job's link, if there is a row.
    Knows {
        /// Whose.
        key: Key,
    },
}

impl JobCommand {
    /// The row that the command is about.
    #[must_use]
    pub fn key(&self) -> &Key {
        match self {
            Self::Claim(request) => &request.claimant.key,
            Self::Settle(request) => &request.key,
            Self::Close(request) => &request.claimant.key,
            Self::Look(who) => &who.key,
            Self::Parked { key, .. } | Self::Knows { key } => key,
        }
    }
}

/// What a ledger can be told about itself.
#[derive(Debug, Clone)]
pub enum OwnCommand {
    /// A time in which nothing could be tried.
    Pause {
        /// Its beginning.
        from: Millis,
        /// Its end.
        to: Millis,
    },
    /// So long a worker keeps outcomes.
    Keep(Retention),
    /// Proves that the ledger can write.
    Probe,
    /// The ledger was restored: it may have forgotten what was done until then.
    Restored {
        /// When.
        until: Millis,
    },
    /// What has been decided about a new ledger.
    Adopt(Adoption),
    /// No worker takes jobs of that lane any more.
    PauseLane(Lane),
    /// They do again.
    ResumeLane(Lane),
    /// A job was published so far in the future: somebody's clock is wrong.
    Skew {
        /// How far, in milliseconds.
        ahead: Millis,
    },
    /// Jobs of that campaign that were published before then are not wanted any more.
    CancelCampaign {
        /// Its name.
        campaign: String,
        /// When.
        before: Millis,
    },
    /// They are wanted after all; those that have ended since stay so.
    ReinstateCampaign {
        /// Its name.
        campaign: String,
    },
}

/// A lane that an operator has paused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PausedLane {
    /// Which.
    pub lane: Lane,
    /// Since when.
    pub since: Millis,
}

/// A time in which an operator had paused a lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LanePause {
    /// Which.
    pub lane: Lane,
    /// Its beginning.
    pub from: Millis,
    /// Its end.
    pub to: Millis,
}

/// A campaign that an operator has cancelled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CancelledCampaign {
    /// Its name.
    pub campaign: String,
    /// Its jobs that were published before that are cancelled.
    pub before: Millis,
}

/// What a ledger keeps for all of its workers, and for operators: what those have told it, and what workers
/// have seen.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Orders {
    /// Lanes whose jobs are not taken.
    pub paused_lanes: Vec<PausedLane>,
    /// When lanes were paused before; forgotten with what jobs came to in that time.
    pub lane_pauses: Vec<LanePause>,
    /// Campaigns whose jobs are not wanted.
    pub cancelled: Vec<CancelledCampaign>,
    /// How far in the future a job was published, in milliseconds, and when a worker last saw such a one.
    pub skew: Option<(Millis, Millis)>,
}

impl Orders {
    /// Reads one out of the names and numbers that a ledger keeps.
    pub(super) fn note(&mut self, name: &str, number: Millis) {
        if let Some(campaign) = name.strip_prefix(CANCELLED) {
            let campaign = campaign.to_owned();
            self.cancelled.push(CancelledCampaign { campaign, before: number });
        } else if let Some(lane) = Lane::ALL.into_iter().find(|lane| pause_name(*lane) == name) {
            self.paused_lanes.push(PausedLane { lane, since: number });
        } else if let Some(pause) = name.strip_prefix(WAS_PAUSED) {
            let (lane, from) = pause.split_once('.').unwrap_or((pause, ""));
            if let (Some(lane), Ok(from)) = (Lane::parse(lane), from.parse()) {
                self.lane_pauses.push(LanePause { lane, from, to: number });
            }
        } else if name == SKEW {
            self.skew.get_or_insert_default().0 = number;
        } else if name == SKEW_AT {
            self.skew.get_or_insert_default().1 = number;
        }
    }
}

/// What the names begin with under which a ledger keeps that lanes are paused, and campaigns cancelled.
pub(super) const PAUSED: &str = "paused.";
pub(super) const CANCELLED: &str = "cancelled.";
/// Under which names it keeps how far clocks differ, and when that was seen.
pub(super) const SKEW: &str = "skew";
pub(super) const SKEW_AT: &str = "skew_at";

/// What the names begin with under which a ledger keeps when lanes were paused: the lane and the beginning
/// follow, and the number is the end.
pub(super) const WAS_PAUSED: &str = "was_paused.";

/// What the names of a lane's begin with.
#[must_use]
pub(super) fn was_paused_prefix(lane: Lane) -> String {
    format!("{WAS_PAUSED}{lane}.")
}

/// Under which name a ledger keeps that a lane is paused.
#[must_use]
pub(super) const fn pause_name(lane: Lane) -> &'static str {
    match lane {
        Lane::Interactive => "paused.interactive",
        Lane::Bulk => "paused.bulk",
    }
}

/// What a row says of its job's link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Known {
    /// Creem's id of the session that was handed out.
    pub checkout_id: Option<String>,
    /// Of the job.
    pub fingerprint: Fingerprint,
}

/// The answer to a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// To a claim or a close.
    Claim(Claim),
    /// To a settle.
    Settle(Settle),
    /// What a claim would be answered, unless it would be granted or write something.
    Look(Option<Claim>),
    /// What there is, if there is a row.
    Knows(Option<Known>),
    /// Done.
    Done,
}
