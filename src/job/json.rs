//! JSON read strictly: every rule that `serde_json` leaves open is closed here.
//!
//! `serde_json` keeps the last of two equal keys, turns big integers into floats and lets a
//! struct be written as an array. Each of these could change what a buyer pays without anybody
//! noticing, so a job is read into a [`Node`] first: duplicate keys are an error, numbers stay
//! the text that was written, depth is bounded before anything recurses.

use std::collections::HashSet;
use std::fmt;

use serde::de::{self, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

/// Deepest nesting that is read at all, the outermost value being level 1.
///
/// Metadata has a stricter limit of its own; this one only keeps the descent below bounded.
pub const MAX_DEPTH: usize = 32;

/// Why a text was not read. No variant carries any of the text: it may hold personal data.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JsonError {
    /// Not JSON, or more than one document.
    #[error("not JSON: {category} at line {line}, column {column}")]
    Syntax {
        /// What kind of mistake.
        category: &'static str,
        /// Line, from 1.
        line: usize,
        /// Column in bytes, from 1.
        column: usize,
    },
    /// Nested deeper than [`MAX_DEPTH`].
    #[error("nested deeper than {MAX_DEPTH} levels")]
    TooDeep,
    /// One object has the same key twice, at whatever depth.
    #[error("the same key appears twice in one object")]
    DuplicateKey,
}

/// A JSON value whose numbers are still the text that was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Node {
    /// `null`
    Null,
    /// `true` or `false`
    Bool(bool),
    /// A number, as written.
    Number(String),
    /// A string, unescaped.
    String(String),
    /// An array.
    Array(Vec<Node>),
    /// An object in the order of its text; keys are unique.
    Object(Vec<(String, Node)>),
}

impl Node {
    /// Reads one JSON document.
    ///
    /// # Errors
    /// See [`JsonError`].
    pub fn parse(text: &str) -> Result<Self, JsonError> {
        if depth(text) > MAX_DEPTH {
            return Err(JsonError::TooDeep);
        }
        let raw: &RawValue = serde_json::from_str(text).map_err(|error| syntax(&error))?;
        descend(raw)
    }

    /// The members, if this is an object.
    #[must_use]
    pub fn as_object(&self) -> Option<&[(String, Self)]> {
        if let Self::Object(members) = self { Some(members) } else { None }
    }

    /// The text, if this is a string.
    #[must_use]
    pub fn as_str(&self) -> Option<&str> {
        if let Self::String(text) = self { Some(text) } else { None }
    }

    /// The member of that name, if this is an object that has it.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&Self> {
        self.as_object()?.iter().find(|(key, _)| key == name).map(|(_, value)| value)
    }

    /// Levels of nesting: 0 for a scalar, 1 for a container of scalars or an empty one.
    #[must_use]
    pub fn depth(&self) -> usize {
        match self {
            Self::Null | Self::Bool(_) | Self::Number(_) | Self::String(_) => 0,
            Self::Array(items) => 1 + items.iter().map(Self::depth).max().unwrap_or(0),
            Self::Object(members) => {
                1 + members.iter().map(|(_, value)| value.depth()).max().unwrap_or(0)
            }
        }
    }

    /// Appends the value as compact JSON: raw UTF-8, the order and the number texts of the source.
    pub fn write_to(&self, out: &mut Vec<u8>) {
        self.write(out, false);
    }

    /// Appends the value as canonical JSON: as [`Node::write_to`], with sorted keys, so that two
    /// texts that differ only in white space and key order come out equal.
    pub fn write_canonical_to(&self, out: &mut Vec<u8>) {
        self.write(out, true);
    }

    fn write(&self, out: &mut Vec<u8>, sorted: bool) {
        match self {
            Self::Null => out.extend_from_slice(b"null"),
            Self::Bool(true) => out.extend_from_slice(b"true"),
            Self::Bool(false) => out.extend_from_slice(b"false"),
            Self::Number(text) => out.extend_from_slice(text.as_bytes()),
            Self::String(text) => write_string(text, out),
            Self::Array(items) => {
                out.push(b'[');
                for (index, item) in items.iter().enumerate() {
                    if index > 0 {
                        out.push(b',');
                    }
                    item.write(out, sorted);
                }
                out.push(b']');
            }
            Self::Object(members) => {
                let mut order: Vec<&(String, Self)> = members.iter().collect();
                if sorted {
                    order.sort_by(|left, right| left.0.cmp(&right.0));
                }
                out.push(b'{');
                for (index, (key, value)) in order.into_iter().enumerate() {
                    if index > 0 {
                        out.push(b',');
                    }
                    write_string(key, out);
                    out.push(b':');
                    value.write(out, sorted);
                }
                out.push(b'}');
            }
        }
    }
}

/// Appends a JSON string with its quotes.
pub fn write_string(text: &str, out: &mut Vec<u8>) {
    serde_json::to_writer(out, text).expect("a string written to memory cannot fail");
}

/// Counts the deepest nesting of brackets outside strings, without recursion.
///
/// Runs on text that may not be JSON at all; then the number is meaningless but bounded work.
fn depth(text: &str) -> usize {
    let (mut level, mut deepest) = (0_usize, 0);
    let (mut in_string, mut escaped) = (false, false);
    for byte in text.bytes() {
        if in_string {
            match byte {
                _ if escaped => escaped = false,
                b'\\' => escaped = true,
                b'"' => in_string = false,
                _ => {}
            }
            continue;
        }
        match byte {
            b'"' => in_string = true,
            b'{' | b'[' => {
                level += 1;
                deepest = deepest.max(level);
            }
            b'}' | b']' => level = level.saturating_sub(1),
            _ => {}
        }
    }
    deepest
}

