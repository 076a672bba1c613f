//! Links that earlier runs have given to rows, as sixteen bytes each: which id has which session.

use std::collections::{BTreeSet, HashMap};
use std::hash::{BuildHasher as _, RandomState};

use super::layout::{EarlierLink, Outcome};
use crate::job::Status;

/// Which `request_id` was given which session, at 16 bytes or so a link.
#[derive(Debug, Default)]
pub struct GivenLinks {
    hasher: RandomState,
    sessions: HashMap<u64, u64>,
    /// Further sessions of an id: somebody has put lines of two outputs together.
    further: BTreeSet<(u64, u64)>,
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
        let (id, session) = self.hashes(request_id, checkout_id);
        if *self.sessions.entry(id).or_insert(session) != session {
            self.further.insert((id, session));
        }
    }

    fn hashes(&self, request_id: &str, checkout_id: &str) -> (u64, u64) {
        (self.hasher.hash_one(request_id), self.hasher.hash_one(checkout_id))
    }

    /// Whether that id has a link.
    #[must_use]
    pub fn has(&self, request_id: &str) -> bool {
        let id = self.hasher.hash_one(request_id);
        self.sessions.contains_key(&id)
            || self.further.range((id, u64::MIN)..=(id, u64::MAX)).next().is_some()
    }

    /// Whether that session is the id's, or one of them.
    #[must_use]
    pub fn is_of(&self, request_id: &str, checkout_id: &str) -> bool {
        let (id, session) = self.hashes(request_id, checkout_id);
        self.sessions.get(&id) == Some(&session) || self.further.contains(&(id, session))
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
        let (id, session) = self.hashes(request_id, checkout_id);
        if !self.further.remove(&(id, session)) && self.sessions.get(&id) == Some(&session) {
            self.sessions.remove(&id);
        }
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.sessions.len() + self.further.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.sessions.is_empty() && self.further.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_session_of_an_id_is_remembered() {
        let mut given = GivenLinks::default();
        for session in ["ch_1", "ch_2", "ch_2"] {
            given.note("a", session);
        }
        given.note("b", "ch_3");
        given.forget("a", "ch_1");
        assert!(given.has("a") && !given.is_of("a", "ch_1") && given.is_of("a", "ch_2"));
        given.forget("b", "ch_2");
        given.forget("a", "ch_2");
        assert!(!given.has("a") && given.has("b"));
        given.forget("b", "ch_3");
        assert!(given.is_empty());
    }
}
