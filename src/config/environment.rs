//! What the environment says.

use std::collections::BTreeMap;

use toml::Table;

use super::Problem;
use super::keys::{PREFIX, is_secret, key_of, misspelt, nearest, read_value};
use super::table::{remove, set};

pub(super) fn from_environment(
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
