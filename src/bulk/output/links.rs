//! Links in outputs, read one after another.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};

use super::OutputError;
use crate::bulk::layout::{EarlierLink, Layout, next_line};

/// Links that rows were given before.
#[derive(Debug)]
pub struct EarlierLinks {
    layout: Layout,
    files: std::vec::IntoIter<PathBuf>,
    lines: Option<(PathBuf, csv::Reader<File>, u64)>,
    /// Lines of the first file that are passed over.
    passed: u64,
}

impl EarlierLinks {
    /// Those of some files, without the first lines of the first one.
    pub(super) fn of(layout: Layout, files: Vec<PathBuf>, passed: u64) -> Self {
        Self { layout, files: files.into_iter(), lines: None, passed }
    }

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

impl Iterator for EarlierLinks {
    type Item = Result<EarlierLink, OutputError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.next_link().transpose()
    }
}

/// Begins to read a part; one whose first line was cut off is as good as none.
pub(super) fn read_part(
    layout: &Layout,
    part: &Path,
) -> Result<Option<csv::Reader<File>>, OutputError> {
    match read(layout, part) {
        Err(OutputError::Foreign(_)) if layout.begins_like(part) => Ok(None),
        other => other,
    }
}

/// Begins to read an output, if it is there; an empty file is none.
pub(super) fn read(layout: &Layout, path: &Path) -> Result<Option<csv::Reader<File>>, OutputError> {
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
pub(super) fn whole_lines(path: &Path) -> io::Result<u64> {
    let mut file = File::open(path)?;
    let before_last = file.seek(SeekFrom::End(-1))?;
    let mut last = [0];
    file.read_exact(&mut last)?;
    Ok(before_last + u64::from(last == *b"\n"))
}
