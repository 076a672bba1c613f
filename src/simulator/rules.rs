//! What Creem accepts and how it says no.
//!
//! The wording is that of NestJS's class-validator, which Creem's published messages match; the
//! one for `success_url` is from Creem's own error page.

use std::collections::BTreeMap;

use axum::body::Body;
use axum::http::{HeaderValue, Response, StatusCode, header};
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};

/// A JSON response.
pub(super) fn json(status: StatusCode, body: &Value) -> Response<Body> {
    let mut response = Response::new(Body::from(body.to_string()));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// Creem's error body; 403 has no `message` in its documentation.
pub(super) fn error(status: StatusCode, messages: Option<&[&str]>) -> Response<Body> {
    let mut body = json!({
        "trace_id": "00000000-0000-4000-8000-000000000000",
        "status": status.as_u16(),
        "error": status.canonical_reason().unwrap_or("Error"),
        "timestamp": 1_706_889_600_000_u64,
    });
    if let Some(messages) = messages {
        body["message"] = json!(messages);
    }
    json(status, &body)
}

/// A custom field as an answer has it: its `min_length` is called `minimum_length` there.
pub(super) fn echo_custom_field(field: &Value) -> Value {
    let mut field = field.clone();
    if let Some(text) = field.get_mut("text").and_then(Value::as_object_mut)
        && let Some(length) = text.remove("min_length")
    {
        text.insert("minimum_length".to_owned(), length);
    }
    field
}

const KNOWN: [&str; 11] = [
    "request_id",
    "product_id",
    "units",
    "custom_price",
    "discount_code",
    "affiliate_code",
    "customer",
    "custom_fields",
    "custom_field",
    "success_url",
    "metadata",
];

/// Reads a body as JavaScript does: a number that no float can hold becomes infinite, which is null
/// when it is written again.
pub(super) fn parse(body: &[u8]) -> Option<Value> {
    fn lenient(raw: &RawValue) -> Option<Value> {
        let text = raw.get();
        match text.as_bytes().first()? {
            b'{' => {
                let members: BTreeMap<String, &RawValue> = serde_json::from_str(text).ok()?;
                let read = |(name, value): (String, &RawValue)| Some((name, lenient(value)?));
                members.into_iter().map(read).collect::<Option<Map<_, _>>>().map(Value::Object)
            }
            b'[' => {
                let items: Vec<&RawValue> = serde_json::from_str(text).ok()?;
                items.into_iter().map(lenient).collect::<Option<Vec<_>>>().map(Value::Array)
            }
            b'"' => serde_json::from_str(text).ok(),
            // What is well-formed and yet not read is such a number.
            _ => Some(serde_json::from_str(text).unwrap_or(Value::Null)),
        }
    }
    lenient(serde_json::from_slice(body).ok()?)
}

/// Checks a create's body; all that is wrong at once, as Creem does.
pub(super) fn validate(request: Value) -> Result<Value, Vec<String>> {
    let Value::Object(members) = &request else {
        return Err(vec!["request body must be an object".to_owned()]);
    };
    let mut wrong: Vec<String> = members
        .keys()
        .filter(|name| !KNOWN.contains(&name.as_str()))
        .map(|name| format!("property {name} should not exist"))
        .collect();
    match members.get("product_id") {
        Some(Value::String(id)) if !id.is_empty() => {}
        Some(Value::String(_)) => wrong.push("product_id should not be empty".to_owned()),
        _ => wrong.extend(
            ["product_id should not be empty", "product_id must be a string"].map(str::to_owned),
        ),
    }
    for name in ["request_id", "discount_code", "affiliate_code"] {
        if members.get(name).is_some_and(|value| !value.is_string()) {
            wrong.push(format!("{name} must be a string"));
        }
    }
    numbers(members, &mut wrong);
    if let Some(url) = members.get("success_url") {
        let valid = url
            .as_str()
            .and_then(|text| url::Url::parse(text).ok())
            .is_some_and(|url| url.has_host());
        if !valid {
            wrong.push("success_url must be a valid URL".to_owned());
        }
    }
    if members.get("metadata").is_some_and(|value| !value.is_object()) {
        wrong.push("metadata must be an object".to_owned());
    }
    customer(members.get("customer"), &mut wrong);
    custom_fields(members.get("custom_fields"), &mut wrong);
    if wrong.is_empty() { Ok(request) } else { Err(wrong) }
}

fn numbers(members: &Map<String, Value>, wrong: &mut Vec<String>) {
    if members.get("units").is_some_and(|value| !value.is_number()) {
        wrong.push("units must be a number conforming to the specified constraints".to_owned());
    }
    if let Some(price) = members.get("custom_price") {
        match price.as_i64() {
            None => wrong.push("custom_price must be an integer number".to_owned()),
            Some(price) if price < 100 => {
                wrong.push("custom_price must not be less than 100".to_owned());
            }
            Some(price) if price > 99_999_999 => {
                wrong.push("custom_price must not be greater than 99999999".to_owned());
            }
            Some(_) => {}
        }
    }
}

fn customer(value: Option<&Value>, wrong: &mut Vec<String>) {
    let Some(value) = value else { return };
    let Value::Object(members) = value else {
        wrong.push("nested property customer must be either object or array".to_owned());
        return;
    };
    for (name, value) in members {
        match name.as_str() {
            "id" | "name" if !value.is_string() => {
                wrong.push(format!("customer.{name} must be a string"));
            }
            "email" if !value.as_str().is_some_and(|text| text.contains('@')) => {
                wrong.push("customer.email must be an email".to_owned());
            }
            "id" | "name" | "email" => {}
            name => wrong.push(format!("customer.property {name} should not exist")),
        }
    }
    if members.contains_key("id") && members.contains_key("email") {
        wrong.push("only one of customer.id and customer.email may be given".to_owned());
    }
}

fn custom_fields(value: Option<&Value>, wrong: &mut Vec<String>) {
    let Some(value) = value else { return };
    let Value::Array(fields) = value else {
        wrong.push("custom_fields must be an array".to_owned());
        return;
    };
    if fields.len() > 3 {
        wrong.push("custom_fields must contain no more than 3 elements".to_owned());
    }
    for (index, field) in fields.iter().enumerate() {
        let text = |name: &str| field.get(name).and_then(Value::as_str);
        if !matches!(text("type"), Some("text" | "checkbox")) {
            wrong.push(format!(
                "custom_fields.{index}.type must be one of the following values: text, checkbox"
            ));
        }
        for (name, most) in [("key", 200), ("label", 50)] {
            match text(name) {
                None => wrong.push(format!("custom_fields.{index}.{name} must be a string")),
                Some(text) if text.chars().count() > most => wrong.push(format!(
                    "custom_fields.{index}.{name} must be shorter than or equal to {most} characters"
                )),
                Some(_) => {}
            }
        }
        for name in field.as_object().into_iter().flat_map(Map::keys) {
            if !["type", "key", "label", "optional", "text", "checkbox"].contains(&name.as_str()) {
                wrong.push(format!("custom_fields.{index}.property {name} should not exist"));
            }
        }
    }
}
