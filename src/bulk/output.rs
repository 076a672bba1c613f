//! The file of links: the input's own columns and what came of each row, in the order of the input.
//!
//! It grows beside its name, with `.part` behind it, and takes its place when it is whole. A run that was
//! interrupted finds it there and goes on behind its last whole row.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, BufWriter, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};

use csv::ByteRecord;

use super::input::Row;
use super::layout::{EarlierLink, Layout, Outcome, next_line};
use super::source::Format;
use super::table::BOM;
use crate::job::printable;

/// Why there is no output. Each says what to do.
#[derive(Debug, thiserror::Error)]
pub enum OutputError {
    /// The file system says no.
    #[error("{0} cannot be read or written: {1}")]
    Io(PathBuf, io::Error),
    /// It is something else.
    #[error(
        "{0} is there and is no output for this input (its first line differs): give another --out, or remove it"
    )]
    Foreign(PathBuf),
    /// A device, a pipe or a directory.
    #[error("{0} is no regular file: remove it, or give the name of a file as --out")]
    NoFile(PathBuf),
    /// Somebody writes it.
    #[error("{0} is being written by another run: wait for it, or give another --out")]
    InUse(PathBuf),
    /// Its rows may be of another product, or of a sandbox.
    #[error(
        "{0} was begun by another command (another key, ledger, or other flags): finish that one, or remove the file and its .run"
    )]
    AnotherRun(PathBuf),
    /// The same rows under other ids: each would get a second link.
    #[error(
        "{0} has links under other ids: its first row is {1}, and would be {2} now. Give the same --request-id-prefix, or another --out"
    )]
    OtherIds(PathBuf, String, String),
}

/// An output that is being written.
#[derive(Debug)]
pub struct Output {
    layout: Layout,
    writer: csv::Writer<BufWriter<File>>,
    part: PathBuf,
    path: PathBuf,
}

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
    linked: Vec<PathBuf>,
}

/// Links that rows were given before.
#[derive(Debug)]
pub struct Links {
    layout: Layout,
    files: std::vec::IntoIter<PathBuf>,
    lines: Option<(PathBuf, csv::Reader<File>, u64)>,
    /// Lines of the first file that are passed over.
    passed: u64,
}

impl Links {
    fn next_link(&mut self) -> Result<Option<EarlierLink>, OutputError> {
        loop {
            if let Some((path, lines, whole)) = &mut self.lines {
                let link = self.layout.next_link(lines, *whole);
                if let Some(link) = link.map_err(|error| OutputError::Io(path.clone(), error))? {
                    return Ok(Some(link));
                }
            }
            let Some(path) = self.files.next() else { return Ok(None) };
            let Some(mut lines) = read(&self.layout, &path)? else { continue };
            for _ in 0..std::mem::take(&mut self.passed) {
                next_line(&mut lines);
            }
            let whole = whole_lines(&path).map_err(|error| OutputError::Io(path.clone(), error))?;
            self.lines = Some((path, lines, whole));
        }
    }
}

