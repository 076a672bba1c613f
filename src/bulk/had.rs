//! Links that an output had before a run: none of them may be lost.

use super::given::GivenLinks;
use super::input::Row;
use super::layout::{EarlierLink, Outcome};
use super::output::{Earlier, EarlierLinks, OutputError};

/// The links that no row of this run was given again yet.
#[derive(Debug)]
pub(super) struct Had {
    /// The output's, which stays as it is as long as there are any.
    links: GivenLinks,
    /// Those that interrupted runs have made for rows as they were then: they were never in a whole output, and the
    /// ledger keeps them.
    cut_off: GivenLinks,
}

impl Had {
    /// Takes note of the links of an output, if somebody may have been given them.
    ///
    /// # Errors
    /// See [`OutputError`].
    pub(super) fn read(earlier: &Earlier) -> Result<Self, OutputError> {
        let links = GivenLinks::read(earlier.guarded_links())?;
        Ok(Self { links, cut_off: GivenLinks::read(earlier.kept_links())? })
    }

    /// Takes note of lines that are cut off.
    ///
    /// # Errors
    /// See [`OutputError`].
    pub(super) fn note_cut_off(&mut self, links: EarlierLinks) -> Result<(), OutputError> {
        for link in links {
            let EarlierLink { request_id, checkout_id } = link?;
            self.cut_off.note(&request_id, &checkout_id);
        }
        Ok(())
    }

    /// A row is written again.
    pub(super) fn wrote(&mut self, row: &Row, outcome: &Outcome) {
        if let (Some(id), Some(session)) = (&row.request_id, &outcome.checkout_id) {
            self.links.forget(id, session);
            self.cut_off.forget(id, session);
        }
    }

    /// How many of the output's were not written again, and the first of them.
    ///
    /// # Errors
    /// See [`OutputError`].
    pub(super) fn left(&self, earlier: &Earlier) -> Result<Option<Left>, OutputError> {
        first_of(&self.links, earlier.guarded_links())
    }

    /// The same of those that were cut off, as long as they are kept.
    ///
    /// # Errors
    /// See [`OutputError`].
    pub(super) fn dropped(&self, earlier: &Earlier) -> Result<Option<Left>, OutputError> {
        first_of(&self.cut_off, earlier.kept_links())
    }
}

/// How many links, and the id of one of them.
pub(super) type Left = (usize, String);

fn first_of(links: &GivenLinks, all: EarlierLinks) -> Result<Option<Left>, OutputError> {
    if links.is_empty() {
        return Ok(None);
    }
    for link in all {
        let link = link?;
        if links.is_of(&link.request_id, &link.checkout_id) {
            return Ok(Some((links.len(), link.request_id)));
        }
    }
    Ok(None)
}
