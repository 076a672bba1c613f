//! What a job message says besides its body. Only what the README names is read; a header
//! that a producer could have written is never taken for the worker's own bookkeeping.

use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable};

use super::headers;
use super::hop::Hop;
use super::topology::Topology;
use crate::clock::Millis;
use crate::job::{Lane, LedgerSecret};

/// Prefix of direct reply-to addresses.
const DIRECT: &str = "amq.rabbitmq.reply-to";
/// Longest trace state that is kept.
const MAX_TRACESTATE: usize = 512;

/// Where the reply goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReplyTo {
    /// The routing key: a queue's name, or a direct reply-to address.
    pub address: String,
    /// Whether it is a direct reply-to address.
    pub direct: bool,
}

/// A rule that the message's properties break.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Broken {
    /// Stable name of the rule.
    pub code: &'static str,
    /// What to change.
    pub message: &'static str,
}

/// A message's properties, read.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Envelope {
    /// Where the reply goes; `None` for the configured reply queue.
    pub reply_to: Option<ReplyTo>,
    /// Copied to the reply, if it is printable.
    pub correlation_id: Option<String>,
    /// When the producer says it was published.
    pub timestamp: Option<Millis>,
    /// After which nobody waits any more.
    pub deadline: Option<Millis>,
    /// The campaign's name.
    pub campaign: Option<String>,
    /// W3C trace context, if well-formed.
    pub traceparent: Option<String>,
    /// What the worker remembers of it, if it comes back from a delay queue.
    pub hop: Option<Hop>,
    /// Whether it carries the like of it, which this ledger's key has not signed.
    pub foreign_hop: bool,
}

/// What may be a reply address.
#[derive(Debug, Clone)]
pub struct ReplyRules {
    /// Names of our own queues.
    pub topology: Topology,
    /// If not empty, the patterns (`*` for any text) an address must match one of.
    pub allow: Vec<String>,
}

impl Envelope {
    /// Reads the properties of a message.
    ///
    /// The envelope comes back in any case, as far as it could be read: a refusal needs it to be
    /// answered. The first broken rule comes beside it.
    #[must_use]
    pub fn read(
        properties: &BasicProperties,
        body: &[u8],
        key: &LedgerSecret,
        lane: Lane,
    ) -> (Self, Option<Broken>) {
        let mut broken = None;
        let mut check = |result: Result<(), Broken>| {
            if let Err(rule) = result {
                broken.get_or_insert(rule);
            }
        };
        check(content(properties));
        let empty = FieldTable::default();
        let headers = properties.headers().as_ref().unwrap_or(&empty);
        let text = |name: &str| headers.inner().get(name).and_then(as_text);
        let timestamp = properties.timestamp().map(seconds);
        if timestamp.is_some_and(|time| time.is_none()) {
            check(Err(Broken {
                code: "timestamp",
                message: "the timestamp property is beyond the year 9999",
            }));
        }
        let deadline = headers.inner().get(headers::DEADLINE).map(moment);
        if deadline.is_some_and(|time| time.is_none()) {
            let message = "checkout-deadline must be RFC 3339 text, an AMQP timestamp or integer Unix milliseconds";
            check(Err(Broken { code: "deadline", message }));
        }
        let campaign = headers.inner().get(headers::CAMPAIGN).map(as_text);
        if campaign.is_some_and(|name| name.is_none_or(|name| !is_campaign(name))) {
            check(Err(Broken {
                code: "campaign",
                message: "checkout-campaign must be a text of 1-64 characters",
            }));
        }
        let hop = text(headers::HOP).and_then(|value| Hop::read(value, key, body, lane));
        let envelope = Self {
            reply_to: properties
                .reply_to()
                .as_ref()
                .map(lapin::types::ShortString::as_str)
                .filter(|name| !name.is_empty())
                .map(|address| ReplyTo {
                    address: address.to_owned(),
                    direct: address.starts_with(DIRECT),
                }),
            correlation_id: properties
                .correlation_id()
                .as_ref()
                .map(|id| id.as_str().to_owned())
                .filter(|id| !id.chars().any(char::is_control)),
            timestamp: timestamp.flatten(),
            deadline: deadline.flatten(),
            campaign: campaign.flatten().filter(|name| is_campaign(name)).map(str::to_owned),
            traceparent: text(headers::TRACEPARENT)
                .filter(|value| is_traceparent(value))
                .map(str::to_owned),
            foreign_hop: hop.is_none() && text(headers::HOP).and_then(Hop::unsigned).is_some(),
            hop,
        };
        (envelope, broken)
    }

