//! What an answer of Creem's means for a job: did it happen, and may we ask again?
//!
//! The status is trusted, the body is optional text. Only a status that Creem gives before it
//! makes a session counts as "certainly not made"; all the rest is unknown, because calling an
//! unknown answer a failure is how two payable links come about.

use std::time::{Duration, SystemTime};

use url::Url;

use super::{Response, redact};
use crate::job::json::Node;
use crate::job::success_url::is_loopback;
use crate::job::{Mode, Problem, RequestId};

/// Longest `checkout_url` that is handed on.
const MAX_URL: usize = 2048;

/// A session that was made, with a link that may be handed out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkout {
    /// Creem's id.
    pub id: String,
    /// The link.
    pub url: String,
}

/// What came of asking.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// Made.
    Made(Checkout),
    /// A session exists and its link could not be had.
    Linkless {
        /// Creem's id of it.
        checkout_id: String,
    },
    /// Refused for good; no session.
    Refused(Problem),
    /// Creem says that something with this identifier exists already: a session may.
    Duplicate(Problem),
    /// Certainly not made; ask again.
    NotMade {
        /// Why.
        reason: String,
    },
    /// Nobody knows.
    Unknown {
        /// What was seen.
        reason: String,
        /// When Creem wants to be asked again.
        retry_after: Option<Duration>,
        /// Whether Creem said that it has too much to do (503).
        overloaded: bool,
    },
    /// Not made: too fast.
    Throttled {
        /// When Creem wants to be asked again.
        retry_after: Option<Duration>,
    },
    /// Not made: the key was not accepted for this call.
    KeyRefused(Problem),
    /// A session was made, but the answer is not this job's; its link must not be published.
    Mismatch {
        /// What does not fit.
        reason: String,
        /// The session's id, where it could be read.
        checkout_id: Option<String>,
    },
}

/// What an answer says of how fast Creem may be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pressure {
    /// It took the call.
    Taken,
    /// It said "slow down" (429).
    SlowDown,
    /// It said that it has too much to do (503).
    Overloaded,
}

impl Answer {
    /// What the answer says of how fast Creem may be asked, if anything. One that never came says nothing:
    /// Creem's latency and its faults have other reasons.
    #[must_use]
    pub const fn pressure(&self) -> Option<Pressure> {
        match self {
            Self::Throttled { .. } => Some(Pressure::SlowDown),
            Self::Unknown { overloaded: true, .. } => Some(Pressure::Overloaded),
            Self::Made(_)
            | Self::Linkless { .. }
            | Self::Mismatch { .. }
            | Self::Refused(_)
            | Self::Duplicate(_)
            | Self::KeyRefused(_) => Some(Pressure::Taken),
            Self::NotMade { .. } | Self::Unknown { overloaded: false, .. } => None,
        }
    }

    /// The answer's name in metrics and logs.
    #[must_use]
    pub const fn label(&self) -> &'static str {
        match self {
            Self::Made(_) => "made",
            Self::Linkless { .. } => "linkless",
            Self::Refused(_) => "refused",
            Self::Duplicate(_) => "duplicate",
            Self::NotMade { .. } => "not_made",
            Self::Unknown { .. } => "unknown",
            Self::Throttled { .. } => "throttled",
            Self::KeyRefused(_) => "key_refused",
            Self::Mismatch { .. } => "mismatch",
        }
    }
}

/// What an answer must agree with.
#[derive(Debug, Clone, Copy)]
pub struct Expected<'a> {
    /// The job's id.
    pub request_id: &'a RequestId,
    /// The key's mode.
    pub mode: Mode,
    /// If not empty, the only hosts of a link.
    pub checkout_hosts: &'a [String],
    /// Whether Creem itself is on loopback, so that its links may be `http`.
    pub loopback: bool,
}

