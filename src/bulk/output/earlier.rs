//! What interrupted runs have left, and how the next one goes on.

use std::fs::File;
use std::io::{self, BufWriter};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use csv::ByteRecord;

use super::files::{
    State, before_of, copied, new_of, nothing_else_is_there, open_part, part_of, put_in_place,
    run_of, state_of, write_run,
};
use super::links::{EarlierLinks, LinkedFile, byte_before, read, read_part, whole_lines};
use super::{Output, OutputError};
use crate::bulk::input::Row;
use crate::bulk::layout::{Layout, Outcome, next_line};
use crate::bulk::source::Format;
use crate::job::printable;

/// What earlier runs have left, row by row in the order of the input.
#[derive(Debug)]
pub struct Earlier {
    layout: Layout,
    /// Of the run that was interrupted.
    part: Option<Part>,
    /// What the run is made with: see [`Earlier::look`].
    run: String,
    path: PathBuf,
    /// Where the links are that rows were given before which are asked for again.
    linked: Vec<LinkedFile>,
    /// What was looked at, as it was then.
    looked_at: Vec<(PathBuf, State)>,
    /// Whether the links of this run lead nowhere, and those of the output itself.
    rehearses: bool,
    was_rehearsed: bool,
}

#[derive(Debug)]
struct Part {
    reader: csv::Reader<File>,
    /// Where its lines end that are whole and of rows of the input.
    good: u64,
    /// How many such lines there are.
    lines: u64,
    /// How many of its bytes are whole lines' at most.
    whole: u64,
    /// Whether each line so far was such a line.
    holds: bool,
}

impl Part {
    /// What came of a row, if the next line is whole and the row's.
    fn outcome_of(&mut self, row: &Row, layout: &Layout) -> Option<Outcome> {
        let line = next_line(&mut self.reader)?;
        let outcome = layout.outcome_in(&line, row)?;
        let end = layout.end_of_line(&self.reader);
        // However whole a line looks that does not end, or not as lines do that are written here.
        if end > self.whole || !self.ends_at(end, layout) {
            return None;
        }
        self.good = end;
        self.lines += 1;
        Some(outcome)
    }

    /// Whether a line ends before that byte; a reader takes either end of a line for one.
    fn ends_at(&self, end: u64, layout: &Layout) -> bool {
        let mut last = [0];
        !layout.format.is_crlf()
            || (self.reader.get_ref().read_exact_at(&mut last, end - 1).is_ok() && last == *b"\n")
    }
}

impl Earlier {
    /// Looks for what an interrupted run has left. `run` tells runs apart that would make other links of the
    /// same rows: only the same one is gone on with.
    ///
    /// What a whole run has left is not looked at: the ledger knows its links, and which of them are for which
    /// jobs. Nor is a part whose lines do not show what their rows were.
    ///
    /// # Errors
    /// See [`OutputError`].
    pub fn look(path: &Path, layout: Layout, run: String) -> Result<Self, OutputError> {
        let part_path = part_of(path);
        let looked_at = [path.to_owned(), before_of(path), part_path.clone()];
        let looked_at = looked_at.map(|file| (file.clone(), state_of(&file))).into();
        // Something else is not written over.
        let mut linked = Vec::new();
        for whole in [path.to_owned(), before_of(path)] {
            if read(&layout, &whole)?.is_some() {
                linked.push(LinkedFile { path: whole, grows: false });
            }
        }
        let part = match read_part(&layout, &part_path)? {
            None => None,
            Some(_) if std::fs::read_to_string(run_of(path)).ok().as_ref() != Some(&run) => {
                return Err(OutputError::AnotherRun(part_path));
            }
            Some(reader) => {
                let io = |error| OutputError::Io(part_path.clone(), error);
                let whole = whole_lines(&part_path).map_err(io)?;
                let good = layout.end_of_line(&reader);
                let ends = byte_before(&part_path, good).map_err(io)? == Some(b'\n');
                if layout.format == Format::Ndjson || (good <= whole && !ends) {
                    // Its lines do not show what their rows were, or end as they would not if they were written
                    // here: the ledger is asked for each again.
                    linked.push(LinkedFile { path: part_path, grows: true });
                    None
                } else {
                    // Its first line, too, counts only if it ends.
                    (good <= whole).then_some(Part { reader, good, lines: 0, whole, holds: true })
                }
            }
        };
        let (path, rehearses, was_rehearsed) = (path.to_owned(), false, false);
        Ok(Self { layout, part, run, path, linked, looked_at, rehearses, was_rehearsed })
    }

    /// The links that rows were given before which are asked for again: whoever makes the same links again knows
    /// each of them.
    #[must_use]
    pub fn links(&self) -> EarlierLinks {
        let was_rehearsed = |file: &LinkedFile| self.was_rehearsed && file.path == self.path;
        let linked = self.linked.iter().filter(|file| !was_rehearsed(file)).cloned().collect();
        EarlierLinks::of(self.layout.clone(), linked, 0)
    }

    /// The links of the output itself, and of no run that was interrupted.
    #[must_use]
    pub fn links_of_output(&self) -> EarlierLinks {
        let linked = self.linked.iter().filter(|file| file.path == self.path).cloned().collect();
        EarlierLinks::of(self.layout.clone(), linked, 0)
    }

