//! The reply message's JSON, version 1 (`checkout.result.v1`).

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::key::{Key, Mode};
use super::outcome::{Ending, Problem, Status};

/// The `type` property of every reply.
pub const TYPE: &str = "checkout.result.v1";

/// A reply as it is on the wire. Absent fields are left out, never null.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reply {
    /// The job's id; left out where it could not be read.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub request_id: Option<String>,
    /// The status word.
    pub status: String,
    /// What the caller does next.
    pub next: String,
    /// Creem's id of the session.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub checkout_id: Option<String>,
    /// The link.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub checkout_url: Option<String>,
    /// `test` or `prod`; with a link only.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub mode: Option<String>,
    /// The product asked for; with a link only.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub product_id: Option<String>,
    /// What went wrong.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub error: Option<ReplyError>,
    /// Calls sent to Creem for this outcome.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub attempts: Option<u32>,
    /// When the outcome was made, RFC 3339, UTC.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub created_at: Option<String>,
}

/// The `error` object of a reply.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplyError {
    /// Stable name of the rule or cause.
    pub code: String,
    /// One sentence.
    pub message: String,
    /// Creem's texts, or the fields of a conflict.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub details: Vec<String>,
    /// HTTP status of Creem's answer.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub http_status: Option<u16>,
    /// Creem's trace id.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub trace_id: Option<String>,
}

impl From<&Problem> for ReplyError {
    fn from(problem: &Problem) -> Self {
        Self {
            code: problem.code.clone(),
            message: problem.message.clone(),
            details: problem.details.clone(),
            http_status: problem.http_status,
            trace_id: problem.trace_id.clone(),
        }
    }
}

/// What a stored reply says besides its ending.
#[derive(Debug, Clone, Copy)]
pub struct Facts<'a> {
    /// Whose reply it is.
    pub key: &'a Key,
    /// The product asked for.
    pub product_id: &'a str,
    /// Calls sent.
    pub attempts: u32,
    /// When, in milliseconds since 1970.
    pub created_at: i64,
    /// Whether `creem.on_unknown` is `park`.
    pub park: bool,
}

/// The bytes of an ending's reply: made once, stored, and from then on only copied.
#[must_use]
pub fn encode(ending: &Ending, facts: Facts<'_>) -> Vec<u8> {
    let status = ending.status();
    let (checkout_id, checkout_url) = match ending {
        Ending::Succeeded { checkout_id, checkout_url } => {
            (Some(checkout_id.clone()), Some(checkout_url.clone()))
        }
        Ending::Rejected(_)
        | Ending::Expired(_)
        | Ending::Failed(_)
        | Ending::Unresolved(_)
        | Ending::Cancelled(_) => (None, None),
    };
    let linked = checkout_url.is_some();
    to_bytes(&Reply {
        request_id: Some(facts.key.request_id.to_string()),
        status: status.as_str().to_owned(),
        next: status.next(facts.park).to_owned(),
        checkout_id,
        checkout_url,
        mode: linked.then(|| facts.key.mode.as_str().to_owned()),
        product_id: linked.then(|| facts.product_id.to_owned()),
        error: ending.problem().map(ReplyError::from),
        attempts: Some(facts.attempts),
        created_at: Some(rfc3339(facts.created_at)),
    })
}

/// The bytes of an `invalid` or `conflict` answer, which is made afresh each time it is asked
/// for and therefore carries no time: the same question must give the same bytes.
#[must_use]
pub fn encode_answer(status: Status, request_id: Option<&str>, problem: &Problem) -> Vec<u8> {
    to_bytes(&Reply {
        request_id: request_id.map(str::to_owned),
        status: status.as_str().to_owned(),
        next: status.next(false).to_owned(),
        checkout_id: None,
        checkout_url: None,
        mode: None,
        product_id: None,
        error: Some(problem.into()),
        attempts: None,
        created_at: None,
    })
}

fn to_bytes(reply: &Reply) -> Vec<u8> {
    serde_json::to_vec(reply).expect("a reply has only string keys")
}

/// The `message_id` of a stored outcome: follows from its bytes, so a repeat carries it again.
#[must_use]
pub fn message_id(mode: Mode, reply: &[u8]) -> String {
    digest(&[mode.as_str().as_bytes(), reply])
}

/// The `message_id` of an `invalid` or `conflict`: follows from the job's body and the answer.
#[must_use]
pub fn answer_message_id(body: &[u8], answer: &[u8]) -> String {
    digest(&[body, answer])
}

/// Tells lists of texts apart, the same in every version of this program: 128 bits of SHA-256 over each part with
/// its length, as 32 hexadecimal digits.
#[must_use]
pub fn digest(parts: &[&[u8]]) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hash.finalize()[..16].iter().fold(String::with_capacity(32), |mut out, byte| {
        use std::fmt::Write as _;
        write!(out, "{byte:02x}").expect("writing to a string cannot fail");
        out
    })
}

/// A time as RFC 3339 in UTC with milliseconds, e.g. `2026-11-22T18:00:00.123Z`.
#[must_use]
pub fn rfc3339(millis: i64) -> String {
    jiff::Timestamp::from_millisecond(millis)
        .map_or_else(|_| "1970-01-01T00:00:00.000Z".to_owned(), |time| format!("{time:.3}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::RequestId;

    #[test]
    fn a_digest_is_the_same_in_every_version() {
        assert_eq!(digest(&[b"a", b"bc"]), "9a8acca1b6c6c0befd3fbc756aed625d");
        assert_ne!(digest(&[b"ab", b"c"]), digest(&[b"a", b"bc"]));
    }

    #[test]
    fn a_link_is_written_as_the_readme_shows_it() {
        let key = Key { mode: Mode::Test, request_id: RequestId::parse("order_1").unwrap() };
        let ending = Ending::Succeeded {
            checkout_id: "ch_1".into(),
            checkout_url: "https://creem.io/test/checkout/prod_1/ch_1".into(),
        };
        let facts = Facts {
            key: &key,
            product_id: "prod_1",
            attempts: 1,
            created_at: 1_795_370_400_000,
            park: false,
        };
        assert_eq!(
            String::from_utf8(encode(&ending, facts)).unwrap(),
            r#"{"request_id":"order_1","status":"succeeded","next":"redirect","checkout_id":"ch_1","checkout_url":"https://creem.io/test/checkout/prod_1/ch_1","mode":"test","product_id":"prod_1","attempts":1,"created_at":"2026-11-22T18:00:00.000Z"}"#
        );
    }

    #[test]
    fn the_same_question_gets_the_same_answer_and_message_id() {
        let problem = Problem::new("units", "units must be an integer");
        let one = encode_answer(Status::Invalid, Some("a"), &problem);
        let two = encode_answer(Status::Invalid, Some("a"), &problem);
        assert_eq!(one, two);
        assert_eq!(answer_message_id(b"body", &one), answer_message_id(b"body", &two));
        assert_ne!(answer_message_id(b"body", &one), answer_message_id(b"other", &one));
        assert!(!String::from_utf8(one).unwrap().contains("created_at"));
    }
}
