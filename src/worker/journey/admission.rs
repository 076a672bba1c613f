//! Whether and when a call may be made: the gate, the pacer, and the time that is left.

use std::time::Duration;

use tokio::time::Instant;

use super::{ASIDE, Journey, Verdict};
use crate::job::Lane;
use crate::observe::metrics;
use crate::pace::Place;
use crate::worker::ask::Ask;
use crate::worker::circuit::Probe;
use crate::worker::gate::Reason;

/// While nobody may call and a lane is full, a job without a deadline makes room after so long.
const MAKE_ROOM: Duration = Duration::from_secs(5);

/// Whether a call may be made now.
pub(super) enum Admission<'a> {
    Admitted(Pass<'a>),
    /// Too late or cancelled while waiting, or the gate is closed again: the rules say what follows.
    LookAgain,
    Verdict(Verdict),
}

/// The right to make a call.
pub(super) struct Pass<'a> {
    pub(super) place: Place,
    /// Whether it is the one that shows whether Creem is back.
    pub(super) probe: Option<Probe<'a>>,
}

impl Journey {
    /// Waits for the gate and the pacer, as long as the job can still make it.
    pub(super) async fn admit(&self, ask: &Ask) -> Admission<'_> {
        let paced = async {
            let probe = tokio::select! {
                biased;
                () = self.gate.opened() => None,
                probe = self.circuit.probe(&self.gate) => Some(probe),
            };
            let waited = Instant::now();
            let place = self.pacer.admit(ask.lane).await;
            metrics::rate_limit_wait(ask.lane, waited.elapsed());
            Pass { place, probe }
        };
        let admission = tokio::select! {
            biased;
            verdict = self.interrupted(ask) => Admission::Verdict(verdict),
            pass = paced => Admission::Admitted(pass),
            () = self.expiry(ask) => Admission::LookAgain,
            () = self.orders.cancelled(ask) => Admission::LookAgain,
            why = self.must_make_room(ask) => {
                Admission::Verdict(Verdict::Delay { wait: ASIDE, why })
            }
        };
        // The gate may have closed while the pacer was waited for.
        if let Admission::Admitted(pass) = &admission {
            let may = match pass.probe {
                None => self.gate.is_open(),
                Some(_) => self.gate.is_held_only_by(Reason::Circuit),
            };
            if !may {
                self.pacer.put_back(pass.place);
                return Admission::LookAgain;
            }
        }
        admission
    }

    /// Resolves, with the reason, when an interactive job without a deadline holds a slot that one with a
    /// deadline may need: while Creem is not asked all wait, but those who are late must be told.
    async fn must_make_room(&self, ask: &Ask) -> &'static str {
        if ask.lane != Lane::Interactive || self.rules.expires_at(ask).is_some() {
            return std::future::pending().await;
        }
        loop {
            // Held first: a full lane must not send its whole backlog round and round.
            tokio::time::sleep(MAKE_ROOM).await;
            let held = [Reason::Key, Reason::Circuit];
            let held = held.into_iter().find(|reason| self.gate.is_closed_by(*reason));
            let silent = (self.pacer.silence() > MAKE_ROOM).then_some("throttled");
            if let Some(reason) =
                held.map(Reason::as_str).or(silent).filter(|_| ask.permits.available_permits() == 0)
            {
                return reason;
            }
        }
    }
}
