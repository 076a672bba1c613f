//! Which ids of a file follow from one another: the next id of one line may be the own id of another one.

use std::collections::HashMap;
use std::hash::{BuildHasher as _, RandomState};

use super::verify::{Links, LinksError, numbered, stem};

/// What the ids of a file begin with, as some sixteen bytes each.
#[derive(Debug, Default)]
pub struct Stems {
    hasher: RandomState,
    /// The one id that begins so; none where several do.
    ids: HashMap<u64, Option<u64>>,
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
        let stem = self.hasher.hash_one(stem(id));
        let id = self.hasher.hash_one(id);
        let only = self.ids.entry(stem).or_insert(Some(id));
        // Rows of one id share their link, and its successors.
        *only = only.filter(|only| *only == id);
    }

    /// Whether the file has another id of the same kind.
    #[must_use]
    pub fn is_shared(&self, id: &str) -> bool {
        self.ids.get(&self.hasher.hash_one(stem(id))) == Some(&None)
    }
}

/// The last of the renewals that links have, by what their ids begin with.
#[derive(Debug, Default)]
pub struct LastRenewals {
    hasher: RandomState,
    numbers: HashMap<u64, u32>,
}

impl LastRenewals {
    /// Takes note of the id of a link.
    pub fn note(&mut self, id: &str) {
        if let Some((stem, number)) = numbered(id) {
            let last = self.numbers.entry(self.hasher.hash_one(stem)).or_default();
            *last = number.max(*last);
        }
    }

    /// The number of the last one whose id begins like that one.
    #[must_use]
    pub fn number(&self, id: &str) -> Option<u32> {
        self.numbers.get(&self.hasher.hash_one(stem(id))).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_that_follow_from_one_another_are_of_one_kind() {
        let mut stems = Stems::default();
        for id in ["a", "b.r1", "b.r2", "b.r2", "c", "c.r1", "d.r", "d.rx", "e", "e"] {
            stems.note(id);
        }
        for (id, shared) in [
            ("a", false),
            ("b.r1", true),
            ("b.r2", true),
            ("c", true),
            ("d.r", false),
            ("e", false),
        ] {
            assert_eq!(stems.is_shared(id), shared, "{id}");
        }
    }

    #[test]
    fn the_last_renewal_is_that_with_the_highest_number() {
        let mut last = LastRenewals::default();
        for id in ["a.r2", "a.r10", "a.r9", "b", "c.r0"] {
            last.note(id);
        }
        let of = ["a", "a.r3", "b", "c"].map(|id| last.number(id));
        assert_eq!(of, [Some(10), Some(10), None, Some(0)]);
    }
}
