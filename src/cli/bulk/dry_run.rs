//! `bulk --dry-run`: what is wrong with the rows, before anything is asked of Creem.

use std::collections::HashMap;
use std::hash::{BuildHasher as _, RandomState};

use super::Arguments;
use super::open::input;
use crate::cli::{Failure, Outcome, count, say, say_error};
use crate::config::check::Resolved;

/// Most rows that are named.
const NAMED: u64 = 100;

pub(super) fn run(settings: &Resolved, arguments: &Arguments) -> Outcome {
    let (mut input, _) = input(settings, arguments)?;
    // Of a million ids 50 MB or so; rows that are named by what is in them cannot have the same.
    let may_share = !input.names_rows();
    let (hasher, mut lines) = (RandomState::new(), HashMap::new());
    let (mut rows, mut wrong) = (0, 0);
    let mut name = |line: u64, what: &str| {
        wrong += 1;
        if wrong <= NAMED {
            say(&format!("line {line}, {what}"));
        }
    };
    while let Some((row, job)) = input.next_row()? {
        rows += 1;
        if let Err(flaw) = &job {
            let column = flaw.column.map(|column| format!("column {column}: "));
            name(
                row.line,
                &format!("{}{} ({})", column.unwrap_or_default(), flaw.message, flaw.code),
            );
        } else if let Some(id) = row.request_id.as_ref().filter(|_| may_share) {
            let (number, first) =
                *lines.entry(hasher.hash_one(id)).or_insert((row.number, row.line));
            if number != row.number {
                let text = format!(
                    "column request_id: line {first} has the same one, so both get one link, or none if they differ; give each row its own (request_id_twice)"
                );
                name(row.line, &text);
            }
        }
    }
    if wrong > NAMED {
        say(&format!("and {} more", wrong - NAMED));
    }
    let empty = input.empty();
    if empty > 0 {
        say_error(&format!("{} without a value passed over", count(empty, "row")));
    }
    if wrong > 0 {
        let text = format!("{} of {} wrong, see above", wrong, count(rows, "row"));
        return Err(Failure::Failed(anyhow::anyhow!(text)));
    }
    say_error(&format!("{}, nothing is wrong with them", count(rows, "row")));
    Ok(())
}
