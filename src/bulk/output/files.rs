//! The files beside an output, and who may write them.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use super::OutputError;

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
    let file = open_part(&part)?;
    file.set_len(0).map_err(|error| OutputError::Io(part, error))?;
    Ok(file)
}

/// Opens the part, or makes it; locked as long as it is open.
pub(super) fn open_part(part: &Path) -> Result<File, OutputError> {
    nothing_else_is_there(part)?;
    let opened = OpenOptions::new().write(true).create(true).truncate(false).open(part);
    let file = opened.map_err(|error| OutputError::Io(part.to_owned(), error))?;
    lock(&file, part)?;
    Ok(file)
}

/// What is written beside an output follows no link and waits for no pipe.
pub(super) fn nothing_else_is_there(path: &Path) -> Result<(), OutputError> {
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
