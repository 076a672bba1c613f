//! The arithmetic of the budget's row in `ledger/postgres/budget.rs`, in Rust: fleets in virtual time use it, and
//! `ledger::shared::fleets_are_simulated_with_the_databases_arithmetic` holds it against the database's.

use std::time::Duration;

use creem_checkout_worker::ledger::Wish;

/// Points in time are microseconds of the database's clock.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Line {
    pub(crate) next: i64,
    pub(crate) quiet_until: i64,
    pub(crate) bulk_at: i64,
    pub(crate) interactive_next: i64,
}

/// What whoever asked is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Leased {
    pub(crate) count: u32,
    /// When the first place is, or when there may be one.
    pub(crate) first: i64,
    pub(crate) interval: Duration,
    pub(crate) waited: bool,
}

impl Line {
    /// Takes a block of places; `lead` is how long the answer takes, and `learned` how far apart calls are by what was
    /// learned.
    pub(crate) fn lease(
        &mut self,
        wish: Wish,
        now: i64,
        lead: Duration,
        learned: Option<Duration>,
    ) -> Leased {
        let interval = learned.unwrap_or(wish.default_interval).max(wish.least_interval);
        let fits = wish.lasting.as_micros() / interval.as_micros().max(1);
        let count = u32::try_from(fits).unwrap_or(u32::MAX).min(wish.count).max(1);
        let soonest = now + micros(lead);
        let next = self.next.max(self.quiet_until);
        let line = match wish.bulk_every {
            Some(_) => next,
            None => self
                .interactive_next
                .min(next)
                .max(next - micros(wish.overtakes))
                .max(self.quiet_until),
        };
        let owed = wish.bulk_every.is_some() && self.bulk_at <= now;
        if !owed && wish.horizon.is_some_and(|horizon| line > now + micros(horizon)) {
            let again = line - wish.horizon.map_or(0, micros);
            let first = wish.bulk_every.map_or(again, |_| again.min(self.bulk_at));
            return Leased { count: 0, first, interval, waited: true };
        }
        let (first, block) = (line.max(soonest), micros(interval * count));
        self.next = next.max(soonest) + block;
        match wish.bulk_every {
            Some(every) => self.bulk_at = now + micros(every),
            None => self.interactive_next = first + block,
        }
        Leased { count, first, interval, waited: first > soonest }
    }
}

pub(crate) fn micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap()
}
