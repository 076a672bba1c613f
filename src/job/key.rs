//! What makes two jobs the same job: the [`Key`], and the [`Fingerprint`] of the body.

use std::fmt;

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use super::json::Node;

/// Which of Creem's two worlds a link belongs to. A test link is never given to a live buyer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Mode {
    /// `https://test-api.creem.io`, keys that begin with `creem_test_`.
    Test,
    /// `https://api.creem.io`.
    Live,
}

impl Mode {
    /// Every mode.
    pub const ALL: [Self; 2] = [Self::Test, Self::Live];

    /// The mode as Creem writes it today, in replies and in the ledger.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Test => "test",
            Self::Live => "prod",
        }
    }

    /// Reads the ledger's spelling.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|mode| mode.as_str() == text)
    }

    /// Whether a `mode` in one of Creem's answers belongs to this mode.
    ///
    /// Creem has written `live` for `prod` before May 2025 and documents `sandbox` beside `test`.
    #[must_use]
    pub fn accepts(self, answered: &str) -> bool {
        match self {
            Self::Test => matches!(answered, "test" | "sandbox" | "local"),
            Self::Live => matches!(answered, "prod" | "live"),
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A `request_id`: 1–128 of `A–Z a–z 0–9 . _ : -`.
///
/// Creem signs its redirects over unescaped `name=value` pairs, so characters that could forge
/// a pair (`& = |`) are not in the set; neither is `@`, because the id lands in URLs and logs.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(Box<str>);

impl RequestId {
    /// Longest id in bytes.
    pub const MAX: usize = 128;

    /// Reads an id.
    ///
    /// # Errors
    /// The `error.code` of the rule that was broken.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        if text.is_empty() {
            return Err("request_id_missing");
        }
        if !text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b':' | b'-'))
        {
            return Err("request_id_charset");
        }
        if text.len() > Self::MAX {
            return Err("request_id_too_long");
        }
        Ok(Self(text.into()))
    }

    /// The id as it was written.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What the ledger is keyed by.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    /// Creem's world.
    pub mode: Mode,
    /// The producer's idempotency key. Bytes are compared: another case is another job.
    pub request_id: RequestId,
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.mode, self.request_id)
    }
}

/// The random secret of one ledger, under which fingerprints and hops are keyed.
///
/// Keyed, because a bare hash of an e-mail address can be guessed back.
#[derive(Clone)]
pub struct LedgerSecret([u8; 32]);

impl LedgerSecret {
    /// Wraps the ledger's secret.
    #[must_use]
    pub const fn new(secret: [u8; 32]) -> Self {
        Self(secret)
    }

    /// A keyed hash of several parts; each part's length goes in, so that parts cannot shift.
    #[must_use]
    pub fn mac(&self, parts: &[&[u8]]) -> [u8; 32] {
        let mut mac =
            Hmac::<Sha256>::new_from_slice(&self.0).expect("HMAC takes a key of any length");
        for part in parts {
            mac.update(&(part.len() as u64).to_le_bytes());
            mac.update(part);
        }
        mac.finalize().into_bytes().into()
    }
}

impl fmt::Debug for LedgerSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LedgerSecret(…)")
    }
}

/// A keyed hash per field of the job as the producer sent it, before any configured default.
///
/// Layout, version 1: the version byte, then for each field in the order of its name one length
/// byte, the name, and the first 16 bytes of HMAC-SHA256 over name and canonical value. Per
/// field, so that a conflict can name what differs without the ledger keeping anybody's data.
#[derive(Clone, PartialEq, Eq)]
pub struct Fingerprint(Vec<u8>);

/// How a stored fingerprint compares with a job's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Comparison {
    /// The same body.
    Same,
    /// Another body; the names of the fields that differ, sorted.
    Differs(Vec<String>),
    /// The stored one was written by a newer version of this program.
    Unknown,
}

const VERSION: u8 = 1;
const MAC_LEN: usize = 16;

impl Fingerprint {
    /// Takes the fingerprint of a job's top-level members; `customer` counts per member.
    #[must_use]
    pub fn of(members: &[(String, Node)], key: &LedgerSecret) -> Self {
        let mut fields: Vec<(String, &Node)> = Vec::with_capacity(members.len() + 2);
        for (name, value) in members {
            match value {
                Node::Object(inner) if name == "customer" => {
                    fields.extend(
                        inner.iter().map(|(inner, value)| (format!("customer.{inner}"), value)),
                    );
                }
                Node::Null
                | Node::Bool(_)
                | Node::Number(_)
                | Node::String(_)
                | Node::Array(_)
                | Node::Object(_) => fields.push((name.clone(), value)),
            }
        }
        fields.sort_by(|left, right| left.0.cmp(&right.0));
        let mut out = vec![VERSION];
        let mut canonical = Vec::new();
        for (name, value) in fields {
            canonical.clear();
            value.write_canonical_to(&mut canonical);
            let mac = key.mac(&[name.as_bytes(), &canonical]);
            // Names of valid jobs are far shorter; a longer one is cut, its hash still covers it.
            let shown = &name.as_bytes()[..name.len().min(255)];
            out.push(u8::try_from(shown.len()).unwrap_or(u8::MAX));
            out.extend_from_slice(shown);
            out.extend_from_slice(&mac[..MAC_LEN]);
        }
        Self(out)
    }

