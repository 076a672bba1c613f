//! How fast Creem takes calls, learned from nothing but its "slow down".
//!
//! Additive increase and multiplicative decrease, the way of TCP (RFC 5681): where calls wait for the
//! rate, it grows; where Creem says "slow down" (429, 503), it is cut. Below what Creem was last seen to
//! take it grows fast, and near that slowly, so that most of the time it lies a little below. How long an
//! answer takes is no sign: Creem's latency says more about a product's images than about its load.
//!
//! | when | then |
//! |---|---|
//! | in the beginning | 100 calls a second, or the ceiling; while calls wait, four times as many after each second |
//! | "slow down" | the limit is what was taken in the last second, but half of the rate at least; the rate is 93 % of it. Once a second at most |
//! | again within 3 s, and nearly all of the rate was taken | the limit is 90 % of the rate, and the new rate 70 % of the old |
//! | "slow down" to 1 % of the calls at most, of 20 or more that are taken in a second | nothing: other reasons are likelier |
//! | until a later call is taken | the rate is as it is, and a call every 50 ms shows whether Creem takes any |
//! | calls wait, below 93 % of the limit | twice as much after each second |
//! | calls wait, from there to 140 % of it | 0.6 % of the limit (1 at least) more each second, twice as fast 8 s after the cut, and so on |
//! | calls wait, above that | the limit is forgotten: twice as much after each second |
//! | the rate is four times what is taken, and 100 at least | it does not grow: nothing shows how far it is right |
//! | after an outage | a tenth of the best second of late, as if that were the limit |
//!
//! Pure: time comes in as an argument.

use std::fmt;
use std::time::Duration;

use tokio::time::Instant;

use super::seen::Seen;

/// Where nobody has said how fast: calls a second to begin with.
const START: f64 = 100.0;
/// However often it is cut: calls a second that remain.
const LEAST: f64 = 1.0;
/// More calls a second than anybody makes: between two of them there is some time still.
const MOST: f64 = 1e6;
/// What a cut leaves.
const CUT: f64 = 0.93;
/// What a cut leaves of the rate that comes soon after another: the limit lies much lower.
const DEEP_CUT: f64 = 0.7;
/// What part of the rate must have been taken for the rate to have been about right.
const CLOSE: f64 = 0.85;
/// What part of the calls of a second may be refused for other reasons than the rate, where they are many.
const NOISE: f64 = 0.01;
/// So many times what is taken the rate grows up to: answers may take a while to show what it is.
const UNUSED: f64 = 4.0;
/// From here on calls in a second are many.
const MANY: f64 = 20.0;
/// The least part of the rate that is believed to be what Creem takes: few may have been asked for.
const LEAST_BELIEVED: f64 = 0.5;
/// What part of the rate is then taken for the limit.
const AGAIN: f64 = 0.9;
/// One cut may follow another after so long: Creem may count calls by the second, and says "slow down" for
/// the rest of one that is used up.
const BETWEEN_CUTS: Duration = Duration::from_secs(1);
/// How soon after a cut another one is a deep one.
const SOON: Duration = Duration::from_secs(3);
/// How often it doubles in a second as long as nothing is known.
const LEARNS: f64 = 2.0;
/// What part of the last limit is reached fast.
const FAST_UNTIL: f64 = 0.93;
/// So far above the last limit nothing is known any more.
const FORGET_ABOVE: f64 = 1.4;
/// Growth in a second near the limit, as a part of it; the longer ago Creem said "slow down", the faster.
const SLOWLY: f64 = 0.006;
/// After so long it is twice as fast, after twice that three times, and so on.
const PATIENCE: Duration = Duration::from_secs(4);
/// While Creem takes none: how far apart calls are that show whether it does again.
const BETWEEN_PROBES: Duration = Duration::from_millis(50);
/// How often the rate grows.
const TICK: Duration = Duration::from_millis(100);
/// What is left of the best second after another tick: half of it after two minutes.
const FADES: f64 = 0.9994;
/// Ticks of which the calls are counted: a second.
pub(super) const TICKS: usize = 10;

