//! The file that `--verify` is to be written over: no link in it may be lost, or be made a second time.

use std::cell::RefCell;
use std::fs::File;
use std::io::{BufWriter, ErrorKind, Read as _, Seek as _, SeekFrom};
use std::path::Path;

use anyhow::{Context as _, anyhow};

use super::Arguments;
use crate::bulk::columns::RESULT;
use crate::bulk::given::GivenLinks;
use crate::bulk::input::InputError;
use crate::bulk::inside::Inside;
use crate::bulk::layout::{EarlierLink, REQUEST_ID};
use crate::bulk::output::{before_of, new_of, part_of, put_in_place};
use crate::bulk::stems::LastRenewals;
use crate::bulk::table::Writer;
use crate::bulk::verify::{Line, Link, Links, LinksError, stem};
use crate::cli::Failure;
use crate::config::check::Resolved;
use crate::job::{Status, printable};

/// Its links, and those of an interrupted look, but for those that were written again.
pub(super) struct WrittenOver<'a> {
    out: &'a Path,
    arguments: &'a Arguments,
    settings: &'a Resolved,
    not_written: RefCell<GivenLinks>,
    /// What the ids begin with of lines that were written with a link that can be paid or was.
    usable: RefCell<GivenLinks>,
    renewals: LastRenewals,
}

impl<'a> WrittenOver<'a> {
    /// Reads the file, if it is there; it must be a file of links as well, and whoever reads it holds its part: nobody
    /// else is to write it.
    pub(super) fn read(
        out: &'a Path,
        arguments: &'a Arguments,
        settings: &'a Resolved,
    ) -> Result<Self, Failure> {
        let (not_written, usable) = (RefCell::default(), RefCell::default());
        let renewals = LastRenewals::default();
        let mut over = Self { out, arguments, settings, not_written, usable, renewals };
        for file in [out.to_owned(), before_of(out)] {
            over.note_all(&file, false)?;
        }
        Ok(over)
    }

    fn note_all(&mut self, file: &Path, torn: bool) -> Result<(), Failure> {
        for link in self.links(file, torn)?.into_iter().flatten() {
            let EarlierLink { request_id, checkout_id } =
                link.with_context(|| file.display().to_string())?;
            self.not_written.get_mut().note(&request_id, &checkout_id);
            self.renewals.note(&request_id);
        }
        Ok(())
    }

    /// Keeps the links that an interrupted look has left in the part, which is about to be cut off: it may have made
    /// some of them. The looks after this one are to know them, too.
    pub(super) fn keep_part(&mut self) -> Result<(), Failure> {
        let part = part_of(self.out);
        let Some(links) = self.links(&part, true)? else { return Ok(()) };
        let before = before_of(self.out);
        let new = new_of(&before);
        let earlier = self.links(&before, false)?;
        let write = || -> anyhow::Result<()> {
            // What else may be there is nobody's: it is this one's own name.
            drop(std::fs::remove_file(&new));
            let file = File::create_new(&new)?;
            let mut table = Writer::new(BufWriter::new(&file));
            table.line(&[&[REQUEST_ID], &RESULT[..]].concat())?;
            for link in earlier.into_iter().flatten().chain(links) {
                let EarlierLink { request_id, checkout_id } = link?;
                let status = Status::Succeeded.as_str();
                table.line(&[&request_id, status, &checkout_id, "", "", ""])?;
            }
            table.finish()?;
            Ok(put_in_place(&file, &new, &before)?)
        };
        write().with_context(|| {
            format!("{} cannot be kept as {}", part.display(), before.display())
        })?;
        self.note_all(&before, false)
    }

    /// Takes away what was kept: the output is in its place, and has all of it.
    pub(super) fn forget_kept(&self) {
        let before = before_of(self.out);
        for kept in [new_of(&before), before] {
            drop(std::fs::remove_file(kept));
        }
    }

