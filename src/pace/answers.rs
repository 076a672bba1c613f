//! What a pacer is told of Creem's answers, and what it says of its rate. A worker by itself learns from each at once;
//! where the rate is shared, what was seen is kept until all are told of it (see [`super::together`]).

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use super::rate::{Held, Rate};
use super::seen::Seen;
use super::{Pacer, State};

impl Pacer {
    /// Creem took a call that was made at `asked`.
    pub fn taken(&self, asked: Instant) {
        let now = Instant::now();
        self.note(
            &mut self.state(),
            |rate| rate.taken(asked, now),
            |seen, rate| seen.take(asked, now, rate.is_refused()),
        );
    }

    /// Creem said "slow down" to a call that was made at `asked`.
    pub fn slow_down(&self, asked: Instant) {
        let now = Instant::now();
        let seen = |seen: &mut Seen, _: &Rate| seen.refuse(asked, now);
        self.note(&mut self.state(), |rate| rate.slow_down(asked, now), seen);
    }

    /// Creem said that it has too much to do, to a call that was made at `asked`.
    pub fn overloaded(&self, asked: Instant) {
        let now = Instant::now();
        let seen = |seen: &mut Seen, _: &Rate| seen.overload(asked, now);
        self.note(&mut self.state(), |rate| rate.overloaded(asked, now), seen);
    }

    /// After an outage: begins slowly again.
    pub fn restart(&self) {
        let now = Instant::now();
        self.note(&mut self.state(), |rate| rate.restart(now), |seen, _| seen.restart());
    }

    /// A call has to wait for the rate.
    pub(super) fn press(&self, state: &mut State, now: Instant) {
        self.note(state, |rate| rate.press(now), |seen, _| seen.press());
    }

    /// Tells one's own rate, or keeps it for all who share one.
    fn note(
        &self,
        state: &mut State,
        own: impl FnOnce(&mut Rate),
        shared: impl FnOnce(&mut Seen, &Rate),
    ) {
        if self.granted {
            shared(&mut state.seen, &state.rate);
            self.saw.notify_one();
        } else {
            own(&mut state.rate);
        }
    }

    /// Creem asked this worker for silence: nobody calls until it is over.
    pub fn quiet(&self, duration: Duration) {
        let until = Instant::now() + duration;
        self.hear(until);
        self.silences.send_replace(Some(until));
    }

    /// Creem asked another worker for silence.
    pub fn hear(&self, until: Instant) {
        let mut state = self.state();
        state.quiet_until = state.quiet_until.max(until);
    }

    /// Most calls a second now, and what holds that where it is, in a sentence.
    #[must_use]
    pub fn explain(&self) -> (f64, String) {
        let now = Instant::now();
        let mut state = self.state();
        if self.granted {
            state.rate.grow(now);
        }
        let ceiling = self.limits.ceiling.unwrap_or(f64::MAX);
        let per_second = state.rate.per_second().min(ceiling);
        let silence = state.quiet_until.saturating_duration_since(now);
        if !silence.is_zero() {
            let seconds = silence.as_secs() + 1;
            return (per_second, format!("Creem asked for silence, for {seconds} s more"));
        }
        let held = state.rate.held(now);
        if self.granted && held != Held::Demand && state.rate.per_second() >= ceiling {
            let text = "rate_limit.per_second is the ceiling of all workers together";
            return (per_second, text.to_owned());
        }
        (per_second, held.to_string())
    }

    /// Until when Creem has asked this worker for silence, and when that changes.
    #[must_use]
    pub fn silences(&self) -> watch::Receiver<Option<Instant>> {
        self.silences.subscribe()
    }
}
