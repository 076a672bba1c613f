//! A set of very many hashes.

use std::collections::HashSet;

/// Over how many sets they are spread. One set that grows holds its old and its new table at once, and the old one's
/// memory is not given back; of many, one three-hundredth is there twice.
const SETS: u64 = 300;

/// Hashes, at nine bytes or so each.
#[derive(Debug)]
pub(super) struct Hashes(Vec<HashSet<u64>>);

impl Default for Hashes {
    fn default() -> Self {
        Self((0..SETS).map(|_| HashSet::new()).collect())
    }
}

impl Hashes {
    /// Puts one in; whether it was not there yet.
    pub(super) fn insert(&mut self, hash: u64) -> bool {
        let set = usize::try_from(hash % SETS).unwrap_or_default();
        self.0[set].insert(hash)
    }
}
