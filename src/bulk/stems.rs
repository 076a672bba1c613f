//! Which ids of a file follow from one another: the next id of one line may be the own id of another one.

use std::collections::HashMap;
use std::hash::{BuildHasher as _, RandomState};

use super::verify::{Links, LinksError, stem};

/// What the ids of a file begin with, as some sixteen bytes each.
#[derive(Debug, Default)]
pub struct Stems {
    hasher: RandomState,
    /// Whether more than one line has it.
    shared: HashMap<u64, bool>,
}

impl Stems {
    /// Reads all lines of a file.
    ///
    /// # Errors
    /// See [`LinksError`].
    pub fn read(links: &mut Links) -> Result<Self, LinksError> {
        let mut stems = Self::default();
        while let Some(line) = links.next_line()? {
            stems.note(&line.request_id());
        }
        Ok(stems)
    }

    fn note(&mut self, id: &str) {
        let hash = self.hasher.hash_one(stem(id));
        self.shared.entry(hash).and_modify(|shared| *shared = true).or_insert(false);
    }

    /// Whether another line of the file has an id of the same kind.
    #[must_use]
    pub fn is_shared(&self, id: &str) -> bool {
        self.shared.get(&self.hasher.hash_one(stem(id))) == Some(&true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_that_follow_from_one_another_are_of_one_kind() {
        let mut stems = Stems::default();
        for id in ["a", "b.r1", "b.r2", "c", "c.r1", "d.r", "d.rx"] {
            stems.note(id);
        }
        for (id, shared) in
            [("a", false), ("b.r1", true), ("b.r2", true), ("c", true), ("d.r", false)]
        {
            assert_eq!(stems.is_shared(id), shared, "{id}");
        }
    }
}
