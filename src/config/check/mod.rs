//! Rules between the settings. Everything that is wrong is said at once, each with its fix.

mod creem;
mod ledger;

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::sections::{self, Settings};
use crate::job::request::is_extra_field;
use crate::job::success_url;
use crate::job::{Lane, Mode, Rules};
use crate::ledger::{OnUnknown, postgres};
use crate::observe::logging::{self, Format};
use crate::rabbit::envelope::ReplyRules;
use crate::rabbit::link::Tls;
use crate::rabbit::{self, Topology};
use crate::retry::{Backoff, Policy};
use crate::worker::rules::{LaneRules, Rules as JourneyRules};
use crate::worker::{LaneSize, SETTLING};

/// RabbitMQ caps the prefetch of quorum queues here.
const MAX_PREFETCH: i64 = 2_000;
/// Longest `retry.longest`; the ledger takes a wait that is much longer for a clock that jumped.
const LONGEST_RETRY: Duration = Duration::from_mins(30);

/// Something that is wrong, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    what: String,
    fix: String,
}

impl Problem {
    /// A problem and its fix.
    #[must_use]
    pub fn new(what: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { what: what.into(), fix: fix.into() }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.what, self.fix)
    }
}

/// Where the ledger is.
#[derive(Debug, Clone)]
pub enum Ledger {
    /// A file, for one worker.
    File(PathBuf),
    /// A PostgreSQL, for many.
    Database(postgres::Options),
}

/// The settings as the parts of the worker take them.
#[derive(Debug, Clone)]
pub struct Resolved {
    /// The broker.
    pub amqp: rabbit::Options,
    /// Names on the broker.
    pub topology: Topology,
    /// Whether to declare them.
    pub declare: bool,
    /// Reply addresses.
    pub replies: ReplyRules,
    /// Creem.
    pub creem: crate::creem::Options,
    /// The ledger.
    pub ledger: Ledger,
    /// Job bodies.
    pub job: Rules,
    /// Journeys.
    pub journey: JourneyRules,
    /// The lanes and their sizes.
    pub lanes: Vec<LaneSize>,
    /// Calls a second.
    pub per_second: Option<f64>,
    /// The HTTP server.
    pub listen: std::net::SocketAddr,
    /// The end.
    pub grace: Duration,
    /// The log.
    pub log: (Format, String),
}

/// Checks all rules and turns the settings into what the parts take.
///
/// # Errors
/// Everything that is wrong.
pub fn resolve(settings: &Settings) -> Result<Resolved, Vec<Problem>> {
    let mut problems = Vec::new();
    let amqp = check_amqp(settings, &mut problems);
    let creem = creem::check(settings, &mut problems);
    let ledger = ledger::check(settings, &mut problems);
    check_times(settings, &mut problems);
    let backoff = check_retry(settings, &mut problems);
    let lanes = check_lanes(settings, &mut problems);
    let topology = check_topology(settings, &mut problems);
    let job =
        check_job(settings, creem.as_ref().map_or(Mode::Test, |creem| creem.mode), &mut problems);
    check_hosts("creem.checkout_hosts", &settings.creem.checkout_hosts, &mut problems);
    check_hosts("job.success_hosts", &settings.job.success_hosts, &mut problems);
    if let Err(why) = logging::check(&settings.log.level) {
        problems.push(Problem::new(
            format!("`log.level` (or RUST_LOG) is not usable: {why}"),
            "give error, warn, info, debug or trace, or directives such as info,creem_checkout_worker=debug",
        ));
    }
    if let Some(rate) = settings.rate_limit.per_second
        && !(rate.is_finite() && (0.001..=1_000_000.0).contains(&rate))
    {
        problems.push(Problem::new(
            "`rate_limit.per_second` is not a number of calls",
            "give 0.001 to 1000000, or leave it out",
        ));
    }
    let (Some(creem), Some(ledger), Some(backoff), true) =
        (creem, ledger, backoff, problems.is_empty())
    else {
        return Err(problems);
    };
    Ok(Resolved {
        amqp,
        declare: settings.topology.declare,
        replies: ReplyRules { topology: topology.clone(), allow: settings.replies.allow.clone() },
        topology,
        journey: journey(settings, backoff),
        creem,
        ledger,
        job,
        lanes,
        per_second: settings.rate_limit.per_second,
        listen: settings.http.listen,
        grace: settings.shutdown.grace.0,
        log: (log_format(settings), settings.log.level.clone()),
    })
}

