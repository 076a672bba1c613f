//! The worker's note to itself on a job in a delay queue.

use std::fmt::Write as _;

use lapin::BasicProperties;
use lapin::types::AMQPValue;

use super::headers;
use crate::clock::Millis;
use crate::job::{FingerprintKey, Lane};

/// What the worker remembers of a job over a delay queue, signed with the ledger's key and bound
/// to body and lane, so that no producer can write it.
#[must_use]
pub fn write_hop(
    first_picked_up_at: Millis,
    key: &FingerprintKey,
    body: &[u8],
    lane: Lane,
) -> String {
    let mac = hop_mac(first_picked_up_at, key, body, lane);
    let mut text = format!("1;{first_picked_up_at};");
    for byte in &mac[..16] {
        write!(text, "{byte:02x}").expect("writing to a string cannot fail");
    }
    text
}

/// Reads such a note; nothing where the signature is not this ledger's over this body and lane.
#[must_use]
pub fn read_hop(text: &str, key: &FingerprintKey, body: &[u8], lane: Lane) -> Option<Millis> {
    let time: Millis = text.strip_prefix("1;")?.split(';').next()?.parse().ok()?;
    // Both texts are made from the same time; comparing them whole compares the signatures.
    let expected = write_hop(time, key, body, lane);
    let same = expected.len() == text.len()
        && expected
            .bytes()
            .zip(text.bytes())
            .fold(0, |differs, (left, right)| differs | (left ^ right))
            == 0;
    same.then_some(time)
}

fn hop_mac(time: Millis, key: &FingerprintKey, body: &[u8], lane: Lane) -> [u8; 32] {
    key.mac(&[b"hop", &time.to_le_bytes(), lane.as_str().as_bytes(), body])
}

/// Whether a message bears such a note of this ledger's: then this worker has published it before.
#[must_use]
pub fn has_hop(
    properties: &BasicProperties,
    body: &[u8],
    key: &FingerprintKey,
    lane: Lane,
) -> bool {
    let value = properties.headers().as_ref().and_then(|all| all.inner().get(headers::HOP));
    let Some(AMQPValue::LongString(text)) = value else { return false };
    std::str::from_utf8(text.as_bytes()).is_ok_and(|text| read_hop(text, key, body, lane).is_some())
}