fn syntax(error: &serde_json::Error) -> JsonError {
    if error.to_string().starts_with(DUPLICATE) {
        return JsonError::DuplicateKey;
    }
    let category = match error.classify() {
        serde_json::error::Category::Eof => "it ends too early",
        serde_json::error::Category::Io
        | serde_json::error::Category::Syntax
        | serde_json::error::Category::Data => "a syntax error",
    };
    JsonError::Syntax { category, line: error.line(), column: error.column() }
}

/// Marks our own error inside `serde_json`'s, whose texts are never shown to anybody.
const DUPLICATE: &str = "duplicate key";

/// Turns a value that is known to be well-formed into a tree.
///
/// Each level is scanned again for its children; with [`MAX_DEPTH`] levels of a text whose size
/// the caller bounds, that is cheaper than it looks, and it leaves number texts alone, which no other way through
/// `serde_json` does without confusing an object that imitates its private number key.
fn descend(raw: &RawValue) -> Result<Node, JsonError> {
    let text = raw.get();
    let read = |error: serde_json::Error| syntax(&error);
    match text.as_bytes().first() {
        Some(b'{') => {
            let members: Members<'_> = serde_json::from_str(text).map_err(read)?;
            let mut out = Vec::with_capacity(members.0.len());
            for (key, value) in members.0 {
                out.push((key, descend(value)?));
            }
            Ok(Node::Object(out))
        }
        Some(b'[') => {
            let items: Items<'_> = serde_json::from_str(text).map_err(read)?;
            items.0.into_iter().map(descend).collect::<Result<_, _>>().map(Node::Array)
        }
        Some(b'"') => serde_json::from_str(text).map(Node::String).map_err(read),
        Some(b't') => Ok(Node::Bool(true)),
        Some(b'f') => Ok(Node::Bool(false)),
        Some(b'n') => Ok(Node::Null),
        _ => Ok(Node::Number(text.to_owned())),
    }
}

struct Members<'a>(Vec<(String, &'a RawValue)>);

impl<'de> de::Deserialize<'de> for Members<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Read;
        impl<'de> Visitor<'de> for Read {
            type Value = Members<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut seen = HashSet::new();
                let mut members = Vec::new();
                while let Some((key, value)) = map.next_entry::<String, &'de RawValue>()? {
                    if !seen.insert(key.clone()) {
                        return Err(de::Error::custom(DUPLICATE));
                    }
                    members.push((key, value));
                }
                Ok(Members(members))
            }
        }
        deserializer.deserialize_map(Read)
    }
}

struct Items<'a>(Vec<&'a RawValue>);

impl<'de> de::Deserialize<'de> for Items<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Read;
        impl<'de> Visitor<'de> for Read {
            type Value = Items<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an array")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
                let mut items = Vec::new();
                while let Some(item) = seq.next_element::<&'de RawValue>()? {
                    items.push(item);
                }
                Ok(Items(items))
            }
        }
        deserializer.deserialize_seq(Read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compact(text: &str) -> String {
        let mut out = Vec::new();
        Node::parse(text).unwrap().write_to(&mut out);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn numbers_stay_as_they_were_written() {
        let text = r#"{"a":1.0,"b":1e2,"c":123456789012345678901234567890,"d":-0,"e":1E400}"#;
        assert_eq!(compact(text), text);
    }

    #[test]
    fn white_space_goes_and_order_stays() {
        assert_eq!(
            compact(" { \"b\" : [ 1 , {\"z\":null} ] , \"a\" : \"\\u0041\" } "),
            r#"{"b":[1,{"z":null}],"a":"A"}"#
        );
    }

    #[test]
    fn canonical_text_ignores_key_order_at_every_depth() {
        let (mut left, mut right) = (Vec::new(), Vec::new());
        Node::parse(r#"{"b":{"y":1,"x":2},"a":3}"#).unwrap().write_canonical_to(&mut left);
        Node::parse(r#"{"a":3,"b":{"x":2,"y":1}}"#).unwrap().write_canonical_to(&mut right);
        assert_eq!(left, right);
    }

    #[test]
    fn a_key_given_twice_is_refused_at_every_depth_and_however_it_is_escaped() {
        for text in [
            r#"{"a":1,"a":2}"#,
            r#"{"m":{"a":1,"a":1}}"#,
            r#"{"a":1,"\u0061":2}"#,
            r#"[{"a":[{"b":1,"b":2}]}]"#,
        ] {
            assert_eq!(Node::parse(text), Err(JsonError::DuplicateKey), "{text}");
        }
    }

    #[test]
    fn depth_is_refused_before_anything_recurses() {
        let deep = |levels: usize| "[".repeat(levels) + &"]".repeat(levels);
        assert!(Node::parse(&deep(MAX_DEPTH)).is_ok());
        assert_eq!(Node::parse(&deep(MAX_DEPTH + 1)), Err(JsonError::TooDeep));
        assert_eq!(Node::parse(&deep(100_000)), Err(JsonError::TooDeep));
        assert!(Node::parse(r#"{"a":"[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[["}"#).is_ok());
    }

    #[test]
    fn an_object_that_imitates_the_librarys_private_keys_stays_an_object() {
        let text = r#"{"$serde_json::private::Number":"1e5","$serde_json::private::RawValue":"x"}"#;
        assert_eq!(compact(text), text);
    }

    #[test]
    fn what_is_not_one_document_is_refused() {
        for text in [
            "",
            "{",
            "{} {}",
            "{}x",
            "<html>",
            "nul",
            "{'a':1}",
            "{\"a\":1,}",
            "[1 2]",
            "NaN",
            "\"\\ud800\"",
            "{\"a\":01}",
        ] {
            assert!(matches!(Node::parse(text), Err(JsonError::Syntax { .. })), "{text}");
        }
    }
}
