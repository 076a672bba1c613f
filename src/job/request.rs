//! The request a job makes: read, and judged rule by rule.

use super::json::{JsonError, Node};
use super::key::RequestId;
use super::printable::printable;
use super::success_url;
use super::wire::{FIELDS, write_wire};

/// Most top-level members a job may have, `extra_fields` included.
const MAX_MEMBERS: usize = 64;
/// Most characters of a field name that an answer repeats.
const SHOWN: usize = 64;

/// What configuration has to say about jobs.
#[derive(Debug, Clone)]
pub struct Rules {
    /// Largest body in bytes.
    pub max_bytes: usize,
    /// Largest `units`.
    pub max_units: u32,
    /// Names to pass on unchanged, for fields newer than this program.
    pub extra_fields: Vec<String>,
    /// Whether `custom_price` may be given.
    pub allow_custom_price: bool,
    /// Whether `affiliate_code` may be given.
    pub allow_affiliate_code: bool,
    /// If not empty, the only hosts of `success_url`.
    pub success_hosts: Vec<String>,
    /// The `success_url` of jobs without one.
    pub default_success_url: Option<String>,
    /// Whether `http` on loopback is a fine `success_url`: in Creem's test mode.
    pub loopback_http: bool,
}

impl Default for Rules {
    fn default() -> Self {
        Self {
            max_bytes: 64 * 1024,
            max_units: 10_000,
            extra_fields: Vec::new(),
            allow_custom_price: false,
            allow_affiliate_code: false,
            success_hosts: Vec::new(),
            default_success_url: None,
            loopback_http: true,
        }
    }
}

/// Why a body is not a job. Carries no value of the body, only names of fields.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{code}: {message}")]
pub struct Refusal {
    /// Stable name of the broken rule.
    pub code: &'static str,
    /// What to change, in a sentence.
    pub message: String,
    /// The id, where it could be read: the answer carries it back.
    pub request_id: Option<RequestId>,
}

impl Refusal {
    fn new(code: &'static str, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), request_id: None }
    }
}

/// A valid request, ready to be sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckoutRequest {
    /// The idempotency key.
    pub request_id: RequestId,
    /// The product.
    pub product_id: String,
    /// The members as the producer sent them; what the fingerprint is taken of.
    pub members: Vec<(String, Node)>,
    /// The JSON for Creem.
    pub wire: Vec<u8>,
}

impl CheckoutRequest {
    /// Reads a message body.
    ///
    /// # Errors
    /// The first broken rule, with a stable code.
    pub fn parse(body: &[u8], rules: &Rules) -> Result<Self, Refusal> {
        let node = read(body, rules)?;
        let Node::Object(members) = node else {
            return Err(Refusal::new("not_object", "the body must be one JSON object"));
        };
        let request_id = match members.iter().find(|(name, _)| name == "request_id") {
            Some((_, Node::String(text))) => RequestId::parse(text),
            _ => Err("request_id_missing"),
        };
        let known = request_id.clone().ok();
        Self::judge(members, request_id, rules)
            .map_err(|refusal| Refusal { request_id: known, ..refusal })
    }

    fn judge(
        members: Vec<(String, Node)>,
        request_id: Result<RequestId, &'static str>,
        rules: &Rules,
    ) -> Result<Self, Refusal> {
        let request_id = request_id.map_err(|code| {
            let rule = if code == "request_id_missing" {
                "there is no request_id: give a string of 1-128 of A-Z a-z 0-9 . _ : -"
            } else {
                "request_id must be 1-128 of A-Z a-z 0-9 . _ : -"
            };
            Refusal::new(code, rule)
        })?;
        if members.len() > MAX_MEMBERS {
            return Err(Refusal::new("too_many_keys", format!("at most {MAX_MEMBERS} fields")));
        }
        for (name, value) in &members {
            if !FIELDS.contains(&name.as_str()) && !rules.extra_fields.contains(name) {
                let message = format!(
                    "`{}` is not a field of Creem's create-checkout request; if it is new, name it in job.extra_fields",
                    printable(name, SHOWN)
                );
                return Err(Refusal::new("unknown_field", message));
            }
            no_nulls(name, value)?;
        }
        let field =
            |name: &str| members.iter().find(|(key, _)| key == name).map(|(_, value)| value);
        let product_id = product_id(field("product_id"))?;
        check_amounts(&field, rules)?;
        check_texts(&field, rules)?;
        check_customer(field("customer"))?;
        check_custom_fields(field("custom_fields"))?;
        check_metadata(field("metadata"))?;
        let wire = write_wire(&members, rules);
        Ok(Self { request_id, product_id, members, wire })
    }
}