/// Judges the answer to a create.
#[must_use]
pub fn of_create(response: &Response, expected: &Expected<'_>) -> Answer {
    let retry_after = response.retry_after.as_deref().and_then(retry_after);
    let overloaded = response.status.as_u16() == 503;
    let unknown = |reason: String| Answer::Unknown { reason, retry_after, overloaded };
    match response.status.as_u16() {
        200 | 201 => of_success(response, expected),
        429 => Answer::Throttled { retry_after },
        401 | 403 => Answer::KeyRefused(problem(
            response,
            "creem_key_refused",
            "Creem did not accept the API key",
        )),
        // Timeout, conflict, too early, trouble: Creem may have made it all the same.
        code @ (408 | 409 | 425 | 500..=599) => unknown(format!("HTTP {code}")),
        400..=499 => of_refusal(response),
        code @ 300..=399 => unknown(format!(
            "HTTP {code}, a redirect, which is never followed: check creem.base_url"
        )),
        code => unknown(format!("HTTP {code}, which the API does not document")),
    }
}

/// What came of the question for a session's link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fetched {
    /// That is how it is.
    Certain(Answer),
    /// Nobody knows yet; the question may be put again.
    Later {
        /// Creem's wish.
        retry_after: Option<Duration>,
        /// Whether Creem was asked too often.
        throttled: bool,
    },
}

/// Judges the answer to the question for a link; the session exists whatever is said.
#[must_use]
pub fn of_fetch(response: &Response, expected: &Expected<'_>, checkout_id: &str) -> Fetched {
    let checkout_id = checkout_id.to_owned();
    match response.status.as_u16() {
        200 => {}
        code @ (408 | 425 | 429 | 500..=599) => {
            let retry_after = response.retry_after.as_deref().and_then(retry_after);
            return Fetched::Later { retry_after, throttled: code == 429 };
        }
        _ => return Fetched::Certain(Answer::Linkless { checkout_id }),
    }
    let answer = of_success(response, expected);
    Fetched::Certain(match &answer {
        Answer::Made(checkout) if checkout.id != checkout_id => Answer::Mismatch {
            reason: "asked for one session, Creem answered with another".to_owned(),
            checkout_id: Some(checkout_id),
        },
        Answer::Made(_) | Answer::Mismatch { .. } => answer,
        // Whatever else was said of it, the session is there.
        Answer::Linkless { .. }
        | Answer::Refused(_)
        | Answer::Duplicate(_)
        | Answer::NotMade { .. }
        | Answer::Unknown { .. }
        | Answer::Throttled { .. }
        | Answer::KeyRefused(_) => Answer::Linkless { checkout_id },
    })
}

/// What Creem says of a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Seen {
    /// Its status: `pending`, `processing`, `completed`, `expired`, or a word that is new.
    Status(String),
    /// There is none of that id.
    Gone,
    /// The question cannot be answered.
    Never(String),
    /// Not now.
    Later {
        /// Why.
        why: String,
        /// Whether Creem was asked too often, and when it wants to be asked again.
        throttled: Option<Option<Duration>>,
    },
}

/// Judges the answer to the question what has become of a session.
#[must_use]
pub fn of_look_up(response: &Response, checkout_id: &str) -> Seen {
    let never = |why: &str| Seen::Never(format!("HTTP {}{why}", response.status.as_u16()));
    match response.status.as_u16() {
        200 => {}
        404 => return Seen::Gone,
        429 => {
            let retry_after = response.retry_after.as_deref().and_then(retry_after);
            return Seen::Later { why: "HTTP 429".to_owned(), throttled: Some(retry_after) };
        }
        code @ (408 | 425 | 500..=599) => {
            return Seen::Later { why: format!("HTTP {code}"), throttled: None };
        }
        401 | 403 => return never(": Creem does not accept the API key"),
        _ => return never(""),
    }
    let text = response.body.as_ref().and_then(|body| std::str::from_utf8(body).ok());
    let node = text.and_then(|text| Node::parse(text).ok());
    let field = |name: &str| node.as_ref().and_then(|node| node.get(name)).and_then(Node::as_str);
    if field("id").is_some_and(|id| id != checkout_id) {
        return never(", but it answered with another session");
    }
    let word = |status: &&str| {
        (1..=32).contains(&status.len())
            && status.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
    };
    match field("status").filter(word) {
        Some(status) => Seen::Status(status.to_owned()),
        None => never(", but it gave no status"),
    }
}