    /// Whether the reply may go where the message asks.
    #[must_use]
    pub fn reply_allowed(&self, rules: &ReplyRules) -> bool {
        let Some(target) = &self.reply_to else { return true };
        if target.address.chars().any(char::is_control)
            || rules.topology.denies_replies_to(&target.address)
        {
            return false;
        }
        // Direct reply-to lives on the default exchange only. The broker drops what is addressed
        // to a malformed one without a word, or even closes the connection over it.
        if target.direct {
            return rules.topology.replies_exchange.is_empty()
                && is_direct_address(&target.address)
                && (rules.allow.is_empty()
                    || rules.allow.iter().any(|pattern| matches(pattern, &target.address)));
        }
        rules.allows(&target.address)
    }
}

impl ReplyRules {
    /// Whether replies may go to a queue that is none of the workers' own.
    #[must_use]
    pub fn allows(&self, queue: &str) -> bool {
        self.allow.is_empty()
            || queue == self.topology.replies_queue
            || self.allow.iter().any(|pattern| matches(pattern, queue))
    }
}

fn content(properties: &BasicProperties) -> Result<(), Broken> {
    if properties.content_encoding().as_ref().is_some_and(|encoding| !encoding.as_str().is_empty())
    {
        let message = "content_encoding must be absent: bodies are never decompressed";
        return Err(Broken { code: "content_encoding", message });
    }
    let Some(kind) = properties.content_type() else { return Ok(()) };
    let kind = kind.as_str().to_ascii_lowercase();
    let mut parts = kind.split(';').map(str::trim);
    let json = matches!(parts.next(), Some("" | "application/json" | "text/json"));
    let utf8 = parts.all(|part| match part.split_once('=') {
        Some((name, value)) if name.trim() == "charset" => {
            ["utf-8", "utf8"].contains(&value.trim().trim_matches('"'))
        }
        Some(_) | None => true,
    });
    if json && utf8 {
        Ok(())
    } else {
        Err(Broken {
            code: "content_type",
            message: "content_type must be absent or application/json in UTF-8",
        })
    }
}

/// Whether a text may name a campaign.
#[must_use]
pub fn is_campaign(name: &str) -> bool {
    (1..=64).contains(&name.chars().count()) && !name.chars().any(char::is_control)
}

/// 9999-12-31T23:59:59.999Z
const LAST_MILLIS: Millis = 253_402_300_799_999;

/// AMQP timestamps are seconds; some clients write milliseconds, which no plausible number of
/// seconds reaches before the year 5138.
fn seconds(timestamp: u64) -> Option<Millis> {
    let last = LAST_MILLIS.cast_unsigned() / 1000;
    let seconds = if timestamp > 100_000_000_000 { timestamp / 1000 } else { timestamp };
    (seconds <= last)
        .then(|| Millis::try_from(seconds).ok())
        .flatten()
        .and_then(|seconds| seconds.checked_mul(1000))
}

#[expect(clippy::wildcard_enum_match_arm, reason = "a foreign enum: the rest is one case")]
fn moment(value: &AMQPValue) -> Option<Millis> {
    match value {
        AMQPValue::Timestamp(timestamp) => seconds(*timestamp),
        // Smaller numbers can only be seconds by mistake; taken for milliseconds they would say
        // 1973, and the job would be called late.
        AMQPValue::LongLongInt(millis) => {
            Some(*millis).filter(|millis| (100_000_000_001..=LAST_MILLIS).contains(millis))
        }
        AMQPValue::LongInt(_) | AMQPValue::LongUInt(_) => None,
        value => {
            let text = as_text(value)?;
            match text.parse::<jiff::Timestamp>() {
                Ok(time) => Some(time.as_millisecond()),
                Err(_) => is_the_end_of_time(text).then_some(LAST_MILLIS),
            }
        }
    }
}

/// Whether it is one of the last days of the year 9999: what some languages write for "never" lies a little
/// behind the last moment that is known here.
fn is_the_end_of_time(text: &str) -> bool {
    jiff::fmt::temporal::Pieces::parse(text).is_ok_and(|pieces| {
        pieces.date().year() == 9999 && pieces.time().is_some() && pieces.offset().is_some()
    })
}

#[expect(clippy::wildcard_enum_match_arm, reason = "a foreign enum: the rest is one case")]
fn as_text(value: &AMQPValue) -> Option<&str> {
    match value {
        AMQPValue::LongString(text) => std::str::from_utf8(text.as_bytes()).ok(),
        AMQPValue::ShortString(text) => Some(text.as_str()),
        _ => None,
    }
}