/// Bytes to a JSON value: size before anything else, then text, then syntax.
fn read(body: &[u8], rules: &Rules) -> Result<Node, Refusal> {
    if body.is_empty() {
        return Err(Refusal::new("body_empty", "the message has no body"));
    }
    if body.len() > rules.max_bytes {
        return Err(Refusal::new(
            "too_large",
            format!("the body is larger than {} bytes", rules.max_bytes),
        ));
    }
    if body.starts_with(b"\xef\xbb\xbf")
        || body.starts_with(b"\xff\xfe")
        || body.starts_with(b"\xfe\xff")
    {
        return Err(Refusal::new(
            "bom",
            "the body begins with a byte order mark; send plain UTF-8",
        ));
    }
    let text =
        std::str::from_utf8(body).map_err(|_| Refusal::new("not_utf8", "the body is not UTF-8"))?;
    Node::parse(text).map_err(|error| {
        let code = match error {
            JsonError::Syntax { .. } => "not_json",
            JsonError::TooDeep => "too_deep",
            JsonError::DuplicateKey => "duplicate_key",
        };
        Refusal::new(code, error.to_string())
    })
}

/// Creem refuses nulls, and a null may be a value that the producer lost: outside `metadata`
/// none is passed on.
fn no_nulls(name: &str, value: &Node) -> Result<(), Refusal> {
    let inner: &[(String, Node)] = match value {
        Node::Null => {
            let message =
                format!("`{}` is null; leave the field out instead", printable(name, SHOWN));
            return Err(Refusal::new("null_field", message));
        }
        Node::Object(members) if name != "metadata" => members,
        Node::Array(items) => return items.iter().try_for_each(|item| no_nulls(name, item)),
        Node::Object(_) | Node::Bool(_) | Node::Number(_) | Node::String(_) => return Ok(()),
    };
    // Whatever is called `metadata` further down is not the job's metadata.
    inner.iter().try_for_each(|(key, value)| match value {
        Node::Object(members) => members.iter().try_for_each(|(key, value)| no_nulls(key, value)),
        Node::Null | Node::Bool(_) | Node::Number(_) | Node::String(_) | Node::Array(_) => {
            no_nulls(key, value)
        }
    })
}

fn product_id(value: Option<&Node>) -> Result<String, Refusal> {
    match value.and_then(Node::as_str) {
        Some(text)
            if (1..=128).contains(&text.len())
                && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-')) =>
        {
            Ok(text.to_owned())
        }
        _ => Err(Refusal::new(
            "product_id",
            "product_id must be a string of 1-128 of A-Z a-z 0-9 _ -",
        )),
    }
}

/// An unsigned integer written as one: no sign, fraction, exponent or leading zero.
fn integer(value: &Node) -> Option<u64> {
    let Node::Number(text) = value else { return None };
    if text.bytes().all(|byte| byte.is_ascii_digit()) { text.parse().ok() } else { None }
}

