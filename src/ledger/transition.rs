//! The state machine, pure: a row and a command go in, an answer and a changed row come out.
//!
//! One machine for all back-ends: they differ in how rows are loaded, locked and made durable,
//! never in what a command means.

use super::row::{Row, State};
use super::{
    Answer, Attempt, Claim, ClaimRequest, Claimant, CloseRequest, JobCommand, Lease, Next,
    OnUnknown, Settle, SettleRequest,
};
use crate::clock::{Millis, as_millis};
use crate::job::key::Comparison;
use crate::job::reply::{self, Facts};
use crate::job::{Ending, Key, Problem, Status};

/// How often a process may end while it is sending one job before that job is taken for the
/// cause. A crash costs every job of the prefetch window its turn, so a poison job must stop.
pub const MOST_CRASHES: u32 = 5;

/// No retry is ever due later than this from now, in milliseconds; one that seems to be was
/// written under a clock that ran ahead, and is due. The longest delay that a policy can choose is
/// 35 minutes: a clamped `Retry-After` of 5, and jitter of up to `retry.first`, at most 30.
const LONGEST_WAIT: Millis = 40 * 60 * 1000;
/// No lease lasts longer than this, in milliseconds; one that seems to was written under a clock
/// that ran ahead, and is over. The longest is a `creem.request_timeout` of two minutes and 15 s.
const LONGEST_LEASE: Millis = 5 * 60 * 1000;
/// How long a restored ledger is doubted, in milliseconds: 30 days.
pub const DOUBT_LASTS: Millis = 30 * 24 * 3_600_000;
/// How far a producer's clock may run ahead, in milliseconds.
const CLOCKS_DIFFER: Millis = 5 * 60_000;
/// How long after a restore a redelivered job without a timestamp counts as older, in milliseconds.
const UNTIMED: Millis = 24 * 3_600_000;
/// When a row that a newer version wrote is looked at again, in milliseconds.
const LEAVE_TO_NEWER: Millis = 30_000;

/// What the back-end knows besides the row.
#[derive(Debug, Clone, Copy)]
pub struct Context {
    /// The ledger's clock.
    pub now: Millis,
    /// This worker process, where the ledger belongs to one process at a time: leases of other
    /// epochs are void at once. `None` where many workers share it and only time voids a lease.
    pub epoch: Option<u64>,
    /// Until when the ledger may have forgotten what was done, because it was restored.
    pub restored: Option<Millis>,
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
        JobCommand::Knows { .. } => Effect::keep(Answer::Knows(row.is_some())),
    };
    if let Some(written) = &mut effect.write {
        written.updated_at = context.now;
        effect.ambiguous = written.ambiguous.saturating_sub(before);
    }
    effect
}

