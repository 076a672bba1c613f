//! The file that `--verify` is to be written over: no link in it may be lost, or be made a second time.

use std::cell::RefCell;
use std::fs::File;
use std::path::Path;

use anyhow::{Context as _, anyhow};

use super::Arguments;
use crate::bulk::given::GivenLinks;
use crate::bulk::inside::Inside;
use crate::bulk::layout::EarlierLink;
use crate::bulk::verify::{Line, Links, LinksError};
use crate::cli::Failure;
use crate::config::check::Resolved;
use crate::job::{Key, RequestId, printable};

/// Its links, but for those that were written again.
pub(super) struct WrittenOver<'a> {
    out: &'a Path,
    arguments: &'a Arguments,
    settings: &'a Resolved,
    left: RefCell<GivenLinks>,
}

impl<'a> WrittenOver<'a> {
    /// Reads the file, if it is there; it must be a file of links as well.
    pub(super) fn read(
        out: &'a Path,
        arguments: &'a Arguments,
        settings: &'a Resolved,
    ) -> Result<Self, Failure> {
        let over = Self { out, arguments, settings, left: RefCell::default() };
        if let Some(links) = over.links()? {
            let given = GivenLinks::read(links).with_context(|| out.display().to_string())?;
            over.left.replace(given);
        }
        Ok(over)
    }

    fn links(
        &self,
    ) -> Result<Option<impl Iterator<Item = Result<EarlierLink, LinksError>> + use<>>, Failure>
    {
        let shown = || self.out.display().to_string();
        // Asked before it is opened: a pipe would wait for somebody at its other end.
        match std::fs::metadata(self.out) {
            Ok(about) if about.is_file() && about.len() > 0 => {}
            // What is no file at all is refused where the output is begun.
            Ok(_) => return Ok(None),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Failure::Failed(anyhow!(error).context(shown()))),
        }
        let file = File::open(self.out).with_context(shown)?;
        let Ok(mut links) = Links::open(file, self.arguments.wishes(self.settings)) else {
            return Err(Failure::Failed(anyhow!(
                "{} is there and is no file of links: give another --out, or remove it",
                self.out.display()
            )));
        };
        let rows = std::iter::from_fn(move || links.next_line().transpose());
        Ok(Some(rows.filter_map(|line| line.map(|line| link_of(&line)).transpose())))
    }

    /// A line is written.
    pub(super) fn wrote(&self, line: &Line) {
        if let Some(EarlierLink { request_id, checkout_id }) = link_of(line) {
            self.left.borrow_mut().forget(&request_id, &checkout_id);
        }
    }

    /// Whether it has a link for that id.
    pub(super) fn has(&self, request_id: &str) -> bool {
        self.left.borrow().has(request_id)
    }

    /// Whether that is its link for that id.
    pub(super) fn is_of(&self, request_id: &str, checkout_id: &str) -> bool {
        self.left.borrow().is_of(request_id, checkout_id)
    }

    /// Refuses to lose a link that was not written again and that the ledger has not made.
    pub(super) async fn check(&self, inside: &Inside, part: &Path) -> Result<(), Failure> {
        if self.left.borrow().is_empty() {
            return Ok(());
        }
        let Some(links) = self.links()? else { return Ok(()) };
        for link in links {
            let EarlierLink { request_id, checkout_id } =
                link.with_context(|| self.out.display().to_string())?;
            let left = self.left.borrow().is_of(&request_id, &checkout_id);
            if left && !is_known(inside, &request_id, &checkout_id).await? {
                return Err(Failure::Failed(anyhow!(
                    "{} has a link for {} ({}) that is not in {} and that the ledger has not made: it would be lost. Give another --out; {} has what was learned",
                    self.out.display(),
                    printable(&request_id, 128),
                    printable(&checkout_id, 128),
                    self.arguments.file.display(),
                    part.display()
                )));
            }
        }
        Ok(())
    }
}

fn link_of(line: &Line) -> Option<EarlierLink> {
    let checkout_id = line.checkout_id()?;
    Some(EarlierLink { request_id: line.request_id(), checkout_id })
}

async fn is_known(inside: &Inside, request_id: &str, checkout_id: &str) -> anyhow::Result<bool> {
    let Ok(request_id) = RequestId::parse(request_id) else { return Ok(false) };
    let key = Key { mode: inside.engine.mode, request_id };
    let known = inside.engine.journey.ledger.known(key).await?;
    Ok(known.is_some_and(|known| known.checkout_id.as_deref() == Some(checkout_id)))
}