fn of_success(response: &Response, expected: &Expected<'_>) -> Answer {
    let unknown = |reason: &str| Answer::Unknown {
        reason: format!("HTTP {}, but {reason}", response.status.as_u16()),
        retry_after: None,
        overloaded: false,
    };
    let Some(body) = &response.body else { return unknown("its body is too large or was cut off") };
    let Ok(text) = std::str::from_utf8(body) else { return unknown("its body is not UTF-8") };
    let Ok(node @ Node::Object(_)) = Node::parse(text) else {
        return unknown("its body is not a JSON object");
    };
    let id = node.get("id").and_then(Node::as_str).filter(|id| is_id(id)).map(str::to_owned);
    let mismatch = |reason: String| Answer::Mismatch { reason, checkout_id: id.clone() };
    match node.get("request_id") {
        None | Some(Node::Null) => {}
        Some(Node::String(echoed)) if echoed == expected.request_id.as_str() => {}
        Some(_) => return mismatch("the answer carries another request_id".to_owned()),
    }
    match node.get("mode") {
        None | Some(Node::Null) => {}
        Some(Node::String(mode)) if expected.mode.accepts(mode) => {}
        Some(_) => return mismatch(format!("the answer is not of mode {}", expected.mode)),
    }
    let Some(id) = id.clone() else { return unknown("it names no session") };
    match node.get("checkout_url") {
        None | Some(Node::Null) => Answer::Linkless { checkout_id: id },
        Some(Node::String(url)) => match check_url(url, expected) {
            Ok(()) => Answer::Made(Checkout { id, url: url.clone() }),
            Err(reason) => mismatch(format!("its checkout_url {reason}")),
        },
        Some(_) => mismatch("its checkout_url is not a string".to_owned()),
    }
}

/// An id that may go into replies, queries and logs.
fn is_id(id: &str) -> bool {
    (1..=256).contains(&id.len()) && id.bytes().all(|byte| byte.is_ascii_graphic())
}