/// What holds the rate where it is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Held {
    /// Nothing: there are fewer calls than it would allow.
    Demand,
    /// `rate_limit.per_second`.
    Ceiling,
    /// Nobody knows yet how fast Creem can be asked; it is being tried out.
    Unknown,
    /// Creem said "slow down" at so many calls a second, so long ago.
    Limit {
        /// Calls a second.
        per_second: f64,
        /// How long ago.
        ago: Duration,
    },
}

impl fmt::Display for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Demand => f.write_str("fewer calls are wanted than it allows"),
            Self::Ceiling => f.write_str("rate_limit.per_second is the ceiling"),
            Self::Unknown => f.write_str(
                "Creem has not said yet how fast is too fast, so it grows until it does",
            ),
            Self::Limit { per_second, ago } => write!(
                f,
                "Creem said \"slow down\" at {per_second:.1} calls a second, {} s ago; it grows slowly from below that",
                ago.as_secs()
            ),
        }
    }
}

/// The rate at which calls are made.
#[derive(Debug, Clone)]
pub struct Rate {
    pub(super) per_second: f64,
    pub(super) ceiling: Option<f64>,
    /// The rate at which Creem last said "slow down".
    pub(super) limit: Option<f64>,
    pub(super) cut_at: Option<Instant>,
    pub(super) tick_at: Instant,
    /// Whether a call had to wait for the rate since the last tick, and in the one before.
    pub(super) pressed: [bool; 2],
    /// When Creem last said "slow down", until it takes a call that was made after that: in between it is
    /// only asked now and then whether it takes calls again.
    pub(super) refused_at: Option<Instant>,
    /// Calls that were taken in the last ticks, the current one first.
    pub(super) taken: [u32; TICKS],
    /// And those that were not.
    pub(super) refused: [u32; TICKS],
    /// The most that were taken in a second, fading: what an outage does not make forgotten.
    pub(super) best: f64,
}

impl Rate {
    /// A rate that stays below a ceiling, if there is one: whoever gave it knows more than this does, so it
    /// begins there.
    #[must_use]
    pub fn new(ceiling: Option<f64>, now: Instant) -> Self {
        Self {
            per_second: ceiling.unwrap_or(START),
            ceiling,
            limit: None,
            cut_at: None,
            tick_at: now,
            pressed: [false; 2],
            refused_at: None,
            taken: [0; TICKS],
            refused: [0; TICKS],
            best: 0.0,
        }
    }

    /// Calls a second.
    #[must_use]
    pub fn per_second(&self) -> f64 {
        self.per_second
    }

    /// How far apart calls are, by what was learned.
    #[must_use]
    pub fn interval(&self) -> Duration {
        let interval = Duration::from_secs_f64(1.0 / self.per_second);
        if self.refused_at.is_some() { interval.max(BETWEEN_PROBES) } else { interval }
    }

    /// A call had to wait for the rate.
    pub fn press(&mut self, now: Instant) {
        self.grow(now);
        self.pressed[0] = true;
    }

    /// Creem took a call that was made at `asked`.
    pub fn taken(&mut self, asked: Instant, now: Instant) {
        self.grow(now);
        self.taken[0] = self.taken[0].saturating_add(1);
        self.hear_taken(asked);
    }

    fn hear_taken(&mut self, asked: Instant) {
        if self.refused_at.is_some_and(|refused_at| asked > refused_at) {
            self.refused_at = None;
        }
    }

    /// Whether Creem has said "slow down", and taken no call since.
    #[must_use]
    pub fn is_refused(&self) -> bool {
        self.refused_at.is_some()
    }

