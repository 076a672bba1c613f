//! Rules between the settings. Everything that is wrong is said at once, each with its fix.

mod amqp;
mod creem;
mod job;
mod ledger;
mod worker;

pub use creem::NO_KEY;

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::Problem;
use super::secrets::{read_small_file, shown};
use super::sections::{self, Settings};
use crate::job::{Mode, Rules};
use crate::ledger::{OnUnknown, postgres};
use crate::observe::logging::{self, Format};
use crate::pace::Limits;
use crate::rabbit::envelope::ReplyRules;
use crate::rabbit::{self, Topology};
use crate::retry::{Backoff, Policy};
use crate::worker::LaneSize;
use crate::worker::rules::{LaneRules, Rules as JourneyRules};
use amqp::{check_allowed, check_amqp, check_topology};
use job::{check_hosts, check_job};
use worker::{check_lanes, check_retry, check_times};

/// Largest file of certificates: a whole system's are a quarter of a megabyte.
const MAX_PEM: u64 = 4 * 1024 * 1024;

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
    /// Calls a second, and whose they are.
    pub limits: Limits,
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
    check_allowed(settings, &topology, &mut problems);
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
    let share = settings.rate_limit.bulk_share;
    if !(share.is_finite() && (0.001..=0.5).contains(&share)) {
        problems.push(Problem::new(
            format!("`rate_limit.bulk_share` is {share}"),
            "give 0.001 to 0.5: a part of the calls, e.g. 0.05",
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
        limits: Limits {
            ceiling: settings.rate_limit.per_second,
            bulk_share: settings.rate_limit.bulk_share,
        },
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

/// Reads a file of certificates, or of a key.
fn pem(key: &str, path: &Path, problems: &mut Vec<Problem>) -> Option<Vec<u8>> {
    match read_small_file(path, MAX_PEM) {
        Ok(pem) => Some(pem.into_bytes()),
        Err(error) => {
            let path = shown(&path.to_string_lossy());
            let what = format!("`{key}`: {path} cannot be read: {error}");
            problems.push(Problem::new(what, "give the path of a PEM file"));
            None
        }
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
            (&[("LEDGER_URL", "sqlite:postgres://u:canary@h/d")], "another file"),
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
            (&[("CHECKOUT_WORKER__LANES__BULK__MAX_AGE", "1ns")], "lanes.bulk.max_age"),
            (&[("CHECKOUT_WORKER__LANES__BULK__MAX_ELAPSED", "1ns")], "lanes.bulk.max_elapsed"),
            (&[("CHECKOUT_WORKER__JOB__MAX_BYTES", "1")], "job.max_bytes"),
            (&[("CREEM_BASE_URL", "https://api.creem.io.")], "mode test"),
            (&[("CHECKOUT_WORKER__REPLIES__ALLOW", "checkout.jobs")], "replies.allow"),
            (&[("CHECKOUT_WORKER__REPLIES__ALLOW", "a b,[\"c\"]")], "replies.allow"),
            (&[("CHECKOUT_WORKER__REPLIES__ALLOW", ",")], "replies.allow"),
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

    #[test]
    fn what_is_said_of_a_lane_is_that_lanes() {
        let pairs = [
            ("CHECKOUT_WORKER__LANES__INTERACTIVE__MAX_AGE", "15m"),
            ("CHECKOUT_WORKER__LANES__BULK__MAX_AGE", "2d"),
            ("CHECKOUT_WORKER__LANES__INTERACTIVE__MAX_ELAPSED", "50s"),
            ("CHECKOUT_WORKER__LANES__BULK__MAX_ELAPSED", "5h"),
            ("CHECKOUT_WORKER__RATE_LIMIT__BULK_SHARE", "0.25"),
        ];
        let resolved = with(&pairs).unwrap();
        let rules = resolved.journey;
        assert_eq!(rules.interactive.max_age, Some(Duration::from_mins(15)));
        assert_eq!(rules.bulk.max_age, Some(Duration::from_hours(48)));
        assert_eq!(rules.interactive.policy.max_elapsed, Duration::from_secs(50));
        assert_eq!(rules.bulk.policy.max_elapsed, Duration::from_hours(5));
        assert_eq!(resolved.limits.bulk_share.to_bits(), 0.25_f64.to_bits());
    }

    #[test]
    fn a_key_in_the_place_of_its_path_is_not_shown() {
        for (name, value) in [
            ("CHECKOUT_WORKER__AMQP__CLIENT_KEY_FILE", "-----BEGIN PRIVATE KEY-----\nMIICANARY"),
            ("CHECKOUT_WORKER__LEDGER__CA_FILE", "creem_test_CANARY"),
            ("CHECKOUT_WORKER__CREEM__CA_FILE", "MIICANARY\nMIICANARY\n"),
        ] {
            let pairs = [("LEDGER_URL", "postgres://h/d"), (name, value)];
            let text = with(&pairs).unwrap_err();
            assert!(!text.contains("CANARY") && text.contains("looks like"), "{text}");
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
            (&[("CHECKOUT_WORKER__AMQP__CA_FILE", "/dev/null")], "not a regular file"),
            (&[("CHECKOUT_WORKER__AMQP__CA_FILE", "Cargo.toml")], "holds no PEM"),
            (&[("CHECKOUT_WORKER__AMQP__CLIENT_KEY_FILE", "/nothing")], "belong together"),
            (&[("AMQP_URL", "amqp://u:p@host,,/")], "a host is missing"),
            (&[("AMQP_URL", "amqp:///")], "a host is missing"),
            (&[("AMQP_URL", "amqp://u:p@host/")], "%2f"),
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