fn check_amounts<'a>(
    field: &impl Fn(&str) -> Option<&'a Node>,
    rules: &Rules,
) -> Result<(), Refusal> {
    if let Some(value) = field("units") {
        let units = integer(value).filter(|units| *units >= 1);
        let units = units.ok_or_else(|| {
            Refusal::new(
                "units",
                "units must be an integer from 1 to job.max_units, without sign, fraction or exponent",
            )
        })?;
        if units > u64::from(rules.max_units) {
            let message = format!("units must be at most {} (job.max_units)", rules.max_units);
            return Err(Refusal::new("units_max", message));
        }
    }
    if let Some(value) = field("custom_price") {
        if !rules.allow_custom_price {
            return Err(not_enabled("custom_price", "job.allow_custom_price"));
        }
        if !integer(value).is_some_and(|price| (100..=99_999_999).contains(&price)) {
            let message = "custom_price must be an integer from 100 to 99999999 (cents per unit)";
            return Err(Refusal::new("custom_price", message));
        }
    }
    Ok(())
}

fn not_enabled(field: &str, switch: &str) -> Refusal {
    Refusal::new(
        "not_enabled",
        format!("{field} moves money and is refused unless {switch} is true"),
    )
}

fn check_texts<'a>(
    field: &impl Fn(&str) -> Option<&'a Node>,
    rules: &Rules,
) -> Result<(), Refusal> {
    if let Some(value) = field("discount_code") {
        short_text(value, 64).ok_or_else(|| {
            Refusal::new("discount_code", "discount_code must be 1-64 printable characters")
        })?;
    }
    if let Some(value) = field("affiliate_code") {
        if !rules.allow_affiliate_code {
            return Err(not_enabled("affiliate_code", "job.allow_affiliate_code"));
        }
        short_text(value, 128).ok_or_else(|| {
            Refusal::new("affiliate_code", "affiliate_code must be 1-128 printable characters")
        })?;
    }
    if let Some(value) = field("success_url") {
        let text = value.as_str().ok_or_else(|| url_refusal("success_url_form"))?;
        success_url::check(text, rules.loopback_http, &rules.success_hosts).map_err(url_refusal)?;
    }
    Ok(())
}

fn url_refusal(code: &'static str) -> Refusal {
    let message = match code {
        "success_url_scheme" => "success_url must begin with https://",
        "success_url_userinfo" => {
            "success_url must not hold a user name, a password or @ before its path"
        }
        "success_url_host" => {
            "success_url must name a public host (one of job.success_hosts, if set), not an IP address"
        }
        _ => {
            "success_url must be an absolute URL of at most 2048 characters, written the way browsers normalise it"
        }
    };
    Refusal::new(code, message)
}

/// A text of `1..=max` characters, none of them a control character or an invisible
/// direction mark that would make it look like another text.
fn short_text(value: &Node, max: usize) -> Option<&str> {
    let text = value.as_str()?;
    let count = text.chars().count();
    let hidden = |c: char| {
        c.is_control()
            || matches!(
                c,
                '\u{ad}' | '\u{61c}' | '\u{2060}' | '\u{3164}' | '\u{e0000}'..='\u{e007f}'
            )
            || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
    };
    let shown = !text.trim().is_empty() && !text.chars().any(hidden);
    ((1..=max).contains(&count) && shown).then_some(text)
}

fn check_customer(value: Option<&Node>) -> Result<(), Refusal> {
    let Some(value) = value else { return Ok(()) };
    let wrong = || {
        Refusal::new(
            "customer",
            "customer must be an object with `email` or `id`, and at most a `name`",
        )
    };
    let members = value.as_object().ok_or_else(wrong)?;
    if let Some((name, _)) =
        members.iter().find(|(name, _)| !matches!(name.as_str(), "id" | "email" | "name"))
    {
        let message =
            format!("`customer.{}` is not a field of Creem's customer", printable(name, SHOWN));
        return Err(Refusal::new("unknown_field", message));
    }
    if let Some(name) = value.get("name") {
        short_text(name, 256).ok_or_else(wrong)?;
    }
    match (value.get("id"), value.get("email")) {
        (Some(_), Some(_)) => {
            Err(Refusal::new("customer_one_of", "customer takes `email` or `id`, not both"))
        }
        (None, None) => Err(wrong()),
        (Some(id), None) => short_text(id, 128).map(|_| ()).ok_or_else(wrong),
        (None, Some(email)) if email.as_str().is_some_and(is_email) => Ok(()),
        (None, Some(_)) => Err(Refusal::new(
            "email",
            "customer.email must be a plain address of at most 254 characters",
        )),
    }
}