    /// Creem said "slow down" to a call that was made at `asked`.
    pub fn slow_down(&mut self, asked: Instant, now: Instant) {
        self.grow(now);
        self.refused[0] = self.refused[0].saturating_add(1);
        if self.is_noise() {
            return;
        }
        self.refused_at = Some(now);
        // What was asked before the last cut says nothing about the rate since.
        if self.cut_at.is_some_and(|cut_at| asked < cut_at || now < cut_at + BETWEEN_CUTS) {
            return;
        }
        let again = self.cut_at.is_some_and(|cut_at| now < cut_at + SOON);
        // What Creem took is what it takes, whatever was asked of it; where the two are close, the one that
        // is counted in whole ticks and by late answers is the less exact.
        let taken = self.taken_in_a_second();
        let (limit, cut) = if taken < self.per_second * CLOSE {
            (taken.max(self.per_second * LEAST_BELIEVED).max(LEAST), CUT)
        } else if again {
            // Twice within a moment: what was taken for the limit lies above it.
            (self.per_second * AGAIN, DEEP_CUT / AGAIN)
        } else {
            (self.per_second, CUT)
        };
        self.limit = Some(limit);
        self.cut_at = Some(now);
        self.set(limit * cut);
    }

    /// Creem said that it has too much to do. Where it takes nothing at all that is an outage, which is for
    /// the circuit breaker: a slow trickle of failing calls would only take long to show it.
    pub fn overloaded(&mut self, asked: Instant, now: Instant) {
        self.grow(now);
        if self.takes_any() {
            self.slow_down(asked, now);
        }
    }

    /// After an outage: from a small part of what was taken before it, growing fast.
    pub fn restart(&mut self, now: Instant) {
        self.grow(now);
        let before = self.best.max(self.per_second);
        self.limit = Some(before);
        self.refused_at = None;
        self.set(before / 10.0);
    }

    /// Takes in what one of those who share it has seen since it last told; the end of an outage counts for the first
    /// who tells it.
    pub fn see(&mut self, seen: &Seen, now: Instant) {
        self.grow(now);
        // The first one who finds Creem back begins slowly. The others find that out a moment later, when calls
        // are taken again.
        if seen.restarted && !self.takes_any() {
            self.restart(now);
        }
        self.pressed[0] |= seen.pressed;
        self.taken[0] = self.taken[0].saturating_add(seen.taken.count);
        if let Some((asked, answered)) = seen.refused.last {
            self.refused[0] = self.refused[0].saturating_add(seen.refused.count.saturating_sub(1));
            self.slow_down(asked, answered);
        }
        if let Some((asked, answered)) = seen.overloaded.last
            && self.takes_any()
        {
            let others = seen.overloaded.count.saturating_sub(1);
            self.refused[0] = self.refused[0].saturating_add(others);
            self.slow_down(asked, answered);
        }
        if let Some((asked, _)) = seen.taken.last {
            self.hear_taken(asked);
        }
    }

    /// A rate that workers share, each of whom keeps a ceiling of its own: whoever gave it knows more than this does.
    #[must_use]
    pub fn shared(ceiling: Option<f64>, now: Instant) -> Self {
        Self { ceiling: None, ..Self::new(ceiling, now) }
    }

    /// What holds the rate where it is.
    #[must_use]
    pub fn held(&self, now: Instant) -> Held {
        if !self.pressed.contains(&true) {
            return Held::Demand;
        }
        if self.ceiling.is_some_and(|ceiling| self.per_second >= ceiling) {
            return Held::Ceiling;
        }
        match self.limit.zip(self.cut_at) {
            Some((per_second, cut_at)) => {
                Held::Limit { per_second, ago: now.saturating_duration_since(cut_at) }
            }
            None => Held::Unknown,
        }
    }

    /// Whether so few of many calls are refused that the rate is hardly the reason.
    fn is_noise(&self) -> bool {
        let taken = total(&self.taken);
        let refused = total(&self.refused);
        taken >= MANY && refused <= (taken * NOISE).max(1.0)
    }