/// What the stored state allows a new arrival to do.
enum Arrival {
    /// Nothing stands in the way; the row so far, if there is one.
    Free(Option<Row>),
    /// The answer is fixed.
    Answered(Claim),
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
    let row = match doubt(row, who, context) {
        Doubted::Believed(row) => row,
        Doubted::Lost(row, code, text) => return lost((row, code, text), who, context),
    };
    let row = match arrive(row, who, context) {
        Arrival::Answered(claim) => return Effect::claim(claim),
        Arrival::Free(row) => row,
    };
    if let Some(row) = &row
        && row.state == State::Waiting
        && (1..=LONGEST_WAIT).contains(&row.not_before.saturating_sub(context.now))
    {
        return Effect::claim(Claim::Waiting { until: row.not_before });
    }
    let mut row = match row.map(|row| take_over(row, context)) {
        None => open(who, context),
        Some(row) => row,
    };
    if row.state == State::Sending
        && let Some(ending) = last_word_of_a_takeover(&row, request)
    {
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

/// A dead attempt was taken over: may another one follow?
fn last_word_of_a_takeover(row: &Row, request: &ClaimRequest) -> Option<Ending> {
    if request.claimant.on_unknown == OnUnknown::Park {
        let text = "a call to Creem was cut off and may have made a checkout";
        return Some(Ending::Unresolved(Problem::new("outcome_unknown", text)));
    }
    if row.crashes >= MOST_CRASHES {
        let text = format!("the worker ended {} times while it was sending this job", row.crashes);
        return Some(Ending::Unresolved(Problem::new("crashes_worker", text)));
    }
    if row.attempts.saturating_sub(row.throttled) >= request.max_attempts {
        let text = format!("{} attempts were made, and the last one was cut off", row.attempts);
        return Some(Ending::Unresolved(Problem::new("attempts_exhausted", text)));
    }
    None
}

fn arrive(row: Option<Row>, who: &Claimant, context: Context) -> Arrival {
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
fn sent_again(who: &Claimant, ended_at: Millis) -> bool {
    !who.redelivered && who.picked_up_at > ended_at
}

/// Whether an ended row answers this copy with what it holds, rather than being tried afresh.
fn keeps(status: Status, who: &Claimant, ended_at: Millis) -> bool {
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
fn frees_the_id(row: &Row, who: &Claimant) -> bool {
    let ended_without = matches!(
        row.state,
        State::Ended(Status::Rejected | Status::Expired | Status::Failed | Status::Cancelled)
    );
    ended_without && row.ambiguous == 0 && row.ended_at.is_some_and(|at| sent_again(who, at))
}

fn alive(row: &Row, context: Context) -> bool {
    let same_process = context.epoch.is_none_or(|epoch| epoch == row.epoch);
    same_process && (1..=LONGEST_LEASE).contains(&row.lease_until.saturating_sub(context.now))
}

/// An attempt that nobody will report on any more may have made a session.
fn take_over(mut row: Row, context: Context) -> Row {
    if row.state == State::Sending {
        row.ambiguous += 1;
        // Where many workers share the ledger, whoever held the lease is dead or was frozen.
        if context.epoch.is_none_or(|epoch| epoch != row.epoch) {
            row.crashes += 1;
        }
    }
    row
}

/// `error.code` of jobs that another ledger may know a link for.
const OTHER_LEDGER: &str = "other_ledger";
/// `error.code` of jobs whose link this ledger may have forgotten.
const LEDGER_RESTORED: &str = "ledger_restored";

/// Whether only a person may decide what becomes of an outcome, whatever `creem.on_unknown` says.
fn is_for_a_person(code: Option<&str>) -> bool {
    matches!(code, Some(OTHER_LEDGER | LEDGER_RESTORED))
}

/// What a restored ledger says of a job.
enum Doubted {
    /// It is believed; where the row may be older than what was told, that counts as an attempt
    /// whose outcome nobody knows.
    Believed(Option<Row>),
    /// This copy may have been answered already, with a link that this ledger does not know; the
    /// `error.code` and the reason.
    Lost(Row, &'static str, &'static str),
}

/// A ledger that was restored may have forgotten a job, or what came of it; one that is new may have
/// taken the place of one that knew.
fn doubt(row: Option<Row>, who: &Claimant, context: Context) -> Doubted {
    if row.is_none() && who.elsewhere {
        let text =
            "the job comes from a delay queue of another ledger, which may know a link for it";
        return Doubted::Lost(doubted(open(who, context)), OTHER_LEDGER, text);
    }
    let Some(until) = context.restored.filter(|until| context.now <= until + DOUBT_LASTS) else {
        return Doubted::Believed(row);
    };
    // What ended with a link did so before the backup was made, and stays so; what is unresolved says
    // so already.
    let told = |row: &Row| {
        matches!(row.state, State::Ended(Status::Succeeded | Status::Unresolved))
            || row.updated_at > until
    };
    if row.as_ref().is_some_and(told) {
        return Doubted::Believed(row);
    }
    let old = match who.published_at {
        Some(published) => published <= until + if who.redelivered { CLOCKS_DIFFER } else { 0 },
        // Nobody can say how old it is; what was delivered before soon after the restore counts.
        None if who.redelivered => context.now <= until + UNTIMED,
        None => who.picked_up_at <= until,
    };
    match row {
        row if old => {
            let text =
                "the ledger was restored from a backup and may have forgotten this job's link";
            let row = row.unwrap_or_else(|| open(who, context));
            Doubted::Lost(doubted(row), LEDGER_RESTORED, text)
        }
        Some(row) => Doubted::Believed(Some(doubted(row))),
        None => Doubted::Believed(None),
    }
}

/// A session may exist that no row tells of.
fn doubted(row: Row) -> Row {
    Row { ambiguous: row.ambiguous + 1, ..row }
}

/// A person must look whether such a job has a link: as with `park`, nothing that a producer sends
/// makes it be asked for again.
fn lost((mut row, code, text): (Row, &str, &str), who: &Claimant, context: Context) -> Effect {
    row.fence += 1;
    let ending = Ending::Unresolved(Problem::new(code, text));
    end(row, &who.key, ending, OnUnknown::Park, context, |stored| {
        Answer::Claim(Claim::Settled(stored))
    })
}

fn open(who: &Claimant, context: Context) -> Row {
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
        throttled: 0,
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
fn reopen(row: &Row, who: &Claimant, context: Context) -> Row {
    let Row { fence, ambiguous, created_at, .. } = *row;
    Row { fence, ambiguous, created_at, ..open(who, context) }
}

fn lease_of(row: &Row) -> Lease {
    Lease {
        fence: row.fence,
        token: row.token,
        attempt: row.attempts,
        throttled: row.throttled,
        ambiguous: row.ambiguous,
        opened_at: row.opened_at,
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
        Attempt::Throttled => row.throttled += 1,
        Attempt::Ambiguous { .. } => row.ambiguous += 1,
    }
    let ambiguous = matches!(request.attempt, Attempt::Ambiguous { .. });
    let mut effect = match &request.next {
        Next::Wait { .. } if ambiguous && request.on_unknown == OnUnknown::Park => {
            let text = "Creem's answer never came, and it may have made a checkout";
            let ending = Ending::Unresolved(Problem::new("outcome_unknown", text));
            end(row, &request.key, ending, request.on_unknown, context, settled)
        }
        Next::Wait { until } => {
            row.state = State::Waiting;
            row.not_before = *until;
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
    let row = match doubt(row, who, context) {
        Doubted::Believed(row) => row,
        Doubted::Lost(row, code, text) => return lost((row, code, text), who, context),
    };
    let row = match arrive(row, who, context) {
        Arrival::Answered(claim) => return Effect::claim(claim),
        Arrival::Free(row) => row,
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
        Ending::Rejected(_) | Ending::Expired(_) | Ending::Failed(_) | Ending::Unresolved(_) => {
            None
        }
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
