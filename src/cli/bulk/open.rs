//! The input, and what was left of its output.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use anyhow::Context as _;

use super::Arguments;
use crate::bulk::input::Input;
use crate::bulk::layout::Layout;
use crate::bulk::output::{Earlier, part_of};
use crate::cli::{Failure, say_error};
use crate::config::check::Resolved;
use crate::job::printable;

/// Most carried columns that are named.
const NAMED: usize = 20;

/// The bytes of a file, and how many they are, if that is known.
pub(super) fn source(path: &Path) -> Result<(Box<dyn Read + Send>, Option<u64>), Failure> {
    if path.as_os_str() == "-" {
        return Ok((Box::new(std::io::stdin()), None));
    }
    let file = File::open(path).with_context(|| format!("{} cannot be opened", path.display()))?;
    let about = file.metadata().with_context(|| path.display().to_string())?;
    if about.is_dir() {
        return Err(Failure::Usage(format!("{} is a directory: give a file", path.display())));
    }
    Ok((Box::new(file), about.is_file().then_some(about.len())))
}

/// Begins to read the input; how many bytes it has, if that is known.
pub(super) fn input(
    settings: &Resolved,
    arguments: &Arguments,
) -> Result<(Input, Option<u64>), Failure> {
    let path = &arguments.file;
    let (source, bytes) = source(path)?;
    let input = Input::open(source, arguments.wishes(settings))
        .with_context(|| path.display().to_string())?;
    let carried: Vec<&str> = input.carried().collect();
    if !carried.is_empty() {
        let mut names: Vec<String> =
            carried.iter().take(NAMED).map(|name| printable(name, 60)).collect();
        if carried.len() > NAMED {
            names.push(format!("and {} more", carried.len() - NAMED));
        }
        say_error(&format!("carried through, and no part of the jobs: {}", names.join(", ")));
    }
    Ok((input, bytes))
}

/// Begins to read the input, and what an interrupted run has left of its output.
pub(super) fn opened(
    settings: &Resolved,
    arguments: &Arguments,
    out: &Path,
) -> Result<(Input, Option<u64>, Earlier), Failure> {
    let (input, bytes) = input(settings, arguments)?;
    let layout = Layout::new(input.format(), input.names(), input.shows_ids());
    let earlier = Earlier::look(out, layout, arguments.made_with(settings))?;
    if earlier.was_interrupted() {
        say_error(&format!("going on with {}", part_of(out).display()));
    }
    Ok((input, bytes, earlier))
}
