//! What the columns of a table mean: fields of a job, or something that is only carried through.

use crate::job::json::{Node, write_string};
use crate::job::printable;

/// Fields that a column of that name holds, as text.
const TEXTS: [&str; 5] =
    ["request_id", "product_id", "discount_code", "affiliate_code", "success_url"];
/// Fields whose cells are written into the job as they are: numbers and JSON.
const RAW: [&str; 4] = ["units", "custom_price", "custom_fields", "metadata"];
/// What else the buyer's address is called; one that is only carried through would be missed.
const EMAIL: [&str; 4] = ["email", "mail", "emailaddress", "mailaddress"];
/// The members of `customer`.
const CUSTOMER: [&str; 3] = ["customer.id", "customer.email", "customer.name"];
/// What metadata columns begin with.
const METADATA: &str = "metadata.";
/// Names that differ in so many letters may be one another's typos.
const TYPO: usize = 2;
/// Names longer than this are no typos, in bytes.
const LONGEST_TYPO: usize = 40;
/// As many as a spreadsheet has.
const MOST_COLUMNS: usize = 16_384;
/// Longest name of a column, in bytes.
const LONGEST_NAME: usize = 1_024;
/// What an output adds to the columns of its input.
pub const RESULT: [&str; 5] =
    ["status", "checkout_id", "checkout_url", "error_code", "error_message"];

/// Why a header cannot be used. Each says what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// No column is a field.
    #[error(
        "no column of the header is a field of a job: name them product_id, request_id, customer.email, units, metadata.KEY and so on, in the first line, with commas, semicolons, tabs or pipes between them; or give --product ID and say --carry COLUMN for each, if all rows are to be the same job but for their ids"
    )]
    NoField,
    /// More columns than any spreadsheet has.
    #[error("it has more than {MOST_COLUMNS} columns: is it a table?")]
    TooWide,
    /// The beginning of a name without end.
    #[error(
        "the name of a column has more than {LONGEST_NAME} bytes ({0}…): is line 1 the header?"
    )]
    LongName(String),
    /// Nearly the name of a field.
    #[error(
        "column `{column}` is nearly `{field}`: rename it, or say --carry {column:?} if it is another thing"
    )]
    Typo {
        /// As it is written.
        column: String,
        /// What it may be meant for.
        field: String,
    },
    /// No such column.
    #[error("there is no column `{0}` to be carried: look for a typo in --carry")]
    NotThere(String),
    /// Twice the same field.
    #[error("two columns are called `{0}`: keep one")]
    Twice(String),
    /// `metadata` and `metadata.KEY`.
    #[error("there is a column `metadata` and one `{0}`: use one kind")]
    BothMetadata(String),
    /// Its name is one that the output adds.
    #[error(
        "the input has a column `{0}`, which the output adds: rename it; links of an earlier run are checked with --verify"
    )]
    Taken(&'static str),
    /// Nothing names the jobs.
    #[error("nothing names the jobs: add a column request_id, or give --request-id-prefix")]
    NoRequestId,
}

