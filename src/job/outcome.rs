//! Every ending a caller can be told of.

use std::fmt;

/// The word a reply begins with. A closed set; consumers must tolerate new ones all the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Status {
    /// `checkout_url` is there.
    Succeeded,
    /// The job itself is wrong; Creem was not asked.
    Invalid,
    /// This `request_id` has, or may have, a link for another body.
    Conflict,
    /// Creem refused it for good and no session exists.
    Rejected,
    /// The deadline passed first; nothing was handed out.
    Expired,
    /// Attempts or time ran out and certainly no session exists.
    Failed,
    /// A session may exist that nobody was given, and no URL could be had.
    Unresolved,
    /// Its campaign was cancelled.
    Cancelled,
}

impl Status {
    /// Every status.
    pub const ALL: [Self; 8] = [
        Self::Succeeded,
        Self::Invalid,
        Self::Conflict,
        Self::Rejected,
        Self::Expired,
        Self::Failed,
        Self::Unresolved,
        Self::Cancelled,
    ];

    /// The word in replies, metrics and the ledger.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Succeeded => "succeeded",
            Self::Invalid => "invalid",
            Self::Conflict => "conflict",
            Self::Rejected => "rejected",
            Self::Expired => "expired",
            Self::Failed => "failed",
            Self::Unresolved => "unresolved",
            Self::Cancelled => "cancelled",
        }
    }

    /// Reads the word.
    #[must_use]
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|status| status.as_str() == word)
    }

    /// What the caller does next; `park` is `creem.on_unknown = "park"`.
    #[must_use]
    pub const fn next(self, park: bool) -> &'static str {
        match self {
            Self::Succeeded => "redirect",
            Self::Invalid | Self::Rejected => "fix",
            Self::Conflict => "new_request_id",
            Self::Unresolved if park => "ask_operator",
            Self::Expired | Self::Failed | Self::Unresolved | Self::Cancelled => "resend",
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What went wrong, for a program (`code`) and for a person (the rest).
///
/// Nothing in here is taken from a job's personal data; texts of Creem's are redacted and cut
/// before they come here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Stable name of the rule or the cause.
    pub code: String,
    /// One sentence for a person.
    pub message: String,
    /// Further texts: Creem's messages, or the fields of a conflict.
    pub details: Vec<String>,
    /// HTTP status of Creem's answer, where there was one.
    pub http_status: Option<u16>,
    /// Creem's trace id, for its support.
    pub trace_id: Option<String>,
}

impl Problem {
    /// A problem that is only a code and a sentence.
    #[must_use]
    pub fn new(code: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            code: code.into(),
            message: message.into(),
            details: Vec::new(),
            http_status: None,
            trace_id: None,
        }
    }
}

/// How a job that was accepted ends. `invalid` and `conflict` are answers, not endings: they
/// are never stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ending {
    /// The link.
    Succeeded {
        /// Creem's id of the session.
        checkout_id: String,
        /// The link, already checked.
        checkout_url: String,
    },
    /// Refused for good.
    Rejected(Problem),
    /// Too late.
    Expired(Problem),
    /// Attempts or time ran out.
    Failed(Problem),
    /// Nobody knows.
    Unresolved(Problem),
    /// Not wanted any more.
    Cancelled(Problem),
}

impl Ending {
    /// The ending's word.
    #[must_use]
    pub const fn status(&self) -> Status {
        match self {
            Self::Succeeded { .. } => Status::Succeeded,
            Self::Rejected(_) => Status::Rejected,
            Self::Expired(_) => Status::Expired,
            Self::Failed(_) => Status::Failed,
            Self::Unresolved(_) => Status::Unresolved,
            Self::Cancelled(_) => Status::Cancelled,
        }
    }

    /// What went wrong, if anything did.
    #[must_use]
    pub const fn problem(&self) -> Option<&Problem> {
        match self {
            Self::Succeeded { .. } => None,
            Self::Rejected(problem)
            | Self::Expired(problem)
            | Self::Failed(problem)
            | Self::Unresolved(problem)
            | Self::Cancelled(problem) => Some(problem),
        }
    }

    /// Holds promise P3: "no session exists" is said only if no attempt was ambiguous.
    ///
    /// Every ending passes through here on its way into the ledger, so this is the one place
    /// that could break the promise.
    #[must_use]
    pub fn honest(self, ambiguous_attempts: u32) -> Self {
        if ambiguous_attempts == 0 {
            return self;
        }
        match self {
            Self::Rejected(problem)
            | Self::Expired(problem)
            | Self::Failed(problem)
            | Self::Cancelled(problem) => Self::Unresolved(problem),
            ending @ (Self::Succeeded { .. } | Self::Unresolved(_)) => ending,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_session_exists_is_never_said_after_an_ambiguous_attempt() {
        let problem = || Problem::new("code", "text");
        for ending in [
            Ending::Rejected(problem()),
            Ending::Expired(problem()),
            Ending::Failed(problem()),
            Ending::Cancelled(problem()),
        ] {
            assert_eq!(ending.clone().honest(0), ending);
            assert_eq!(ending.honest(1), Ending::Unresolved(problem()));
        }
    }

    #[test]
    fn words_read_back() {
        for status in Status::ALL {
            assert_eq!(Status::parse(status.as_str()), Some(status));
        }
    }
}
