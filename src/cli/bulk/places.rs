//! The files of a run: none may be another one.

use std::path::{Path, PathBuf};

use super::Arguments;
use crate::bulk::output::{before_of, new_of, part_of, run_of};
use crate::cli::Failure;
use crate::config::check::Ledger;

/// Refuses a run that would write over its own input, ledger or log.
pub(super) fn check(
    arguments: &Arguments,
    out: &Path,
    ledger: Option<&Ledger>,
) -> Result<(), Failure> {
    let directory = out.parent().filter(|directory| !directory.as_os_str().is_empty());
    if let Some(directory) = directory.filter(|directory| !directory.is_dir()) {
        let text = format!("--out: there is no directory {}: make it first", directory.display());
        return Err(Failure::Usage(text));
    }
    // A link that is put in the output's place would leave its target as it was.
    if std::fs::symlink_metadata(out).is_ok_and(|about| about.is_symlink()) {
        let text = format!("--out: {} is a symbolic link: name the file itself", out.display());
        return Err(Failure::Usage(text));
    }
    let mut places = vec![
        ("--out", out.to_owned()),
        ("the output while it grows", part_of(out)),
        ("what the output is made with", run_of(out)),
        ("the links that were cut off", before_of(out)),
        ("what the output is made with, while it is written", new_of(&run_of(out))),
        ("the links that were cut off, while they are written", new_of(&before_of(out))),
        ("the output's successor", new_of(out)),
    ];
    if arguments.file.as_os_str() != "-" {
        places.push(("the input", arguments.file.clone()));
    }
    if let Some(Ledger::File(path)) = ledger {
        for (what, end) in [
            ("the ledger", ""),
            ("the ledger's log", "-wal"),
            ("the ledger's index of its log", "-shm"),
            ("the ledger's journal", "-journal"),
            ("the ledger's lock", ".lock"),
        ] {
            let mut path = path.clone().into_os_string();
            path.push(end);
            places.push((what, path.into()));
        }
    }
    if let Some(log) = &arguments.sandbox_log {
        places.push(("--sandbox-log", log.clone()));
    }
    let whole: Vec<PathBuf> = places.iter().map(|(_, path)| whole(path)).collect();
    for (index, (what, path)) in places.iter().enumerate() {
        if let Some(before) = whole[..index].iter().position(|other| *other == whole[index]) {
            let text = format!(
                "{what} is {}, which is {} as well: give each a file of its own",
                path.display(),
                places[before].0
            );
            return Err(Failure::Usage(text));
        }
    }
    Ok(())
}

/// The same for each name of a file, whether it is there or not.
fn whole(path: &Path) -> PathBuf {
    if let Ok(whole) = std::fs::canonicalize(path) {
        return whole;
    }
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let directory = path.parent().and_then(|parent| std::fs::canonicalize(parent).ok());
    match (directory, path.file_name()) {
        (Some(directory), Some(name)) => directory.join(name),
        _ => path,
    }
}