impl Iterator for Links {
    type Item = Result<EarlierLink, OutputError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.next_link().transpose()
    }
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
        // Something else is not written over.
        let mut linked: Vec<PathBuf> =
            read(&layout, path)?.into_iter().map(|_| path.to_owned()).collect();
        let before = before_of(path);
        if read(&layout, &before)?.is_some() {
            linked.push(before);
        }
        let part = match read(&layout, &part_path) {
            // One whose first line was cut off is as good as none.
            Err(OutputError::Foreign(_)) if layout.begins_like(&part_path) => None,
            other => other?,
        };
        let part = match part {
            None => None,
            Some(_) if std::fs::read_to_string(run_of(path)).ok().as_ref() != Some(&run) => {
                return Err(OutputError::AnotherRun(part_path));
            }
            // Its lines do not show what their rows were: the ledger is asked for each again.
            Some(_) if layout.format == Format::Ndjson => {
                linked.push(part_path);
                None
            }
            Some(reader) => {
                let whole =
                    whole_lines(&part_path).map_err(|error| OutputError::Io(part_path, error))?;
                let good = layout.end_of_line(&reader);
                // Its first line, too, counts only if it ends.
                (good <= whole).then_some(Part { reader, good, lines: 0, whole, holds: true })
            }
        };
        Ok(Self { layout, part, run, path: path.to_owned(), linked })
    }

    /// The links that rows were given before which are asked for again: whoever makes the same links again knows
    /// each of them.
    #[must_use]
    pub fn links(&self) -> Links {
        let files = self.linked.clone().into_iter();
        Links { layout: self.layout.clone(), files, lines: None, passed: 0 }
    }

    /// The links in an interrupted run's lines that are not gone on behind: their rows, too, are asked for again.
    #[must_use]
    pub fn cut_off(&self) -> Links {
        let files: Vec<PathBuf> = self.part.iter().map(|_| part_of(&self.path)).collect();
        let passed = self.part.as_ref().map_or(0, |part| part.lines);
        Links { layout: self.layout.clone(), files: files.into_iter(), lines: None, passed }
    }

    /// Whether a run was interrupted.
    #[must_use]
    pub fn was_interrupted(&self) -> bool {
        self.part.is_some()
    }

    /// What came of a row, if the interrupted run has written it; asked for each row, from the first on.
    pub fn next(&mut self, row: &Row) -> Option<Outcome> {
        if let Some(part) = &mut self.part
            && part.holds
        {
            if let Some(line) = next_line(&mut part.reader)
                && let Some(outcome) = self.layout.outcome_in(&line, row)
            {
                let end = self.layout.end_of_line(&part.reader);
                // However whole a line looks that does not end.
                if end <= part.whole {
                    part.good = end;
                    part.lines += 1;
                    return Some(outcome);
                }
            }
            part.holds = false;
        }
        None
    }

    /// Refuses an input whose first row is that of the output, under another id.
    ///
    /// # Errors
    /// See [`OutputError`].
    pub fn same_ids(&self, first: &Row) -> Result<(), OutputError> {
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
        for ours in [&part, &run, &before] {
            nothing_else_is_there(ours)?;
        }
        let mut options = OpenOptions::new();
        let mut file = options.write(true).create(true).truncate(false).open(&part).map_err(io)?;
        // Held as long as it is written.
        lock(&file, &part)?;
        let good = self.part.as_ref().map_or(0, |part| part.good);
        if file.metadata().map_err(io)?.len() < good {
            // Another run has brought it to its end since it was looked at.
            return Err(OutputError::InUse(part));
        }
        self.keep_links(&part, &before)?;
        std::fs::write(&run, &self.run).map_err(|error| OutputError::Io(run, error))?;
        file.set_len(good).map_err(io)?;
        file.seek(SeekFrom::End(0)).map_err(io)?;
        if good == 0 && self.layout.bom_len() > 0 {
            file.write_all(BOM).map_err(io)?;
        }
        let mut writer = self.layout.writer(BufWriter::new(file));
        if good == 0 {
            let written = writer.write_byte_record(&self.layout.header);
            written.map_err(|error| io(io::Error::other(error)))?;
        }
        Ok(Output { layout: self.layout.clone(), writer, part, path: self.path.clone() })
    }
}

impl Earlier {
    /// Keeps the lines with links that are cut off, until the output is whole: the run after this one, too, must know
    /// which rows have links.
    fn keep_links(&self, part: &Path, before: &Path) -> Result<(), OutputError> {
        let io = |error| OutputError::Io(before.to_owned(), error);
        let lines = match read(&self.layout, part) {
            // Its first line was cut off: there is none behind it.
            Err(OutputError::Foreign(_)) if self.layout.begins_like(part) => None,
            lines => lines?,
        };
        let Some(mut lines) = lines else { return Ok(()) };
        let unread = |error: io::Error| OutputError::Io(part.to_owned(), error);
        let whole = whole_lines(part).map_err(unread)?;
        let good = self.part.as_ref().map_or(0, |part| part.good);
        let mut kept: Option<csv::Writer<BufWriter<File>>> = None;
        let mut line = ByteRecord::new();
        // Whatever cannot be read is not cut off.
        while lines.read_byte_record(&mut line).map_err(|error| unread(error.into()))? {
            let end = self.layout.end_of_line(&lines);
            if end <= good || end > whole || !self.layout.has_link(&line) {
                continue;
            }
            let writer = match &mut kept {
                Some(writer) => writer,
                None => kept.insert(self.append(before).map_err(io)?),
            };
            writer.write_byte_record(&line).map_err(|error| io(io::Error::other(error)))?;
        }
        let Some(mut writer) = kept else { return Ok(()) };
        writer.flush().map_err(io)?;
        writer.get_ref().get_ref().sync_all().map_err(io)
    }