/// W3C trace context, version 00.
fn is_traceparent(value: &str) -> bool {
    let hex = |part: &str, length: usize| {
        part.len() == length
            && part.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
    };
    let parts: Vec<&str> = value.split('-').collect();
    matches!(parts.as_slice(), ["00", trace, span, flags]
        if hex(trace, 32) && hex(span, 16) && hex(flags, 2) && trace.bytes().any(|b| b != b'0') && span.bytes().any(|b| b != b'0'))
}

/// Whether a trace state is worth keeping.
#[must_use]
pub fn keeps_tracestate(value: &AMQPValue) -> bool {
    as_text(value).is_some_and(|text| text.len() <= MAX_TRACESTATE)
}

/// The form of a direct reply-to address: two parts in base64, of which the first is an Erlang
/// process id in the external term format, which begins with the byte 131 (base64 `g`).
fn is_direct_address(address: &str) -> bool {
    let base64 = |part: &str| {
        part.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+/=-_".contains(&byte))
    };
    let parts = address.strip_prefix(DIRECT).and_then(|rest| rest.strip_prefix('.'));
    let Some((process, key)) = parts.and_then(|rest| rest.split_once('.')) else { return false };
    process.len() >= 28
        && process.starts_with('g')
        && base64(process)
        && !key.is_empty()
        && base64(key)
}

