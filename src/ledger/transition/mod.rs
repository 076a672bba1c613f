//! The state machine, pure: a row and a command go in, an answer and a changed row come out.
//!
//! One machine for all back-ends: they differ in how rows are loaded, locked and made durable,
//! never in what a command means.

mod arrival;
mod doubt;

use super::row::{Row, State};
use super::{
    Answer, Attempt, Claim, ClaimRequest, Claimant, CloseRequest, JobCommand, Known, Next,
    OnUnknown, Settle, SettleRequest,
};
use crate::clock::{Millis, as_millis};
use crate::job::reply::{self, Facts};
use crate::job::{Ending, Key, Mode, Problem};
pub use arrival::MOST_CRASHES;
use arrival::{Arrival, LONGEST_WAIT, arrive, last_word, lease_of, open, take_over};
use doubt::{Doubted, doubt, lost, swept};

/// What the back-end knows besides the row.
#[derive(Debug, Clone, Copy)]
pub struct Context {
    /// The ledger's clock.
    pub now: Millis,
    /// This worker process, where the ledger belongs to one process at a time: leases of other
    /// epochs are void at once. `None` where many workers share it and only time voids a lease.
    pub epoch: Option<u64>,
    /// What it may have forgotten.
    pub forgotten: Forgotten,
}

/// What a ledger may have forgotten.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Forgotten {
    /// Whatever was done until then, because it was restored.
    pub restored: Option<Millis>,
    /// What ended before that, because it was swept.
    pub swept: Swept,
}

/// Until when outcomes were swept, by mode.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Swept {
    /// Of test jobs.
    pub test: Option<Millis>,
    /// Of live jobs.
    pub live: Option<Millis>,
}

impl Swept {
    /// Until when those of a mode were.
    #[must_use]
    pub const fn of(self, mode: Mode) -> Option<Millis> {
        match mode {
            Mode::Test => self.test,
            Mode::Live => self.live,
        }
    }

    /// More of a mode was swept.
    pub fn note(&mut self, mode: Mode, before: Option<Millis>) {
        let swept = match mode {
            Mode::Test => &mut self.test,
            Mode::Live => &mut self.live,
        };
        *swept = (*swept).max(before);
    }
}

/// A session that Creem is known to hold and that nobody is given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Orphan {
    /// The claim that made it.
    pub fence: u64,
    /// Creem's id.
    pub checkout_id: String,
    /// Why it is not handed out.
    pub reason: String,
}

/// What a command comes to.
#[derive(Debug)]
pub struct Effect {
    /// For the caller.
    pub answer: Answer,
    /// The row to write, if it changed.
    pub write: Option<Row>,
    /// An orphan to record.
    pub orphan: Option<Orphan>,
    /// By how much the count of ambiguous attempts grew.
    pub ambiguous: u32,
}

impl Effect {
    fn keep(answer: Answer) -> Self {
        Self { answer, write: None, orphan: None, ambiguous: 0 }
    }

    fn claim(claim: Claim) -> Self {
        Self::keep(Answer::Claim(claim))
    }
}

/// Applies a command to its row.
#[must_use]
pub fn apply(row: Option<Row>, command: &JobCommand, context: Context) -> Effect {
    let before = row.as_ref().map_or(0, |row| row.ambiguous);
    let mut effect = match command {
        JobCommand::Claim(request) => claim(row, request, context),
        JobCommand::Settle(request) => settle(row, request, context),
        JobCommand::Close(request) => close(row, request, context),
        JobCommand::Parked { fence, .. } => parked(row, *fence),
        JobCommand::Look(who) => look(row, who, context),
        JobCommand::Knows { .. } => {
            let known =
                row.map(|row| Known { checkout_id: row.checkout_id, fingerprint: row.fingerprint });
            Effect::keep(Answer::Knows(known))
        }
    };
    if let Some(written) = &mut effect.write {
        written.updated_at = context.now;
        effect.ambiguous = written.ambiguous.saturating_sub(before);
    }
    effect
}

