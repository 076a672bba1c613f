//! The files beside an output, and who may write them.

use std::fs::{File, Metadata, OpenOptions, TryLockError};
use std::io::{self, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use super::OutputError;

/// Gives a file that is written its name, so that a crash leaves it or what had that name before, whole.
///
/// # Errors
/// What the file system says.
pub fn put_in_place(file: &File, part: &Path, path: &Path) -> io::Result<()> {
    file.sync_all()?;
    if !is_still(file, part)? {
        let text = format!(
            "{} was replaced while it was being written: close the program that saved it, and run the same command again",
            part.display()
        );
        return Err(io::Error::other(text));
    }
    std::fs::rename(part, path)?;
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    File::open(directory.unwrap_or_else(|| Path::new(".")))
        .and_then(|directory| directory.sync_all())
}

/// Opens the part of an output for whoever goes on with none: locked as long as it is open, and not cut off yet.
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
    let file = open_part(&part)?;
    match std::fs::remove_file(run_of(path)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(OutputError::Io(part, error)),
        Ok(()) | Err(_) => Ok(file),
    }
}

/// Opens the part, or makes it; locked as long as it is open.
pub(super) fn open_part(part: &Path) -> Result<File, OutputError> {
    nothing_else_is_there(part)?;
    let opened = OpenOptions::new().write(true).create(true).truncate(false).open(part);
    let file = opened.map_err(|error| OutputError::Io(part.to_owned(), error))?;
    lock(&file, part)?;
    // Whoever had it locked until now may have given it another name.
    match is_still(&file, part) {
        Ok(true) => Ok(file),
        Ok(false) => Err(OutputError::InUse(part.to_owned())),
        Err(error) => Err(OutputError::Io(part.to_owned(), error)),
    }
}

/// What tells whether a file is the one that was there before, as it was.
pub(super) type State = Option<(u64, u64, u64, i64, i64)>;

/// The state of a file; none if it is not there, which an empty one is as good as.
pub(super) fn state_of(path: &Path) -> State {
    let about = std::fs::metadata(path).ok().filter(|about| about.len() > 0)?;
    Some((about.dev(), about.ino(), about.len(), about.mtime(), about.mtime_nsec()))
}

/// Takes a part away in which nothing was written.
pub fn remove_empty(file: &File, part: &Path) {
    if file.metadata().is_ok_and(|about| about.len() == 0) {
        drop(std::fs::remove_file(part));
    }
}

/// Writes what a part is made with, so that a crash leaves all of it or what was there before.
pub(super) fn write_run(run: &Path, text: &str) -> io::Result<()> {
    if std::fs::read_to_string(run).is_ok_and(|known| known == text) {
        return Ok(());
    }
    let new = new_of(run);
    // What else may be there is nobody's: it is this one's own name.
    drop(std::fs::remove_file(&new));
    let mut file = File::create_new(&new)?;
    file.write_all(text.as_bytes())?;
    put_in_place(&file, &new, run)
}

/// Whether an open file has that name.
fn is_still(file: &File, path: &Path) -> io::Result<bool> {
    let which = |about: &Metadata| (about.dev(), about.ino());
    match std::fs::symlink_metadata(path) {
        Ok(about) => Ok(which(&about) == which(&file.metadata()?)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// A copy of a file, if it is there, to be written behind and put in its place.
pub(super) fn copied(path: &Path, new: &Path) -> io::Result<File> {
    match std::fs::copy(path, new) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => File::create(new),
        Err(error) => Err(error),
        Ok(_) => OpenOptions::new().write(true).open(new),
    }
}

/// What is written beside an output follows no link, waits for no pipe, and is no file of another name.
pub(super) fn nothing_else_is_there(path: &Path) -> Result<(), OutputError> {
    match std::fs::symlink_metadata(path) {
        Ok(about) if !about.is_file() || about.nlink() > 1 => {
            Err(OutputError::NoFile(path.to_owned()))
        }
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

/// Where what takes a file's place is written.
#[must_use]
pub fn new_of(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    name.into()
}

/// Where an output grows.
#[must_use]
pub fn part_of(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".part");
    name.into()
}
