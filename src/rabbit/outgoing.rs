//! Messages that the worker publishes: replies, delay hops, parked jobs.

use std::sync::Arc;

use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable, ShortString};

use super::envelope::{Envelope, keeps_tracestate};
use super::headers;
use super::hop::{Hop, has_hop};
use super::link::{LinkError, short};
use super::topology::Topology;
use crate::clock::Millis;
use crate::job::reply::TYPE;
use crate::job::{Lane, LedgerSecret, RequestId, reply};

/// Most bytes of a message's headers that are carried on: a header frame must fit one AMQP
/// frame, and a broker refuses what does not.
const MAX_HEADERS: usize = 16 * 1024;
/// Headers that the worker reads.
const READ: [&str; 4] =
    [headers::DEADLINE, headers::CAMPAIGN, headers::TRACEPARENT, headers::TRACESTATE];
/// Survives a restart of the broker.
const PERSISTENT: u8 = 2;

/// A message, ready to be published.
#[derive(Debug, Clone)]
pub struct Message {
    pub(super) exchange: ShortString,
    pub(super) routing_key: ShortString,
    pub(super) properties: BasicProperties,
    pub(super) body: Arc<[u8]>,
    /// All but direct replies: RabbitMQ 3.10 returns those although it delivers them, and 4.3
    /// confirms them although it drops them, so a return says nothing there.
    pub(super) mandatory: bool,
}

/// Why a job is parked.
#[derive(Debug, Clone)]
pub struct Parking<'a> {
    /// Stable name of the reason.
    pub code: &'a str,
    /// The reason in a sentence.
    pub message: &'a str,
    /// Calls sent so far.
    pub attempts: u32,
    /// When.
    pub at: Millis,
    /// The queue it came from.
    pub source_queue: &'a str,
    /// Whether it bears this worker's own hop, so that its `checkout-original-…` headers are ours.
    pub hopped: bool,
}

impl Message {
    /// A reply.
    ///
    /// # Errors
    /// If the address is longer than AMQP allows.
    pub fn reply(
        topology: &Topology,
        envelope: &Envelope,
        request_id: Option<&RequestId>,
        body: Arc<[u8]>,
        message_id: &str,
        at: Millis,
    ) -> Result<Self, LinkError> {
        let (exchange, routing_key) = match &envelope.reply_to {
            Some(target) if target.direct => ("", target.address.as_str()),
            Some(target) => (topology.replies_exchange.as_str(), target.address.as_str()),
            None => (topology.replies_exchange.as_str(), topology.replies_queue.as_str()),
        };
        let mut headers = FieldTable::default();
        if let Some(id) = request_id {
            headers.insert(headers::REQUEST_ID.into(), text(id.as_str()));
        }
        if let Some(trace) = &envelope.traceparent {
            headers.insert(headers::TRACEPARENT.into(), text(trace));
        }
        let mut properties = BasicProperties::default()
            .with_content_type("application/json".into())
            .with_delivery_mode(PERSISTENT)
            .with_type(TYPE.into())
            .with_app_id("checkout-worker".into())
            .with_message_id(short(message_id)?)
            .with_timestamp(u64::try_from(at / 1000).unwrap_or(0))
            .with_headers(headers);
        if let Some(id) = &envelope.correlation_id {
            properties = properties.with_correlation_id(short(id)?);
        }
        let mandatory = envelope.reply_to.as_ref().is_none_or(|target| !target.direct);
        Ok(Self {
            exchange: short(exchange)?,
            routing_key: short(routing_key)?,
            properties,
            body,
            mandatory,
        })
    }

    /// The same job, to come back after a delay queue's delay.
    ///
    /// # Errors
    /// If a name is longer than AMQP allows.
    pub fn hop(
        topology: &Topology,
        lane: Lane,
        delay: &str,
        original: &BasicProperties,
        body: Arc<[u8]>,
        hop: Hop,
        key: &LedgerSecret,
    ) -> Result<Self, LinkError> {
        let (properties, mut headers) = carried(original, has_hop(original, &body, key, lane));
        headers.insert(headers::HOP.into(), text(&hop.write(key, &body, lane)));
        Ok(Self {
            exchange: short(&topology.retry_exchange())?,
            routing_key: short(&Topology::retry_key(lane, delay))?,
            properties: properties.with_headers(headers),
            body,
            mandatory: true,
        })
    }

    /// A job that is set aside for a person.
    ///
    /// # Errors
    /// If a name is longer than AMQP allows.
    pub fn parked(
        topology: &Topology,
        original: &BasicProperties,
        body: Arc<[u8]>,
        parking: &Parking<'_>,
    ) -> Result<Self, LinkError> {
        let (properties, mut headers) = carried(original, parking.hopped);
        headers.insert(headers::ERROR_CODE.into(), text(parking.code));
        headers.insert(headers::ERROR_MESSAGE.into(), text(parking.message));
        headers
            .insert(headers::ATTEMPTS.into(), AMQPValue::LongLongInt(i64::from(parking.attempts)));
        headers.insert(headers::PARKED_AT.into(), text(&reply::rfc3339(parking.at)));
        headers.insert(headers::SOURCE_QUEUE.into(), text(parking.source_queue));
        Ok(Self {
            exchange: short(&topology.dead_exchange())?,
            routing_key: short(&topology.dead())?,
            properties: properties.with_headers(headers),
            body,
            mandatory: true,
        })
    }

