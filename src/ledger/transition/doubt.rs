//! Jobs that the ledger may have forgotten: it was restored, or another one may know them.

use super::arrival::open;
use super::end;
use super::{Context, Effect};
use crate::clock::Millis;
use crate::job::{Ending, Problem, Status};
use crate::ledger::row::{Row, State};
use crate::ledger::{Answer, Claim, Claimant, OnUnknown};

/// How long a restored ledger is doubted, in milliseconds: 30 days.
pub const DOUBT_LASTS: Millis = 30 * 24 * 3_600_000;

/// How far a producer's clock may run ahead, in milliseconds.
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

/// What a restored ledger says of a job.
pub(super) enum Doubted {
    /// It is believed; where the row may be older than what was told, that counts as an attempt
    /// whose outcome nobody knows.
    Believed(Option<Row>),
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
