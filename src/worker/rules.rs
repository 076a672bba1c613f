//! What journeys go by: how often a job is tried, and until when it is worth a try.

use std::time::Duration;

use super::ask::Ask;
use crate::clock::{Millis, as_duration, as_millis};
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

    /// When a call that needs so long must begin at the latest for somebody still to wait for its answer.
    #[must_use]
    pub fn latest_call(&self, ask: &Ask, needs: Duration) -> Option<Millis> {
        self.expires_at(ask).map(|at| at.saturating_sub(as_millis(needs)))
    }

    /// Why a call at that time that needs so long would be in vain, if nobody would wait for its answer.
    #[must_use]
    pub fn in_vain(&self, ask: &Ask, at: Millis, needs: Duration) -> Option<Problem> {
        let end = at.saturating_add(as_millis(needs));
        if ask.deadline.is_some_and(|deadline| deadline < end) {
            let text = "its checkout-deadline leaves no time for a call, or for another one";
            return Some(Problem::new("deadline_passed", text));
        }
        let text = "its lane's max_age leaves no time for a call, or for another one";
        self.expires_at(ask).filter(|at| *at < end).map(|_| Problem::new("max_age", text))
    }

    /// How much of a delay that nobody but this program wants a job can afford: half of the time that is left
    /// to it, so that there is time for the call as well.
    #[must_use]
    pub fn affordable(&self, ask: &Ask, delay: Duration, now: Millis) -> Duration {
        let left = self.expires_at(ask).map(|at| as_duration(at.saturating_sub(now)));
        left.map_or(delay, |left| delay.min(left / 2))
    }

    /// How long a call may take that begins at `now`.
    #[must_use]
    pub fn time_for_a_call(&self, ask: &Ask, now: Millis) -> Duration {
        let left = self.expires_at(ask).map(|at| as_duration(at.saturating_sub(now)));
        left.map_or(self.request_timeout, |left| left.min(self.request_timeout))
    }

    /// Why a job whose call needs so long is not begun at `now`, if it is too late for it.
    #[must_use]
    pub fn too_late(&self, ask: &Ask, now: Millis, needs: Duration) -> Option<Problem> {
        if let Some(problem) = self.in_vain(ask, now, needs) {
            return Some(problem);
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
