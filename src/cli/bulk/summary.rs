//! The last words of a run, and whether all is well.

use std::path::Path;

use anyhow::anyhow;

use super::Arguments;
use crate::bulk::Tally;
use crate::bulk::output::part_of;
use crate::cli::{Failure, Outcome, count, say_error};
use crate::job::{Status, printable};

pub(super) fn ended(
    tally: &Tally,
    broken: Option<anyhow::Error>,
    arguments: &Arguments,
    out: &Path,
) -> Outcome {
    match broken {
        Some(error) => Err(Failure::Failed(error.context(format!(
            "stopped after {}; the same command goes on with {}",
            count(tally.rows, "row"),
            part_of(out).display()
        )))),
        None => summary(tally, arguments, out),
    }
}

pub(super) fn interrupted(rows: u64, out: &Path) -> Failure {
    let kept = if rows == 0 { String::new() } else { format!(" after {}", count(rows, "row")) };
    Failure::Failed(anyhow!(
        "interrupted{kept}; the same command goes on with {}",
        part_of(out).display()
    ))
}

/// The last words, and whether all is well.
fn summary(tally: &Tally, arguments: &Arguments, out: &Path) -> Outcome {
    if !tally.whole {
        return Err(interrupted(tally.rows, out));
    }
    let rows = count(tally.rows, "row");
    let mut text = format!("{rows}, {} with a link", tally.linked());
    for (status, rows) in tally.statuses.iter().filter(|(status, _)| **status != "succeeded") {
        text = format!("{text}, {rows} {status}");
    }
    text = match tally.left {
        None => format!("{text}: {}", out.display()),
        Some(_) => format!("{text}: {}", part_of(out).display()),
    };
    if arguments.sandbox {
        text.push_str(" (a sandbox: the links lead nowhere)");
    }
    if let Some((links, id)) = &tally.dropped {
        text = format!(
            "{text}. An interrupted run has made {} for rows that are not in the table any more, for instance that of {}: the ledger keeps them, and nobody was given them by this file",
            count(*links as u64, "link"),
            printable(id, 128)
        );
    }
    if tally.linked() == tally.rows && tally.shared == 0 && tally.left.is_none() {
        say_error(&text);
        return Ok(());
    }
    if tally.statuses.contains_key(Status::Conflict.as_str()) {
        text.push_str(
            ". A conflict: that request_id has a link as another job, and error_message names the fields that differ: give the flags and cells of that run, or another --request-id-prefix for new links",
        );
    }
    if tally.statuses.contains_key(Status::Unresolved.as_str()) {
        text.push_str(
            ". Unresolved: Creem may have made a session that nobody was given. With creem.on_unknown = \"park\" such a row is never asked for again: look for it at Creem, or give it another request_id",
        );
    }
    if tally.statuses.contains_key(Status::Cancelled.as_str()) {
        text.push_str(
            ". The campaign was cancelled: run the command again only if those rows are to be sold after all",
        );
    }
    if tally.linked() < tally.rows {
        text.push_str(
            ". The columns error_code and error_message say why; the same command tries those rows again and keeps the links",
        );
    }
    if tally.shared > 0 {
        text = format!(
            "{text}. Of all rows {} have the request_id of an earlier one, and so no link of their own: --dry-run names them",
            tally.shared
        );
    }
    if let Some((links, id)) = &tally.left {
        text = format!(
            "{text}. {} stays as it was: no row of this run was given {} of it, for instance that of {}. A row without a request_id of its own has a new one as soon as a cell of it is changed. Put such rows back as they were, and the same command goes on; or give another --out for a table of other rows; or remove the file if nobody was given its links",
            out.display(),
            count(*links as u64, "link"),
            printable(id, 128)
        );
    }
    Err(Failure::Failed(anyhow!(text)))
}