    /// A new job.
    ///
    /// # Errors
    /// If a name is longer than AMQP allows.
    pub fn job(
        topology: &Topology,
        lane: Lane,
        body: Arc<[u8]>,
        reply_to: Option<&str>,
        correlation_id: &str,
        at: Millis,
    ) -> Result<Self, LinkError> {
        let mut properties = BasicProperties::default()
            .with_content_type("application/json".into())
            .with_delivery_mode(PERSISTENT)
            .with_correlation_id(short(correlation_id)?)
            .with_timestamp(u64::try_from(at / 1000).unwrap_or(0));
        if let Some(queue) = reply_to {
            properties = properties.with_reply_to(short(queue)?);
        }
        Ok(Self {
            exchange: short("")?,
            routing_key: short(&topology.jobs(lane))?,
            properties,
            body,
            mandatory: true,
        })
    }

    /// The same message with a further header.
    #[must_use]
    pub fn with_header(mut self, name: &'static str, value: &str) -> Self {
        let mut headers = self.properties.headers().clone().unwrap_or_default();
        headers.insert(name.into(), text(value));
        self.properties = self.properties.with_headers(headers);
        self
    }
}

fn text(value: &str) -> AMQPValue {
    AMQPValue::LongString(value.into())
}

/// What of a job's properties is carried on when the job is published again.
///
/// `user_id`, `expiration`, `CC` and `BCC` would make the broker refuse, drop or misroute the
/// copy; they are kept as text. The broker's own records of earlier deaths are left behind: on a
/// parked job they would say that the broker parked it.
///
/// `hopped` says that the job was published again by this worker before: what it kept as text then
/// stays.
fn carried(original: &BasicProperties, hopped: bool) -> (BasicProperties, FieldTable) {
    let mut properties = BasicProperties::default().with_delivery_mode(PERSISTENT);
    let mut headers = FieldTable::default();
    if let Some(value) = original.content_type() {
        properties = properties.with_content_type(value.clone());
    }
    if let Some(value) = original.content_encoding() {
        properties = properties.with_content_encoding(value.clone());
    }
    if let Some(value) = original.priority() {
        properties = properties.with_priority(*value);
    }
    if let Some(value) = original.correlation_id() {
        properties = properties.with_correlation_id(value.clone());
    }
    if let Some(value) = original.reply_to() {
        properties = properties.with_reply_to(value.clone());
    }
    if let Some(value) = original.message_id() {
        properties = properties.with_message_id(value.clone());
    }
    if let Some(value) = original.timestamp() {
        properties = properties.with_timestamp(*value);
    }
    if let Some(value) = original.kind() {
        properties = properties.with_type(value.clone());
    }
    if let Some(value) = original.app_id() {
        properties = properties.with_app_id(value.clone());
    }
    if let Some(value) = original.expiration() {
        headers.insert(headers::ORIGINAL_EXPIRATION.into(), text(value.as_str()));
    }
    if let Some(value) = original.user_id() {
        headers.insert(headers::ORIGINAL_USER_ID.into(), text(value.as_str()));
    }
    carry_headers(original, hopped, &mut headers);
    (properties, headers)
}

fn carry_headers(original: &BasicProperties, hopped: bool, headers: &mut FieldTable) {
    let Some(all) = original.headers() else { return };
    // What the worker itself reads comes first, so that a flood of other headers cannot push it out.
    let own = |name: &str| READ.contains(&name);
    let mut ordered: Vec<_> = all.inner().iter().collect();
    ordered.sort_by_key(|(name, _)| !own(name.as_str()));
    let (mut bytes, mut dropped) = (0, 0_i64);
    for (name, value) in ordered {
        let carried = match name.as_str() {
            "x-death" | "x-delivery-count" | "x-acquired-count" => continue,
            // The worker's own words about a message are not a producer's to write.
            name if headers::is_ours(name) && !(hopped && headers::is_original(name)) => continue,
            name if name.starts_with("x-first-death-") || name.starts_with("x-last-death-") => {
                continue;
            }
            "CC" => (headers::ORIGINAL_CC.into(), text(&addresses(value))),
            "BCC" => (headers::ORIGINAL_BCC.into(), text(&addresses(value))),
            headers::TRACESTATE if !keeps_tracestate(value) => continue,
            _ => (name.clone(), value.clone()),
        };
        let more = carried.0.as_str().len() + size(&carried.1) + 8;
        if bytes + more > MAX_HEADERS {
            dropped += 1;
        } else {
            bytes += more;
            headers.insert(carried.0, carried.1);
        }
    }
    if dropped > 0 {
        headers.insert(headers::HEADERS_DROPPED.into(), AMQPValue::LongLongInt(dropped));
    }
}