    fn takes_any(&self) -> bool {
        self.taken.iter().any(|taken| *taken > 0)
    }

    /// Calls a second that were taken of late; while it grows, the last ticks say more than the whole second.
    fn taken_in_a_second(&self) -> f64 {
        let second = total(&self.taken);
        let lately = total(&self.taken[1..4]) * 10.0 / 3.0;
        if self.limit.is_some() { second } else { second.max(lately) }
    }

    /// Lets time pass.
    pub fn grow(&mut self, now: Instant) {
        let mut ticks = 0;
        while now >= self.tick_at + TICK {
            self.tick_at += TICK;
            ticks += 1;
            if ticks > TICKS {
                // A long silence: nothing waited in it.
                self.tick_at = now;
                self.pressed = [false; 2];
            }
            if self.pressed[0] && self.refused_at.is_none() && self.takes_any() {
                self.grow_once();
            }
            self.pressed = [false, self.pressed[0]];
            let second = total(&self.taken);
            self.best = (self.best * FADES).max(second);
            self.taken.rotate_right(1);
            self.taken[0] = 0;
            self.refused.rotate_right(1);
            self.refused[0] = 0;
        }
    }

    fn grow_once(&mut self) {
        // A rate that is not used says nothing (RFC 7661), and would be far off when it is.
        if self.per_second >= START.max(self.taken_in_a_second() * UNUSED) {
            return;
        }
        let second = TICK.as_secs_f64();
        let fast = |times: f64| self.per_second * 2_f64.powf(second * times);
        let next = match self.limit {
            // With a hair's room: what is written down and read again may differ in the last digit.
            Some(limit) if self.per_second < limit * FAST_UNTIL * (1.0 - 1e-9) => {
                fast(1.0).min(limit * FAST_UNTIL)
            }
            Some(limit) if self.per_second < limit * FORGET_ABOVE => {
                let since =
                    self.cut_at.map(|cut_at| self.tick_at.saturating_duration_since(cut_at));
                let eager = since.unwrap_or_default().div_duration_f64(PATIENCE).max(1.0);
                // After a night as well it is tried out how much more it may be.
                fast(1.0).min(self.per_second + (limit * SLOWLY).max(LEAST) * eager * second)
            }
            Some(_) | None => {
                self.limit = None;
                // Where it was known once, it may not be far from here.
                fast(if self.cut_at.is_some() { 1.0 } else { LEARNS })
            }
        };
        self.set(next);
    }

    pub(super) fn set(&mut self, per_second: f64) {
        let most = self.ceiling.unwrap_or(MOST).min(MOST);
        self.per_second = per_second.clamp(LEAST.min(most), most);
    }
}