    fn append(&self, path: &Path) -> io::Result<csv::Writer<BufWriter<File>>> {
        let mut file = OpenOptions::new().append(true).create(true).open(path)?;
        let new = file.metadata()?.len() == 0;
        if new && self.layout.bom_len() > 0 {
            file.write_all(BOM)?;
        }
        let mut writer = self.layout.writer(BufWriter::new(file));
        if new {
            writer.write_byte_record(&self.layout.header).map_err(io::Error::other)?;
        }
        Ok(writer)
    }
}

/// Begins to read an output, if it is there; an empty file is none.
fn read(layout: &Layout, path: &Path) -> Result<Option<csv::Reader<File>>, OutputError> {
    let io = |error| OutputError::Io(path.to_owned(), error);
    // Asked before it is opened: a pipe would wait for somebody at its other end.
    match std::fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io(error)),
        Ok(about) if !about.is_file() => return Err(OutputError::NoFile(path.to_owned())),
        Ok(about) if about.len() == 0 => return Ok(None),
        Ok(_) => {}
    }
    let file = File::open(path).map_err(io)?;
    let reader = layout.reader(file).map_err(io)?;
    reader.map(Some).ok_or_else(|| OutputError::Foreign(path.to_owned()))
}

/// How long a file is, but for a last byte that ends no line.
fn whole_lines(path: &Path) -> io::Result<u64> {
    let mut file = File::open(path)?;
    let before_last = file.seek(SeekFrom::End(-1))?;
    let mut last = [0];
    file.read_exact(&mut last)?;
    Ok(before_last + u64::from(last == *b"\n"))
}

impl Output {
    /// Writes a row's line.
    ///
    /// # Errors
    /// See [`OutputError`].
    pub fn write(&mut self, row: &Row, outcome: &Outcome) -> Result<(), OutputError> {
        let written = self.writer.write_byte_record(&self.layout.line(row, outcome));
        written.map_err(|error| OutputError::Io(self.part.clone(), io::Error::other(error)))
    }

    /// Hands what is written to the operating system: a process that is killed loses none of it.
    ///
    /// # Errors
    /// See [`OutputError`].
    pub fn flush(&mut self) -> Result<(), OutputError> {
        self.writer.flush().map_err(|error| OutputError::Io(self.part.clone(), error))
    }

    /// Puts the whole output in its place, for good.
    ///
    /// # Errors
    /// See [`OutputError`].
    pub fn finish(mut self) -> Result<(), OutputError> {
        self.flush()?;
        let io = |error| OutputError::Io(self.path.clone(), error);
        put_in_place(self.writer.get_ref().get_ref(), &self.part, &self.path).map_err(io)?;
        // Without a part they say nothing.
        drop(std::fs::remove_file(run_of(&self.path)));
        drop(std::fs::remove_file(before_of(&self.path)));
        Ok(())
    }
}

/// Gives a file that is written its name, so that a crash leaves it or what had that name before, whole.
///
/// # Errors
/// What the file system says.
pub fn put_in_place(file: &File, part: &Path, path: &Path) -> io::Result<()> {
    file.sync_all()?;
    std::fs::rename(part, path)?;
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    File::open(directory.unwrap_or_else(|| Path::new(".")))
        .and_then(|directory| directory.sync_all())
}

/// Begins an output anew, for whoever goes on with none: locked as long as it is written.
///
/// # Errors
/// See [`OutputError`]; a run that was interrupted is not written over.
pub fn begin_anew(path: &Path) -> Result<File, OutputError> {
    let part = part_of(path);
    // What tells of a part that is in its place by now tells nothing.
    if run_of(path).exists() && part.exists() {
        return Err(OutputError::AnotherRun(part));
    }
    if std::fs::metadata(path).is_ok_and(|about| !about.is_file()) {
        return Err(OutputError::NoFile(path.to_owned()));
    }
    nothing_else_is_there(&part)?;
    let io = |error| OutputError::Io(part.clone(), error);
    let mut options = OpenOptions::new();
    let file = options.write(true).create(true).truncate(false).open(&part).map_err(io)?;
    lock(&file, &part)?;
    file.set_len(0).map_err(io)?;
    Ok(file)
}

/// What is written beside an output follows no link and waits for no pipe.
fn nothing_else_is_there(path: &Path) -> Result<(), OutputError> {
    match std::fs::symlink_metadata(path) {
        Ok(about) if !about.is_file() => Err(OutputError::NoFile(path.to_owned())),
        Ok(_) | Err(_) => Ok(()),
    }
}

fn lock(file: &File, part: &Path) -> Result<(), OutputError> {
    match file.try_lock() {
        Ok(()) => Ok(()),
        Err(TryLockError::WouldBlock) => Err(OutputError::InUse(part.to_owned())),
        Err(TryLockError::Error(error)) => Err(OutputError::Io(part.to_owned(), error)),
    }
}

