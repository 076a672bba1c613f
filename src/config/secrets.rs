//! Secrets that are given as files.

use std::path::Path;

use toml::{Table, Value};

use super::keys::{KEYS, Kind};
use super::table::{get, remove, set};
use super::{DEFAULTS, Need, Problem};

/// Replaces each `…_file` by the content of its file.
pub(super) fn read_secrets(table: &mut Table, need: Need, problems: &mut Vec<Problem>) {
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
        let filled = |text: String| {
            if text.trim().is_empty() { Err("it is empty".to_owned()) } else { Ok(text) }
        };
        match read_small_file(Path::new(&path), MAX_SECRET).and_then(filled) {
            Ok(text) => {
                // Editors and `kubectl create secret` leave a newline that no secret ends with.
                let secret = text.strip_suffix('\n').unwrap_or(&text);
                let secret = secret.strip_suffix('\r').unwrap_or(secret);
                set(table, key, Value::String(secret.to_owned()));
            }
            Err(_) if need == Need::AllButTheKey && key == "creem.api_key" => {}
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
pub(super) fn shown(path: &str) -> String {
    let secret = |part: &str| path.contains(part);
    let key = secret("creem_") && !secret("/");
    if key || ["://", "-----", "\n"].into_iter().any(secret) {
        "its value, which looks like the secret itself and not like a path,".to_owned()
    } else {
        crate::job::printable(path, 200)
    }
}

/// Largest file that may hold a secret.
const MAX_SECRET: u64 = 64 * 1024;

/// Reads a regular text file of at most `most` bytes; a pipe would wait for ever.
pub(super) fn read_small_file(path: &Path, most: u64) -> Result<String, String> {
    let file = path.metadata().map_err(|error| error.to_string())?;
    if !file.is_file() {
        return Err("it is not a regular file".to_owned());
    }
    if file.len() > most {
        return Err(format!("it is larger than {most} bytes"));
    }
    std::fs::read_to_string(path).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_shown_and_a_secret_in_its_place_is_not() {
        for path in ["/run/secrets/creem_api_key", "secrets/creem_api_key", "key.pem"] {
            assert_eq!(shown(path), path);
        }
        for secret in ["creem_test_CANARY", "\"creem_test_CANARY\"", "amqp://u:CANARY@h"] {
            assert!(!shown(secret).contains("CANARY"), "{secret}");
        }
    }
}
