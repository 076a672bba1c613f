//! What one worker has seen of how fast Creem can be asked, until all who share a rate are told of it.

use std::time::Duration;

use tokio::time::Instant;

/// How often the others are told while calls wait for the rate: as often as it can grow.
const TELL_EVERY: Duration = Duration::from_millis(100);
/// The same while no call does: it changes nothing that must be known at once.
const TELL_IDLY_EVERY: Duration = Duration::from_millis(400);
/// The same where Creem has said "slow down", or takes calls again after that.
const TELL_URGENTLY_EVERY: Duration = Duration::from_millis(20);

/// Calls of one kind of answer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Answered {
    /// How many.
    pub count: u32,
    /// The one of them that was made last: when it was made, and when it was answered.
    pub last: Option<(Instant, Instant)>,
}

impl Answered {
    fn add(&mut self, asked: Instant, now: Instant) {
        self.join(Self { count: 1, last: Some((asked, now)) });
    }

    fn join(&mut self, other: Self) {
        self.count = self.count.saturating_add(other.count);
        self.last = self.last.max(other.last);
    }
}

/// What was seen since the others were told last.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Seen {
    /// Calls that Creem took.
    pub taken: Answered,
    /// Calls that it answered with "slow down".
    pub refused: Answered,
    /// Calls for which it had too much to do.
    pub overloaded: Answered,
    /// Whether a call had to wait for the rate.
    pub pressed: bool,
    /// Whether an outage has ended.
    pub restarted: bool,
    urgent: bool,
}

impl Seen {
    /// A call that was made at `asked` was taken; `first` says that nobody is known to have been since Creem said
    /// "slow down".
    pub fn take(&mut self, asked: Instant, now: Instant, first: bool) {
        self.taken.add(asked, now);
        self.urgent |= first;
    }

    /// A call that was made at `asked` was answered with "slow down".
    pub fn refuse(&mut self, asked: Instant, now: Instant) {
        self.refused.add(asked, now);
        self.urgent = true;
    }

    /// Creem had too much to do for a call that was made at `asked`.
    pub fn overload(&mut self, asked: Instant, now: Instant) {
        self.overloaded.add(asked, now);
        self.urgent = true;
    }

    /// A call has to wait for the rate.
    pub fn press(&mut self) {
        self.pressed = true;
    }

    /// An outage has ended.
    pub fn restart(&mut self) {
        self.restarted = true;
        self.urgent = true;
    }

    /// What was seen before this as well, as nobody could be told of it.
    pub fn join(&mut self, earlier: Self) {
        let Self { taken, refused, overloaded, pressed, restarted, urgent } = earlier;
        self.taken.join(taken);
        self.refused.join(refused);
        self.overloaded.join(overloaded);
        self.pressed |= pressed;
        self.restarted |= restarted;
        self.urgent |= urgent;
    }

    /// When it is to be told, after somebody was told last; `None` while there is nothing to tell.
    #[must_use]
    pub fn due(&self, told: Instant) -> Option<Instant> {
        let every = match self {
            Self { urgent: true, .. } => TELL_URGENTLY_EVERY,
            Self { pressed: true, .. } => TELL_EVERY,
            Self { taken: Answered { count: 1.., .. }, .. } => TELL_IDLY_EVERY,
            _ => return None,
        };
        Some(told + every)
    }
}