fn claim(row: Option<Row>, request: &ClaimRequest, context: Context) -> Effect {
    let who = &request.claimant;
    if let Some(row) = &row
        && row.state == State::Sending
        && row.token == request.token
    {
        // The same claim again: its first commit happened, only the answer was lost.
        let granted = Claim::Granted(lease_of(row));
        return Effect { write: Some(row.clone()), ..Effect::claim(granted) };
    }
    let row = match admit(row, who, context) {
        Ok(row) => row,
        Err(answered) => return *answered,
    };
    if let Some(row) = &row
        && is_waiting(row, context)
    {
        return Effect::claim(Claim::Waiting { until: row.not_before });
    }
    let mut row = match row.map(|row| take_over(row, context)) {
        None => open(who, context),
        Some(row) => row,
    };
    if let Some(ending) = last_word(&row, request) {
        // What a call that is still under way brings back is an orphan.
        row.fence += 1;
        return end(row, &who.key, ending, who.on_unknown, context, |stored| {
            Answer::Claim(Claim::Settled(stored))
        });
    }
    row.state = State::Sending;
    row.fence += 1;
    row.token = request.token;
    row.epoch = context.epoch.unwrap_or(0);
    row.lease_until = context.now.saturating_add(as_millis(request.lease));
    row.attempts += 1;
    row.ended_at = None;
    let granted = Claim::Granted(lease_of(&row));
    Effect { write: Some(row), ..Effect::claim(granted) }
}

/// What would be written is left to the claim.
fn look(row: Option<Row>, who: &Claimant, context: Context) -> Effect {
    let claim = match admit(row, who, context) {
        Ok(Some(row)) => {
            is_waiting(&row, context).then_some(Claim::Waiting { until: row.not_before })
        }
        Ok(None) => None,
        Err(effect) => match *effect {
            Effect { answer: Answer::Claim(claim), write: None, .. } => Some(claim),
            Effect { .. } => None,
        },
    };
    Effect::keep(Answer::Look(claim))
}

/// Whether its next try lies ahead.
fn is_waiting(row: &Row, context: Context) -> bool {
    row.state == State::Waiting
        && (1..=LONGEST_WAIT).contains(&row.not_before.saturating_sub(context.now))
}

/// Whether a job may be worked on with its row; if not, what it is answered.
fn admit(row: Option<Row>, who: &Claimant, context: Context) -> Result<Option<Row>, Box<Effect>> {
    let row = match doubt(row, who, context) {
        Doubted::Believed(row) => row,
        Doubted::Swept(row) => return Err(Box::new(swept(row, who, context))),
        Doubted::Lost(row, code, text) => {
            return Err(Box::new(lost((row, code, text), who, context)));
        }
    };
    match arrive(row, who, context) {
        Arrival::Answered(claim) => Err(Box::new(Effect::claim(claim))),
        Arrival::Free(row) => Ok(row),
    }
}

fn settle(row: Option<Row>, request: &SettleRequest, context: Context) -> Effect {
    let lease = &request.lease;
    let mut row = match row {
        Some(row) if row.fence == lease.fence && row.token == lease.token => row,
        // The fence moved on (or the row is gone): somebody else decides now.
        Some(_) | None => return zombie(request),
    };
    match row.state {
        State::Sending => {}
        // The same settle again: its first commit happened, only the answer was lost.
        State::Waiting => {
            let answer = Answer::Settle(Settle::Waiting { until: row.not_before });
            return Effect { write: Some(row), ..Effect::keep(answer) };
        }
        State::Ended(_) => {
            return match row.stored(&request.key) {
                Some(stored) => Effect {
                    write: Some(row),
                    ..Effect::keep(Answer::Settle(Settle::Ended(stored)))
                },
                None => zombie(request),
            };
        }
    }
    match &request.attempt {
        Attempt::Counted => {}
        Attempt::GivenBack => row.attempts = row.attempts.saturating_sub(1),
        Attempt::Free => row.free += 1,
        Attempt::Probed { .. } => {
            row.free += 1;
            row.ambiguous += 1;
        }
        Attempt::Ambiguous { .. } => row.ambiguous += 1,
    }
    let ambiguous = matches!(request.attempt, Attempt::Ambiguous { .. } | Attempt::Probed { .. });
    let mut effect = match &request.next {
        Next::Wait { .. } if ambiguous && request.on_unknown == OnUnknown::Park => {
            let text = "Creem's answer never came, and it may have made a checkout";
            let ending = Ending::Unresolved(Problem::new("outcome_unknown", text));
            end(row, &request.key, ending, request.on_unknown, context, settled)
        }
        Next::Wait { until, uncounted } => {
            row.state = State::Waiting;
            row.not_before = *until;
            row.opened_at = row.opened_at.saturating_add(*uncounted);
            row.lease_until = 0;
            let answer = Answer::Settle(Settle::Waiting { until: *until });
            Effect { write: Some(row), ..Effect::keep(answer) }
        }
        Next::End(ending) => {
            end(row, &request.key, ending.clone(), request.on_unknown, context, settled)
        }
    };
    effect.orphan = orphan(request, None);
    effect
}