#[expect(clippy::wildcard_enum_match_arm, reason = "a foreign enum: the rest is one case")]
fn addresses(value: &AMQPValue) -> String {
    let one = |value: &AMQPValue| match value {
        AMQPValue::LongString(text) => String::from_utf8_lossy(text.as_bytes()).into_owned(),
        AMQPValue::ShortString(text) => text.as_str().to_owned(),
        _ => "?".to_owned(),
    };
    let mut text = match value {
        AMQPValue::FieldArray(items) => {
            items.as_slice().iter().map(one).collect::<Vec<_>>().join(",")
        }
        value => one(value),
    };
    if let Some((end, _)) = text.char_indices().nth(1024) {
        text.truncate(end);
    }
    text
}

/// About how many bytes a value takes on the wire.
#[expect(clippy::wildcard_enum_match_arm, reason = "a foreign enum: the rest is one case")]
fn size(value: &AMQPValue) -> usize {
    match value {
        AMQPValue::LongString(text) => text.len(),
        AMQPValue::ShortString(text) => text.as_str().len(),
        AMQPValue::ByteArray(bytes) => bytes.len(),
        AMQPValue::FieldArray(items) => items.as_slice().iter().map(|item| size(item) + 5).sum(),
        AMQPValue::FieldTable(table) => {
            table.inner().iter().map(|(name, value)| name.as_str().len() + size(value) + 6).sum()
        }
        _ => 8,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn original() -> BasicProperties {
        let mut headers = FieldTable::default();
        headers.insert("CC".into(), AMQPValue::FieldArray(vec![text("elsewhere")].into()));
        headers.insert("BCC".into(), text("secretly"));
        headers.insert("x-death".into(), text("spoofed"));
        headers.insert("mine".into(), text("kept"));
        BasicProperties::default()
            .with_user_id("ann".into())
            .with_expiration("1000".into())
            .with_correlation_id("c-1".into())
            .with_reply_to("shop.replies".into())
            .with_headers(headers)
    }

    #[test]
    fn what_would_misroute_or_drop_a_copy_is_kept_as_text_only() {
        let parking = Parking {
            code: "x",
            message: "y",
            attempts: 2,
            at: 0,
            source_queue: "checkout.jobs",
            hopped: false,
        };
        let topology = Topology::new("checkout", None, "");
        let parked =
            Message::parked(&topology, &original(), Arc::from(&b"body"[..]), &parking).unwrap();
        let hop = Message::hop(
            &topology,
            Lane::Bulk,
            "1s",
            &original(),
            Arc::from(&b"body"[..]),
            Hop { first_picked_up_at: 5, redelivered: false },
            &LedgerSecret::new([0; 32]),
        )
        .unwrap();
        // A job that is parked after a hop still says what it said at first; a producer's own
        // words to that effect are never carried on.
        let again = Parking { hopped: true, ..parking.clone() };
        let body = || Arc::from(&b"body"[..]);
        let later = Message::parked(&topology, &hop.properties, body(), &again).unwrap();
        let spoofed = Message::parked(&topology, &hop.properties, body(), &parking).unwrap();
        let spoofed = spoofed.properties.headers().as_ref().unwrap().inner();
        assert!(!spoofed.contains_key(headers::ORIGINAL_CC));
        for message in [parked, hop, later] {
            let properties = &message.properties;
            assert_eq!((properties.user_id(), properties.expiration()), (&None, &None));
            assert_eq!(properties.correlation_id().as_ref().unwrap().as_str(), "c-1");
            assert_eq!(*properties.delivery_mode(), Some(PERSISTENT));
            let headers = properties.headers().as_ref().unwrap().inner();
            for gone in ["CC", "BCC", "x-death"] {
                assert!(!headers.contains_key(gone), "{gone}");
            }
            assert_eq!(headers["checkout-original-cc"], text("elsewhere"));
            assert_eq!(headers["checkout-original-bcc"], text("secretly"));
            assert_eq!(headers["checkout-original-user-id"], text("ann"));
            assert_eq!(headers["checkout-original-expiration"], text("1000"));
            assert_eq!(headers["mine"], text("kept"));
        }
    }

    #[test]
    fn a_flood_of_headers_is_cut_and_noted_but_what_we_read_stays() {
        let mut headers = FieldTable::default();
        for n in 0..1000 {
            headers.insert(format!("a{n}").as_str().into(), text(&"x".repeat(100)));
        }
        headers.insert("checkout-deadline".into(), text("2026-11-22T18:00:00Z"));
        let (_, carried) = carried(&BasicProperties::default().with_headers(headers), false);
        let total: usize = carried.inner().values().map(size).sum();
        assert!(total <= MAX_HEADERS, "{total}");
        assert!(carried.contains_key("checkout-deadline"));
        assert!(
            matches!(carried.inner()["checkout-headers-dropped"], AMQPValue::LongLongInt(dropped) if dropped > 800)
        );
    }
}