/// A plain address: what a mailbox of today looks like, not all that RFC 5321 would allow.
fn is_email(text: &str) -> bool {
    let Some((local, domain)) = text.rsplit_once('@') else { return false };
    let local_char = |c: char| c.is_alphanumeric() || "!#$%&'*+-/=?^_`{|}~.".contains(c);
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.chars().all(|c| c.is_alphanumeric() || c == '-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    text.len() <= 254
        && (1..=64).contains(&local.len())
        && local.chars().all(local_char)
        && local.split('.').all(|part| !part.is_empty())
        && domain.contains('.')
        && domain.split('.').all(label)
        && domain
            .rsplit('.')
            .next()
            .is_some_and(|top| top.len() >= 2 && top.chars().any(char::is_alphabetic))
}

/// Whether a name may be passed on as a field that is newer than this program.
#[must_use]
pub fn is_extra_field(name: &str) -> bool {
    (1..=64).contains(&name.len())
        && name
            .bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_')
        && !name.starts_with('_')
        && !FIELDS.contains(&name)
}

fn check_custom_fields(value: Option<&Node>) -> Result<(), Refusal> {
    let Some(value) = value else { return Ok(()) };
    let wrong = |message: &str| Refusal::new("custom_fields", message);
    let Node::Array(fields) = value else {
        return Err(wrong("custom_fields must be an array"));
    };
    if fields.len() > 3 {
        return Err(wrong("at most 3 custom_fields"));
    }
    let mut keys = Vec::new();
    for field in fields {
        check_custom_field(field)?;
        let key = field.get("key").and_then(Node::as_str);
        if keys.contains(&key) {
            return Err(wrong("the keys of custom_fields must be unique"));
        }
        keys.push(key);
    }
    Ok(())
}

fn check_custom_field(field: &Node) -> Result<(), Refusal> {
    let wrong = |message: &str| Refusal::new("custom_fields", message);
    let known = |node: &Node, names: &[&str]| {
        node.as_object()
            .is_some_and(|members| members.iter().all(|(name, _)| names.contains(&name.as_str())))
    };
    if !known(field, &["type", "key", "label", "optional", "text", "checkbox"]) {
        return Err(wrong(
            "a custom field is an object of type, key, label, optional, text, checkbox",
        ));
    }
    if !matches!(field.get("type").and_then(Node::as_str), Some("text" | "checkbox")) {
        return Err(wrong("a custom field's type is `text` or `checkbox`"));
    }
    if field.get("key").is_none_or(|key| short_text(key, 200).is_none()) {
        return Err(wrong("a custom field's key is 1-200 printable characters"));
    }
    if field.get("label").is_none_or(|label| short_text(label, 50).is_none()) {
        return Err(wrong("a custom field's label is 1-50 printable characters"));
    }
    if field.get("optional").is_some_and(|optional| !matches!(optional, Node::Bool(_))) {
        return Err(wrong("a custom field's `optional` is true or false"));
    }
    if let Some(text) = field.get("text") {
        let lengths = ["min_length", "max_length"].map(|name| text.get(name));
        if !known(text, &["min_length", "max_length"])
            || lengths.iter().flatten().any(|n| integer(n).is_none())
        {
            return Err(wrong(
                "a custom field's `text` holds the integers min_length and max_length",
            ));
        }
        if let [Some(min), Some(max)] = lengths.map(|length| length.and_then(integer))
            && min > max
        {
            return Err(wrong("a custom field's min_length is larger than its max_length"));
        }
    }
    if let Some(checkbox) = field.get("checkbox") {
        let short = |label: &Node| label.as_str().is_some_and(|text| text.chars().count() <= 1000);
        let label = checkbox.get("label").is_none_or(short);
        if !known(checkbox, &["label"]) || !label {
            return Err(wrong(
                "a custom field's `checkbox` holds a label of at most 1000 characters",
            ));
        }
    }
    Ok(())
}

fn check_metadata(value: Option<&Node>) -> Result<(), Refusal> {
    let Some(value) = value else { return Ok(()) };
    let Some(members) = value.as_object() else {
        return Err(Refusal::new("metadata", "metadata must be an object"));
    };
    let mut text = Vec::new();
    value.write_to(&mut text);
    if members.len() > 50 || text.len() > 8 * 1024 || value.depth() > 16 {
        let message = "metadata holds at most 50 keys, 8 KiB as compact JSON, 16 levels";
        return Err(Refusal::new("metadata_limits", message));
    }
    if has_key(value, "__proto__") {
        let message =
            "metadata must not use the key `__proto__`: JavaScript readers lose or misuse it";
        return Err(Refusal::new("metadata_reserved", message));
    }
    Ok(())
}

fn has_key(node: &Node, name: &str) -> bool {
    match node {
        Node::Object(members) => {
            members.iter().any(|(key, value)| key == name || has_key(value, name))
        }
        Node::Array(items) => items.iter().any(|item| has_key(item, name)),
        Node::Null | Node::Bool(_) | Node::Number(_) | Node::String(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINIMAL: &str = r#""request_id":"a","product_id":"p""#;

    fn code(extra: &str) -> &'static str {
        let body = format!("{{{MINIMAL},{extra}}}");
        match CheckoutRequest::parse(body.as_bytes(), &Rules::default()) {
            Ok(_) => "ok",
            Err(refusal) => {
                let read = if refusal.code == "duplicate_key" { None } else { Some("a") };
                assert_eq!(refusal.request_id.as_ref().map(RequestId::as_str), read);
                refusal.code
            }
        }
    }

    fn whole(body: &[u8]) -> &'static str {
        CheckoutRequest::parse(body, &Rules::default())
            .map_or_else(|refusal| refusal.code, |_| "ok")
    }

    #[test]
    fn bodies_that_are_no_object_have_their_codes() {
        let long = format!("{{{MINIMAL},\"metadata\":{{\"a\":\"{}\"}}}}", "x".repeat(65 * 1024));
        let many = (0..70).fold(String::new(), |text, n| text + &format!(",\"k{n}\":1"));
        for (body, expected) in [
            (b"".to_vec(), "body_empty"),
            (long.into_bytes(), "too_large"),
            (vec![b'['; 16 * 1024 * 1024], "too_large"),
            (b"\xff\xfe{\0}\0".to_vec(), "bom"),
            (b"\xef\xbb\xbf{}".to_vec(), "bom"),
            (b"{\"a\":\"\xff\"}".to_vec(), "not_utf8"),
            (b"<html></html>".to_vec(), "not_json"),
            (b"\x1f\x8b\x08".to_vec(), "not_utf8"),
            (b"{\"a\":1".to_vec(), "not_json"),
            (b"{} {}".to_vec(), "not_json"),
            ([vec![b'['; 200], vec![b']'; 200]].concat(), "too_deep"),
            (vec![b'['; 60_000], "too_deep"),
            (b"[\"a\",1]".to_vec(), "not_object"),
            (b"null".to_vec(), "not_object"),
            (b"42".to_vec(), "not_object"),
            (b"\"x\"".to_vec(), "not_object"),
            (format!("{{{MINIMAL},\"units\":1,\"units\":2}}").into_bytes(), "duplicate_key"),
            (format!("{{{MINIMAL}{many}}}").into_bytes(), "too_many_keys"),
            (b"{}".to_vec(), "request_id_missing"),
            (b"{\"request_id\":null}".to_vec(), "request_id_missing"),
            (b"{\"request_id\":1}".to_vec(), "request_id_missing"),
            (b"{\"request_id\":\"\"}".to_vec(), "request_id_missing"),
            (b"{\"request_id\":\"a\"}".to_vec(), "product_id"),
            (b"{\"request_id\":\"a\",\"product_id\":\"../x\"}".to_vec(), "product_id"),
        ] {
            assert_eq!(
                whole(&body),
                expected,
                "{:?}",
                String::from_utf8_lossy(&body[..body.len().min(60)])
            );
        }
    }

    #[test]
    fn every_field_keeps_to_its_rule() {
        for (extra, expected) in [
            (r#""units":0"#, "units"),
            (r#""units":-1"#, "units"),
            (r#""units":1.0"#, "units"),
            (r#""units":1e2"#, "units"),
            (r#""units":"1""#, "units"),
            (r#""units":true"#, "units"),
            (r#""units":null"#, "null_field"),
            (r#""units":4294967296"#, "units_max"),
            (r#""units":99999999999999999999999"#, "units"),
            (r#""units":1e400"#, "units"),
            (r#""units":10000"#, "ok"),
            (r#""units":10001"#, "units_max"),
            (r#""custom_price":1500"#, "not_enabled"),
            (r#""affiliate_code":"x""#, "not_enabled"),
            (r#""customer":{"id":"c","email":"a@b.co"}"#, "customer_one_of"),
            (r#""customer":{}"#, "customer"),
            (r#""customer":[]"#, "customer"),
            (r#""customer":["a@b.co"]"#, "customer"),
            (r#""customer":{"email":null}"#, "null_field"),
            (r#""customer":{"email":"not an address"}"#, "email"),
            (r#""customer":{"email":"a@b.co\r\nBcc: x@y.z"}"#, "email"),
            (r#""customer":{"email":"Ada <a@b.co>"}"#, "email"),
            (r#""customer":{"email":".ada@b.co"}"#, "email"),
            (r#""customer":{"email":"a..b@b.co"}"#, "email"),
            (r#""customer":{"email":"ada@1.2.3.4"}"#, "email"),
            (r#""customer":{"email":"ada@example.c"}"#, "email"),
            (r#""customer":{"email":"a@b.co","role":"x"}"#, "unknown_field"),
            (r#""customer":{"email":"a@b.co","name":"Ünï"}"#, "ok"),
            (r#""custom_fields":{}"#, "custom_fields"),
            (r#""custom_field":[]"#, "unknown_field"),
            (
                r#""custom_fields":[{"type":"text","key":"k","label":"L"},{"type":"text","key":"k","label":"M"}]"#,
                "custom_fields",
            ),
            (r#""custom_fields":[{"type":"radio","key":"k","label":"L"}]"#, "custom_fields"),
            (r#""custom_fields":[{"type":"text","key":"k"}]"#, "custom_fields"),
            (
                r#""custom_fields":[{"type":"text","key":"k","label":"L","text":{"min_length":5,"max_length":1}}]"#,
                "custom_fields",
            ),
            (
                r#""custom_fields":[{"type":"text","key":"k","label":"L","text":null}]"#,
                "null_field",
            ),
            (r#""custom_fields":[["text","k","L"]]"#, "custom_fields"),
            (r#""custom_fields":[null]"#, "null_field"),
        ] {
            assert_eq!(code(extra), expected, "{extra}");
        }
        assert_eq!(
            code(&format!("\"customer\":{{\"email\":\"{}@b.co\"}}", "x".repeat(250))),
            "email"
        );
    }

    #[test]
    fn texts_and_metadata_keep_to_their_rules() {
        let deep = format!("\"metadata\":{{\"a\":{}{}}}", "[".repeat(16), "]".repeat(16));
        let keys: Vec<String> = (0..51).map(|n| format!("\"k{n}\":1")).collect();
        let keys = format!("\"metadata\":{{{}}}", keys.join(","));
        let big = format!("\"metadata\":{{\"a\":\"{}\"}}", "x".repeat(8 * 1024));
        for (extra, expected) in [
            (r#""metadata":[]"#, "metadata"),
            (r#""metadata":null"#, "null_field"),
            (r#""metadata":{"a":null,"b":[null]}"#, "ok"),
            (r#""metadata":{"a":{"__proto__":1}}"#, "metadata_reserved"),
            (r#""metadata":{"a":1,"a":2}"#, "duplicate_key"),
            (deep.as_str(), "metadata_limits"),
            (keys.as_str(), "metadata_limits"),
            (big.as_str(), "metadata_limits"),
            (r#""discount_code":"""#, "discount_code"),
            (r#""discount_code":"A\u0000B""#, "discount_code"),
            (r#""discount_code":"A\u202eB""#, "discount_code"),
            (r#""discount_code":5"#, "discount_code"),
            (r#""discount_code":"   ""#, "discount_code"),
            (r#""discount_code":"A\u061cB""#, "discount_code"),
            (r#""success_url":5"#, "success_url_form"),
            (r#""success_url":"javascript:alert(1)""#, "success_url_scheme"),
            (r#""checkout_url":"https://x.y""#, "unknown_field"),
            (r#""mode":"prod""#, "unknown_field"),
            (r#""productId":"p""#, "unknown_field"),
        ] {
            assert_eq!(code(extra), expected, "{extra}");
        }
        assert_eq!(code(&format!("\"discount_code\":\"{}\"", "x".repeat(65))), "discount_code");
    }

    #[test]
    fn a_refusal_repeats_no_value_and_no_control_character() {
        let body =
            format!("{{{MINIMAL},\"x\\u001b[31m\\n{}\":\"ada@example.com\"}}", "y".repeat(500));
        let refusal = CheckoutRequest::parse(body.as_bytes(), &Rules::default()).unwrap_err();
        assert!(!refusal.message.contains("ada@example.com"));
        assert!(!refusal.message.chars().any(char::is_control), "{}", refusal.message);
        assert!(refusal.message.chars().count() < 300);
    }

    #[test]
    fn money_moving_fields_pass_where_they_are_switched_on() {
        let rules =
            Rules { allow_custom_price: true, allow_affiliate_code: true, ..Rules::default() };
        let code = |price: &str| {
            let body = format!("{{{MINIMAL},\"affiliate_code\":\"a\",\"custom_price\":{price}}}");
            CheckoutRequest::parse(body.as_bytes(), &rules)
                .map_or_else(|refusal| refusal.code, |_| "ok")
        };
        for (price, expected) in [
            ("100", "ok"),
            ("99999999", "ok"),
            ("99", "custom_price"),
            ("1000000000", "custom_price"),
            ("100.5", "custom_price"),
            ("\"100\"", "custom_price"),
        ] {
            assert_eq!(code(price), expected, "{price}");
        }
    }

    #[test]
    fn extra_fields_are_passed_on_unchanged_and_a_default_url_is_added() {
        let rules = Rules {
            extra_fields: vec!["coupon_stack".into()],
            default_success_url: Some("https://shop.example/ok".into()),
            ..Rules::default()
        };
        let body = br#"{"coupon_stack":{"b":1.50,"a":[]},"product_id":"p","request_id":"a"}"#;
        let request = CheckoutRequest::parse(body, &rules).unwrap();
        assert_eq!(
            String::from_utf8(request.wire).unwrap(),
            r#"{"request_id":"a","product_id":"p","success_url":"https://shop.example/ok","coupon_stack":{"b":1.50,"a":[]}}"#
        );
        assert!(
            !request.members.iter().any(|(name, _)| name == "success_url"),
            "a default is no part of the body"
        );
    }
}