/// What one column is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Column {
    /// A field of text.
    Text(&'static str),
    /// A field that is no text.
    Raw(&'static str),
    /// A member of `customer`.
    Customer(&'static str),
    /// A key of `metadata`.
    Metadata(String),
    /// A field that configuration passes on (`job.extra_fields`).
    Extra(String),
    /// No business of a job's.
    Carried,
}

/// What every row has that has no cell for it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Defaults {
    /// `product_id`.
    pub product_id: Option<String>,
    /// `discount_code`.
    pub discount_code: Option<String>,
    /// `success_url`.
    pub success_url: Option<String>,
    /// Keys of `metadata`.
    pub metadata: Vec<(String, String)>,
    /// Comes before each `request_id`, or before one that follows from what is in the row, where it has none.
    pub request_id_prefix: Option<String>,
}

impl Defaults {
    /// The id of a row whose own one is `own`; where it has none, `content` follows from what is in it.
    pub fn request_id(
        &self,
        own: Option<&str>,
        content: impl FnOnce() -> String,
    ) -> Option<String> {
        match (&self.request_id_prefix, own.filter(|own| !own.is_empty())) {
            (Some(prefix), Some(own)) => Some(format!("{prefix}{own}")),
            (Some(prefix), None) => Some(format!("{prefix}{}", content())),
            (None, own) => own.map(str::to_owned),
        }
    }

    /// The text of a field without a cell.
    #[must_use]
    pub fn text(&self, field: &str) -> Option<&str> {
        match field {
            "product_id" => self.product_id.as_deref(),
            "discount_code" => self.discount_code.as_deref(),
            "success_url" => self.success_url.as_deref(),
            _ => None,
        }
    }
}

/// Says what each column of jobs is: something must name them, and say what they are.
///
/// `carry` names columns that are carried through though they look like fields; `extra_fields` is
/// `job.extra_fields`.
///
/// # Errors
/// See [`HeaderError`].
pub fn read_header(
    names: &[String],
    defaults: &Defaults,
    carry: &[String],
    extra_fields: &[String],
) -> Result<Vec<Column>, HeaderError> {
    let columns = read_columns(names, carry, extra_fields)?;
    if defaults.request_id_prefix.is_none() && !columns.contains(&Column::Text("request_id")) {
        return Err(HeaderError::NoRequestId);
    }
    let no_field = columns.iter().all(|column| *column == Column::Carried);
    let wanted = |name: &String| carry.iter().any(|carried| carried == name.trim());
    if no_field && !(defaults.product_id.is_some() && names.iter().all(wanted)) {
        return Err(HeaderError::NoField);
    }
    Ok(columns)
}

/// Says what each column is, whether or not they make jobs.
///
/// # Errors
/// See [`HeaderError`].
pub(super) fn read_columns(
    names: &[String],
    carry: &[String],
    extra_fields: &[String],
) -> Result<Vec<Column>, HeaderError> {
    if let Some(missing) =
        carry.iter().find(|carried| !names.iter().any(|name| name.trim() == carried.as_str()))
    {
        return Err(HeaderError::NotThere(missing.clone()));
    }
    if names.len() > MOST_COLUMNS {
        return Err(HeaderError::TooWide);
    }
    if let Some(long) = names.iter().find(|name| name.len() > LONGEST_NAME) {
        return Err(HeaderError::LongName(printable(long, 40)));
    }
    let mut columns = Vec::with_capacity(names.len());
    for name in names {
        let trimmed = name.trim();
        let column = if carry.iter().any(|carried| carried == trimmed) {
            Column::Carried
        } else {
            column(trimmed, extra_fields)?
        };
        if column != Column::Carried && columns.contains(&column) {
            return Err(HeaderError::Twice(trimmed.to_owned()));
        }
        if let Some(taken) = RESULT.iter().find(|taken| **taken == trimmed) {
            return Err(HeaderError::Taken(taken));
        }
        columns.push(column);
    }
    let metadata = |column: &&Column| matches!(column, Column::Metadata(_));
    if columns.contains(&Column::Raw("metadata"))
        && let Some(Column::Metadata(key)) = columns.iter().find(metadata)
    {
        return Err(HeaderError::BothMetadata(format!("{METADATA}{key}")));
    }
    Ok(columns)
}

fn column(name: &str, extra_fields: &[String]) -> Result<Column, HeaderError> {
    let known = |names: &[&'static str]| names.iter().copied().find(|known| *known == name);
    if let Some(field) = known(&TEXTS) {
        return Ok(Column::Text(field));
    }
    if let Some(field) = known(&RAW) {
        return Ok(Column::Raw(field));
    }
    if let Some(member) = known(&CUSTOMER).and_then(|field| field.strip_prefix("customer.")) {
        return Ok(Column::Customer(member));
    }
    if let Some(key) = name.strip_prefix(METADATA).filter(|key| !key.is_empty()) {
        return Ok(Column::Metadata(key.to_owned()));
    }
    if extra_fields.iter().any(|field| field == name) {
        return Ok(Column::Extra(name.to_owned()));
    }
    if name.len() > LONGEST_TYPO {
        return Ok(Column::Carried);
    }
    // A discount must not be lost to a typo. Short names are one another's typos too easily.
    let plain = |text: &str| text.to_lowercase().replace([' ', '-', '_', '.'], "");
    let own = plain(name);
    let near = TEXTS.iter().chain(&RAW).chain(&CUSTOMER).find(|field| {
        let field = plain(field);
        let most = if field.len() < 7 { 1 } else { TYPO };
        own == field || strsim::damerau_levenshtein(&own, &field) <= most
    });
    let near = near.copied().or_else(|| EMAIL.contains(&own.as_str()).then_some("customer.email"));
    let near = near.map(str::to_owned);
    let metadata = own.strip_prefix("metadata").filter(|key| !key.is_empty());
    let near = near.or_else(|| metadata.map(|_| "metadata.KEY".to_owned()));
    match near {
        Some(field) => Err(HeaderError::Typo { column: name.to_owned(), field }),
        None => Ok(Column::Carried),
    }
}

/// Writes the job of a row: what its cells say, and what they leave out as the defaults have it. Whether
/// that is a job is for the rules of jobs to say.
#[must_use]
pub fn write_job(
    columns: &[Column],
    cells: &[&str],
    defaults: &Defaults,
    request_id: Option<&str>,
) -> Vec<u8> {
    let mut job = Members::default();
    let (mut customer, mut metadata) = (Members::default(), Members::default());
    for (column, cell) in columns.iter().zip(cells) {
        let cell = if let Column::Metadata(_) | Column::Carried = column {
            *cell
        } else {
            // What surrounds a value in a spreadsheet is never meant.
            cell.trim()
        };
        if cell.is_empty() {
            continue;
        }
        match column {
            Column::Text("request_id") | Column::Carried => {}
            Column::Text(field) => job.text(field, cell),
            Column::Raw("metadata") => job.raw("metadata", &with_keys(cell, &defaults.metadata)),
            Column::Raw(field) => job.raw(field, cell),
            Column::Customer(member) => customer.text(member, cell),
            Column::Metadata(key) => metadata.text(key, cell),
            Column::Extra(field) => job.text(field, cell),
        }
    }
    if let Some(id) = request_id {
        job.text("request_id", id);
    }
    for field in TEXTS {
        if let Some(text) = defaults.text(field)
            && !job.has(field)
        {
            job.text(field, text);
        }
    }
    if !job.has("metadata") {
        for (key, value) in &defaults.metadata {
            if !metadata.has(key) {
                metadata.text(key, value);
            }
        }
    }
    for (name, members) in [("customer", customer), ("metadata", metadata)] {
        if !members.is_empty() {
            job.raw(name, &members.finish());
        }
    }
    job.finish().into_bytes()
}

/// An object with further keys, as far as it has none of that name; anything else as it is, for the rules to
/// refuse.
fn with_keys(object: &str, more: &[(String, String)]) -> String {
    let Ok(Node::Object(mut keys)) = Node::parse(object) else { return object.to_owned() };
    add_keys(&mut keys, more);
    let mut text = Vec::new();
    Node::Object(keys).write_to(&mut text);
    String::from_utf8(text).unwrap_or_else(|_| object.to_owned())
}

/// Adds further keys, as far as there are none of that name.
pub(super) fn add_keys(keys: &mut Vec<(String, Node)>, more: &[(String, String)]) {
    for (key, value) in more {
        if !keys.iter().any(|(known, _)| known == key) {
            keys.push((key.clone(), Node::String(value.clone())));
        }
    }
}

/// The id that a row has of its own.
#[must_use]
pub fn own_id<'a>(columns: &[Column], cells: &[&'a str]) -> Option<&'a str> {
    let at = columns.iter().position(|column| *column == Column::Text("request_id"))?;
    cells.get(at).map(|cell| cell.trim())
}

