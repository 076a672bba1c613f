//! Links in outputs, read one after another.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};

use super::OutputError;
use crate::bulk::layout::{EarlierLink, Layout, next_line};

/// A file with links that rows were given before.
#[derive(Debug, Clone)]
pub(super) struct LinkedFile {
    pub(super) path: PathBuf,
    /// Whether it was being written: its last line may be torn.
    pub(super) grows: bool,
}

/// Links that rows were given before.
#[derive(Debug)]
pub struct EarlierLinks {
    layout: Layout,
    files: std::vec::IntoIter<LinkedFile>,
    lines: Option<(PathBuf, csv::Reader<File>, u64)>,
    /// Lines of the first file that are passed over.
    passed: u64,
}

impl EarlierLinks {
    /// Those of some files, without the first lines of the first one.
    pub(super) fn of(layout: Layout, files: Vec<LinkedFile>, passed: u64) -> Self {
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
            let Some(LinkedFile { path, grows }) = self.files.next() else { return Ok(None) };
            let Some(mut lines) = read(&self.layout, &path)? else { continue };
            for _ in 0..std::mem::take(&mut self.passed) {
                next_line(&mut lines);
            }
            // Where a spreadsheet has saved a whole one since, its last line may have no end.
            let whole = if grows { whole_lines(&path) } else { Ok(u64::MAX) };
            let whole = whole.map_err(|error| OutputError::Io(path.clone(), error))?;
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
    let length = std::fs::metadata(path)?.len();
    let ends = byte_before(path, length)?.is_some_and(|byte| matches!(byte, b'\n' | b'\r'));
    Ok(if ends { length } else { length.saturating_sub(1) })
}

/// The byte that comes before a place in a file.
pub(super) fn byte_before(path: &Path, at: u64) -> io::Result<Option<u8>> {
    let Some(at) = at.checked_sub(1) else { return Ok(None) };
    let mut file = File::open(path)?;
    file.seek(SeekFrom::Start(at))?;
    let mut byte = [0];
    Ok((file.read(&mut byte)? == 1).then_some(byte[0]))
}