fn check_url(text: &str, expected: &Expected<'_>) -> Result<(), &'static str> {
    if text.len() > MAX_URL {
        return Err("is longer than 2048 characters");
    }
    // Browsers mend much that others do not: what is handed on must read the same everywhere.
    let plain = |byte: u8| byte.is_ascii_graphic() && !b"\"<>\\^`{|}".contains(&byte);
    if !text.bytes().all(plain) || text.contains(":///") {
        return Err("is not written as URLs are");
    }
    let url = Url::parse(text).map_err(|_| "is not a URL")?;
    let host = url.host().ok_or("names no host")?;
    match url.scheme() {
        "https" => {}
        "http" if expected.loopback && is_loopback(&host) => {}
        _ => return Err("is not https"),
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err("holds a user name");
    }
    let name = url.host_str().unwrap_or_default();
    if expected.checkout_hosts.is_empty() || expected.checkout_hosts.iter().any(|host| host == name)
    {
        Ok(())
    } else {
        Err("is on a host that creem.checkout_hosts does not name")
    }
}

fn of_refusal(response: &Response) -> Answer {
    let mut problem = problem(response, "creem_rejected", "Creem refused the request");
    let duplicate =
        problem.details.iter().any(|text| text.to_ascii_lowercase().contains("already exist"));
    if duplicate {
        "creem_duplicate".clone_into(&mut problem.code);
        "Creem says that this identifier exists already, so a checkout may exist"
            .clone_into(&mut problem.message);
        return Answer::Duplicate(problem);
    }
    Answer::Refused(problem)
}

/// Creem's error body, as far as there is one: `message` is an array, a string, or absent.
fn problem(response: &Response, code: &str, fallback: &str) -> Problem {
    let text = response.body.as_ref().and_then(|body| std::str::from_utf8(body).ok());
    let node = text.and_then(|text| Node::parse(text).ok());
    let field = |name: &str| node.as_ref().and_then(|node| node.get(name));
    let details: Vec<String> = match field("message") {
        Some(Node::Array(items)) => {
            items.iter().filter_map(Node::as_str).take(8).map(clean).collect()
        }
        Some(Node::String(text)) => vec![clean(text)],
        _ => Vec::new(),
    };
    let trace_id = field("trace_id")
        .and_then(Node::as_str)
        .filter(|id| {
            id.len() <= 64 && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
        })
        .map(str::to_owned);
    Problem {
        code: code.to_owned(),
        message: details
            .first()
            .map_or_else(|| fallback.to_owned(), |first| format!("{fallback}: {first}")),
        details,
        http_status: Some(response.status.as_u16()),
        trace_id,
    }
}

fn clean(text: &str) -> String {
    redact::text(text, 256)
}

/// Reads a `Retry-After`: seconds, or an HTTP date. Anything else counts as absent.
///
/// The result is not clamped here; [`crate::retry::backoff`] holds the bounds.
#[must_use]
pub fn retry_after(text: &str) -> Option<Duration> {
    let text = text.trim();
    if text.bytes().all(|byte| byte.is_ascii_digit()) && !text.is_empty() {
        return Some(Duration::from_secs(text.parse().unwrap_or(u64::MAX)));
    }
    let date = httpdate::parse_http_date(text).ok()?;
    #[expect(clippy::disallowed_methods, reason = "an HTTP date is relative to the wall clock")]
    let now = SystemTime::now();
    Some(date.duration_since(now).unwrap_or(Duration::ZERO))
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use reqwest::StatusCode;

    fn judge(status: u16, body: &str) -> Answer {
        judge_with(status, body, &[])
    }

    fn judge_with(status: u16, body: &str, hosts: &[String]) -> Answer {
        let id = RequestId::parse("job-42").unwrap();
        let expected =
            Expected { request_id: &id, mode: Mode::Test, checkout_hosts: hosts, loopback: false };
        let response = Response {
            status: StatusCode::from_u16(status).unwrap(),
            retry_after: None,
            body: Some(Bytes::copy_from_slice(body.as_bytes())),
        };
        of_create(&response, &expected)
    }

    const GOOD: &str = r#"{"id":"ch_1","object":"checkout","mode":"test","request_id":"job-42","checkout_url":"https://creem.io/x"}"#;

    #[test]
    fn every_status_has_its_class() {
        for (status, label) in [
            (200, "made"),
            (201, "made"),
            (202, "unknown"),
            (204, "unknown"),
            (206, "unknown"),
            (301, "unknown"),
            (302, "unknown"),
            (307, "unknown"),
            (308, "unknown"),
            (400, "refused"),
            (401, "key_refused"),
            (402, "refused"),
            (403, "key_refused"),
            (404, "refused"),
            (408, "unknown"),
            (409, "unknown"),
            (413, "refused"),
            (415, "refused"),
            (418, "refused"),
            (422, "refused"),
            (425, "unknown"),
            (429, "throttled"),
            (451, "refused"),
            (500, "unknown"),
            (502, "unknown"),
            (503, "unknown"),
            (504, "unknown"),
            (599, "unknown"),
            (700, "unknown"),
        ] {
            assert_eq!(judge(status, GOOD).label(), label, "{status}");
        }
    }

    #[test]
    fn a_success_that_cannot_be_read_is_unknown() {
        for body in [
            "",
            "null",
            "[]",
            "42",
            "<html></html>",
            "{",
            "{\"id\":\"ch_1\",\"id\":\"ch_2\"}",
            "{\"mode\":\"test\"}",
            "{\"id\":5,\"checkout_url\":\"https://a.b/\"}",
            "{\"id\":\"\",\"checkout_url\":\"https://a.b/\"}",
        ] {
            assert_eq!(judge(200, body).label(), "unknown", "{body}");
        }
        let deep =
            format!("{{\"id\":\"ch_1\",\"x\":{}{}}}", "[".repeat(10_000), "]".repeat(10_000));
        assert_eq!(judge(200, &deep).label(), "unknown");
    }

    #[test]
    fn an_answer_for_another_job_mode_or_place_is_never_a_link() {
        for (body, why) in [
            (GOOD.replace("job-42", "job-43"), "request_id"),
            (GOOD.replace("\"job-42\"", "42"), "request_id"),
            (GOOD.replace("\"test\"", "\"prod\""), "mode"),
            (GOOD.replace("\"test\"", "7"), "mode"),
            (GOOD.replace("https://creem.io/x", "http://creem.io/x"), "https"),
            (GOOD.replace("https://creem.io/x", "http://127.0.0.1/x"), "https"),
            (GOOD.replace("https://creem.io/x", "javascript:alert(1)"), "host"),
            (GOOD.replace("https://creem.io/x", "https://a@creem.io/x"), "user"),
            (GOOD.replace("https://creem.io/x", "https://creem.io/\\nx"), "as URLs are"),
            (GOOD.replace("https://creem.io/x", "https:///creem.io/x"), "as URLs are"),
            (GOOD.replace("https://creem.io/x", "https://creem.io/<x>"), "as URLs are"),
            (GOOD.replace("https://creem.io/x", "https://creem.io/\u{202e}x"), "as URLs are"),
            (GOOD.replace("\"https://creem.io/x\"", "5"), "string"),
            (GOOD.replace("/x\"", &format!("/{}\"", "x".repeat(3000))), "2048"),
        ] {
            let answer = judge(200, &body);
            let Answer::Mismatch { reason, checkout_id } = &answer else {
                panic!("{answer:?} for {body}");
            };
            assert!(reason.contains(why), "{reason} for {body}");
            assert_eq!(checkout_id.as_deref(), Some("ch_1"));
        }
        assert_eq!(judge_with(200, GOOD, &["creem.io".into()]).label(), "made");
        assert_eq!(judge_with(200, GOOD, &["checkout.creem.io".into()]).label(), "mismatch");
    }

    #[test]
    fn what_creem_leaves_out_is_no_mismatch() {
        assert_eq!(
            judge(200, r#"{"id":"ch_1","checkout_url":"https://creem.io/x"}"#).label(),
            "made"
        );
        assert_eq!(
            judge(
                200,
                r#"{"id":"ch_1","request_id":null,"mode":null,"checkout_url":"https://creem.io/x"}"#
            )
            .label(),
            "made"
        );
        assert_eq!(judge(200, r#"{"id":"ch_1","mode":"test"}"#).label(), "linkless");
        assert_eq!(
            judge(200, r#"{"id":"ch_1","mode":"test","checkout_url":null}"#).label(),
            "linkless"
        );
    }

    #[test]
    fn error_bodies_are_optional_text() {
        let Answer::Refused(problem) = judge(
            400,
            r#"{"trace_id":"550e8400-e29b","status":400,"error":"Bad Request","message":["customer.email ada@example.com must be an email","x"]}"#,
        ) else {
            panic!("a 400 is a refusal")
        };
        assert_eq!(
            (problem.http_status, problem.trace_id.as_deref()),
            (Some(400), Some("550e8400-e29b"))
        );
        assert_eq!(problem.details.len(), 2);
        assert!(!format!("{problem:?}").contains("ada@"), "{problem:?}");
        for body in
            ["", "<html>", "{\"message\":\"text\"}", "{\"message\":5}", "{\"message\":[5,null]}"]
        {
            assert_eq!(judge(404, body).label(), "refused", "{body}");
        }
        let huge = format!("{{\"message\":[\"{}\"]}}", "x".repeat(200_000));
        let Answer::Refused(problem) = judge(400, &huge) else { panic!("a 400 is a refusal") };
        assert!(problem.details[0].chars().count() <= 257);
    }

    #[test]
    fn already_exists_is_not_a_refusal() {
        assert_eq!(
            judge(400, r#"{"message":["A resource with this identifier already exists"]}"#).label(),
            "duplicate"
        );
    }

    #[test]
    fn retry_after_reads_seconds_and_dates_and_nothing_else() {
        assert_eq!(retry_after("7"), Some(Duration::from_secs(7)));
        assert_eq!(retry_after(" 0 "), Some(Duration::ZERO));
        assert_eq!(retry_after("99999999999999999999999"), Some(Duration::from_secs(u64::MAX)));
        assert_eq!(retry_after("Sun, 06 Nov 1994 08:49:37 GMT"), Some(Duration::ZERO));
        #[expect(clippy::disallowed_methods, reason = "an HTTP date is relative to the wall clock")]
        let soon = httpdate::fmt_http_date(SystemTime::now() + Duration::from_hours(1));
        assert!(retry_after(&soon).is_some_and(|wait| (3500..=3600).contains(&wait.as_secs())));
        for text in ["", "-5", "1e9", "1.5", "soon", "+3"] {
            assert_eq!(retry_after(text), None, "{text}");
        }
    }
}
