//! The worker's note to itself on a job in a delay queue.

use std::fmt::Write as _;

use lapin::BasicProperties;
use lapin::types::AMQPValue;

use super::headers;
use crate::clock::Millis;
use crate::job::{Lane, LedgerSecret};

/// What the worker remembers of a job over a delay queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hop {
    /// When this copy was first picked up.
    pub first_picked_up_at: Millis,
    /// Whether the broker delivered it twice before that: then it never counts as sent again.
    pub redelivered: bool,
}

impl Hop {
    /// The header's text, signed with the ledger's key and bound to body and lane, so that no
    /// producer can write it.
    #[must_use]
    pub fn write(self, key: &LedgerSecret, body: &[u8], lane: Lane) -> String {
        let Self { first_picked_up_at, redelivered } = self;
        let flag = u8::from(redelivered);
        let time = first_picked_up_at.to_le_bytes();
        let mac = key.mac(&[b"hop", &time, &[flag], lane.as_str().as_bytes(), body]);
        let mut text = format!("1;{first_picked_up_at};{flag};");
        for byte in &mac[..16] {
            write!(text, "{byte:02x}").expect("writing to a string cannot fail");
        }
        text
    }

    /// Reads such a text; nothing where the signature is not this ledger's over this body and lane.
    #[must_use]
    pub fn read(text: &str, key: &LedgerSecret, body: &[u8], lane: Lane) -> Option<Self> {
        let hop = Self::unsigned(text)?;
        // Both texts are made from the same facts; comparing them whole compares the signatures.
        let expected = hop.write(key, body, lane);
        let same = expected.len() == text.len()
            && expected
                .bytes()
                .zip(text.bytes())
                .fold(0, |differs, (left, right)| differs | (left ^ right))
                == 0;
        same.then_some(hop)
    }

    /// What the text says, if it has the form of one, whoever has signed it.
    #[must_use]
    pub fn unsigned(text: &str) -> Option<Self> {
        let mut parts = text.strip_prefix("1;")?.split(';');
        let (time, flag, mac) = (parts.next()?, parts.next()?, parts.next()?);
        let hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        if parts.next().is_some() || mac.len() != 32 || !mac.bytes().all(hex) {
            return None;
        }
        let redelivered = match flag {
            "0" => false,
            "1" => true,
            _ => return None,
        };
        Some(Self { first_picked_up_at: time.parse().ok()?, redelivered })
    }
}

/// Whether a message bears such a note of this ledger's: then this worker has published it before.
#[must_use]
pub fn has_hop(properties: &BasicProperties, body: &[u8], key: &LedgerSecret, lane: Lane) -> bool {
    let value = properties.headers().as_ref().and_then(|all| all.inner().get(headers::HOP));
    let Some(AMQPValue::LongString(text)) = value else { return false };
    std::str::from_utf8(text.as_bytes())
        .is_ok_and(|text| Hop::read(text, key, body, lane).is_some())
}
