//! A request as Creem's own SDK writes it.

use super::Rules;
use super::json::{self, Node};

/// Fields of Creem's create-checkout request, in the order in which Creem's SDK sends them.
pub(super) const FIELDS: [&str; 10] = [
    "request_id",
    "product_id",
    "units",
    "custom_price",
    "discount_code",
    "affiliate_code",
    "customer",
    "custom_fields",
    "success_url",
    "metadata",
];

/// Writes the request as Creem's SDK does: its order of fields, compact, nothing added but a
/// configured default, `extra_fields` last.
pub(super) fn write_wire(members: &[(String, Node)], rules: &Rules) -> Vec<u8> {
    let mut out = Vec::with_capacity(512);
    out.push(b'{');
    let mut first = true;
    let mut name_to = |out: &mut Vec<u8>, name: &str| {
        if !std::mem::take(&mut first) {
            out.push(b',');
        }
        json::write_string(name, out);
        out.push(b':');
    };
    for name in FIELDS {
        if let Some((_, value)) = members.iter().find(|(key, _)| key == name) {
            name_to(&mut out, name);
            write_field(name, value, &mut out);
        } else if name == "success_url"
            && let Some(url) = &rules.default_success_url
        {
            name_to(&mut out, name);
            json::write_string(url, &mut out);
        }
    }
    for (name, value) in members.iter().filter(|(name, _)| !FIELDS.contains(&name.as_str())) {
        name_to(&mut out, name);
        value.write_to(&mut out);
    }
    out.push(b'}');
    out
}

/// Writes one field, its members in the SDK's order where the SDK has one.
fn write_field(name: &str, value: &Node, out: &mut Vec<u8>) {
    match (name, value) {
        ("customer", customer) => ordered(customer, &["id", "email", "name"]).write_to(out),
        ("custom_fields", Node::Array(fields)) => {
            let order = ["type", "key", "label", "optional", "text", "checkbox"];
            Node::Array(fields.iter().map(|field| ordered(field, &order)).collect()).write_to(out);
        }
        (_, value) => value.write_to(out),
    }
}

fn ordered(node: &Node, order: &[&str]) -> Node {
    let Node::Object(members) = node else { return node.clone() };
    let place = |name: &str| order.iter().position(|known| *known == name).unwrap_or(order.len());
    let mut members: Vec<(String, Node)> = members
        .iter()
        .map(|(name, value)| {
            let inner = if name == "text" {
                ordered(value, &["max_length", "min_length"])
            } else {
                value.clone()
            };
            (name.clone(), inner)
        })
        .collect();
    members.sort_by_key(|(name, _)| place(name));
    Node::Object(members)
}
