//! The settings as they are written, section by section. Names carry no units: durations say
//! theirs in the value.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use secrecy::SecretString;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer};
use toml::Table;

use super::Problem;

/// Longest duration of a setting: sums of two cannot overflow anything.
pub const LONGEST: Duration = Duration::from_secs(3650 * 24 * 3600);

/// A duration written as `250ms`, `10s`, `7d`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span(pub Duration);

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        humantime::parse_duration(&text)
            .ok()
            .filter(|span| *span <= LONGEST)
            .map(Span)
            .ok_or(())
            .map_err(|()| {
                D::Error::custom(
                    "a duration is written as 250ms, 10s, 5m, 6h or 7d, and is at most 3650d",
                )
            })
    }
}

/// Everything.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// The broker.
    pub amqp: Amqp,
    /// Creem.
    pub creem: Creem,
    /// The ledger.
    pub ledger: Ledger,
    /// The lanes.
    pub lanes: Lanes,
    /// The ceiling on calls.
    pub rate_limit: RateLimit,
    /// Trying again.
    pub retry: Retry,
    /// The rules of jobs.
    pub job: Job,
    /// Replies.
    pub replies: Replies,
    /// Names on the broker.
    pub topology: Topology,
    /// The worker's own HTTP server.
    pub http: Http,
    /// The end.
    pub shutdown: Shutdown,
    /// The log.
    pub log: Log,
}

impl Settings {
    /// Reads the merged table; what does not fit is named by its key.
    pub(super) fn from_table(table: Table) -> Result<Self, (String, Problem)> {
        serde_path_to_error::deserialize(toml::Value::Table(table)).map_err(|error| {
            let path = error.path().to_string();
            let problem = Problem::new(
                format!("`{path}`: {}", one_line(error.inner())),
                "see config/default.toml for what it takes",
            );
            (path, problem)
        })
    }
}

/// The first line of a TOML error, which repeats no value.
fn one_line(error: &toml::de::Error) -> String {
    let message = error.message();
    // Serde quotes strings that are of the wrong type; they may be secrets.
    match message.split_once("string \"") {
        Some((before, _)) => format!("{before}a text"),
        None => message.lines().next().unwrap_or_default().to_owned(),
    }
}

/// `[amqp]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Amqp {
    /// The URL.
    pub url: SecretString,
    /// The AMQP heartbeat; see `rabbit::Options`.
    pub heartbeat: Span,
    /// Further root certificates.
    pub ca_file: Option<PathBuf>,
    /// The worker's own certificate.
    pub client_cert_file: Option<PathBuf>,
    /// Its key.
    pub client_key_file: Option<PathBuf>,
}

/// `[creem]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Creem {
    /// The key.
    pub api_key: Option<SecretString>,
    /// Where.
    pub base_url: Option<String>,
    /// One deadline for a call.
    pub request_timeout: Span,
    /// After an unknown outcome.
    pub on_unknown: OnUnknown,
    /// A proxy.
    pub proxy: Option<String>,
    /// Further root certificates.
    pub ca_file: Option<PathBuf>,
    /// Hosts of links.
    pub checkout_hosts: Vec<String>,
}

/// `creem.on_unknown`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnUnknown {
    /// Ask again.
    Retry,
    /// Never ask twice.
    Park,
}

/// `[ledger]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ledger {
    /// Where; may hold a password.
    pub url: SecretString,
    /// Further root certificates.
    pub ca_file: Option<PathBuf>,
    /// How long outcomes are kept.
    pub retention: Span,
}

/// `[lanes]`
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lanes {
    /// Somebody waits.
    pub interactive: Lane,
    /// Campaigns.
    pub bulk: Lane,
}

/// `[lanes.*]`
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lane {
    /// Jobs in the works at once.
    pub concurrency: i64,
    /// How long a job is tried.
    pub max_elapsed: Span,
    /// Oldest job worth a link.
    pub max_age: Option<Span>,
}

/// `[rate_limit]`
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimit {
    /// Calls a second.
    pub per_second: Option<f64>,
    /// What part of them bulk is sure of.
    pub bulk_share: f64,
}

/// `[retry]`
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Retry {
    /// Most calls.
    pub max_attempts: i64,
    /// First delay.
    pub first: Span,
    /// Longest delay.
    pub longest: Span,
}

/// `[job]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Job {
    /// Largest body.
    pub max_bytes: i64,
    /// Largest `units`.
    pub max_units: i64,
    /// Fields to pass on.
    pub extra_fields: Vec<String>,
    /// Whether `custom_price` may be given.
    pub allow_custom_price: bool,
    /// Whether `affiliate_code` may be given.
    pub allow_affiliate_code: bool,
    /// Hosts of `success_url`.
    pub success_hosts: Vec<String>,
    /// The default `success_url`.
    pub success_url: Option<String>,
}

/// `[replies]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Replies {
    /// The queue of replies without `reply_to`.
    pub queue: Option<String>,
    /// Patterns of addresses.
    pub allow: Vec<String>,
    /// The exchange.
    pub exchange: String,
}

/// `[topology]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Topology {
    /// Whether to declare.
    pub declare: bool,
    /// First word of names.
    pub prefix: String,
}

/// `[http]`
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Http {
    /// Where to listen.
    pub listen: SocketAddr,
}

/// `[shutdown]`
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shutdown {
    /// How long to finish.
    pub grace: Span,
}

/// `[log]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Log {
    /// How lines look.
    pub format: Format,
    /// How much.
    pub level: String,
}

/// `log.format`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// By the terminal.
    Auto,
    /// For people.
    Text,
    /// For machines.
    Json,
}