const fn log_format(settings: &Settings) -> Format {
    match settings.log.format {
        sections::Format::Auto => Format::Auto,
        sections::Format::Text => Format::Text,
        sections::Format::Json => Format::Json,
    }
}

fn journey(settings: &Settings, backoff: Backoff) -> JourneyRules {
    let lane = |lane: sections::Lane| LaneRules {
        policy: Policy {
            max_attempts: u32::try_from(settings.retry.max_attempts).unwrap_or(u32::MAX),
            max_elapsed: lane.max_elapsed.0,
            backoff,
        },
        max_age: lane.max_age.map(|age| age.0),
    };
    JourneyRules {
        interactive: lane(settings.lanes.interactive),
        bulk: lane(settings.lanes.bulk),
        on_unknown: match settings.creem.on_unknown {
            sections::OnUnknown::Retry => OnUnknown::Retry,
            sections::OnUnknown::Park => OnUnknown::Park,
        },
        request_timeout: settings.creem.request_timeout.0,
        retention: settings.ledger.retention.0,
    }
}

fn check_amqp(settings: &Settings, problems: &mut Vec<Problem>) -> rabbit::Options {
    let options = rabbit::Options {
        url: settings.amqp.url.clone(),
        heartbeat: settings.amqp.heartbeat.0,
        tls: amqp_tls(&settings.amqp, problems),
    };
    if !(1..=300).contains(&options.heartbeat.as_secs()) {
        problems.push(Problem::new(
            "`amqp.heartbeat` is out of bounds",
            "give 1s to 300s; 10s to 15s are usual",
        ));
    }
    match rabbit::link::uris(&options) {
        Err(error) => problems
            .push(Problem::new(error.to_string(), "give amqp://user:password@host:port/vhost")),
        Ok(uris) => {
            for uri in uris {
                let loopback = is_local(&uri.authority.host);
                let user = &uri.authority.userinfo;
                if !loopback && user.username == "guest" && user.password == "guest" {
                    problems.push(Problem::new(
                        format!("`amqp.url` uses guest:guest for {}", uri.authority.host),
                        "everybody knows that login, and RabbitMQ lets it in from loopback only unless told otherwise: make a user of the worker's own",
                    ));
                }
            }
        }
    }
    options
}

fn amqp_tls(amqp: &sections::Amqp, problems: &mut Vec<Problem>) -> Tls {
    let mut read = |key: &str, path: Option<&Path>| -> Option<String> {
        let bytes = pem(key, path?, problems)?;
        let text = String::from_utf8(bytes).ok().filter(|text| text.contains("-----BEGIN "));
        if text.is_none() {
            let what = format!("`{key}` holds no PEM");
            problems.push(Problem::new(what, "give a file that begins with -----BEGIN"));
        }
        text
    };
    let ca_pem = read("amqp.ca_file", amqp.ca_file.as_deref());
    let certificate = read("amqp.client_cert_file", amqp.client_cert_file.as_deref());
    let key = read("amqp.client_key_file", amqp.client_key_file.as_deref());
    if amqp.client_cert_file.is_some() != amqp.client_key_file.is_some() {
        problems.push(Problem::new(
            "`amqp.client_cert_file` and `amqp.client_key_file` belong together",
            "give both or none",
        ));
    }
    let given = ca_pem.is_some() || certificate.is_some() || key.is_some();
    if given && secrecy::ExposeSecret::expose_secret(&amqp.url).starts_with("amqp://") {
        problems.push(Problem::new(
            "`amqp.ca_file` and the client's certificate are for TLS, and `amqp.url` begins with amqp://",
            "begin it with amqps://, or leave them out",
        ));
    }
    let identity = certificate.zip(key).map(|(pem, key)| (pem.into_bytes(), key.into()));
    Tls { ca_pem, identity }
}

