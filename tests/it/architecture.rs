//! The house rules: which module may import which, and which crate may be named where.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Module → modules of ours that it may import (besides itself).
fn allowed() -> BTreeMap<&'static str, &'static [&'static str]> {
    BTreeMap::from([
        ("job", &[][..]),
        ("clock", &[]),
        ("retry", &["clock"]),
        ("pace", &["job"]),
        ("lifecycle", &["clock"]),
        ("ledger", &["job", "clock"]),
        ("creem", &["job"]),
        ("rabbit", &["job", "clock", "retry"]),
        ("observe", &["job"]),
        ("worker", &["job", "clock", "retry", "pace", "ledger", "creem", "rabbit", "observe"]),
        (
            "config",
            &["job", "clock", "retry", "pace", "ledger", "creem", "rabbit", "observe", "worker"],
        ),
        ("bulk", &["job", "clock", "retry", "ledger", "creem", "worker"]),
        ("simulator", &[]),
        (
            "cli",
            &[
                "job",
                "clock",
                "retry",
                "pace",
                "ledger",
                "creem",
                "rabbit",
                "observe",
                "worker",
                "bulk",
                "config",
                "lifecycle",
                // The sandbox of `bulk`.
                "simulator",
            ],
        ),
    ])
}

/// Crate → places that may name it.
const CRATES: [(&str, &[&str]); 15] = [
    ("lapin", &["src/rabbit/"]),
    ("reqwest", &["src/creem/"]),
    ("rusqlite", &["src/ledger/sqlite/"]),
    ("tokio_postgres", &["src/ledger/postgres/"]),
    ("deadpool_postgres", &["src/ledger/postgres/"]),
    ("backoff::", &["src/retry/backoff.rs"]),
    ("clap", &["src/cli/", "src/bin/"]),
    ("csv", &["src/bulk/"]),
    ("indicatif", &["src/cli/"]),
    ("anyhow", &["src/cli/"]),
    ("axum", &["src/simulator/", "src/observe/admin.rs"]),
    ("hyper", &["src/simulator/", "src/observe/admin.rs"]),
    ("tower", &["src/simulator/", "src/observe/admin.rs"]),
    ("hyper_util", &["src/simulator/", "src/observe/admin.rs"]),
    ("metrics_exporter_prometheus", &["src/observe/", "src/cli/run.rs"]),
];

fn sources() -> Vec<(String, String)> {
    fn walk(directory: &Path, files: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, files);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                files.push(path);
            }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    walk(&root.join("src"), &mut files);
    files
        .into_iter()
        .map(|path| {
            let name = path.strip_prefix(root).unwrap().to_string_lossy().into_owned();
            (name, production(&fs::read_to_string(&path).unwrap()))
        })
        .collect()
}

/// The code without comments and in-file tests.
fn production(text: &str) -> String {
    let text = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
    text.lines()
        .map(|line| line.split("//").next().unwrap_or_default())
        .collect::<Vec<_>>()
        .join("\n")
}

fn names(text: &str, word: &str) -> bool {
    // A module of ours has that crate's name, so only an import counts.
    if word == "backoff::" {
        return text.contains("use backoff::");
    }
    let boundary = |c: Option<char>| c.is_none_or(|c| !(c.is_alphanumeric() || c == '_'));
    let plain = word.trim_end_matches("::");
    text.match_indices(plain).any(|(at, _)| {
        let path = text[at + plain.len()..].starts_with("::");
        path && boundary(text[..at].chars().next_back()) && !text[..at].ends_with("::")
    })
}

#[test]
fn no_module_imports_what_is_above_it() {
    let allowed = allowed();
    let mut wrong = Vec::new();
    for (file, text) in sources() {
        let parts: Vec<&str> = file.split('/').collect();
        let module = parts[1].trim_end_matches(".rs");
        if matches!(module, "lib" | "main" | "bin") {
            continue;
        }
        let may = allowed.get(module).unwrap_or_else(|| panic!("{module} has no row in the table"));
        for other in allowed.keys().filter(|other| **other != module && !may.contains(other)) {
            if text.contains(&format!("crate::{other}::"))
                || text.contains(&format!("use crate::{other};"))
            {
                wrong.push(format!("{file} imports {other}"));
            }
        }
        if text.contains("use crate::{") {
            wrong.push(format!(
                "{file}: imports are one path a line, so that this test can read them"
            ));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn a_journey_never_touches_the_broker_and_settling_never_asks_creem() {
    let mut read = [0, 0];
    for (file, text) in sources() {
        for (at, (own, other)) in
            [("journey", "crate::rabbit"), ("settle", "crate::creem")].into_iter().enumerate()
        {
            if file.starts_with(&format!("src/worker/{own}")) {
                assert!(!text.contains(other), "{file} names {other}");
                read[at] += 1;
            }
        }
    }
    assert!(read.iter().all(|files| *files > 0), "each is somewhere: {read:?}");
}

#[test]
fn words_and_rules_know_no_io() {
    for (file, text) in sources() {
        if file.starts_with("src/pace/") {
            for crate_name in ["std::fs", "std::net", "tokio::fs", "tokio::net"] {
                assert!(!text.contains(crate_name), "{file} names {crate_name}");
            }
        }
        if file.starts_with("src/job/") || file.starts_with("src/retry/") {
            for crate_name in ["tokio", "std::fs", "std::net", "futures", "getrandom"] {
                if (file.as_str(), crate_name) == ("src/retry/backoff.rs", "getrandom") {
                    continue;
                }
                assert!(!text.contains(&format!("{crate_name}::")), "{file} names {crate_name}");
            }
        }
    }
}

#[test]
fn crates_are_named_in_their_places_only() {
    let mut wrong = Vec::new();
    for (file, text) in sources() {
        for (crate_name, places) in CRATES {
            if names(&text, crate_name) && !places.iter().any(|place| file.starts_with(place)) {
                wrong.push(format!("{file} names {crate_name}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn the_checks_above_can_fail() {
    assert!(names("use lapin::Channel;", "lapin"));
    assert!(names("let c: lapin::Channel;", "lapin"));
    assert!(!names("use my_lapin::Channel;", "lapin"));
    assert!(names("use backoff::ExponentialBackoffBuilder;", "backoff::"));
    assert!(!names("use crate::retry::backoff::chance;", "backoff::"));
    assert!(!production("a // lapin::x\n#[cfg(test)]\nmod tests { lapin::y }").contains("lapin"));
    assert!(!sources().is_empty());
}

#[test]
fn the_crates_the_project_is_built_on_are_all_used() {
    let sources = sources();
    let all: String = sources.iter().map(|(_, text)| text.as_str()).collect();
    for crate_name in ["lapin", "tokio", "reqwest", "serde", "serde_json", "backoff::", "tracing"] {
        assert!(names(&all, crate_name), "{crate_name} is not used");
    }
}