    /// Wraps stored bytes.
    #[must_use]
    pub const fn from_bytes(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }

    /// The bytes to store.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Compares this stored fingerprint with a job's.
    #[must_use]
    pub fn compare(&self, job: &Self) -> Comparison {
        if self == job {
            return Comparison::Same;
        }
        let (Some(stored), Some(asked)) = (self.fields(), job.fields()) else {
            return Comparison::Unknown;
        };
        let differs = |one: &[(&[u8], &[u8])], other: &[(&[u8], &[u8])]| {
            one.iter()
                .filter(|field| !other.contains(field))
                .map(|(name, _)| String::from_utf8_lossy(name).into_owned())
                .collect::<Vec<_>>()
        };
        let mut names = differs(&stored, &asked);
        names.extend(differs(&asked, &stored));
        names.sort();
        names.dedup();
        Comparison::Differs(names)
    }

    fn fields(&self) -> Option<Vec<(&[u8], &[u8])>> {
        let (&version, mut rest) = self.0.split_first()?;
        if version != VERSION {
            return None;
        }
        let mut fields = Vec::new();
        while let Some((&length, after)) = rest.split_first() {
            let (name, after) = after.split_at_checked(usize::from(length))?;
            let (mac, after) = after.split_at_checked(MAC_LEN)?;
            fields.push((name, mac));
            rest = after;
        }
        Some(fields)
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Fingerprint({} bytes)", self.0.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn print(text: &str) -> Fingerprint {
        let node = Node::parse(text).unwrap();
        Fingerprint::of(node.as_object().unwrap(), &LedgerSecret::new([7; 32]))
    }

    #[test]
    fn key_order_and_white_space_do_not_make_another_body() {
        let left = print(r#"{"request_id":"a","metadata":{"x":1,"y":[1,2]}}"#);
        let right = print(r#" {"metadata": {"y":[1, 2], "x":1}, "request_id":"\u0061"}"#);
        assert_eq!(left.compare(&right), Comparison::Same);
    }

    #[test]
    fn a_conflict_names_every_field_that_differs_added_ones_and_missing_ones() {
        let stored = print(
            r#"{"request_id":"a","units":1,"discount_code":"X","customer":{"email":"a@b.c"}}"#,
        );
        let asked = print(
            r#"{"request_id":"a","units":2,"success_url":"https://a.b/","customer":{"email":"a@b.d"}}"#,
        );
        let names =
            ["customer.email", "discount_code", "success_url", "units"].map(str::to_owned).to_vec();
        assert_eq!(stored.compare(&asked), Comparison::Differs(names));
    }

    #[test]
    fn number_texts_are_compared_as_written() {
        assert_ne!(print(r#"{"metadata":{"a":1}}"#), print(r#"{"metadata":{"a":1.0}}"#));
        assert_ne!(print(r#"{"metadata":{"a":"1"}}"#), print(r#"{"metadata":{"a":1}}"#));
    }

    #[test]
    fn another_ledgers_key_gives_another_fingerprint() {
        let node = Node::parse(r#"{"customer":{"email":"a@b.c"}}"#).unwrap();
        let of = |byte| Fingerprint::of(node.as_object().unwrap(), &LedgerSecret::new([byte; 32]));
        assert_ne!(of(1), of(2));
    }

    #[test]
    fn a_fingerprint_of_a_newer_version_is_not_called_a_conflict() {
        let mut newer = print(r#"{"units":1}"#).0;
        newer[0] = VERSION + 1;
        assert_eq!(
            Fingerprint::from_bytes(newer).compare(&print(r#"{"units":1}"#)),
            Comparison::Unknown
        );
    }

    #[test]
    fn a_damaged_fingerprint_is_unknown_rather_than_a_panic() {
        let whole = print(r#"{"units":1,"request_id":"abc"}"#).0;
        for cut in 0..whole.len() {
            let cut = Fingerprint::from_bytes(whole[..cut].to_vec());
            assert_ne!(cut.compare(&print(r#"{"a":1}"#)), Comparison::Same);
        }
    }

    #[test]
    fn request_ids_keep_to_their_characters_and_length() {
        for (text, code) in [
            ("", "request_id_missing"),
            ("a b", "request_id_charset"),
            ("a&b", "request_id_charset"),
            ("a|checkout_id=x", "request_id_charset"),
            ("ada@example.com", "request_id_charset"),
            ("a\u{0}", "request_id_charset"),
            ("а", "request_id_charset"),
            ("a/b", "request_id_charset"),
            ("a%20", "request_id_charset"),
            ("\u{202e}x", "request_id_charset"),
        ] {
            assert_eq!(RequestId::parse(text), Err(code), "{text:?}");
        }
        assert_eq!(RequestId::parse(&"a".repeat(129)), Err("request_id_too_long"));
        assert!(RequestId::parse(&"a".repeat(128)).is_ok());
        assert!(RequestId::parse("Order-1_2.3:4").is_ok());
    }
}
