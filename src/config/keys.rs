//! Every key there is, and what it is called in the environment.

use toml::Value;

/// What the environment's names begin with.
pub(super) const PREFIX: &str = "CHECKOUT_WORKER__";

/// What kind of value a key takes; says how a text from the environment is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Text,
    Integer,
    Float,
    Switch,
    List,
    Secret,
}

/// Every key there is.
pub(super) const KEYS: [(&str, Kind); 42] = [
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
    ("rate_limit.bulk_share", Kind::Float),
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
pub(super) const SHORT: [(&str, &str); 4] = [
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

pub(super) fn nearest(key: &str) -> String {
    let nearest = known_keys().map(|known| (strsim::osa_distance(&known, key), known)).min();
    match nearest {
        Some((distance, known)) if distance <= 5 => format!("did you mean `{known}`?"),
        Some(_) | None => "config/default.toml has every key there is".to_owned(),
    }
}

/// The key that a variable's name stands for, if it is one of ours.
pub(super) fn key_of(name: &str) -> Option<String> {
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
pub(super) fn misspelt(name: &str) -> Option<String> {
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

pub(super) fn is_secret(key: &str) -> bool {
    KEYS.contains(&(key, Kind::Secret))
}

pub(super) fn read_value(key: &str, text: &str) -> Result<Value, &'static str> {
    let kind =
        KEYS.into_iter().find(|(known, _)| *known == key).map_or(Kind::Text, |(_, kind)| kind);
    match kind {
        Kind::Text | Kind::Secret => Ok(Value::String(text.to_owned())),
        Kind::Integer => text.trim().parse().map(Value::Integer).map_err(|_| "give a whole number"),
        Kind::Float => text.trim().parse().map(Value::Float).map_err(|_| "give a number"),
        Kind::Switch => text.trim().parse().map(Value::Boolean).map_err(|_| "give true or false"),
        Kind::List => {
            let items = text.split(',').map(str::trim).filter(|item| !item.is_empty());
            let items: Vec<Value> = items.map(|item| Value::String(item.to_owned())).collect();
            // A variable that was meant to be filled must not lift a list of what is allowed.
            if items.is_empty() {
                Err("give names with commas between, or leave it out")
            } else {
                Ok(Value::Array(items))
            }
        }
    }
}
