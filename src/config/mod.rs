//! The configuration: built-in defaults, a file, the environment; in that order, all strict.
//!
//! The whole environment comes in as a map, so that a test needs none of its own.

pub mod check;
mod environment;
mod keys;
mod problem;
mod secrets;
pub mod sections;
mod table;

use std::collections::BTreeMap;
use std::path::Path;

use toml::{Table, Value};

pub use check::resolve;
use environment::from_environment;
use keys::{KEYS, nearest};
pub use keys::{is_ours, known_keys};
pub use problem::Problem;
use secrets::{read_secrets, read_small_file};
pub use sections::Settings;
use table::{get, leaves, merge, remove, set};

/// The documented defaults.
pub const DEFAULTS: &str = include_str!("../../config/default.toml");

/// Largest file of settings.
const MAX_FILE: u64 = 1024 * 1024;

/// Reads the settings.
///
/// # Errors
/// Everything that is wrong, at once, each with its fix.
pub fn load(
    file: Option<&Path>,
    environment: &BTreeMap<String, String>,
) -> Result<Settings, Vec<Problem>> {
    load_for(file, environment, Need::All)
}

/// The same for a command that needs no key of Creem's: one that cannot be read is as good as none.
///
/// # Errors
/// See [`load`].
pub fn load_without_key(
    file: Option<&Path>,
    environment: &BTreeMap<String, String>,
) -> Result<Settings, Vec<Problem>> {
    load_for(file, environment, Need::AllButTheKey)
}

/// Which secrets must be readable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Need {
    All,
    AllButTheKey,
}

fn load_for(
    file: Option<&Path>,
    environment: &BTreeMap<String, String>,
    need: Need,
) -> Result<Settings, Vec<Problem>> {
    let mut problems = Vec::new();
    let mut table: Table = DEFAULTS.parse().expect("the embedded defaults are TOML");
    if let Some(path) = file {
        match read_file(path) {
            Ok(given) => {
                let unknown = unknown_keys(&given, path, &mut problems);
                merge(&mut table, given);
                for key in unknown {
                    remove(&mut table, &key);
                }
            }
            Err(problem) => problems.push(problem),
        }
    }
    from_environment(&mut table, environment, &mut problems);
    read_secrets(&mut table, need, &mut problems);
    if let Some(level) = environment.get("RUST_LOG").filter(|level| !level.is_empty()) {
        set(&mut table, "log.level", Value::String(level.clone()));
    }
    let settings = read_all(table, &mut problems);
    if problems.is_empty()
        && let Some(settings) = settings
    {
        return Ok(settings);
    }
    // What is wrong between the settings is said together with what is wrong with them.
    if let Some(settings) = settings.filter(|settings| settings.creem.api_key.is_some()) {
        problems.extend(resolve(&settings).err().unwrap_or_default());
    }
    Err(problems)
}

/// Reads the sections. A value that does not fit is noted and taken for its default, so that the
/// next one is noted as well.
fn read_all(mut table: Table, problems: &mut Vec<Problem>) -> Option<Settings> {
    let defaults: Table = DEFAULTS.parse().expect("the embedded defaults are TOML");
    for _ in 0..KEYS.len() {
        let (path, problem) = match Settings::from_table(table.clone()) {
            Ok(settings) => return Some(settings),
            Err(wrong) => wrong,
        };
        if problems.contains(&problem) {
            // Nothing can be taken out that would help.
            return None;
        }
        problems.push(problem);
        match get(&defaults, &path).cloned() {
            Some(default) => set(&mut table, &path, default),
            None => {
                // A section that is no table, or a key without a default.
                remove(&mut table, &path)?;
            }
        }
    }
    None
}

fn read_file(path: &Path) -> Result<Table, Problem> {
    let shown = path.display();
    let text = read_small_file(path, MAX_FILE).map_err(|error| {
        Problem::new(
            format!("{shown} cannot be read: {error}"),
            "check the path given with --config",
        )
    })?;
    // TOML's own message quotes the line, which may hold a secret; its place is enough.
    text.parse::<Table>().map_err(|error| {
        let line = error
            .span()
            .map_or(1, |span| 1 + text[..span.start.min(text.len())].matches('\n').count());
        Problem::new(format!("{shown}, line {line}: {}", error.message()), "correct that line")
    })
}

