//! Links that an output had before a run: none of them may be lost.

use super::given::GivenLinks;
use super::input::Row;
use super::layout::{EarlierLink, Outcome};
use super::output::{Earlier, EarlierLinks, OutputError};

/// The links that no row of this run was given again yet.
#[derive(Debug)]
pub(super) struct Had {
    links: GivenLinks,
}

impl Had {
    /// Takes note of the links of an output, if somebody may have been given them.
    ///
    /// # Errors
    /// See [`OutputError`].
    pub(super) fn read(earlier: &Earlier) -> Result<Self, OutputError> {
        Ok(Self { links: GivenLinks::read(earlier.guarded_links())? })
    }

    /// Takes note of further ones.
    ///
    /// # Errors
    /// See [`OutputError`].
    pub(super) fn note_all(&mut self, links: EarlierLinks) -> Result<(), OutputError> {
        for link in links {
            let EarlierLink { request_id, checkout_id } = link?;
            self.links.note(&request_id, &checkout_id);
        }
        Ok(())
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