/// Which column a broken rule is about, as far as its code tells.
#[must_use]
pub fn column_of(code: &str) -> Option<&'static str> {
    Some(match code {
        "units" | "units_max" => "units",
        "email" => "customer.email",
        "customer" | "customer_one_of" => "customer",
        "success_url_form" | "success_url_scheme" | "success_url_userinfo" | "success_url_host" => {
            "success_url"
        }
        "metadata" | "metadata_limits" | "metadata_reserved" => "metadata",
        "request_id_missing" | "request_id_charset" | "request_id_too_long" => "request_id",
        "product_id" => "product_id",
        "discount_code" => "discount_code",
        "affiliate_code" => "affiliate_code",
        "custom_price" => "custom_price",
        "custom_fields" => "custom_fields",
        _ => return None,
    })
}

/// The members of an object that is being written.
#[derive(Debug, Default)]
struct Members {
    names: Vec<String>,
    text: Vec<u8>,
}

impl Members {
    fn has(&self, name: &str) -> bool {
        self.names.iter().any(|known| known == name)
    }

    fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    fn name(&mut self, name: &str) {
        self.text.push(if self.names.is_empty() { b'{' } else { b',' });
        write_string(name, &mut self.text);
        self.text.push(b':');
        self.names.push(name.to_owned());
    }

    fn text(&mut self, name: &str, value: &str) {
        self.name(name);
        write_string(value, &mut self.text);
    }

    /// A cell that is no JSON becomes a text, for the rules to refuse by its name: it must not spoil the
    /// whole job.
    fn raw(&mut self, name: &str, value: &str) {
        if crate::job::json::Node::parse(value).is_err() {
            return self.text(name, value);
        }
        self.name(name);
        self.text.extend_from_slice(value.as_bytes());
    }

