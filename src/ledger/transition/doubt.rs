//! Jobs that the ledger may have forgotten: it was restored, or another one may know them.

use super::arrival::{keeps, open};
use super::end;
use super::{Context, Effect};
use crate::clock::Millis;
use crate::job::key::Comparison;
use crate::job::{Ending, Problem, Status};
use crate::ledger::row::{Row, State};
use crate::ledger::{Answer, Claim, Claimant, OnUnknown};

/// How far a producer's clock may be off, in milliseconds.
pub(super) const CLOCKS_DIFFER: Millis = 5 * 60_000;

/// How long after a restore a redelivered job without a timestamp counts as older, in milliseconds.
pub(super) const UNTIMED: Millis = 24 * 3_600_000;

/// `error.code` of jobs that another ledger may know a link for.
pub(super) const OTHER_LEDGER: &str = "other_ledger";

/// `error.code` of jobs whose link this ledger may have forgotten.
pub(super) const LEDGER_RESTORED: &str = "ledger_restored";

/// Whether only a person may decide what becomes of an outcome, whatever `creem.on_unknown` says.
pub(super) fn is_for_a_person(code: Option<&str>) -> bool {
    matches!(code, Some(OTHER_LEDGER | LEDGER_RESTORED))
}

/// What a ledger that may have forgotten something says of a job.
pub(super) enum Doubted {
    /// It is believed; where the row may be older than what was told, that counts as an attempt
    /// whose outcome nobody knows.
    Believed(Option<Row>),
    /// Outcomes of its age have been removed.
    Swept(Row),
    /// This copy may have been answered already, with a link that this ledger does not know; the
    /// `error.code` and the reason.
    Lost(Row, &'static str, &'static str),
}

/// A ledger that was restored may have forgotten a job, or what came of it; one that is new may have
/// taken the place of one that knew.
pub(super) fn doubt(row: Option<Row>, who: &Claimant, context: Context) -> Doubted {
    if row.is_none() && who.elsewhere {
        let text =
            "the job comes from a delay queue of another ledger, which may know a link for it";
        return Doubted::Lost(doubted(open(who, context)), OTHER_LEDGER, text);
    }
    if row.is_none() && is_swept(who, context) {
        return Doubted::Swept(open(who, context));
    }
    let Some(until) = context.forgotten.restored else { return Doubted::Believed(row) };
    let text = "the ledger was restored from a backup and may have forgotten this job's link";
    let Some(row) = row else {
        return if was_about(who, until, context) {
            Doubted::Lost(doubted(open(who, context)), LEDGER_RESTORED, text)
        } else {
            Doubted::Believed(None)
        };
    };
    if row.updated_at > until || tells_the_same_for_ever(&row, who) {
        return Doubted::Believed(Some(row));
    }
    match row.fingerprint.compare(&who.fingerprint) {
        Comparison::Same => Doubted::Lost(doubted(row), LEDGER_RESTORED, text),
        // Its id is not free for another body: the job may have been given a link since.
        Comparison::Differs(_) => Doubted::Believed(Some(doubted(row))),
        Comparison::Unknown => Doubted::Believed(Some(row)),
    }
}

/// Whether rows of jobs that are as old as this copy may have been swept. Those of a longer retention
/// than the one that is configured now are refused before they come here.
fn is_swept(who: &Claimant, context: Context) -> bool {
    let stamped = who.published_at.unwrap_or(who.picked_up_at);
    let swept = context.forgotten.swept.of(who.key.mode).filter(|swept| *swept <= context.now);
    swept.is_some_and(|swept| stamped <= swept + CLOCKS_DIFFER)
}

/// Whether a copy may have been about when the ledger knew more than it does now.
fn was_about(who: &Claimant, until: Millis, context: Context) -> bool {
    let published = match who.published_at {
        Some(published) => published <= until + if who.redelivered { CLOCKS_DIFFER } else { 0 },
        // Nobody can say how old it is; what was delivered before soon after the restore counts.
        None => who.redelivered && context.now <= until + UNTIMED,
    };
    published || who.picked_up_at <= until
}

/// Whether an old row still answers this copy as it would if nothing had been forgotten.
fn tells_the_same_for_ever(row: &Row, who: &Claimant) -> bool {
    match row.state {
        State::Ended(Status::Succeeded) => true,
        State::Ended(status @ Status::Unresolved) => {
            is_for_a_person(row.code.as_deref())
                || row.ended_at.is_some_and(|ended_at| keeps(status, who, ended_at))
        }
        State::Ended(_) | State::Sending | State::Waiting => false,
    }
}

/// A session may exist that no row tells of.
pub(super) fn doubted(row: Row) -> Row {
    Row { ambiguous: row.ambiguous + 1, ..row }
}

/// A person must look whether such a job has a link: as with `park`, nothing that a producer sends
/// makes it be asked for again.
pub(super) fn lost(
    (mut row, code, text): (Row, &str, &str),
    who: &Claimant,
    context: Context,
) -> Effect {
    row.fence += 1;
    let ending = Ending::Unresolved(Problem::new(code, text));
    end(row, &who.key, ending, OnUnknown::Park, context, |stored| {
        Answer::Claim(Claim::Settled(stored))
    })
}

/// Nobody can say whether such a job has been given a link, and its producer was told that outcomes are
/// kept for so long only.
pub(super) fn swept(row: Row, who: &Claimant, context: Context) -> Effect {
    let text = "the job is older than the outcomes that the ledger has removed, so it may have a link already";
    let ending = Ending::Expired(Problem::new("older_than_retention", text));
    end(row, &who.key, ending, who.on_unknown, context, |stored| {
        Answer::Claim(Claim::Settled(stored))
    })
}