    /// The output's links lead nowhere: nobody was given them. What an interrupted run has made since is another
    /// thing.
    pub fn let_output_go(&mut self) {
        self.was_rehearsed = true;
    }

    /// This run's links lead nowhere.
    pub fn rehearse(&mut self) {
        self.rehearses = true;
    }

    /// The output's links, which must not be lost.
    pub(in crate::bulk) fn guarded_links(&self) -> EarlierLinks {
        if self.rehearses || self.was_rehearsed {
            return EarlierLinks::of(self.layout.clone(), Vec::new(), 0);
        }
        self.links_of_output()
    }

    /// The links in lines that were cut off, as they are kept beside the part.
    pub(in crate::bulk) fn kept_links(&self) -> EarlierLinks {
        if self.rehearses {
            return EarlierLinks::of(self.layout.clone(), Vec::new(), 0);
        }
        let kept = vec![LinkedFile { path: before_of(&self.path), grows: false }];
        EarlierLinks::of(self.layout.clone(), kept, 0)
    }

    /// Whether nobody is given the links of this run.
    pub(in crate::bulk) const fn is_rehearsal(&self) -> bool {
        self.rehearses
    }

    /// The links in an interrupted run's lines that are not gone on behind: their rows, too, are asked for again.
    #[must_use]
    pub fn cut_off(&self) -> EarlierLinks {
        let part = |_| LinkedFile { path: part_of(&self.path), grows: true };
        let files = self.part.iter().map(part).collect();
        let passed = self.part.as_ref().map_or(0, |part| part.lines);
        EarlierLinks::of(self.layout.clone(), files, passed)
    }

    /// Whether a run was interrupted.
    #[must_use]
    pub fn was_interrupted(&self) -> bool {
        self.part.is_some()
    }

    /// What came of a row, if the interrupted run has written it; asked for each row, from the first on.
    pub fn outcome_of(&mut self, row: &Row) -> Option<Outcome> {
        let part = self.part.as_mut().filter(|part| part.holds)?;
        let outcome = part.outcome_of(row, &self.layout);
        part.holds = outcome.is_some();
        outcome
    }

    /// Refuses an input whose first row is that of the output, under another id.
    ///
    /// # Errors
    /// See [`OutputError`].
    pub fn refuse_other_ids(&self, first: &Row) -> Result<(), OutputError> {
        let other =
            match read(&self.layout, &self.path)?.and_then(|mut lines| next_line(&mut lines)) {
                Some(line) => self.layout.other_id(&line, first),
                None => None,
            };
        match other {
            Some(was) if self.links().next().is_some() => {
                let now = first.request_id.clone().unwrap_or_default();
                Err(OutputError::OtherIds(self.path.clone(), printable(&was, 128), now))
            }
            Some(_) | None => Ok(()),
        }
    }

    /// Begins to write behind the rows that the interrupted run has written.
    ///
    /// # Errors
    /// See [`OutputError`].
    pub fn go_on(&self) -> Result<Output, OutputError> {
        let part = part_of(&self.path);
        let io = |error| OutputError::Io(part.clone(), error);
        let run = run_of(&self.path);
        let before = before_of(&self.path);
        for ours in [&run, &before, &new_of(&before)] {
            nothing_else_is_there(ours)?;
        }
        let file = open_part(&part)?;
        // Another run may have been at it until it was locked: links that are not known would be written over.
        if let Some((file, _)) = self.looked_at.iter().find(|(file, was)| state_of(file) != *was) {
            return Err(OutputError::Changed(file.clone()));
        }
        let good = self.part.as_ref().map_or(0, |part| part.good);
        self.keep_links(&part, &before)?;
        write_run(&run, &self.run).map_err(|error| OutputError::Io(run, error))?;
        file.set_len(good).map_err(io)?;
        let writer = self.layout.append_to(file).map_err(io)?;
        Ok(Output { layout: self.layout.clone(), writer, part, path: self.path.clone() })
    }

    /// Keeps the lines with links that are cut off, until the output is whole: the run after this one, too, must know
    /// which rows have links.
    fn keep_links(&self, part: &Path, before: &Path) -> Result<(), OutputError> {
        let io = |error| OutputError::Io(before.to_owned(), error);
        let Some(mut lines) = read_part(&self.layout, part)? else { return Ok(()) };
        let unread = |error: io::Error| OutputError::Io(part.to_owned(), error);
        let whole = whole_lines(part).map_err(unread)?;
        let good = self.part.as_ref().map_or(0, |part| part.good);
        let mut kept: Option<csv::Writer<BufWriter<File>>> = None;
        let new = new_of(before);
        let mut line = ByteRecord::new();
        // Whatever cannot be read is not cut off.
        while lines.read_byte_record(&mut line).map_err(|error| unread(error.into()))? {
            let end = self.layout.end_of_cells(&lines);
            if end <= good || end > whole || self.layout.link_in(&line).is_none() {
                continue;
            }
            let writer = if let Some(writer) = &mut kept {
                writer
            } else {
                let file = copied(before, &new).map_err(io)?;
                kept.insert(self.layout.append_to(file).map_err(io)?)
            };
            writer.write_byte_record(&line).map_err(|error| io(io::Error::other(error)))?;
        }
        let Some(mut writer) = kept else { return Ok(()) };
        writer.flush().map_err(io)?;
        put_in_place(writer.get_ref().get_ref(), &new, before).map_err(io)
    }
}
