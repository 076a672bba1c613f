//! Links that earlier runs have given to rows, as sixteen bytes each: which id has which session.

use std::collections::HashMap;
use std::hash::{BuildHasher as _, RandomState};

use super::layout::{EarlierLink, Outcome};
use crate::job::Status;

/// See the module's text.
#[derive(Debug, Default)]
pub struct GivenLinks {
    hasher: RandomState,
    sessions: HashMap<u64, u64>,
}

impl GivenLinks {
    /// Takes note of all of them.
    ///
    /// # Errors
    /// The first that there is.
    pub fn read<E>(links: impl Iterator<Item = Result<EarlierLink, E>>) -> Result<Self, E> {
        let mut given = Self::default();
        for link in links {
            let EarlierLink { request_id, checkout_id } = link?;
            given.note(&request_id, &checkout_id);
        }
        Ok(given)
    }

    /// Takes note of one.
    pub fn note(&mut self, request_id: &str, checkout_id: &str) {
        let session = self.hasher.hash_one(checkout_id);
        self.sessions.insert(self.hasher.hash_one(request_id), session);
    }

    /// Whether that id has a link.
    #[must_use]
    pub fn has(&self, request_id: &str) -> bool {
        self.sessions.contains_key(&self.hasher.hash_one(request_id))
    }

    /// Whether that session is the id's.
    #[must_use]
    pub fn is_of(&self, request_id: &str, checkout_id: &str) -> bool {
        let session = self.hasher.hash_one(checkout_id);
        self.sessions.get(&self.hasher.hash_one(request_id)) == Some(&session)
    }

    /// Whether that is the answer of a ledger that has the id's link: the same link, or a conflict, if the job is
    /// another one now.
    #[must_use]
    pub fn fits(&self, request_id: &str, outcome: &Outcome) -> bool {
        match outcome.status {
            Status::Succeeded => {
                outcome.checkout_id.as_ref().is_some_and(|id| self.is_of(request_id, id))
            }
            Status::Conflict => true,
            Status::Failed
            | Status::Rejected
            | Status::Invalid
            | Status::Expired
            | Status::Unresolved
            | Status::Cancelled => false,
        }
    }

    /// Forgets one, if that session is the id's.
    pub fn forget(&mut self, request_id: &str, checkout_id: &str) {
        if self.is_of(request_id, checkout_id) {
            self.sessions.remove(&self.hasher.hash_one(request_id));
        }
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.sessions.is_empty()
    }
}