    /// The links of a file, if it is there; of one that may be torn, those of its whole lines.
    fn links(
        &self,
        file: &Path,
        torn: bool,
    ) -> Result<Option<impl Iterator<Item = Result<EarlierLink, LinksError>> + use<>>, Failure>
    {
        let shown = || file.display().to_string();
        // Asked before it is opened: a pipe would wait for somebody at its other end.
        match std::fs::metadata(file) {
            Ok(about) if about.is_file() && about.len() > 0 => {}
            // What is no file at all is refused where the output is begun.
            Ok(_) => return Ok(None),
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Failure::Failed(anyhow!(error).context(shown()))),
        }
        let whole = if torn { last_line_break(file).with_context(shown)? } else { Some(u64::MAX) };
        let Some(whole) = whole else { return Ok(None) };
        let source = File::open(file).with_context(shown)?.take(whole);
        let Ok(mut links) = Links::open(source, self.arguments.wishes(self.settings)) else {
            return Err(Failure::Failed(anyhow!(
                "{} is there and is no file of links: give another --out, or remove it",
                file.display()
            )));
        };
        let rows = std::iter::from_fn(move || match links.next_line() {
            // It was cut off within a cell.
            Err(LinksError::Input(InputError::OpenQuote(_))) if torn => None,
            line => line.transpose(),
        });
        Ok(Some(rows.filter_map(|line| line.map(|line| link_of(&line)).transpose())))
    }

    /// A line is written, with what was learned of its link.
    pub(super) fn note_written(&self, line: &Line, learned: Option<&Link>) {
        // Only those are asked for that would be lost.
        let id = line.request_id();
        if learned.is_some_and(Link::is_usable) && !self.not_written.borrow().is_empty() {
            self.usable.borrow_mut().note(stem(&id), "");
        }
        if let Some(EarlierLink { request_id, checkout_id }) = link_of(line) {
            self.not_written.borrow_mut().forget(&request_id, &checkout_id);
        }
    }

    /// The number of the last renewal that it has of that id.
    pub(super) fn last_renewal(&self, request_id: &str) -> Option<u32> {
        self.renewals.number(request_id)
    }

    /// Whether it has a link for that id.
    pub(super) fn has(&self, request_id: &str) -> bool {
        self.not_written.borrow().has(request_id)
    }

    /// Whether that is its link for that id.
    pub(super) fn is_of(&self, request_id: &str, checkout_id: &str) -> bool {
        self.not_written.borrow().is_of(request_id, checkout_id)
    }

    /// Refuses to lose a link that was not written again and that the ledger has not made. A mere look also loses
    /// none that the ledger knows: its line may be what an earlier one has renewed.
    pub(super) async fn check(&self, inside: &Inside, part: &Path) -> Result<(), Failure> {
        if self.not_written.borrow().is_empty() {
            return Ok(());
        }
        for file in [self.out.to_owned(), before_of(self.out)] {
            for link in self.links(&file, false)?.into_iter().flatten() {
                let EarlierLink { request_id, checkout_id } =
                    link.with_context(|| file.display().to_string())?;
                if !self.is_of(&request_id, &checkout_id) {
                    continue;
                }
                // A dead one may go whose row has another link now.
                let known = inside.has_made(&request_id, &checkout_id).await?;
                if self.arguments.refresh && known && self.usable.borrow().has(stem(&request_id)) {
                    continue;
                }
                let advice = if known {
                    "give the flags of the run that made it, or another --out"
                } else {
                    "give the ledger that made it (LEDGER_URL), as another --out knows nothing of it, or remove the file if nobody was given its links"
                };
                return Err(Failure::Failed(anyhow!(
                    "{} has a link for {} ({}) that this look at {} has not found again{}: it would be lost; look at that file, {advice}. {} has what was learned",
                    file.display(),
                    printable(&request_id, 128),
                    printable(&checkout_id, 128),
                    self.arguments.file.display(),
                    if known { "" } else { " and that the ledger has not made" },
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

/// How many bytes there are up to the last end of a line, if there is one.
fn last_line_break(path: &Path) -> std::io::Result<Option<u64>> {
    const BLOCK: u64 = 64 * 1024;
    let mut file = File::open(path)?;
    let mut end = file.metadata()?.len();
    while end > 0 {
        let begin = end.saturating_sub(BLOCK);
        let mut block = Vec::new();
        file.seek(SeekFrom::Start(begin))?;
        (&file).take(end - begin).read_to_end(&mut block)?;
        if let Some(at) = block.iter().rposition(|byte| *byte == b'\n') {
            return Ok(Some(begin + at as u64 + 1));
        }
        end = begin;
    }
    Ok(None)
}