    fn finish(mut self) -> String {
        if self.names.is_empty() {
            self.text.push(b'{');
        }
        self.text.push(b'}');
        String::from_utf8(self.text).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|&name| name.to_owned()).collect()
    }

    fn header(given: &[&str]) -> Result<Vec<Column>, HeaderError> {
        let defaults = Defaults { request_id_prefix: Some("c-".to_owned()), ..Defaults::default() };
        let carry: &[&str] = if given.contains(&"Units (old)") { &["Units (old)"] } else { &[] };
        read_header(&names(given), &defaults, &names(carry), &names(&["seats"]))
    }

    #[test]
    fn columns_are_fields_or_carried_through() {
        let read = header(&[
            " product_id ",
            "units",
            "customer.email",
            "metadata.Source ID",
            "seats",
            "Name",
            "Phone",
            "",
            "Units (old)",
        ]);
        let expected = [
            Column::Text("product_id"),
            Column::Raw("units"),
            Column::Customer("email"),
            Column::Metadata("Source ID".to_owned()),
            Column::Extra("seats".to_owned()),
            Column::Carried,
            Column::Carried,
            Column::Carried,
            Column::Carried,
        ];
        assert_eq!(read.unwrap(), expected);
    }

    #[test]
    fn a_header_that_would_lose_something_is_refused() {
        for (given, field) in [
            ("dicsount_code", "discount_code"),
            ("Discount Code", "discount_code"),
            ("customer_email", "customer.email"),
            ("Units", "units"),
            ("unit", "units"),
            ("metadata", ""),
            ("E-Mail", "customer.email"),
            ("email", "customer.email"),
            ("metadata_source", "metadata.KEY"),
        ] {
            match header(&["product_id", given]) {
                Err(HeaderError::Typo { column, field: near }) => {
                    assert_eq!((column.as_str(), near.as_str()), (given, field));
                }
                other => assert!(field.is_empty() && other.is_ok(), "{given}: {other:?}"),
            }
        }
        assert_eq!(
            header(&["units", "product_id", "units"]),
            Err(HeaderError::Twice("units".into()))
        );
        assert_eq!(
            header(&["metadata", "metadata.a", "product_id"]),
            Err(HeaderError::BothMetadata("metadata.a".into()))
        );
        assert_eq!(header(&["product_id", "status"]), Err(HeaderError::Taken("status")));
        assert_eq!(header(&["Name", "Phone"]), Err(HeaderError::NoField));
        // Where flags name the product, all rows would be one job but for their ids.
        let product = Defaults {
            product_id: Some("p".to_owned()),
            request_id_prefix: Some("x-".to_owned()),
            ..Defaults::default()
        };
        let people = names(&["Name", "Phone"]);
        let of_people = |carry: &[&str]| read_header(&people, &product, &names(carry), &[]);
        assert_eq!(of_people(&[]), Err(HeaderError::NoField));
        assert_eq!(of_people(&["Name"]), Err(HeaderError::NoField));
        assert_eq!(of_people(&["Name", "Phone"]), Ok(vec![Column::Carried; 2]));
        let wide = vec!["x".to_owned(); MOST_COLUMNS + 1];
        assert_eq!(read_header(&wide, &product, &[], &[]), Err(HeaderError::TooWide));
        let long = vec!["x".repeat(LONGEST_NAME + 1)];
        let refused = read_header(&long, &product, &[], &[]);
        assert!(matches!(refused, Err(HeaderError::LongName(_))), "{refused:?}");
        let carried = read_header(&names(&["units"]), &Defaults::default(), &names(&["unit"]), &[]);
        assert_eq!(carried, Err(HeaderError::NotThere("unit".to_owned())));
        let none = Defaults::default();
        let without = read_header(&names(&["product_id"]), &none, &[], &[]);
        assert_eq!(without, Err(HeaderError::NoRequestId));
    }

    #[test]
    fn cells_win_over_defaults_and_an_empty_cell_is_no_value() {
        let given = ["request_id", "product_id", "units", "metadata.a", "customer.name"];
        let columns = header(&given).unwrap();
        let more = [("a".to_owned(), "flag".to_owned()), ("b".to_owned(), "2".to_owned())];
        assert_eq!(with_keys(r#"{"a":1.50}"#, &more), r#"{"a":1.50,"b":"2"}"#);
        assert_eq!(with_keys("[1]", &more), "[1]");
        let defaults = Defaults {
            product_id: Some("prod_d".into()),
            discount_code: Some("AUTUMN".into()),
            metadata: vec![("a".into(), "default".into()), ("b".into(), "2".into())],
            request_id_prefix: Some("c-".into()),
            ..Defaults::default()
        };
        let job = |cells: &[&str]| {
            let id = defaults.request_id(own_id(&columns, cells), || "7".to_owned());
            let job = write_job(&columns, cells, &defaults, id.as_deref());
            serde_json::from_slice::<serde_json::Value>(&job).unwrap()
        };
        assert_eq!(
            job(&[" x1 ", "prod_c", "3", " own ", "Ada \"L\""]),
            serde_json::json!({"product_id":"prod_c","units":3,"request_id":"c-x1","discount_code":"AUTUMN",
                "customer":{"name":"Ada \"L\""},"metadata":{"a":" own ","b":"2"}})
        );
        assert_eq!(
            job(&["", "", "three", "", ""]),
            serde_json::json!({"product_id":"prod_d","units":"three","request_id":"c-7","discount_code":"AUTUMN",
                "metadata":{"a":"default","b":"2"}})
        );
    }
}