fn is_local(host: &str) -> bool {
    host == "localhost"
        || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// Reads a file of certificates.
fn pem(key: &str, path: &Path, problems: &mut Vec<Problem>) -> Option<Vec<u8>> {
    match std::fs::read(path) {
        Ok(pem) => Some(pem),
        Err(error) => {
            let what = format!("`{key}`: {} cannot be read: {error}", path.display());
            problems.push(Problem::new(what, "check the path"));
            None
        }
    }
}

/// A host that is not written the way URLs write it would never match.
fn check_hosts(key: &str, hosts: &[String], problems: &mut Vec<Problem>) {
    for host in hosts {
        let plain = |byte: u8| {
            byte.is_ascii_lowercase() || byte.is_ascii_digit() || b".-:[]".contains(&byte)
        };
        let whole = host.bytes().all(plain) && !host.starts_with('.') && !host.ends_with('.');
        if !whole || url::Host::parse(host).map(|parsed| parsed.to_string()).as_ref() != Ok(host) {
            problems.push(Problem::new(
                format!("`{key}` names {host:?}, which no URL's host ever equals"),
                "give host names only: lower case, no https://, no port, no *",
            ));
        }
    }
}

fn check_times(settings: &Settings, problems: &mut Vec<Problem>) {
    let timeout = settings.creem.request_timeout.0;
    let shown = humantime::format_duration;
    if !(Duration::from_millis(100)..=Duration::from_mins(2)).contains(&timeout) {
        problems.push(Problem::new(
            format!("`creem.request_timeout` is {}", shown(timeout)),
            "give 100ms to 120s",
        ));
    }
    let grace = settings.shutdown.grace.0;
    let least = timeout + SETTLING;
    if grace < least {
        problems.push(Problem::new(
            format!("`shutdown.grace` is {}, shorter than `creem.request_timeout` ({}) and {} to settle", shown(grace), shown(timeout), shown(SETTLING)),
            format!("give at least {}", shown(least)),
        ));
    }
    let retention = settings.ledger.retention.0;
    let longest = [settings.lanes.interactive, settings.lanes.bulk]
        .map(|lane| lane.max_elapsed.0)
        .into_iter()
        .max()
        .unwrap_or_default();
    let least = longest + Duration::from_hours(24);
    if retention < least {
        problems.push(Problem::new(
            format!(
                "`ledger.retention` is {}, and jobs are tried for up to {}",
                shown(retention),
                shown(longest)
            ),
            format!(
                "give at least {}: a job that outlives its row could get a second link",
                shown(least)
            ),
        ));
    }
}

fn check_retry(settings: &Settings, problems: &mut Vec<Problem>) -> Option<Backoff> {
    if !(1..=1000).contains(&settings.retry.max_attempts) {
        problems.push(Problem::new(
            format!("`retry.max_attempts` is {}", settings.retry.max_attempts),
            "give 1 to 1000",
        ));
    }
    let (first, longest) = (settings.retry.first.0, settings.retry.longest.0);
    if longest > LONGEST_RETRY {
        problems.push(Problem::new("`retry.longest` is longer than 30m", "give at most 30m"));
    }
    if first < Duration::from_millis(1) {
        problems.push(Problem::new("`retry.first` is shorter than 1ms", "give at least 1ms"));
        return None;
    }
    match Backoff::try_new(first, longest) {
        Ok(backoff) => Some(backoff),
        Err(why) => {
            problems.push(Problem::new(
                format!("`retry.first` and `retry.longest` do not fit: {why}"),
                "give e.g. 250ms and 60s",
            ));
            None
        }
    }
}

fn check_lanes(settings: &Settings, problems: &mut Vec<Problem>) -> Vec<LaneSize> {
    let lanes =
        [(Lane::Interactive, settings.lanes.interactive), (Lane::Bulk, settings.lanes.bulk)];
    let mut sizes = Vec::new();
    for (lane, section) in lanes {
        match u16::try_from(section.concurrency) {
            Ok(concurrency) if (1..=MAX_PREFETCH).contains(&section.concurrency) => sizes.push(LaneSize { lane, concurrency }),
            _ => problems.push(Problem::new(
                format!("`lanes.{lane}.concurrency` is {}", section.concurrency),
                format!("give 1 to {MAX_PREFETCH}, which is the most that a quorum queue lets out unacked"),
            )),
        }
        if section.max_age.is_some_and(|age| age.0.is_zero()) {
            problems.push(Problem::new(
                format!("`lanes.{lane}.max_age` is zero"),
                "leave it out, or every job with a timestamp expires",
            ));
        }
        if section.max_elapsed.0.is_zero() {
            problems.push(Problem::new(
                format!("`lanes.{lane}.max_elapsed` is zero"),
                "give the time a job may be tried",
            ));
        }
    }
    sizes
}

fn check_topology(settings: &Settings, problems: &mut Vec<Problem>) -> Topology {
    let prefix = &settings.topology.prefix;
    let name = |text: &str, most: usize| {
        (1..=most).contains(&text.len())
            && text.bytes().all(|byte| {
                byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-' | b':')
            })
    };
    if !name(prefix, 64) || prefix.starts_with("amq.") {
        problems.push(Problem::new(
            "`topology.prefix` is not usable",
            "give 1-64 letters, digits, dots, dashes or underscores, not beginning with amq.",
        ));
    }
    let topology =
        Topology::new(prefix, settings.replies.queue.as_deref(), &settings.replies.exchange);
    if !name(&topology.replies_queue, 255)
        || topology.replies_queue.starts_with("amq.")
        || topology.denies_replies_to(&topology.replies_queue)
    {
        problems.push(Problem::new(
            "`replies.queue` is not usable",
            "give a queue name that is none of the worker's own",
        ));
    }
    let exchange = &topology.replies_exchange;
    let own = [topology.dead_exchange(), topology.retry_exchange()].contains(exchange);
    let usable = name(exchange, 255) && !exchange.starts_with("amq.");
    if own || (!exchange.is_empty() && !usable) {
        problems.push(Problem::new(
            "`replies.exchange` is not usable",
            "give an exchange name, or leave it empty for the default exchange",
        ));
    }
    topology
}

fn check_job(settings: &Settings, mode: Mode, problems: &mut Vec<Problem>) -> Rules {
    let job = &settings.job;
    let mut bounded = |key: &str, value: i64, most: i64| {
        if !(1..=most).contains(&value) {
            problems
                .push(Problem::new(format!("`job.{key}` is {value}"), format!("give 1 to {most}")));
        }
        value.clamp(1, most)
    };
    let max_bytes = bounded("max_bytes", job.max_bytes, 1024 * 1024);
    let max_units = bounded("max_units", job.max_units, i64::from(u32::MAX));
    for field in job.extra_fields.iter().filter(|field| !is_extra_field(field)) {
        problems.push(Problem::new(
            format!("`job.extra_fields` names {field:?}"),
            "give names of a-z, 0-9 and _ that are no fields of Creem's request already",
        ));
    }
    let loopback_http = mode == Mode::Test;
    if let Some(url) = &job.success_url
        && let Err(code) = success_url::check(url, loopback_http, &job.success_hosts)
    {
        problems.push(Problem::new(
            format!("`job.success_url` would be refused in a job ({code})"),
            "give an https URL as browsers write it",
        ));
    }
    Rules {
        max_bytes: usize::try_from(max_bytes).unwrap_or(64 * 1024),
        max_units: u32::try_from(max_units).unwrap_or(u32::MAX),
        extra_fields: job.extra_fields.clone(),
        allow_custom_price: job.allow_custom_price,
        allow_affiliate_code: job.allow_affiliate_code,
        success_hosts: job.success_hosts.clone(),
        default_success_url: job.success_url.clone(),
        loopback_http,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn with(pairs: &[(&str, &str)]) -> Result<Resolved, String> {
        let mut environment: BTreeMap<String, String> =
            [("CREEM_API_KEY".to_owned(), "creem_test_x".to_owned())].into();
        environment
            .extend(pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
        let settings =
            super::super::load(None, &environment).map_err(|problems| format!("{problems:?}"))?;
        resolve(&settings)
            .map_err(|problems| problems.iter().map(|problem| problem.to_string() + "\n").collect())
    }

    #[test]
    fn the_defaults_need_nothing_but_a_key() {
        let resolved = with(&[]).unwrap();
        assert_eq!(resolved.creem.base_url.as_str(), "https://test-api.creem.io/");
        assert_eq!(
            with(&[("CREEM_API_KEY", "creem_live")]).unwrap().creem.base_url.as_str(),
            "https://api.creem.io/"
        );
        assert!(with(&[("CREEM_API_KEY", "")]).unwrap_err().contains("no Creem API key"));
    }

    #[test]
    fn what_does_not_fit_is_named_with_its_fix() {
        for (pairs, expected) in [
            (&[("CREEM_BASE_URL", "https://api.creem.io")][..], "mode test"),
            (
                &[("CREEM_API_KEY", "creem_x"), ("CREEM_BASE_URL", "https://test-api.creem.io")],
                "mode prod",
            ),
            (&[("CREEM_BASE_URL", "http://creem.example")], "not https"),
            (&[("CREEM_BASE_URL", "https://a:b@creem.example")], "more than a host"),
            (&[("CREEM_API_KEY", "sk_live_x")], "does not begin with creem_"),
            (&[("CREEM_API_KEY", "creem_test_x ")], "white space"),
            (&[("CREEM_API_KEY", "creem_test_é")], "no key has"),
            (&[("CHECKOUT_WORKER__CREEM__PROXY", "ftp://proxy")], "creem.proxy"),
            (&[("CHECKOUT_WORKER__CREEM__PROXY", "proxy:3128")], "creem.proxy"),
            (&[("CHECKOUT_WORKER__CREEM__CA_FILE", "/dev/null")], "creem.ca_file"),
            (&[("LEDGER_URL", "sqlite:~/x.db")], "another file"),
            (&[("LEDGER_URL", "sqlite: /tmp/x")], "another file"),
            (&[("LEDGER_URL", "sqlite://data/x.db")], "another file"),
            (&[("CHECKOUT_WORKER__CREEM__CHECKOUT_HOSTS", "https://creem.io")], "checkout_hosts"),
            (&[("CHECKOUT_WORKER__JOB__SUCCESS_HOSTS", "Shop.example")], "success_hosts"),
            (&[("CHECKOUT_WORKER__CREEM__CHECKOUT_HOSTS", "*.creem.io")], "checkout_hosts"),
            (&[("CHECKOUT_WORKER__CREEM__CHECKOUT_HOSTS", ".creem.io")], "checkout_hosts"),
            (&[("CREEM_BASE_URL", "http://127.0.0.1:1/v1/")], "ends in /v1"),
            (&[("CHECKOUT_WORKER__RETRY__FIRST", "1ns")], "retry.first"),
            (&[("CHECKOUT_WORKER__REPLIES__EXCHANGE", "amq.topic")], "replies.exchange"),
            (&[("CHECKOUT_WORKER__REPLIES__QUEUE", "amq.mine")], "replies.queue"),
            (&[("LEDGER_URL", "sqlite:data/")], "another file"),
            (&[("CHECKOUT_WORKER__LOG__LEVEL", "")], "log.level"),
            (&[("CHECKOUT_WORKER__JOB__EXTRA_FIELDS", "metadata")], "extra_fields"),
            (&[("CHECKOUT_WORKER__JOB__EXTRA_FIELDS", "customer.email")], "extra_fields"),
            (&[("CHECKOUT_WORKER__LOG__LEVEL", "warning")], "log.level"),
            (&[("RUST_LOG", "a=b=c")], "RUST_LOG"),
            (&[("CHECKOUT_WORKER__REPLIES__EXCHANGE", "checkout.retry")], "replies.exchange"),
            (
                &[("CHECKOUT_WORKER__LANES__BULK__MAX_ELAPSED", "18446744073709551615s")],
                "max_elapsed",
            ),
            (&[("CHECKOUT_WORKER__LANES__BULK__MAX_AGE", "0s")], "max_age"),
            (&[("AMQP_URL", "amqp://u:12#pw@host/")], "%23"),
            (&[("CHECKOUT_WORKER__LANES__BULK__CONCURRENCY", "0")], "lanes.bulk.concurrency"),
            (&[("CHECKOUT_WORKER__LANES__INTERACTIVE__CONCURRENCY", "2001")], "1 to 2000"),
            (&[("CHECKOUT_WORKER__SHUTDOWN__GRACE", "11s")], "creem.request_timeout"),
            (&[("CHECKOUT_WORKER__LEDGER__RETENTION", "7h")], "ledger.retention"),
            (&[("CHECKOUT_WORKER__RETRY__FIRST", "2m")], "retry.first"),
            (&[("CHECKOUT_WORKER__RETRY__MAX_ATTEMPTS", "0")], "retry.max_attempts"),
            (&[("CHECKOUT_WORKER__RATE_LIMIT__PER_SECOND", "NaN")], "rate_limit.per_second"),
            (&[("CHECKOUT_WORKER__RATE_LIMIT__PER_SECOND", "0")], "rate_limit.per_second"),
            (&[("CHECKOUT_WORKER__REPLIES__QUEUE", "checkout.jobs")], "replies.queue"),
            (
                &[("CHECKOUT_WORKER__JOB__SUCCESS_URL", "http://shop.example/")],
                "success_url_scheme",
            ),
            (&[("AMQP_URL", "amqp://guest:guest@rabbit.internal/")], "guest"),
            (&[("AMQP_URL", "localhost")], "amqp://"),
            (&[("CHECKOUT_WORKER__AMQP__HEARTBEAT", "0s")], "amqp.heartbeat"),
        ] {
            assert_refused(pairs, expected);
        }
    }

    fn assert_refused(pairs: &[(&str, &str)], expected: &str) {
        let text = with(pairs).unwrap_err();
        assert!(text.contains(expected), "{pairs:?}: {text}");
    }

    #[test]
    fn a_ledgers_url_says_what_it_means() {
        for (pairs, expected) in [
            (&[("LEDGER_URL", "postgres://x:y:z")][..], "ledger.url"),
            (&[("LEDGER_URL", "postgres://host/db?color=red")], "ledger.url"),
            (&[("LEDGER_URL", "mysql://host/db")], "ledger.url"),
            // It would be spoken to in clear text, as if it were this machine.
            (&[("LEDGER_URL", "postgres://u:p@localhost/d?hostaddr=192.0.2.2")], "hostaddr"),
            (&[("LEDGER_URL", "postgres:///d?user=u&hostaddr=192.0.2.2")], "hostaddr"),
            (&[("LEDGER_URL", "postgres://host/d?sslmode=verify-full")], "prefer or require"),
            (
                &[
                    ("LEDGER_URL", "postgres://h/d"),
                    ("CHECKOUT_WORKER__LEDGER__CA_FILE", "/dev/null"),
                ],
                "ledger.ca_file",
            ),
            (&[("LEDGER_URL", "sqlite::memory:")], "ledger.url"),
        ] {
            assert_refused(pairs, expected);
        }
    }

    #[test]
    fn a_broker_url_says_what_it_means() {
        for (pairs, expected) in [
            (&[("CHECKOUT_WORKER__AMQP__CA_FILE", "/dev/null")], "holds no PEM"),
            (&[("CHECKOUT_WORKER__AMQP__CLIENT_KEY_FILE", "/nothing")], "belong together"),
            (&[("AMQP_URL", "amqp://u:p@host,,/")], "a host is missing"),
            (&[("AMQP_URL", "amqp:///")], "a host is missing"),
            (&[("AMQP_URL", "amqp://u:p@host/?hearbeat=5")], "hearbeat"),
            (&[("AMQP_URL", "amqp://u:p@host/?heartbeat=0")], "heartbeat=0"),
            (&[("AMQP_URL", "amqp://u:p@host/?heartbeat=00")], "heartbeat=0"),
            (&[("AMQP_URL", "amqp://u:p@host/?frame_max=1")], "frame_max=1"),
            (&[("AMQP_URL", "amqp://u:p@host/?frame_max=4294967295")], "frame_max=4294967295"),
            (&[("AMQP_URL", "amqp://u:p@host/?channel_max=2")], "channel_max"),
        ] {
            assert_refused(pairs, expected);
        }
    }

    #[test]
    fn everything_is_said_at_once() {
        let text = with(&[
            ("CREEM_API_KEY", ""),
            ("CREEM_BASE_URL", "ftp://x"),
            ("CHECKOUT_WORKER__CREEM__PROXY", "x"),
            ("CHECKOUT_WORKER__CREEM__CA_FILE", "/nothing/here"),
            ("LEDGER_URL", "x"),
            ("CHECKOUT_WORKER__RETRY__MAX_ATTEMPTS", "0"),
        ])
        .unwrap_err();
        assert_eq!(text.lines().count(), 6, "{text}");
    }
}