/// What the part that grows beside an output is made with.
#[must_use]
pub fn run_of(path: &Path) -> PathBuf {
    let mut name = part_of(path).into_os_string();
    name.push(".run");
    name.into()
}

/// Where lines with links are kept that were cut off from the part, until the output is whole.
#[must_use]
pub fn before_of(path: &Path) -> PathBuf {
    let mut name = part_of(path).into_os_string();
    name.push(".before");
    name.into()
}

/// Where an output grows.
#[must_use]
pub fn part_of(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".part");
    name.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bulk::columns::Defaults;
    use crate::bulk::input::{Input, Wishes};
    use crate::job::Status;

    const TABLE: &str = "product_id,Notes\nprod_1,=1+1\nprod_2,-5\nprod_3,plain\n";

    fn rows(text: &str) -> (Layout, Vec<Row>) {
        let defaults = Defaults { request_id_prefix: Some("c-".into()), ..Defaults::default() };
        let wishes = Wishes { defaults, ..Wishes::default() };
        let mut input = Input::open(io::Cursor::new(text.to_owned()), wishes).unwrap();
        let layout = Layout::new(input.format(), input.names(), input.shows_ids());
        (layout, std::iter::from_fn(|| input.next_row().unwrap()).map(|(row, _)| row).collect())
    }

    fn link(number: u64) -> Outcome {
        Outcome {
            status: Status::Succeeded,
            checkout_id: Some(format!("ch_{number}")),
            checkout_url: Some(format!("https://pay.example/{number}")),
            error_code: None,
            error_message: None,
        }
    }

    fn failure(message: &str) -> Outcome {
        Outcome {
            status: Status::Failed,
            checkout_id: None,
            checkout_url: None,
            error_code: Some("code".to_owned()),
            error_message: Some(message.to_owned()),
        }
    }

    fn look(path: &Path, layout: Layout) -> Result<Earlier, OutputError> {
        Earlier::look(path, layout, "this run".to_owned())
    }

    fn known(path: &Path, layout: &Layout, rows: &[Row]) -> (Earlier, Vec<Option<Status>>) {
        let mut earlier = look(path, layout.clone()).unwrap();
        let known = rows.iter().map(|row| earlier.next(row).map(|made| made.status)).collect();
        (earlier, known)
    }

    #[test]
    fn lines_carry_the_inputs_cells_and_no_formula() {
        let directory = tempfile::TempDir::new().unwrap();
        let path = directory.path().join("links.csv");
        for (text, begins, end) in [
            (TABLE.to_owned(), "", "\n"),
            (format!("\u{feff}{}", TABLE.replace('\n', "\r\n")), "\u{feff}", "\r\n"),
        ] {
            let (layout, rows) = rows(&text);
            let mut output = look(&path, layout).unwrap().go_on().unwrap();
            output.write(&rows[0], &link(1)).unwrap();
            output.write(&rows[1], &failure("=cmd, \"quoted\"")).unwrap();
            output.finish().unwrap();
            let expected = [
                "product_id,Notes,status,checkout_id,checkout_url,error_code,error_message,request_id",
                "prod_1,'=1+1,succeeded,ch_1,https://pay.example/1,,,c-1",
                "prod_2,-5,failed,,,code,\"'=cmd, \"\"quoted\"\"\",c-2",
                "",
            ];
            let written = std::fs::read_to_string(&path).unwrap();
            assert_eq!(written, format!("{begins}{}", expected.join(end)));
            assert!(!part_of(&path).exists());
            std::fs::remove_file(&path).unwrap();
        }
    }

    #[test]
    fn wherever_a_run_is_cut_off_the_next_one_goes_on_behind_its_last_whole_line() {
        for text in [TABLE.to_owned(), format!("\u{feff}{}", TABLE.replace('\n', "\r\n"))] {
            let directory = tempfile::TempDir::new().unwrap();
            let path = directory.path().join("links.csv");
            let (layout, rows) = rows(&text);
            let mut output = look(&path, layout.clone()).unwrap().go_on().unwrap();
            let outcomes = [link(1), failure("no"), link(3)];
            for (row, outcome) in rows.iter().zip(&outcomes) {
                output.write(row, outcome).unwrap();
            }
            output.flush().unwrap();
            drop(output);
            let whole = std::fs::read(part_of(&path)).unwrap();
            for cut in 0..=whole.len() {
                std::fs::write(part_of(&path), &whole[..cut]).unwrap();
                let (earlier, known) = known(&path, &layout, &rows);
                assert_eq!(earlier.cut_off().count(), 0, "cut at {cut}");
                let lines = String::from_utf8_lossy(&whole[..cut]).matches('\n').count();
                let unread = look(&path, layout.clone()).unwrap();
                let cut_off = unread.cut_off().map(|link| link.unwrap());
                let cut_off: Vec<_> =
                    cut_off.map(|link| (link.request_id, link.checkout_id)).collect();
                let given = [("c-1", "ch_1"), ("c-3", "ch_3")];
                // The first line is the header, and the second row has no link.
                let expected = &given[..lines.min(4) / 2];
                assert!(
                    cut_off
                        .iter()
                        .map(|(id, session)| (id.as_str(), session.as_str()))
                        .eq(expected.iter().copied()),
                    "cut at {cut}: {cut_off:?}"
                );
                let written = known.iter().take_while(|known| known.is_some()).count();
                assert_eq!(written, lines.saturating_sub(1), "cut at {cut}");
                let mut output = earlier.go_on().unwrap();
                for (row, outcome) in rows.iter().zip(&outcomes).skip(written) {
                    output.write(row, outcome).unwrap();
                }
                output.flush().unwrap();
                assert_eq!(std::fs::read(part_of(&path)).unwrap(), whole, "cut at {cut}");
            }
        }
    }

    #[test]
    fn nothing_is_written_through_a_link() {
        let directory = tempfile::TempDir::new().unwrap();
        let (path, victim) = (directory.path().join("links.csv"), directory.path().join("victim"));
        for beside in [part_of(&path), run_of(&path), before_of(&path)] {
            // It leads to nothing yet: whoever followed it would make the file.
            std::os::unix::fs::symlink(&victim, &beside).unwrap();
            let (layout, _) = rows(TABLE);
            let refused = look(&path, layout).unwrap().go_on();
            assert!(matches!(refused, Err(OutputError::NoFile(_))), "{refused:?}");
            assert!(!victim.exists(), "{}", beside.display());
            std::fs::remove_file(&beside).unwrap();
        }
    }

    #[test]
    fn a_part_that_somebody_writes_is_left_alone() {
        let directory = tempfile::TempDir::new().unwrap();
        let path = directory.path().join("links.csv");
        let (layout, _) = rows(TABLE);
        let written = look(&path, layout.clone()).unwrap().go_on().unwrap();
        let second = look(&path, layout.clone()).unwrap().go_on();
        assert!(matches!(second, Err(OutputError::InUse(_))), "{second:?}");
        drop(written);
        assert!(look(&path, layout).unwrap().go_on().is_ok());
    }

    #[test]
    fn an_input_that_has_changed_is_done_again_from_there_and_another_run_is_not_gone_on_with() {
        let directory = tempfile::TempDir::new().unwrap();
        let path = directory.path().join("links.csv");
        let (layout, first) = rows(TABLE);
        let mut output = look(&path, layout.clone()).unwrap().go_on().unwrap();
        for (row, outcome) in first.iter().zip([link(1), failure("no"), link(3)]) {
            output.write(row, &outcome).unwrap();
        }
        output.flush().unwrap();
        let changed = rows(&TABLE.replace("-5", "6")).1;
        let (_, of_part) = known(&path, &layout, &changed);
        assert_eq!(of_part, [Some(Status::Succeeded), None, None]);
        let other = Earlier::look(&path, layout.clone(), "other flags".to_owned());
        assert!(matches!(other, Err(OutputError::AnotherRun(_))), "{other:?}");
        output.finish().unwrap();
        let (_, of_whole) = known(&path, &layout, &changed);
        assert_eq!(of_whole, [None, None, None], "the ledger knows");
    }

    #[test]
    fn what_is_no_output_for_the_input_is_left_alone() {
        let directory = tempfile::TempDir::new().unwrap();
        let path = directory.path().join("links.csv");
        let (layout, _) = rows(TABLE);
        for place in [path.clone(), part_of(&path)] {
            std::fs::write(&place, "product_id,Notes\nprod_1,mine\n").unwrap();
            let refused = look(&path, layout.clone());
            assert!(matches!(refused, Err(OutputError::Foreign(_))), "{refused:?}");
            std::fs::remove_file(&place).unwrap();
        }
        std::fs::write(&path, "").unwrap();
        assert!(look(&path, layout).is_ok(), "nothing is in it");
    }
}