fn total(counts: &[u32]) -> f64 {
    counts.iter().map(|count| f64::from(*count)).sum()
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    const MILLI: Duration = Duration::from_millis(1);

    /// How a server counts calls.
    #[derive(Debug, Clone, Copy)]
    enum Counts {
        /// In each second of its clock.
        Seconds,
        /// In any second.
        AnySecond,
        /// By tokens that come evenly, so many of which may be saved up.
        Tokens(f64),
    }

    /// A server that says "slow down" above a limit.
    struct Server {
        counts: Counts,
        taken: VecDeque<Duration>,
        tokens: f64,
        at: Duration,
    }

    impl Server {
        fn new(counts: Counts) -> Self {
            let tokens = if let Counts::Tokens(most) = counts { most } else { 0.0 };
            Self { counts, taken: VecDeque::new(), tokens, at: Duration::ZERO }
        }

        fn count(&self) -> f64 {
            f64::from(u32::try_from(self.taken.len()).unwrap())
        }

        fn takes(&mut self, now: Duration, limit: f64) -> bool {
            let taken = match self.counts {
                Counts::Seconds => {
                    self.taken.retain(|at| at.as_secs() == now.as_secs());
                    self.count() < limit
                }
                Counts::AnySecond => {
                    self.taken.retain(|at| *at + Duration::from_secs(1) > now);
                    self.count() < limit
                }
                Counts::Tokens(most) => {
                    self.tokens += now.saturating_sub(self.at).as_secs_f64() * limit;
                    self.tokens = self.tokens.min(most);
                    self.at = now;
                    let taken = self.tokens >= 1.0;
                    self.tokens -= f64::from(u8::from(taken));
                    taken
                }
            };
            if taken {
                self.taken.push_back(now);
            }
            taken
        }
    }

    /// What came of a run.
    #[derive(Debug)]
    struct Ran {
        taken: f64,
        refused: f64,
        /// The rate at the end of each second.
        rates: Vec<f64>,
    }

    /// Calls whenever the rate allows it, against a server with that limit at each second.
    fn run(counts: Counts, way: Duration, seconds: u64, limit: impl Fn(u64) -> f64) -> Ran {
        let start = Instant::now();
        let mut rate = Rate::new(None, start);
        let mut server = Server::new(counts);
        let mut next = start;
        let mut answers: VecDeque<(Instant, Instant, bool)> = VecDeque::new();
        let mut ran = Ran { taken: 0.0, refused: 0.0, rates: Vec::new() };
        let mut refused = Vec::new();
        for step in 0..seconds * 1000 {
            let now = start + MILLI * u32::try_from(step).unwrap();
            while answers.front().is_some_and(|(at, ..)| *at <= now) {
                let (_, asked, taken) = answers.pop_front().unwrap();
                if taken {
                    rate.taken(asked, now);
                } else {
                    rate.slow_down(asked, now);
                }
            }
            while next <= now {
                let taken = server.takes(now - start, limit(step / 1000));
                refused.push(!taken);
                ran.taken += f64::from(u8::from(taken));
                ran.refused += f64::from(u8::from(!taken));
                answers.push_back((now + way, now, taken));
                next += rate.interval();
            }
            rate.press(now);
            if step % 1000 == 999 {
                ran.rates.push(rate.per_second());
            }
        }
        ran
    }

    /// See tests/scenarios/rate/README.md.
    #[derive(Debug, serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Scenario {
        servers: Vec<String>,
        ways_ms: Vec<u32>,
        seconds: u64,
        limits: Vec<(u64, f64)>,
        used: f64,
        refused: f64,
        bands: Vec<(usize, usize, f64, f64)>,
    }

    impl Scenario {
        fn limit(&self, second: u64) -> f64 {
            let since = self.limits.iter().rev().find(|(from, _)| *from <= second);
            since.unwrap().1
        }

        fn run(&self, name: &str, server: &str, way: u32) {
            let counts = match server.split_once(' ').unwrap_or((server, "")) {
                ("tokens", saved) => Counts::Tokens(saved.parse().unwrap()),
                ("seconds", "") => Counts::Seconds,
                ("any_second", "") => Counts::AnySecond,
                _ => panic!("{name}: a server cannot count by {server:?}"),
            };
            let ran = run(counts, MILLI * way, self.seconds, |second| self.limit(second));
            let taken: f64 = (0..self.seconds).map(|second| self.limit(second)).sum();
            let (used, refused) = (ran.taken / taken, ran.refused / ran.taken);
            let what = format!("{name}, {server}, {way} ms");
            assert!(used >= self.used, "{what}: {used:.3} used: {:?}", ran.rates);
            assert!(refused <= self.refused, "{what}: {refused:.4} refused: {:?}", ran.rates);
            for (from, to, least, most) in &self.bands {
                for second in *from..*to {
                    let rate = ran.rates[second];
                    let fits = (*least..=*most).contains(&rate);
                    assert!(fits, "{what}: {rate} in second {second}: {:?}", ran.rates);
                }
            }
        }
    }

    #[test]
    fn it_keeps_to_the_bands_of_every_scenario() {
        let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/scenarios/rate");
        let mut scenarios = 0;
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_none_or(|extension| extension != "toml") {
                continue;
            }
            let name = path.file_stem().unwrap().to_string_lossy().into_owned();
            let text = std::fs::read_to_string(&path).unwrap();
            let scenario: Scenario = toml::from_str(&text).unwrap();
            for server in &scenario.servers {
                for way in &scenario.ways_ms {
                    scenario.run(&name, server, *way);
                }
            }
            scenarios += 1;
        }
        assert!(scenarios >= 6, "only {scenarios} scenarios");
    }

    #[test]
    fn after_an_outage_it_is_soon_where_it_was() {
        let start = Instant::now();
        let mut rate = Rate::new(None, start);
        let mut now = start;
        // Fast enough for a while, then refused for a minute.
        for _ in 0..20_000 {
            now += MILLI;
            rate.press(now);
            if now < start + Duration::from_secs(5) {
                rate.taken(now, now);
            }
        }
        for _ in 0..600 {
            now += MILLI * 100;
            rate.slow_down(now, now);
        }
        assert!(rate.per_second() <= 2.0, "{}", rate.per_second());
        rate.restart(now);
        assert!((50.0..100.0).contains(&rate.per_second()), "{}", rate.per_second());
        for _ in 0..8_000 {
            now += MILLI;
            rate.press(now);
            rate.taken(now, now);
        }
        assert!(rate.per_second() >= 500.0, "{}", rate.per_second());
    }

    #[test]
    fn after_a_quiet_night_it_does_not_leap() {
        let start = Instant::now();
        let mut rate = Rate::new(None, start);
        for millis in 0..100 {
            rate.press(start + MILLI * millis);
            rate.taken(start + MILLI * millis, start + MILLI * millis);
        }
        for _ in 0..10 {
            rate.slow_down(start + MILLI * 100, start + MILLI * 100);
        }
        let mut now = start + Duration::from_secs(8 * 3_600);
        rate.taken(now, now);
        let before = rate.per_second();
        for _ in 0..100 {
            now += MILLI * 10;
            rate.press(now);
            rate.taken(now, now);
        }
        let after = rate.per_second();
        assert!(after > before && after <= before * 2.1, "{before} became {after} in a second");
    }

    #[test]
    fn it_says_what_holds_it() {
        let start = Instant::now();
        let mut rate = Rate::new(None, start);
        assert_eq!(rate.held(start), Held::Demand);
        rate.press(start);
        assert_eq!(rate.held(start), Held::Unknown);
        let cut = start + MILLI * 10;
        rate.slow_down(start, cut);
        let later = cut + Duration::from_secs(2);
        rate.press(later);
        assert!(matches!(rate.held(later), Held::Limit { ago, .. } if ago.as_secs() == 2));
        let mut known = Rate::new(Some(10.0), start);
        known.press(start);
        assert_eq!(known.held(start), Held::Ceiling);
    }

    #[test]
    fn a_few_refusals_of_many_calls_cut_nothing_and_more_do() {
        let start = Instant::now();
        let flowing = || {
            let (mut rate, mut now) = (Rate::new(None, start), start);
            for _ in 0..300 {
                now += MILLI * 3;
                rate.press(now);
                rate.taken(now, now);
            }
            (rate, now)
        };
        let (mut rate, now) = flowing();
        let before = rate.per_second();
        for _ in 0..3 {
            rate.slow_down(now, now);
        }
        assert_eq!(rate.per_second().to_bits(), before.to_bits(), "one in a hundred is noise");
        rate.slow_down(now, now);
        assert!(rate.per_second() < before, "more is not");

        let mut few = Rate::new(None, start);
        few.taken(start, start);
        few.slow_down(start, start);
        assert!(few.per_second() < START, "of few calls each one says something");
    }

    #[test]
    fn of_those_who_share_it_the_first_alone_begins_slowly_after_an_outage() {
        let start = Instant::now();
        let mut rate = Rate::new(Some(500.0), start);
        let back = start + Duration::from_secs(60);
        let mut seen = Seen::default();
        seen.restart();
        seen.take(back, back, false);
        rate.see(&seen, back);
        let slow = rate.per_second();
        assert!(slow <= 50.0, "{slow}");
        rate.see(&seen, back + MILLI * 400);
        assert!(rate.per_second() >= slow, "the second one finds it taking calls");
        rate.see(&seen, back + Duration::from_secs(60));
        assert!(rate.per_second() <= 50.0, "another outage is another one");
    }

    #[test]
    fn what_was_taken_since_ends_the_silence_though_it_is_told_together() {
        let start = Instant::now();
        let mut rate = Rate::new(None, start);
        let mut seen = Seen::default();
        seen.refuse(start, start + MILLI * 10);
        rate.see(&seen, start + MILLI * 20);
        assert!(rate.is_refused());
        let mut seen = Seen::default();
        seen.refuse(start + MILLI * 30, start + MILLI * 40);
        seen.take(start + MILLI * 50, start + MILLI * 60, true);
        rate.see(&seen, start + MILLI * 70);
        assert!(!rate.is_refused());
        let mut seen = Seen::default();
        seen.refuse(start + MILLI * 100, start + MILLI * 110);
        seen.take(start + MILLI * 90, start + MILLI * 120, true);
        rate.see(&seen, start + MILLI * 130);
        assert!(rate.is_refused(), "what was taken was asked before");
    }

    proptest! {
        #[test]
        fn one_who_tells_everything_at_once_learns_as_one_who_is_alone(
            ceiling in proptest::option::of(1.0..1e4),
            steps in proptest::collection::vec((0_u8..5, 0_u32..400, 0_u32..300), 1..300),
        ) {
            let start = Instant::now() + Duration::from_secs(1);
            let (mut alone, mut shared) = (Rate::new(ceiling, start), Rate::new(ceiling, start));
            let mut now = start;
            for (step, millis, took) in steps {
                now += MILLI * millis;
                let asked = now.checked_sub(MILLI * took).unwrap();
                let mut seen = Seen::default();
                match step {
                    0 => { alone.press(now); seen.press(); }
                    1 | 2 => { alone.taken(asked, now); seen.take(asked, now, false); }
                    3 => { alone.slow_down(asked, now); seen.refuse(asked, now); }
                    _ => { alone.overloaded(asked, now); seen.overload(asked, now); }
                }
                shared.see(&seen, now);
                prop_assert_eq!(alone.keep(now), shared.keep(now));
            }
        }

        #[test]
        fn it_stays_in_bounds_and_grows_only_where_calls_wait(
            ceiling in proptest::option::of(0.001..1e6),
            steps in proptest::collection::vec((0_u8..5, 0_u32..3_000), 1..200),
        ) {
            let start = Instant::now();
            let mut rate = Rate::new(ceiling, start);
            let (mut now, mut pressed) = (start, false);
            for (step, millis) in steps {
                let before = rate.per_second();
                now += MILLI * millis;
                match step {
                    0 => { rate.press(now); pressed = true; }
                    1 => rate.taken(now, now),
                    2 => {
                        rate.slow_down(now, now);
                        prop_assert!(rate.per_second() <= before * 4.0);
                    }
                    3 => rate.restart(now),
                    _ => {}
                }
                if !pressed {
                    prop_assert!(rate.per_second() <= before, "nobody waited");
                }
                let most = ceiling.unwrap_or(f64::MAX);
                prop_assert!(rate.per_second() <= most);
                prop_assert!(rate.per_second() >= LEAST.min(most));
                prop_assert!(rate.interval() > Duration::ZERO);
            }
        }
    }
}
