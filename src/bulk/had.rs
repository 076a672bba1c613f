//! Links that an output had before a run: none of them may be lost, and none be given to another row.

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasher as _, RandomState};

use super::given::GivenLinks;
use super::input::Row;
use super::layout::{EarlierLink, Layout, Outcome};
use super::output::{Earlier, EarlierLinks, OutputError};

/// See the module's text.
#[derive(Debug)]
pub(super) struct Had {
    layout: Layout,
    /// Those that were not written again.
    links: GivenLinks,
    hasher: RandomState,
    /// Where ids are numbers of rows: a row's id by its cells (both as hashes), or none where several rows have the same
    /// cells, as nobody can tell then which of them was moved.
    rows: HashMap<u64, Option<u64>>,
    /// Hashes of the same pairs of id and cells.
    with_cells: HashSet<u64>,
    /// Whether ids are numbers of rows.
    numbered: bool,
}

impl Had {
    /// Takes note of the links of an output, if somebody may have been given them.
    ///
    /// # Errors
    /// See [`OutputError`].
    pub(super) fn read(earlier: &Earlier, numbered: bool) -> Result<Self, OutputError> {
        let mut had = Self {
            layout: earlier.layout().clone(),
            links: GivenLinks::default(),
            hasher: RandomState::new(),
            rows: HashMap::new(),
            with_cells: HashSet::new(),
            numbered,
        };
        had.note_all(earlier.guarded_links())?;
        Ok(had)
    }

    /// Takes note of further ones.
    ///
    /// # Errors
    /// See [`OutputError`].
    pub(super) fn note_all(&mut self, mut links: EarlierLinks) -> Result<(), OutputError> {
        while let Some((EarlierLink { request_id, checkout_id }, cells)) = links.next_line()? {
            let is_first = !self.links.has(&request_id);
            self.links.note(&request_id, &checkout_id);
            // What comes later may be of a run that was ended because of it.
            if self.numbered && is_first {
                let id = self.hasher.hash_one(&request_id);
                let cells = self.hasher.hash_one(cells);
                let only = self.rows.entry(cells).or_insert(Some(id));
                *only = only.filter(|only| *only == id);
                self.with_cells.insert(self.hasher.hash_one((id, cells)));
            }
        }
        Ok(())
    }

    /// Whether the row had another number when it was given its link.
    pub(super) fn is_moved(&self, row: &Row) -> bool {
        if self.rows.is_empty() {
            return false;
        }
        let cells = self.hasher.hash_one(self.layout.own_text(&self.layout.own_cells(row)));
        let id = row.request_id.as_ref().map(|id| self.hasher.hash_one(id));
        self.rows.get(&cells).copied().flatten().is_some_and(|was| Some(was) != id)
    }

    /// Whether the row had a link when it had other cells.
    pub(super) fn is_replaced(&self, row: &Row) -> bool {
        let Some(id) = row.request_id.as_ref().filter(|id| self.numbered && self.links.has(id))
        else {
            return false;
        };
        let cells = self.hasher.hash_one(self.layout.own_text(&self.layout.own_cells(row)));
        !self.with_cells.contains(&self.hasher.hash_one((self.hasher.hash_one(id), cells)))
    }

    /// A row is written again.
    pub(super) fn wrote(&mut self, row: &Row, outcome: &Outcome) {
        if let (Some(id), Some(session)) = (&row.request_id, &outcome.checkout_id) {
            self.links.forget(id, session);
        }
    }

    /// How many were not written again, and the first of them.
    ///
    /// # Errors
    /// See [`OutputError`].
    pub(super) fn left(
        &self,
        kept: EarlierLinks,
    ) -> Result<Option<(usize, EarlierLink)>, OutputError> {
        if self.links.is_empty() {
            return Ok(None);
        }
        for link in kept {
            let link = link?;
            if self.links.is_of(&link.request_id, &link.checkout_id) {
                return Ok(Some((self.links.len(), link)));
            }
        }
        Ok(None)
    }
}