fn settled(stored: super::Stored) -> Answer {
    Answer::Settle(Settle::Ended(stored))
}

/// A result that came too late touches no row; a session it brought is an orphan. The attempt
/// was counted as ambiguous when it was taken over.
fn zombie(request: &SettleRequest) -> Effect {
    let late = "its worker had lost the lease";
    let orphan = match &request.next {
        Next::End(Ending::Succeeded { checkout_id, .. }) => Some(Orphan {
            fence: request.lease.fence,
            checkout_id: checkout_id.clone(),
            reason: late.to_owned(),
        }),
        Next::End(_) | Next::Wait { .. } => orphan(request, Some(late)),
    };
    Effect { orphan, ..Effect::keep(Answer::Settle(Settle::Zombie)) }
}

fn orphan(request: &SettleRequest, reason: Option<&str>) -> Option<Orphan> {
    let Attempt::Ambiguous { checkout_id: Some(id), reason: why } = &request.attempt else {
        return None;
    };
    Some(Orphan {
        fence: request.lease.fence,
        checkout_id: id.clone(),
        reason: reason.unwrap_or(why).to_owned(),
    })
}

fn close(row: Option<Row>, request: &CloseRequest, context: Context) -> Effect {
    let who = &request.claimant;
    let row = match admit(row, who, context) {
        Ok(row) => row,
        Err(answered) => return *answered,
    };
    let mut row = match row.map(|row| take_over(row, context)) {
        None => open(who, context),
        Some(row) => row,
    };
    row.fence += 1;
    end(row, &who.key, request.ending.clone(), who.on_unknown, context, |stored| {
        Answer::Claim(Claim::Settled(stored))
    })
}

/// Stores an ending with the bytes of its reply, in one write.
fn end(
    mut row: Row,
    key: &Key,
    ending: Ending,
    on_unknown: OnUnknown,
    context: Context,
    answer: impl FnOnce(super::Stored) -> Answer,
) -> Effect {
    let ending = ending.honest(row.ambiguous);
    let facts = Facts {
        key,
        product_id: &row.product_id,
        attempts: row.attempts,
        created_at: context.now,
        park: on_unknown == OnUnknown::Park,
    };
    row.reply = Some(reply::encode(&ending, facts));
    row.code = ending.problem().map(|problem| problem.code.clone());
    row.state = State::Ended(ending.status());
    row.ended_at = Some(context.now);
    row.lease_until = 0;
    row.parked = false;
    row.checkout_id = match ending {
        Ending::Succeeded { checkout_id, .. } => Some(checkout_id),
        Ending::Rejected(_)
        | Ending::Expired(_)
        | Ending::Failed(_)
        | Ending::Unresolved(_)
        | Ending::Cancelled(_) => None,
    };
    let stored = row.stored(key).expect("a row that was just ended has an outcome");
    Effect { write: Some(row), ..Effect::keep(answer(stored)) }
}

fn parked(row: Option<Row>, fence: u64) -> Effect {
    let write = row
        .filter(|row| row.fence == fence && !row.parked && matches!(row.state, State::Ended(_)))
        .map(|row| Row { parked: true, ..row });
    Effect { write, ..Effect::keep(Answer::Done) }
}
