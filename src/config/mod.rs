//! The configuration: built-in defaults, a file, the environment; in that order, all strict.
//!
//! The whole environment comes in as a map, so that a test needs none of its own.

pub mod check;
pub mod sections;

use std::collections::BTreeMap;
use std::path::Path;

use secrecy::SecretString;
use toml::{Table, Value};

pub use check::{Problem, resolve};
pub use sections::Settings;

/// The documented defaults.
pub const DEFAULTS: &str = include_str!("../../config/default.toml");
/// What the environment's names begin with.
const PREFIX: &str = "CHECKOUT_WORKER__";

/// What kind of value a key takes; says how a text from the environment is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Text,
    Integer,
    Float,
    Switch,
    List,
    Secret,
}

/// Every key there is.
const KEYS: [(&str, Kind); 41] = [
    ("amqp.url", Kind::Secret),
    ("amqp.heartbeat", Kind::Text),
    ("amqp.ca_file", Kind::Text),
    ("amqp.client_cert_file", Kind::Text),
    ("amqp.client_key_file", Kind::Text),
    ("creem.api_key", Kind::Secret),
    ("creem.base_url", Kind::Text),
    ("creem.request_timeout", Kind::Text),
    ("creem.on_unknown", Kind::Text),
    ("creem.proxy", Kind::Text),
    ("creem.ca_file", Kind::Text),
    ("creem.checkout_hosts", Kind::List),
    ("ledger.url", Kind::Secret),
    ("ledger.ca_file", Kind::Text),
    ("ledger.retention", Kind::Text),
    ("lanes.interactive.concurrency", Kind::Integer),
    ("lanes.interactive.max_elapsed", Kind::Text),
    ("lanes.interactive.max_age", Kind::Text),
    ("lanes.bulk.concurrency", Kind::Integer),
    ("lanes.bulk.max_elapsed", Kind::Text),
    ("lanes.bulk.max_age", Kind::Text),
    ("rate_limit.per_second", Kind::Float),
    ("retry.max_attempts", Kind::Integer),
    ("retry.first", Kind::Text),
    ("retry.longest", Kind::Text),
    ("job.max_bytes", Kind::Integer),
    ("job.max_units", Kind::Integer),
    ("job.extra_fields", Kind::List),
    ("job.allow_custom_price", Kind::Switch),
    ("job.allow_affiliate_code", Kind::Switch),
    ("job.success_hosts", Kind::List),
    ("job.success_url", Kind::Text),
    ("replies.queue", Kind::Text),
    ("replies.allow", Kind::List),
    ("replies.exchange", Kind::Text),
    ("topology.declare", Kind::Switch),
    ("topology.prefix", Kind::Text),
    ("http.listen", Kind::Text),
    ("shutdown.grace", Kind::Text),
    ("log.format", Kind::Text),
    ("log.level", Kind::Text),
];

/// Short names of the usual keys.
const SHORT: [(&str, &str); 4] = [
    ("AMQP_URL", "amqp.url"),
    ("CREEM_API_KEY", "creem.api_key"),
    ("CREEM_BASE_URL", "creem.base_url"),
    ("LEDGER_URL", "ledger.url"),
];

/// Every key and, for those that hold a secret, its `_file` twin.
pub fn known_keys() -> impl Iterator<Item = String> {
    KEYS.into_iter().flat_map(|(key, kind)| {
        let file = (kind == Kind::Secret).then(|| format!("{key}_file"));
        std::iter::once(key.to_owned()).chain(file)
    })
}