/// A pattern with `*` for any text.
fn matches(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split('*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = text.strip_prefix(first) else { return false };
    let mut parts: Vec<&str> = parts.collect();
    let Some(last) = parts.pop() else { return rest.is_empty() };
    for part in parts {
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    rest.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::headers::HOP;
    use super::*;

    fn key() -> LedgerSecret {
        LedgerSecret::new([3; 32])
    }

    fn read(
        properties: impl std::borrow::Borrow<BasicProperties>,
    ) -> (Envelope, Option<&'static str>) {
        let (envelope, broken) = Envelope::read(properties.borrow(), b"body", &key(), Lane::Bulk);
        (envelope, broken.map(|rule| rule.code))
    }

    fn with_header(name: &str, value: AMQPValue) -> BasicProperties {
        let mut headers = FieldTable::default();
        headers.insert(name.into(), value);
        BasicProperties::default().with_headers(headers)
    }

    fn text(value: &str) -> AMQPValue {
        AMQPValue::LongString(value.into())
    }

    #[test]
    fn content_type_and_encoding_keep_to_the_rules() {
        for (kind, code) in [
            ("application/json", None),
            ("application/json; charset=utf-8", None),
            ("application/json; charset=\"UTF-8\"", None),
            ("", None),
            ("text/html", Some("content_type")),
            ("application/json; charset=latin1", Some("content_type")),
        ] {
            assert_eq!(
                read(BasicProperties::default().with_content_type(kind.into())).1,
                code,
                "{kind}"
            );
        }
        assert_eq!(
            read(BasicProperties::default().with_content_encoding("gzip".into())).1,
            Some("content_encoding")
        );
    }

    #[test]
    fn a_deadline_is_text_timestamp_or_milliseconds() {
        for value in [
            text("2026-11-22T18:00:00Z"),
            text("2026-11-22T19:00:00+01:00"),
            AMQPValue::Timestamp(1_795_370_400),
            AMQPValue::LongLongInt(1_795_370_400_000),
        ] {
            let (envelope, code) = read(with_header("checkout-deadline", value));
            assert_eq!((envelope.deadline, code), (Some(1_795_370_400_000), None));
        }
        for never in ["9999-12-31T23:59:59Z", "9999-12-31T23:59:59.9999999Z"] {
            let (envelope, code) = read(with_header("checkout-deadline", text(never)));
            assert_eq!((envelope.deadline, code), (Some(LAST_MILLIS), None), "{never}");
        }
        for value in [
            text("soon"),
            text("9999-12-31T23:59:59"),
            AMQPValue::Boolean(true),
            AMQPValue::Timestamp(u64::MAX),
            AMQPValue::Void,
        ] {
            assert_eq!(read(with_header("checkout-deadline", value)).1, Some("deadline"));
        }
    }

    #[test]
    fn timestamps_beyond_reason_are_refused() {
        let stamped = |timestamp| read(BasicProperties::default().with_timestamp(timestamp));
        assert_eq!(stamped(1_795_370_400).0.timestamp, Some(1_795_370_400_000));
        assert_eq!(stamped(1_795_370_400_000).0.timestamp, Some(1_795_370_400_000));
        assert_eq!(stamped(u64::MAX).1, Some("timestamp"));
    }

    #[test]
    fn a_hop_counts_only_with_the_workers_signature() {
        for redelivered in [false, true] {
            let hop = Hop { first_picked_up_at: 123, redelivered };
            let written = hop.write(&key(), b"body", Lane::Bulk);
            let (envelope, _) = read(with_header(HOP, text(&written)));
            assert_eq!((envelope.hop, envelope.foreign_hop), (Some(hop), false));
            let flag = format!(";{};", u8::from(redelivered));
            for foreign in [
                hop.write(&LedgerSecret::new([4; 32]), b"body", Lane::Bulk),
                hop.write(&key(), b"other", Lane::Bulk),
                hop.write(&key(), b"body", Lane::Interactive),
                written.replacen("123", "122", 1),
                written.replacen(&flag, &format!(";{};", u8::from(!redelivered)), 1),
            ] {
                let (envelope, _) = read(with_header(HOP, text(&foreign)));
                assert_eq!((envelope.hop, envelope.foreign_hop), (None, true), "{foreign}");
            }
        }
        for junk in ["1;123;0;", "", "1;x;y", "x", "1;1;2;00112233445566778899aabbccddeeff"] {
            let (envelope, _) = read(with_header(HOP, text(junk)));
            assert_eq!((envelope.hop, envelope.foreign_hop), (None, false), "{junk}");
        }
    }

    #[test]
    fn headers_of_the_wrong_type_are_no_panic() {
        let nested = (0..50).fold(FieldTable::default(), |inner, _| {
            let mut table = FieldTable::default();
            table.insert("x".into(), AMQPValue::FieldTable(inner));
            table
        });
        for name in ["traceparent", "tracestate", HOP, "x-death", "unknown"] {
            let (envelope, code) = read(with_header(name, AMQPValue::FieldTable(nested.clone())));
            assert_eq!((envelope, code), (Envelope::default(), None), "{name}");
        }
        assert_eq!(
            read(with_header("checkout-campaign", AMQPValue::Boolean(true))).1,
            Some("campaign")
        );
        assert_eq!(
            read(with_header("checkout-campaign", text(&"x".repeat(65)))).1,
            Some("campaign")
        );
    }

    #[test]
    fn trace_context_is_kept_only_if_well_formed() {
        let good = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        assert_eq!(
            read(with_header("traceparent", text(good))).0.traceparent.as_deref(),
            Some(good)
        );
        for bad in [
            "",
            "00-0-0-0",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "x",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
        ] {
            assert_eq!(read(with_header("traceparent", text(bad))).0.traceparent, None, "{bad}");
        }
    }

    #[test]
    fn patterns_match_whole_names() {
        for (pattern, name, expected) in [
            ("shop.*", "shop.replies", true),
            ("shop.*", "myshop.replies", false),
            ("*", "", true),
            ("amq.gen-*", "amq.gen-xyz", true),
            ("a*b*c", "a-b-c", true),
            ("a*b*c", "a-c-b", false),
            ("exact", "exact", true),
            ("exact", "exactly", false),
            ("a*a", "a", false),
        ] {
            assert_eq!(matches(pattern, name), expected, "{pattern} {name}");
        }
    }

    #[test]
    fn reply_addresses_keep_to_the_rules() {
        let rules = |allow: &[&str], exchange: &str| ReplyRules {
            topology: Topology::new("checkout", None, exchange),
            allow: allow.iter().map(|&pattern| pattern.to_owned()).collect(),
        };
        let allowed = |address: &str, rules: &ReplyRules| {
            read(BasicProperties::default().with_reply_to(address.into())).0.reply_allowed(rules)
        };
        assert!(allowed("amq.gen-abc", &rules(&[], "")));
        assert!(allowed("", &rules(&["shop.*"], "")), "an empty address counts as absent");
        let direct = "amq.rabbitmq.reply-to.g1h2CnJlcGx5QGhvc3QAAAAAAAAAAQ==.aGVsbG8=";
        assert!(allowed(direct, &rules(&[], "")));
        assert!(!allowed(direct, &rules(&[], "checkout.reply")));
        for malformed in ["garbage", "ggg", "g1hhMzE=", "g2dk.AAAA", ""] {
            let address = format!("amq.rabbitmq.reply-to.{malformed}");
            assert!(!allowed(&address, &rules(&[], "")), "{address}");
        }
        assert!(!allowed("amq.rabbitmq.reply-toX", &rules(&[], "")));
        assert!(!allowed("checkout.jobs", &rules(&["*"], "")));
        assert!(!allowed("a\nb", &rules(&[], "")));
        assert!(!allowed("other", &rules(&["shop.*"], "")));
        assert!(allowed("checkout.replies", &rules(&["shop.*"], "")));
    }
}
