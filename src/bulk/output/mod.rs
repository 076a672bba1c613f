//! The file of links: the input's own columns and what came of each row, in the order of the input.
//!
//! It grows beside its name, with `.part` behind it, and takes its place when it is whole. A run that was
//! interrupted finds it there and goes on behind its last whole row.

mod earlier;
mod files;
mod links;

use std::fs::File;
use std::io::{self, BufWriter};
use std::path::PathBuf;

use super::input::Row;
use super::layout::{Layout, Outcome};
pub use earlier::Earlier;
pub use files::{before_of, begin_anew, new_of, part_of, put_in_place, remove_empty, run_of};
pub use links::EarlierLinks;

/// Why there is no output. Each says what to do.
#[derive(Debug, thiserror::Error)]
pub enum OutputError {
    /// The file system says no.
    #[error("{0} cannot be read or written: {1}")]
    Io(PathBuf, io::Error),
    /// It is something else.
    #[error(
        "{0} is there and is no output for this input (its first line differs): give another --out, or remove it. Rows without a request_id of their own get new links where a column was added, filled or renamed"
    )]
    Foreign(PathBuf),
    /// A device, a pipe, a directory or a link.
    #[error(
        "{0} is no regular file of its own (but a link, a pipe or a directory, or has another name as well): remove it, or give the name of a file as --out"
    )]
    NoFile(PathBuf),
    /// Somebody writes it.
    #[error("{0} is being written by another run: wait for it, or give another --out")]
    InUse(PathBuf),
    /// Another run was at it.
    #[error("{0} has changed since this run looked at it: the same command looks again")]
    Changed(PathBuf),
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
        let (run, before) = (run_of(&self.path), before_of(&self.path));
        for ours in [new_of(&run), run, new_of(&before), before] {
            drop(std::fs::remove_file(ours));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

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
        let known =
            rows.iter().map(|row| earlier.outcome_of(row).map(|made| made.status)).collect();
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
                "prod_1,'=1+1,succeeded,ch_1,https://pay.example/1,,,c-d3c4099c853adcf7",
                "prod_2,-5,failed,,,code,\"'=cmd, \"\"quoted\"\"\",c-2505cd732a9b8bef",
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
            // All cells of a line are there that lacks no more than the second character of its end.
            let first_of_end = if text.contains('\r') { '\r' } else { '\n' };
            for cut in 0..=whole.len() {
                std::fs::write(part_of(&path), &whole[..cut]).unwrap();
                let (earlier, known) = known(&path, &layout, &rows);
                let lines = String::from_utf8_lossy(&whole[..cut]).matches('\n').count();
                let unread = look(&path, layout.clone()).unwrap();
                let cut_off = unread.cut_off().map(|link| link.unwrap());
                let cut_off: Vec<_> =
                    cut_off.map(|link| (link.request_id, link.checkout_id)).collect();
                let id = |at: usize| rows[at].request_id.as_deref().unwrap();
                let given = [(id(0), "ch_1"), (id(2), "ch_3")];
                // The first line is the header, and the second row has no link.
                let ended = String::from_utf8_lossy(&whole[..cut]).matches(first_of_end).count();
                let expected = &given[..ended.min(4) / 2];
                assert!(
                    cut_off
                        .iter()
                        .map(|(id, session)| (id.as_str(), session.as_str()))
                        .eq(expected.iter().copied()),
                    "cut at {cut}: {cut_off:?}"
                );
                let written = known.iter().take_while(|known| known.is_some()).count();
                assert_eq!(written, lines.saturating_sub(1), "cut at {cut}");
                let not_written =
                    [0, 2].iter().filter(|row| (written..ended.max(1) - 1).contains(row));
                assert_eq!(earlier.cut_off().count(), not_written.count(), "cut at {cut}");
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
    fn what_another_run_has_written_since_it_was_looked_at_is_not_written_over() {
        let directory = tempfile::TempDir::new().unwrap();
        let path = directory.path().join("links.csv");
        let (layout, rows) = rows(TABLE);
        let late = look(&path, layout.clone()).unwrap();
        let mut output = look(&path, layout.clone()).unwrap().go_on().unwrap();
        output.write(&rows[0], &link(1)).unwrap();
        drop(output);
        let refused = late.go_on();
        assert!(matches!(&refused, Err(OutputError::Changed(file)) if *file == part_of(&path)));
        let late = look(&path, layout.clone()).unwrap();
        look(&path, layout.clone()).unwrap().go_on().unwrap().finish().unwrap();
        let refused = late.go_on();
        assert!(matches!(&refused, Err(OutputError::Changed(file)) if *file == path));
        assert!(look(&path, layout).unwrap().go_on().is_ok());
    }

    #[test]
    fn a_line_that_ends_otherwise_is_asked_for_again() {
        let directory = tempfile::TempDir::new().unwrap();
        let path = directory.path().join("links.csv");
        let (layout, rows) = rows(&TABLE.replace('\n', "\r\n"));
        let mut output = look(&path, layout.clone()).unwrap().go_on().unwrap();
        for (row, outcome) in rows.iter().zip([link(1), link(2), link(3)]) {
            output.write(row, &outcome).unwrap();
        }
        drop(output);
        let whole = std::fs::read_to_string(part_of(&path)).unwrap();
        let second = whole.find("prod_3").unwrap();
        let torn = [&whole[..second - 2], "\n", &whole[second..]].concat();
        std::fs::write(part_of(&path), torn).unwrap();
        let (earlier, known) = known(&path, &layout, &rows);
        assert_eq!(known, [Some(Status::Succeeded), None, None]);
        assert_eq!(earlier.cut_off().count(), 2);
        let mut output = earlier.go_on().unwrap();
        for (row, outcome) in rows.iter().zip([link(1), link(2), link(3)]).skip(1) {
            output.write(row, &outcome).unwrap();
        }
        drop(output);
        assert_eq!(std::fs::read_to_string(part_of(&path)).unwrap(), whole);
    }

    #[test]
    fn what_a_part_is_made_with_is_not_written_again() {
        use std::os::unix::fs::MetadataExt as _;
        let directory = tempfile::TempDir::new().unwrap();
        let path = directory.path().join("links.csv");
        let (layout, _) = rows(TABLE);
        let inode = || std::fs::metadata(run_of(&path)).unwrap().ino();
        // Of one that an earlier run has not finished, nothing is left.
        std::fs::write(new_of(&run_of(&path)), "half").unwrap();
        drop(look(&path, layout.clone()).unwrap().go_on().unwrap());
        let first = inode();
        let again = look(&path, layout).unwrap().go_on().unwrap();
        assert_eq!(inode(), first, "a full disk would leave it empty");
        again.finish().unwrap();
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
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