/// Reads the settings.
///
/// # Errors
/// Everything that is wrong, at once, each with its fix.
pub fn load(
    file: Option<&Path>,
    environment: &BTreeMap<String, String>,
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
    read_secrets(&mut table, &mut problems);
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
    let text = std::fs::read_to_string(path).map_err(|error| {
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

fn nearest(key: &str) -> String {
    let nearest = known_keys().map(|known| (strsim::osa_distance(&known, key), known)).min();
    match nearest {
        Some((distance, known)) if distance <= 5 => format!("did you mean `{known}`?"),
        Some(_) | None => "config/default.toml has every key there is".to_owned(),
    }
}

/// The paths of all values; a section with nothing in it counts as nothing.
fn leaves(table: &Table, prefix: &str) -> Vec<String> {
    let mut paths = Vec::new();
    for (name, value) in table {
        let path = if prefix.is_empty() { name.clone() } else { format!("{prefix}.{name}") };
        if let Value::Table(inner) = value {
            paths.extend(leaves(inner, &path));
        } else {
            paths.push(path);
        }
    }
    paths
}

fn merge(base: &mut Table, over: Table) {
    for (name, value) in over {
        match (base.get_mut(&name), value) {
            (Some(Value::Table(base)), Value::Table(over)) => merge(base, over),
            (_, value) => {
                base.insert(name, value);
            }
        }
    }
}

fn from_environment(
    table: &mut Table,
    environment: &BTreeMap<String, String>,
    problems: &mut Vec<Problem>,
) {
    let mut named: BTreeMap<String, &str> = BTreeMap::new();
    for (name, text) in environment {
        let Some(key) = key_of(name) else {
            if let Some(key) = name.strip_prefix(PREFIX) {
                let key = key.to_ascii_lowercase().replace("__", ".");
                problems.push(Problem::new(
                    format!("the environment sets {name}, and there is no key `{key}`"),
                    nearest(&key),
                ));
            } else if let Some(right) = misspelt(name) {
                problems.push(Problem::new(
                    format!("the environment sets {name}, which is no setting"),
                    format!("did you mean {right}?"),
                ));
            }
            continue;
        };
        let base =
            key.strip_suffix("_file").filter(|base| is_secret(base)).unwrap_or(&key).to_owned();
        if let Some(other) = named.insert(base, name) {
            problems.push(Problem::new(
                format!("{other} and {name} set the same thing"),
                "set one of them only",
            ));
            continue;
        }
        match read_value(&key, text) {
            Ok(value) => {
                // What the environment names wins over the file, whichever of the twins it is.
                if let Some(base) = key.strip_suffix("_file").filter(|base| is_secret(base)) {
                    remove(table, base);
                } else if is_secret(&key) {
                    remove(table, &format!("{key}_file"));
                }
                set(table, &key, value);
            }
            Err(fix) => problems
                .push(Problem::new(format!("{name} is not a usable value for `{key}`"), fix)),
        }
    }
}

/// The key that a variable's name stands for, if it is one of ours.
fn key_of(name: &str) -> Option<String> {
    let short = SHORT.into_iter().find_map(|(short, key)| {
        if name == short {
            Some(key.to_owned())
        } else {
            (name.strip_suffix("_FILE") == Some(short) && is_secret(key))
                .then(|| format!("{key}_file"))
        }
    });
    let long = || {
        let key = name.strip_prefix(PREFIX)?.to_ascii_lowercase().replace("__", ".");
        known_keys().find(|known| *known == key)
    };
    short.or_else(long)
}

/// The name that a variable with too few underscores was meant to have. Others that begin like ours
/// are left alone: Kubernetes sets some for a service of this name.
fn misspelt(name: &str) -> Option<String> {
    let rest = name.strip_prefix("CHECKOUT_WORKER_")?.replace("__", "_").to_ascii_lowercase();
    let rest = rest.trim_start_matches('_');
    let key = known_keys().find(|key| key.replace('.', "_") == rest)?;
    Some(format!("{PREFIX}{}", key.to_ascii_uppercase().replace('.', "__")))
}

/// Whether a variable of that name would be a setting.
#[must_use]
pub fn is_ours(name: &str) -> bool {
    name.starts_with(PREFIX) || key_of(name).is_some()
}

fn is_secret(key: &str) -> bool {
    KEYS.contains(&(key, Kind::Secret))
}

fn read_value(key: &str, text: &str) -> Result<Value, &'static str> {
    let kind =
        KEYS.into_iter().find(|(known, _)| *known == key).map_or(Kind::Text, |(_, kind)| kind);
    match kind {
        Kind::Text | Kind::Secret => Ok(Value::String(text.to_owned())),
        Kind::Integer => text.trim().parse().map(Value::Integer).map_err(|_| "give a whole number"),
        Kind::Float => text.trim().parse().map(Value::Float).map_err(|_| "give a number"),
        Kind::Switch => text.trim().parse().map(Value::Boolean).map_err(|_| "give true or false"),
        Kind::List => {
            let items = text.split(',').map(str::trim).filter(|item| !item.is_empty());
            Ok(Value::Array(items.map(|item| Value::String(item.to_owned())).collect()))
        }
    }
}

/// Replaces each `…_file` by the content of its file.
fn read_secrets(table: &mut Table, problems: &mut Vec<Problem>) {
    for (key, kind) in KEYS {
        let twin = format!("{key}_file");
        if kind != Kind::Secret {
            continue;
        }
        let path = match remove(table, &twin) {
            None => continue,
            Some(Value::String(path)) => path,
            Some(_) => {
                problems.push(Problem::new(format!("`{twin}` is not a text"), "give a path"));
                continue;
            }
        };
        let default =
            DEFAULTS.parse::<Table>().ok().and_then(|defaults| get(&defaults, key).cloned());
        if get(table, key).is_some_and(|value| Some(value) != default.as_ref()) {
            problems.push(Problem::new(
                format!("`{key}` and `{twin}` set the same thing"),
                "set one of them only",
            ));
            continue;
        }
        match read_secret_file(Path::new(&path)) {
            Ok(text) => {
                // Editors and `kubectl create secret` leave a newline that no secret ends with.
                let secret = text.strip_suffix('\n').unwrap_or(&text);
                let secret = secret.strip_suffix('\r').unwrap_or(secret);
                set(table, key, Value::String(secret.to_owned()));
            }
            Err(error) => {
                problems.push(Problem::new(
                    format!("`{twin}`: {} cannot be read: {error}", shown(&path)),
                    "name a small text file that this user may read",
                ));
                // One complaint is enough.
                if let Some(default) = default {
                    set(table, key, default);
                }
            }
        }
    }
}

/// A path as it may be shown: somebody may have given the secret itself in its place.
fn shown(path: &str) -> String {
    if path.starts_with("creem_") || path.contains("://") {
        "its value, which looks like the secret itself and not like a path,".to_owned()
    } else {
        crate::job::printable(path, 200)
    }
}

/// Largest file that may hold a secret.
const MAX_SECRET: u64 = 64 * 1024;

/// Reads a regular, small, non-empty text file; a pipe would wait for ever.
fn read_secret_file(path: &Path) -> Result<String, String> {
    let file = path.metadata().map_err(|error| error.to_string())?;
    if !file.is_file() {
        return Err("it is not a regular file".to_owned());
    }
    if file.len() > MAX_SECRET {
        return Err(format!("it is larger than {MAX_SECRET} bytes"));
    }
    let text = std::fs::read_to_string(path).map_err(|error| error.to_string())?;
    if text.trim().is_empty() { Err("it is empty".to_owned()) } else { Ok(text) }
}

fn get<'a>(table: &'a Table, path: &str) -> Option<&'a Value> {
    match path.split_once('.') {
        Some((section, rest)) => get(table.get(section)?.as_table()?, rest),
        None => table.get(path),
    }
}

fn set(table: &mut Table, path: &str, value: Value) {
    match path.split_once('.') {
        Some((section, rest)) => {
            let inner = table.entry(section).or_insert_with(|| Value::Table(Table::new()));
            if let Value::Table(inner) = inner {
                set(inner, rest, value);
            }
        }
        None => {
            table.insert(path.to_owned(), value);
        }
    }
}

fn remove(table: &mut Table, path: &str) -> Option<Value> {
    match path.split_once('.') {
        Some((section, rest)) => remove(table.get_mut(section)?.as_table_mut()?, rest),
        None => table.remove(path),
    }
}

/// A secret that prints as nothing.
#[must_use]
pub fn secret(text: &str) -> SecretString {
    text.to_owned().into()
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
