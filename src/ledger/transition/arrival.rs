//! What the stored state allows a new arrival of a job to do.

use super::Context;
use super::doubt::is_for_a_person;
use crate::clock::Millis;
use crate::job::key::Comparison;
use crate::job::{Ending, Problem, Status};
use crate::ledger::row::{Row, State};
use crate::ledger::{Claim, ClaimRequest, Claimant, Lease, OnUnknown};

/// How often a process may end while it is sending one job before that job is taken for the
/// cause. A crash costs every job of the prefetch window its turn, so a poison job must stop.
pub const MOST_CRASHES: u32 = 5;

/// What the stored state allows a new arrival to do.
pub(super) enum Arrival {
    /// Nothing stands in the way; the row so far, if there is one.
    Free(Option<Row>),
    /// The answer is fixed.
    Answered(Claim),
}

/// No retry is ever due later than this from now, in milliseconds; one that seems to be was
/// written under a clock that ran ahead, and is due. The longest delay that a policy can choose is
/// 35 minutes: a clamped `Retry-After` of 5, and jitter of up to `retry.first`, at most 30.
pub(super) const LONGEST_WAIT: Millis = 40 * 60 * 1000;

/// No lease lasts longer than this, in milliseconds; one that seems to was written under a clock
/// that ran ahead, and is over. The longest is a `creem.request_timeout` of two minutes and 15 s.
pub(super) const LONGEST_LEASE: Millis = 5 * 60 * 1000;

/// When a row that a newer version wrote is looked at again, in milliseconds.
pub(super) const LEAVE_TO_NEWER: Millis = 30_000;

/// May another attempt follow? It may not where one may have made a session and `park` was chosen (perhaps since),
/// nor where a dead one was taken over that was the last.
pub(super) fn last_word(row: &Row, request: &ClaimRequest) -> Option<Ending> {
    if request.claimant.on_unknown == OnUnknown::Park && row.ambiguous > 0 {
        let text = "what came of a call to Creem is not known: it may have made a checkout";
        return Some(Ending::Unresolved(Problem::new("outcome_unknown", text)));
    }
    if row.state != State::Sending {
        return None;
    }
    if row.crashes >= MOST_CRASHES {
        let text = format!("the worker ended {} times while it was sending this job", row.crashes);
        return Some(Ending::Unresolved(Problem::new("crashes_worker", text)));
    }
    if row.attempts.saturating_sub(row.free) >= request.max_attempts {
        let text = format!("{} attempts were made, and the last one was cut off", row.attempts);
        return Some(Ending::Unresolved(Problem::new("attempts_exhausted", text)));
    }
    None
}

pub(super) fn arrive(row: Option<Row>, who: &Claimant, context: Context) -> Arrival {
    let Some(row) = row else { return Arrival::Free(None) };
    match row.fingerprint.compare(&who.fingerprint) {
        Comparison::Same => {}
        Comparison::Differs(_) if frees_the_id(&row, who) => {
            return Arrival::Free(Some(reopen(&row, who, context)));
        }
        Comparison::Differs(fields) => return Arrival::Answered(Claim::Conflict(fields)),
        // Written by a newer version: neither "same" nor "conflict" may be said. The newer
        // worker will serve it; here it waits.
        Comparison::Unknown => {
            let until = context.now.saturating_add(LEAVE_TO_NEWER);
            return Arrival::Answered(Claim::Busy { until });
        }
    }
    match row.state {
        State::Sending if alive(&row, context) => {
            Arrival::Answered(Claim::Busy { until: row.lease_until })
        }
        State::Sending | State::Waiting => Arrival::Free(Some(row)),
        State::Ended(status) => match row.stored(&who.key) {
            Some(stored)
                if keeps(status, who, stored.ended_at) || is_for_a_person(row.code.as_deref()) =>
            {
                Arrival::Answered(Claim::Settled(stored))
            }
            Some(_) | None => Arrival::Free(Some(reopen(&row, who, context))),
        },
    }
}

/// A redelivery, or a copy picked up before the outcome was made, was never sent again.
pub(super) fn sent_again(who: &Claimant, ended_at: Millis) -> bool {
    !who.redelivered && who.picked_up_at > ended_at
}

/// Whether an ended row answers this copy with what it holds, rather than being tried afresh.
pub(super) fn keeps(status: Status, who: &Claimant, ended_at: Millis) -> bool {
    let sent_again = sent_again(who, ended_at);
    match status {
        // The last two are never stored; if a row says so all the same, repeat what it holds.
        Status::Succeeded | Status::Invalid | Status::Conflict => true,
        Status::Unresolved => !sent_again || who.on_unknown == OnUnknown::Park,
        Status::Rejected | Status::Expired | Status::Failed | Status::Cancelled => !sent_again,
    }
}

/// Whether an id is free for another body: the job ended, certainly without a session, and the other
/// body was sent after that.
pub(super) fn frees_the_id(row: &Row, who: &Claimant) -> bool {
    let ended_without = matches!(
        row.state,
        State::Ended(Status::Rejected | Status::Expired | Status::Failed | Status::Cancelled)
    );
    ended_without && row.ambiguous == 0 && row.ended_at.is_some_and(|at| sent_again(who, at))
}

pub(super) fn alive(row: &Row, context: Context) -> bool {
    let same_process = context.epoch.is_none_or(|epoch| epoch == row.epoch);
    same_process && (1..=LONGEST_LEASE).contains(&row.lease_until.saturating_sub(context.now))
}

/// An attempt that nobody will report on any more may have made a session.
pub(super) fn take_over(mut row: Row, context: Context) -> Row {
    if row.state == State::Sending {
        row.ambiguous += 1;
        // Where many workers share the ledger, whoever held the lease is dead or was frozen.
        if context.epoch.is_none_or(|epoch| epoch != row.epoch) {
            row.crashes += 1;
        }
    }
    row
}

pub(super) fn open(who: &Claimant, context: Context) -> Row {
    Row {
        state: State::Waiting,
        fence: 0,
        token: [0; 16],
        epoch: 0,
        lease_until: 0,
        not_before: 0,
        fingerprint: who.fingerprint.clone(),
        lane: who.lane,
        campaign: who.campaign.clone(),
        product_id: who.product_id.clone(),
        attempts: 0,
        free: 0,
        ambiguous: 0,
        crashes: 0,
        opened_at: who.picked_up_at.min(context.now),
        created_at: context.now,
        updated_at: context.now,
        ended_at: None,
        checkout_id: None,
        reply: None,
        code: None,
        parked: false,
    }
}

/// The job was sent again: a new outcome begins. What is known of sessions stays.
pub(super) fn reopen(row: &Row, who: &Claimant, context: Context) -> Row {
    let Row { fence, ambiguous, created_at, .. } = *row;
    Row { fence, ambiguous, created_at, ..open(who, context) }
}

pub(super) fn lease_of(row: &Row) -> Lease {
    Lease {
        fence: row.fence,
        token: row.token,
        attempt: row.attempts,
        free: row.free,
        ambiguous: row.ambiguous,
        opened_at: row.opened_at,
    }
}