/// Names every key that is none, with the nearest that is one.
fn unknown_keys(table: &Table, path: &Path, problems: &mut Vec<Problem>) -> Vec<String> {
    let known: Vec<String> = known_keys().collect();
    let unknown: Vec<String> =
        leaves(table, "").into_iter().filter(|key| !known.contains(key)).collect();
    for key in &unknown {
        let what = format!("{}: there is no key `{key}`", path.display());
        problems.push(Problem::new(what, nearest(key)));
    }
    unknown
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    fn problems(file: Option<&str>, pairs: &[(&str, &str)]) -> String {
        let path = file.map(|text| {
            let file = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(file.path(), text).unwrap();
            file
        });
        match load(path.as_ref().map(tempfile::NamedTempFile::path), &environment(pairs)) {
            Ok(_) => String::new(),
            Err(problems) => problems.iter().map(|problem| problem.to_string() + "\n").collect(),
        }
    }

    #[test]
    fn every_known_key_is_documented_in_the_defaults_and_every_documented_key_is_known() {
        let mut section = String::new();
        let mut documented = Vec::new();
        for line in DEFAULTS.lines() {
            let line = line.trim_start_matches("# ");
            if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
                name.clone_into(&mut section);
            } else if let Some((name, _)) = line.split_once(" = ")
                && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_')
            {
                documented.push(format!("{section}.{name}"));
            }
        }
        documented.sort();
        let mut known: Vec<String> = KEYS.iter().map(|(key, _)| (*key).to_owned()).collect();
        known.sort();
        assert_eq!(documented, known);
    }

    #[test]
    fn the_environment_wins_over_the_file_and_the_file_over_the_defaults() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "[retry]\nmax_attempts = 3\nfirst = \"1s\"\n").unwrap();
        let given = environment(&[
            ("CHECKOUT_WORKER__RETRY__MAX_ATTEMPTS", "5"),
            ("CREEM_API_KEY", "creem_test_x"),
        ]);
        let settings = load(Some(file.path()), &given).unwrap();
        assert_eq!(settings.retry.max_attempts, 5);
        assert_eq!(settings.retry.first.0, std::time::Duration::from_secs(1));
        assert_eq!(settings.retry.longest.0, std::time::Duration::from_mins(1));
    }

    #[test]
    fn a_typo_is_answered_with_the_nearest_key() {
        let text = problems(Some("[retry]\nmax_attemps = 3\n[lane.bulk]\nconcurrency = 1\n"), &[]);
        assert!(
            text.contains("`retry.max_attemps`") && text.contains("`retry.max_attempts`"),
            "{text}"
        );
        assert!(text.contains("`lane.bulk.concurrency`"), "{text}");
        let text = problems(None, &[("CHECKOUT_WORKER__LEDGER__URI", "x")]);
        assert!(text.contains("`ledger.url`"), "{text}");
    }

    #[test]
    fn every_wrong_value_is_said_at_once() {
        let file = "[creem]\nrequest_timeout = 5\n[retry]\nfirst = \"1 parsec\"\nlongst = 1\n[job]\nmax_units = 0\n[lanes.bulk]\nconcurrency = \"x\"\n";
        let text = problems(Some(file), &[("CREEM_API_KEY", "creem_test_x")]);
        for key in [
            "creem.request_timeout",
            "retry.first",
            "retry.longst",
            "job.max_units",
            "lanes.bulk.concurrency",
        ] {
            assert!(text.contains(key), "{key}: {text}");
        }
        assert_eq!(text.lines().count(), 5, "{text}");
    }

    #[test]
    fn a_name_with_too_few_underscores_is_not_passed_over() {
        for name in ["CHECKOUT_WORKER_CREEM__ON_UNKNOWN", "CHECKOUT_WORKER_CREEM_ON_UNKNOWN"] {
            let text = problems(None, &[(name, "park")]);
            assert!(text.contains("CHECKOUT_WORKER__CREEM__ON_UNKNOWN?"), "{text}");
        }
        let kubernetes = [
            ("CHECKOUT_WORKER_SERVICE_HOST", "10.0.0.1"),
            ("CHECKOUT_WORKER_PORT_9464_TCP", "tcp://10.0.0.1:9464"),
        ];
        assert_eq!(problems(None, &kubernetes), "");
    }

    #[test]
    fn two_names_for_one_thing_are_refused() {
        let text = problems(
            None,
            &[("AMQP_URL", "amqp://a/"), ("CHECKOUT_WORKER__AMQP__URL", "amqp://b/")],
        );
        assert!(text.contains("set the same thing"), "{text}");
        let text = problems(
            None,
            &[("CREEM_API_KEY", "creem_test_1"), ("CREEM_API_KEY_FILE", "/dev/null")],
        );
        assert!(text.contains("set the same thing"), "{text}");
        let text = problems(
            Some("[creem]\napi_key = \"creem_test_1\"\napi_key_file = \"/dev/null\"\n"),
            &[],
        );
        assert!(text.contains("set the same thing"), "{text}");
    }

    #[test]
    fn a_secret_in_the_place_of_its_file_is_not_shown() {
        for (name, value) in
            [("CREEM_API_KEY_FILE", "creem_canary"), ("AMQP_URL_FILE", "amqp://u:canary@h/")]
        {
            let text = problems(None, &[(name, value)]);
            assert!(text.contains("looks like the secret") && !text.contains("canary"), "{text}");
        }
        let text = problems(Some("[ledger]\nurl_file = 5\n"), &[]);
        assert!(text.contains("`ledger.url_file` is not a text"), "{text}");
    }

    #[test]
    fn a_secret_file_loses_one_newline() {
        use secrecy::ExposeSecret as _;

        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "creem_test_abc\n").unwrap();
        let given = environment(&[("CREEM_API_KEY_FILE", file.path().to_str().unwrap())]);
        assert_eq!(
            load(None, &given).unwrap().creem.api_key.unwrap().expose_secret(),
            "creem_test_abc"
        );
    }

    #[test]
    fn broken_toml_is_placed_but_never_quoted() {
        let text = problems(Some("[creem]\napi_key = \"creem_test_secret\n"), &[]);
        assert!(text.contains("line 2") && !text.contains("secret"), "{text}");
        let text = problems(Some("[retry]\nmax_attempts = \"many\"\n"), &[]);
        assert!(text.contains("retry.max_attempts"), "{text}");
    }

    #[test]
    fn settings_never_print_a_secret() {
        let given = environment(&[
            ("CREEM_API_KEY", "creem_test_canary"),
            ("AMQP_URL", "amqp://u:canary@h/"),
        ]);
        assert!(!format!("{:?}", load(None, &given).unwrap()).contains("canary"));
    }
}
