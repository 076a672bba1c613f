//! `[ledger]`: a file for one worker, or a database for many.

use std::path::PathBuf;

use secrecy::ExposeSecret as _;

use super::{Ledger, Problem, Settings};
use crate::ledger::postgres;

pub(super) fn check(settings: &Settings, problems: &mut Vec<Problem>) -> Option<Ledger> {
    let url = settings.ledger.url.expose_secret();
    match url.split_once(':') {
        Some(("sqlite", path)) if odd_path(path) => {
            problems.push(Problem::new(
                "`ledger.url` would name another file than it seems to",
                "give sqlite:PATH with a plain path: no ~, no //, no file:, no blanks around it",
            ));
            None
        }
        Some(("sqlite", path))
            if !path.is_empty() && !path.starts_with(':') && !path.contains('?') =>
        {
            Some(Ledger::File(PathBuf::from(path)))
        }
        Some(("postgres" | "postgresql", _)) => Some(database(settings, problems)),
        _ => {
            problems.push(Problem::new(
                "`ledger.url` is not usable",
                "give sqlite:PATH, e.g. sqlite:data/ledger.db, or postgres://user:password@host/database",
            ));
            None
        }
    }
}

fn database(settings: &Settings, problems: &mut Vec<Problem>) -> Ledger {
    let ca_file = settings.ledger.ca_file.as_deref();
    let ca_pem = ca_file.and_then(|path| super::pem("ledger.ca_file", path, problems));
    let options = postgres::Options { url: settings.ledger.url.clone(), ca_pem };
    if let Err(error) = options.check() {
        problems.push(Problem::new(
            error.to_string(),
            "give postgres://user:password@host[:port]/database, with % / # ? @ in the password written as %25 %2F %23 %3F %40; sslmode is disable, prefer or require, and TLS is always verified in full, by ledger.ca_file if need be",
        ));
    }
    Ledger::Database(options)
}

/// Forms that shells, URLs or other programs read differently.
fn odd_path(path: &str) -> bool {
    path.trim() != path
        || path.chars().any(char::is_control)
        || path.starts_with('~')
        || path.starts_with("//")
        // Another kind's URL: what it holds must not become a file's name.
        || path.contains("://")
        || path.ends_with('/')
        || path.starts_with("file:")
}
