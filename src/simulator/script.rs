//! Scripted faults: by `request_id` with a count, or by weight from a seeded generator.

use std::time::Duration;

use serde::Deserialize;

/// What goes wrong. `…After` and everything below it happens after the session was made.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Kind {
    /// 429, with this `Retry-After` if given.
    Throttle {
        /// The header's text.
        #[serde(default)]
        retry_after: Option<String>,
    },
    /// An error status; no session.
    Status {
        /// Which.
        status: u16,
        /// What `Retry-After` says, if it is there.
        #[serde(default)]
        retry_after: Option<String>,
    },
    /// 400, saying that something with this identifier exists already; no session.
    Duplicate,
    /// Never an answer; no session.
    Hang,
    /// The connection closes without an answer; no session.
    Cut,
    /// An error status, although the session was made.
    StatusAfter {
        /// Which.
        status: u16,
    },
    /// Never an answer, although the session was made.
    HangAfter,
    /// The connection closes without an answer, although the session was made.
    CutAfter,
    /// Half of the answer, then the connection closes.
    CutBody,
    /// One byte at a time.
    Drip {
        /// Between two bytes.
        milliseconds: u64,
    },
    /// 200 with bytes that are no JSON.
    Garbage,
    /// 200 with a proxy's HTML.
    Html,
    /// 200 with 2 MiB.
    Huge,
    /// The answer names another `request_id`.
    WrongId,
    /// The answer names the other mode.
    WrongMode,
    /// The answer's link is plain http on another host.
    PlainUrl,
    /// The answer has no `checkout_url`; a GET for the session has.
    NoUrl {
        /// How many such GETs are answered 429 first.
        #[serde(default)]
        throttled_gets: usize,
    },
}

impl Kind {
    /// The name in scripts and logs.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Throttle { .. } => "throttle",
            Self::Status { .. } => "status",
            Self::Duplicate => "duplicate",
            Self::Hang => "hang",
            Self::Cut => "cut",
            Self::StatusAfter { .. } => "status_after",
            Self::HangAfter => "hang_after",
            Self::CutAfter => "cut_after",
            Self::CutBody => "cut_body",
            Self::Drip { .. } => "drip",
            Self::Garbage => "garbage",
            Self::Html => "html",
            Self::Huge => "huge",
            Self::WrongId => "wrong_id",
            Self::WrongMode => "wrong_mode",
            Self::PlainUrl => "plain_url",
            Self::NoUrl { .. } => "no_url",
        }
    }
}

/// One fault of a script.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Fault {
    /// What goes wrong.
    #[serde(flatten)]
    pub kind: Kind,
    /// For one job only.
    #[serde(default)]
    pub request_id: Option<String>,
    /// With `request_id`: how many of its calls; all, if absent.
    #[serde(default)]
    pub times: Option<u32>,
    /// Without `request_id`: the share of calls, 0 to 1.
    #[serde(default)]
    pub weight: f64,
}

/// What the simulator does to its callers.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Script {
    /// Before every answer, in milliseconds.
    #[serde(default)]
    pub latency_ms: u64,
    /// Of the weighted faults; the same seed and the same order of calls give the same faults.
    #[serde(default)]
    pub seed: u64,
    /// The faults; those of a `request_id` come before the weighted ones.
    #[serde(default)]
    pub faults: Vec<Fault>,
    /// Most POSTs that are taken in any second; the others are answered 429, without a `Retry-After`.
    #[serde(default)]
    pub limit_per_second: Option<usize>,
}

impl Default for Script {
    fn default() -> Self {
        Self { latency_ms: 0, seed: 1, faults: Vec::new(), limit_per_second: None }
    }
}

impl Script {
    /// Reads a script.
    ///
    /// # Errors
    /// A sentence that says what is wrong with it.
    pub fn parse(text: &[u8]) -> Result<Self, String> {
        let script: Self =
            serde_json::from_slice(text).map_err(|error| format!("not a fault script: {error}"))?;
        let weights: f64 = script.faults.iter().map(|fault| fault.weight).sum();
        if script.faults.iter().any(|fault| !(0.0..=1.0).contains(&fault.weight)) || weights > 1.0 {
            return Err(
                "the weights of a fault script are shares from 0 to 1 that add up to at most 1"
                    .to_owned(),
            );
        }
        if script.faults.iter().any(|fault| fault.request_id.is_none() && fault.weight == 0.0) {
            return Err("a fault needs a `request_id` or a `weight`".to_owned());
        }
        Ok(script)
    }

    /// A script of one fault for one job.
    #[must_use]
    pub fn for_job(request_id: &str, times: u32, kind: Kind) -> Self {
        let fault = Fault {
            kind,
            request_id: Some(request_id.to_owned()),
            times: Some(times),
            weight: 0.0,
        };
        Self { faults: vec![fault], ..Self::default() }
    }

    /// Draws for the next call.
    pub fn draw(&mut self, request_id: &str) -> (Duration, Option<Fault>) {
        let latency = Duration::from_millis(self.latency_ms);
        for fault in &mut self.faults {
            let left = fault.times.unwrap_or(u32::MAX);
            if left > 0 && fault.request_id.as_deref() == Some(request_id) {
                fault.times = fault.times.map(|times| times - 1);
                return (latency, Some(fault.clone()));
            }
        }
        let mut point = self.chance();
        for fault in self.faults.iter().filter(|fault| fault.request_id.is_none()) {
            if point < fault.weight {
                return (latency, Some(fault.clone()));
            }
            point -= fault.weight;
        }
        (latency, None)
    }

    /// What a call above the limit meets.
    #[must_use]
    pub fn throttle() -> Fault {
        let kind = Kind::Throttle { retry_after: None };
        Fault { kind, request_id: None, times: None, weight: 1.0 }
    }

    /// The next number in `0.0..1.0` of a splitmix64 sequence.
    fn chance(&mut self) -> f64 {
        self.seed = self.seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.seed;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let high = u32::try_from((mixed ^ (mixed >> 31)) >> 32).unwrap_or(0);
        f64::from(high) / (f64::from(u32::MAX) + 1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_jobs_own_fault_comes_as_often_as_it_says() {
        let mut script = Script::for_job("a", 2, Kind::Hang);
        let drawn: Vec<bool> = ["a", "b", "a", "a"].map(|id| script.draw(id).1.is_some()).to_vec();
        assert_eq!(drawn, [true, false, true, false]);
    }

    #[test]
    fn weights_are_shares_of_the_calls() {
        let mut script = Script::parse(br#"{"seed":3,"faults":[{"kind":"cut","weight":0.2},{"kind":"status","status":500,"weight":0.1}]}"#).unwrap();
        let drawn: Vec<_> = (0..10_000).filter_map(|_| script.draw("x").1).collect();
        let cuts = drawn.iter().filter(|fault| fault.kind == Kind::Cut).count();
        assert!((1800..2200).contains(&cuts), "{cuts}");
        assert!((2800..3200).contains(&drawn.len()), "{}", drawn.len());
    }

    #[test]
    fn mistakes_in_a_script_are_named() {
        for text in [
            "{",
            "{\"fault\":[]}",
            "{\"faults\":[{\"kind\":\"nap\"}]}",
            "{\"faults\":[{\"kind\":\"cut\"}]}",
            "{\"faults\":[{\"kind\":\"cut\",\"weight\":2}]}",
        ] {
            assert!(Script::parse(text.as_bytes()).is_err(), "{text}");
        }
    }
}
