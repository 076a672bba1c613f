//! What journeys go by: how often a job is tried, and until when it is worth a try.

use std::time::Duration;

use super::ask::Ask;
use crate::clock::{Millis, as_millis};
use crate::job::{Lane, Problem, reply};
use crate::ledger::OnUnknown;
use crate::retry::Policy;

/// Jobs closer than this to the end of retention are not begun: their row would be swept while
/// a copy of them may still be about.
const RETENTION_MARGIN: Duration = Duration::from_hours(1);

/// The rules of one lane.
#[derive(Debug, Clone, Copy)]
pub struct LaneRules {
    /// When to try again, and when not.
    pub policy: Policy,
    /// Oldest `timestamp` that is still worth a link.
    pub max_age: Option<Duration>,
}

/// What journeys have in common.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    /// Of the interactive lane.
    pub interactive: LaneRules,
    /// Of the bulk lane.
    pub bulk: LaneRules,
    /// What may follow an unknown answer.
    pub on_unknown: OnUnknown,
    /// One deadline for a whole exchange with Creem.
    pub request_timeout: Duration,
    /// How long the ledger keeps outcomes.
    pub retention: Duration,
}

impl Rules {
    /// The rules of a lane.
    #[must_use]
    pub const fn of(&self, lane: Lane) -> &LaneRules {
        match lane {
            Lane::Interactive => &self.interactive,
            Lane::Bulk => &self.bulk,
        }
    }

    /// When nobody waits for the link any more.
    #[must_use]
    pub fn expires_at(&self, ask: &Ask) -> Option<Millis> {
        let aged = ask.published_at.zip(self.of(ask.lane).max_age);
        let aged = aged.map(|(at, age)| at.saturating_add(as_millis(age)));
        [ask.deadline, aged].into_iter().flatten().min()
    }

    /// Why a job is not begun at `now`, if it is too late for it.
    #[must_use]
    pub fn too_late(&self, ask: &Ask, now: Millis) -> Option<Problem> {
        if ask.deadline.is_some_and(|deadline| deadline <= now) {
            return Some(Problem::new(
                "deadline_passed",
                "its checkout-deadline passed before there was a link",
            ));
        }
        if self.expires_at(ask).is_some_and(|at| at <= now) {
            return Some(Problem::new("max_age", "the job is older than its lane's max_age"));
        }
        let oldest = now - as_millis(self.retention.saturating_sub(RETENTION_MARGIN));
        let stamped = ask.published_at.unwrap_or(ask.picked_up_at);
        if stamped >= oldest {
            return None;
        }
        let text = format!(
            "the job was published at {}, longer ago than the ledger remembers, so it may have a link already",
            reply::rfc3339(stamped)
        );
        Some(Problem::new("older_than_retention", text))
    }
}
