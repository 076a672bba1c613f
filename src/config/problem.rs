//! What is wrong with a configuration.

use std::fmt;

/// Something that is wrong, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    pub(super) what: String,
    pub(super) fix: String,
}

impl Problem {
    /// A problem and its fix.
    #[must_use]
    pub fn new(what: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { what: what.into(), fix: fix.into() }
    }

    /// Whether that is what is wrong.
    #[must_use]
    pub fn is(&self, what: &str) -> bool {
        self.what == what
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.what, self.fix)
    }
}
