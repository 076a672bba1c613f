//! Rows out of a table or out of NDJSON, one at a time, whatever a spreadsheet made of the file.

use std::io::{self, Read};

use csv::ByteRecord;

use super::columns::{self, Column, Defaults, HeaderError, add_keys};
use super::content_id::ContentIds;
use super::records::Records;
use super::source::Format;
use crate::job::json::{JsonError, Node};
use crate::job::{CheckoutRequest, Refusal, RequestId, Rules};

/// Why an input cannot be read. Each says what to do.
#[derive(Debug, thiserror::Error)]
pub enum InputError {
    /// The file does not give its bytes.
    #[error("it cannot be read: {0}")]
    Io(#[from] io::Error),
    /// A text of two bytes a character.
    #[error("it is UTF-16: save it as \"CSV UTF-8\", not as \"Unicode text\"")]
    Utf16,
    /// Lines that end as on Macs of before 2001, which nothing else takes for lines.
    #[error("its lines end with CR alone, as on old Macs: save it as \"CSV UTF-8\"")]
    OldMac,
    /// A file of another program's.
    #[error("it is an Excel workbook: save it as \"CSV UTF-8\"")]
    Workbook,
    /// A character that no text has.
    #[error("line 1 has a NUL character: it is no CSV file, or a damaged one")]
    Nul,
    /// All jobs in one value.
    #[error("it is a JSON array: put one object on a line (jq -c '.[]' FILE)")]
    Array,
    /// Nothing is in it.
    #[error("it is empty")]
    Empty,
    /// The first line cannot be used.
    #[error("line 1: {0}")]
    Header(HeaderError),
    /// The first line is in another encoding.
    #[error("line 1 is not UTF-8: save the file as \"CSV UTF-8\"")]
    NotUtf8,
    /// Nothing says what is sold.
    #[error("nothing names the product: add a column product_id, or give --product")]
    NoProduct,
    /// A row whose last cell goes on to the end of the file.
    #[error(
        "a quote (\") is left open in the row that begins on line {0}, so that all behind it is one cell: close it, or write it twice where it is meant"
    )]
    OpenQuote(u64),
    /// A row without end.
    #[error(
        "the row that begins on line {0} is larger than 1 MiB, the most that a row may have{1}"
    )]
    Endless(u64, &'static str),
}

impl From<HeaderError> for InputError {
    // Its words are in this one's; it is not a cause to be told as well.
    fn from(error: HeaderError) -> Self {
        Self::Header(error)
    }
}

/// What is wrong with a row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Flaw {
    /// The column, where one is to blame.
    pub column: Option<&'static str>,
    /// The broken rule.
    pub code: &'static str,
    /// What to change.
    pub message: String,
}

/// A row of the input.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// Which, from 1.
    pub number: u64,
    /// Where it begins, from 1.
    pub line: u64,
    /// Its cells, to be carried through; NDJSON has none.
    pub cells: ByteRecord,
    /// Its id, where that can be told.
    pub request_id: Option<String>,
}

/// The job of a row, or why it has none.
pub type Job = Result<Box<CheckoutRequest>, Flaw>;

/// An input that is being read.
pub struct Input {
    records: Records,
    names: Vec<String>,
    columns: Vec<Column>,
    defaults: Defaults,
    rules: Rules,
    content_ids: ContentIds,
    number: u64,
    empty: u64,
}

impl std::fmt::Debug for Input {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Input").field("format", &self.format()).finish_non_exhaustive()
    }
}

/// What is said of all rows.
#[derive(Debug, Clone, Default)]
pub struct Wishes {
    /// What rows have that say nothing themselves.
    pub defaults: Defaults,
    /// Columns that are carried through though they look like fields.
    pub carry: Vec<String>,
    /// The rules of jobs.
    pub rules: Rules,
}

impl Input {
    /// Begins to read.
    ///
    /// # Errors
    /// See [`InputError`].
    pub fn open(source: impl Read + Send + 'static, wishes: Wishes) -> Result<Self, InputError> {
        let records = Records::open(source)?;
        let format = records.format();
        let mut input = Self {
            records,
            names: Vec::new(),
            columns: Vec::new(),
            defaults: wishes.defaults,
            rules: wishes.rules,
            content_ids: ContentIds::default(),
            number: 0,
            empty: 0,
        };
        if format != Format::Ndjson {
            let header = input.records.read()?.ok_or(InputError::Empty)?;
            let count =
                |of: fn(&u8) -> bool| header.iter().flatten().filter(|byte| of(byte)).count();
            match count(|byte| *byte == 0) {
                0 => {}
                // As UTF-16 has between any two letters, with a byte order mark or without.
                nul if 3 * nul > count(|_| true) => return Err(InputError::Utf16),
                _ => return Err(InputError::Nul),
            }
            let names = header.iter().map(|name| String::from_utf8(name.to_vec()));
            input.names = names.collect::<Result<_, _>>().map_err(|_| InputError::NotUtf8)?;
            input.columns = columns::read_header(
                &input.names,
                &input.defaults,
                &wishes.carry,
                &input.rules.extra_fields,
            )?;
            input.content_ids = ContentIds::of_table(&input.names);
            let names_it = input.columns.contains(&Column::Text("product_id"));
            if !names_it && input.defaults.product_id.is_none() {
                return Err(InputError::NoProduct);
            }
        }
        Ok(input)
    }

    /// What kind of file it is.
    #[must_use]
    pub fn format(&self) -> Format {
        self.records.format()
    }

    /// The header, as it is written; empty with NDJSON.
    #[must_use]
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// The columns that are no business of a job's.
    pub fn carried(&self) -> impl Iterator<Item = &str> {
        let columns = self.names.iter().zip(&self.columns);
        let carried =
            columns.filter(|(name, column)| **column == Column::Carried && !name.trim().is_empty());
        carried.map(|(name, _)| name.trim())
    }

    /// Whether the input itself shows each row's id: it has a column for it, and nothing is put before it.
    #[must_use]
    pub fn shows_ids(&self) -> bool {
        self.columns.contains(&Column::Text("request_id"))
            && self.defaults.request_id_prefix.is_none()
    }

    /// Whether all rows are named by what is in them, so that no two have the same id.
    #[must_use]
    pub fn names_rows(&self) -> bool {
        self.format() != Format::Ndjson && !self.columns.contains(&Column::Text("request_id"))
    }

    /// How many bytes have been read so far.
    #[must_use]
    pub fn position(&self) -> u64 {
        self.records.position()
    }

    /// How many rows without a single value were passed over.
    #[must_use]
    pub fn empty(&self) -> u64 {
        self.empty
    }

    /// The next row.
    ///
    /// # Errors
    /// See [`InputError`].
    pub fn next_row(&mut self) -> Result<Option<(Row, Job)>, InputError> {
        loop {
            let Some(record) = self.records.read()? else { return Ok(None) };
            // Spreadsheets export rows that somebody once clicked into.
            if record.iter().all(<[u8]>::is_empty) {
                self.empty += 1;
                continue;
            }
            self.number += 1;
            let line = self.records.line_of(&record);
            let (request_id, job) = match self.format() {
                Format::Csv { .. } => self.read_cells(&record),
                Format::Ndjson => self.read_line(&record),
            };
            let cells = if self.format() == Format::Ndjson {
                ByteRecord::new()
            } else {
                self.filled(record)
            };
            return Ok(Some((Row { number: self.number, line, cells, request_id }, job)));
        }
    }

    /// As many cells as the header has: trailing empty ones may be left out.
    fn filled(&self, mut record: ByteRecord) -> ByteRecord {
        while record.len() < self.names.len() {
            record.push_field(b"");
        }
        record.truncate(self.names.len());
        record
    }

    fn read_cells(&mut self, record: &ByteRecord) -> Judged {
        let count = self.names.len();
        if record.iter().skip(count).any(|cell| !cell.is_empty()) {
            let message = format!(
                "the row has {} cells and the header {count}: is a cell with the delimiter in it not quoted?",
                record.len()
            );
            return (None, Err(Flaw { column: None, code: "row_length", message }));
        }
        if let Some(column) = swallows(&self.names, self.format(), record) {
            let message = format!(
                "the cell of column {column:?} goes on over lines that look like rows: is a quote (\") left open? If all of it is that cell's, take its line breaks out"
            );
            return (None, Err(Flaw { column: None, code: "row_swallows_rows", message }));
        }
        let cells: Result<Vec<&str>, _> = record.iter().map(std::str::from_utf8).collect();
        let Ok(cells) = cells else { return (None, Err(not_utf8())) };
        let own = columns::own_id(&self.columns, &cells);
        // A column of ids that leaves one out is a mistake: the row would get another id when the next cell is mended.
        let left_out = !self.names_rows() && own.is_none_or(str::is_empty);
        let content = || self.content_ids.of_cells(record);
        let id = if left_out { None } else { self.defaults.request_id(own, content) };
        self.judge(&columns::write_job(&self.columns, &cells, &self.defaults, id.as_deref()))
    }

    fn read_line(&mut self, record: &ByteRecord) -> Judged {
        let line = record.get(0).unwrap_or_default();
        if record.len() > 1 {
            return (None, Err(has_nul()));
        }
        let Ok(text) = std::str::from_utf8(line) else {
            let message = "the line is not UTF-8".to_owned();
            return (None, Err(Flaw { column: None, code: "not_utf8", message }));
        };
        match Node::parse(text.trim()) {
            Ok(Node::Object(members)) => {
                let job = self.with_defaults(members);
                self.judge(&job)
            }
            Err(JsonError::Syntax { category, column, .. }) => {
                let message = format!(
                    "not JSON: {category} at column {column}; each line is to be one whole object"
                );
                (None, Err(Flaw { column: None, code: "not_json", message }))
            }
            // Its rules say what is wrong.
            _ => self.judge(text.trim().as_bytes()),
        }
    }

    /// The same job, with what it leaves out.
    fn with_defaults(&mut self, mut members: Vec<(String, Node)>) -> Vec<u8> {
        let defaults = &self.defaults;
        let string = |text: &str| Node::String(text.to_owned());
        let own = members.iter().position(|(name, _)| name == "request_id");
        let own_text = own.and_then(|at| members[at].1.as_str());
        let content = || self.content_ids.of_members(&members);
        if let Some(id) = defaults.request_id(own_text, content) {
            match own {
                // One that is no text is not made one.
                Some(at) if own_text.is_some() => members[at].1 = string(&id),
                Some(_) => {}
                None => members.push(("request_id".to_owned(), string(&id))),
            }
        }
        for field in ["product_id", "discount_code", "success_url"] {
            if let Some(text) = defaults.text(field)
                && !members.iter().any(|(name, _)| name == field)
            {
                members.push((field.to_owned(), string(text)));
            }
        }
        if !defaults.metadata.is_empty() {
            if !members.iter().any(|(name, _)| name == "metadata") {
                members.push(("metadata".to_owned(), Node::Object(Vec::new())));
            }
            for (name, value) in &mut members {
                if let (true, Node::Object(keys)) = (name == "metadata", value) {
                    add_keys(keys, &defaults.metadata);
                }
            }
        }
        let mut body = Vec::new();
        Node::Object(members).write_to(&mut body);
        body
    }

    fn judge(&self, body: &[u8]) -> Judged {
        judge(body, &self.rules)
    }
}

/// The column with a cell that seems to hold other rows: a whole line of it has as many cells as the header,
/// or its last line, which the cell shares with a row then, as many as come before it and a quote.
pub(super) fn swallows<'a>(
    names: &'a [String],
    format: Format,
    record: &ByteRecord,
) -> Option<&'a str> {
    let Format::Csv { delimiter, .. } = format else { return None };
    let cells = |line: &[u8]| line.split(|byte| *byte == delimiter).count();
    // In a table of two columns, any sentence with one comma looks like a row.
    let whole = |line: &&[u8]| names.len() > 2 && cells(line) == names.len();
    let swallows = |(at, cell): (usize, &[u8])| {
        let lines: Vec<&[u8]> = cell.split(|byte| *byte == b'\n').collect();
        let [_, within @ .., last] = lines.as_slice() else { return false };
        // Behind what divides cells no program writes a blank; whoever writes a sentence does.
        let prose = last.windows(2).any(|pair| pair == [delimiter, b' ']);
        within.iter().any(whole)
            || (whole(last) && !prose)
            || (last.contains(&b'"') && cells(last) > at)
    };
    let at = record.iter().enumerate().position(swallows)?;
    names.get(at).map(String::as_str)
}

/// Whether a body is a job.
pub(super) fn judge(body: &[u8], rules: &Rules) -> Judged {
    match CheckoutRequest::parse(body, rules) {
        Ok(request) => (Some(request.request_id.as_str().to_owned()), Ok(Box::new(request))),
        Err(Refusal { code, message, request_id }) => {
            let column = columns::column_of(code);
            let request_id = request_id.as_ref().map(RequestId::as_str).map(str::to_owned);
            (request_id, Err(Flaw { column, code, message }))
        }
    }
}

/// The id, as far as it is known, and the job.
pub(super) type Judged = (Option<String>, Job);

fn has_nul() -> Flaw {
    Flaw {
        column: None,
        code: "not_json",
        message: "the line has a NUL byte in it: put one JSON object on a line".to_owned(),
    }
}

fn not_utf8() -> Flaw {
    Flaw {
        column: None,
        code: "not_utf8",
        message: "the row is not UTF-8: save the file as \"CSV UTF-8\"".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(text: &[u8]) -> Result<Input, InputError> {
        let defaults = Defaults { request_id_prefix: Some("c-".into()), ..Defaults::default() };
        let wishes = Wishes { defaults, ..Wishes::default() };
        Input::open(io::Cursor::new(text.to_vec()), wishes)
    }

    fn rows(text: &[u8]) -> Vec<(Row, Job)> {
        let mut input = open(text).unwrap();
        std::iter::from_fn(|| input.next_row().unwrap()).collect()
    }

    fn wire((_, job): &(Row, Job)) -> String {
        String::from_utf8(job.as_ref().unwrap().wire.clone()).unwrap()
    }

    #[test]
    fn whatever_a_spreadsheet_exports_is_read() {
        let plain = "product_id,customer.email,Notes\nprod_1,a@b.example,\"two\n\"\"lines\"\"\"\nprod_2,c@d.example,hello\n";
        let tabs = plain.replace(',', "\t");
        for (text, delimiter, crlf, bom) in [
            (plain.to_owned(), b',', false, false),
            (
                format!("\u{feff}{}", plain.replace('\n', "\r\n").replace(',', ";")),
                b';',
                true,
                true,
            ),
            (tabs, b'\t', false, false),
        ] {
            assert_eq!(
                open(text.as_bytes()).unwrap().format(),
                Format::Csv { delimiter, crlf, bom }
            );
            let rows = rows(text.as_bytes());
            assert_eq!(rows.len(), 2, "{text}");
            assert_eq!((rows[0].0.number, rows[0].0.line), (1, 2));
            assert_eq!((rows[1].0.number, rows[1].0.line), (2, 4));
            assert!(wire(&rows[0]).contains(r#""customer":{"email":"a@b.example"}"#));
            assert!(rows[0].0.cells[2].ends_with(b"\"lines\""));
        }
    }

    #[test]
    fn rows_without_a_value_are_passed_over_and_short_ones_filled() {
        let rows = rows(b"product_id,units,Notes\nprod_1\n,,\n\nprod_2,2,x,,\nprod_3,1,x,y\n");
        let numbers: Vec<u64> = rows.iter().map(|(row, _)| row.number).collect();
        assert_eq!(numbers, [1, 2, 3]);
        assert_eq!(rows[0].0.cells.len(), 3);
        let job = r#"{"request_id":"c-1410729715242897","product_id":"prod_2","units":2}"#;
        assert_eq!(wire(&rows[1]), job);
        assert_eq!(rows[2].1.as_ref().unwrap_err().code, "row_length");
        let lines: Vec<u64> = rows.iter().map(|(row, _)| row.line).collect();
        assert_eq!(lines, [2, 5, 6]);
    }

    #[test]
    fn a_table_with_a_column_of_ids_names_no_row_itself() {
        let mut rows = rows(b"request_id,product_id\na,prod_1\n,prod_1\n  ,prod_1\n");
        rows.extend(self::rows(b"product_id,request_id\nprod_1\n"));
        assert_eq!(wire(&rows[0]), r#"{"request_id":"c-a","product_id":"prod_1"}"#);
        for (row, job) in &rows[1..] {
            assert_eq!(job.as_ref().unwrap_err().code, "request_id_missing", "line {}", row.line);
        }
    }

    #[test]
    fn a_quote_that_swallows_the_next_row_is_found_and_prose_is_none() {
        let header = "request_id,product_id,City\n";
        let swallowed = format!("{header}a,p,\"\nb,p,\"\nc,p,Oslo\n");
        let codes = |text: &str| -> Vec<Option<&str>> {
            let rows = rows(text.as_bytes());
            rows.iter().map(|(_, job)| job.as_ref().err().map(|flaw| flaw.code)).collect()
        };
        assert_eq!(codes(&swallowed), [Some("row_swallows_rows"), None]);
        let prose = format!("{header}a,p,\"Main Street 5\nBerlin, Mitte, Germany\"\nc,p,Oslo\n");
        assert_eq!(codes(&prose), [None, None]);
    }

    #[test]
    fn lines_that_end_with_cr_alone_are_refused() {
        for text in ["request_id,product_id\rA,p\rB,p\r", "request_id,product_id,a\rA,p,\"x\ny\"\r"]
        {
            let error = open(text.as_bytes()).unwrap_err();
            assert!(matches!(error, InputError::OldMac), "{error}");
        }
        assert!(open(b"request_id,product_id,\"a\rb\"\nA,p,\n").is_ok());
        assert!(open(b"request_id,product_id\r").is_ok(), "a header alone");
    }

    #[test]
    fn a_flaw_names_its_column_and_the_next_row_is_read() {
        let text = b"product_id,units,customer.email\nprod_1,many,\nprod_1,1,nobody\n\xff,1,\nprod_1,1,a@b.example\n";
        let rows = rows(text);
        let flaw = |at: usize| rows[at].1.as_ref().unwrap_err();
        assert_eq!((flaw(0).column, flaw(0).code), (Some("units"), "units"));
        assert_eq!((flaw(1).column, flaw(1).code), (Some("customer.email"), "email"));
        assert_eq!(rows[1].0.request_id.as_deref().map(str::len), Some("c-".len() + 16));
        assert_eq!(flaw(2).code, "not_utf8");
        assert!(rows[3].1.is_ok());
    }

    #[test]
    fn lines_of_json_are_read_and_get_the_defaults() {
        let defaults = Defaults {
            product_id: Some("prod_d".into()),
            metadata: vec![("b".into(), "2".into())],
            request_id_prefix: Some("c-".into()),
            ..Defaults::default()
        };
        let text = "{\"request_id\":\"x\",\"units\":1}\n\n{\"metadata\":{\"a\":1.50},\"product_id\":\"p\"}\nnonsense\n{\"a\":1,\"a\":2}\n[]\n";
        let wishes = Wishes { defaults, ..Wishes::default() };
        let mut input = Input::open(io::Cursor::new(text), wishes).unwrap();
        assert_eq!(input.format(), Format::Ndjson);
        let rows: Vec<(Row, Job)> = std::iter::from_fn(|| input.next_row().unwrap()).collect();
        assert_eq!(
            wire(&rows[0]),
            r#"{"request_id":"c-x","product_id":"prod_d","units":1,"metadata":{"b":"2"}}"#
        );
        assert_eq!(
            wire(&rows[1]),
            r#"{"request_id":"c-6c4c3331b24fb367","product_id":"p","metadata":{"a":1.50,"b":"2"}}"#
        );
        let codes: Vec<&str> =
            rows[2..].iter().map(|(_, job)| job.as_ref().unwrap_err().code).collect();
        assert_eq!(codes, ["not_json", "duplicate_key", "not_object"]);
        assert_eq!(rows[2].0.line, 4);
    }

    #[test]
    fn the_line_that_tells_excel_the_delimiter_is_no_header() {
        let mut input = open(b"sep=|\r\nproduct_id|Name\r\nprod_1|a,b\r\n").unwrap();
        assert_eq!(input.names(), ["product_id", "Name"]);
        let (row, job) = input.next_row().unwrap().unwrap();
        assert!(job.is_ok() && row.line == 3, "{}", row.line);
        assert!(input.next_row().unwrap().is_none());
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        assert!(matches!(open(b""), Err(InputError::Empty)));
        assert!(matches!(open(b"\xff\xfea\0"), Err(InputError::Utf16)));
        assert!(matches!(open(b"p\0,\0n\0\n\0"), Err(InputError::Utf16)));
        assert!(matches!(open(b"product_id,Na\0me\np,x\n"), Err(InputError::Nul)));
        assert!(matches!(open(b"PK\x03\x04\x14\0"), Err(InputError::Workbook)));
        for array in ["[{\"product_id\":\"p\"}]", "\u{feff}[\n  {}\n]", "[]", "["] {
            assert!(matches!(open(array.as_bytes()), Err(InputError::Array)), "{array}");
        }
        assert!(open(b"[Name],product_id\nx,p\n").is_ok(), "it is a name");
        let mut spread = open(b"{\n\"product_id\": \"p\"\n}\n").unwrap();
        let (_, job) = spread.next_row().unwrap().unwrap();
        let flaw = job.unwrap_err();
        assert!(flaw.message.ends_with("each line is to be one whole object"), "{flaw:?}");
        let mut lines = open(b"{\"request_id\":\"a\",\"product_id\":\"p\"}\0{}\n").unwrap();
        let (_, job) = lines.next_row().unwrap().unwrap();
        assert_eq!(job.unwrap_err().code, "not_json");
        let mut text = b"product_id,Notes\nprod_1,x\nprod_1,\"open\n".to_vec();
        text.extend(std::iter::repeat_n(b'x', 3 * 1024 * 1024));
        let mut input = open(&text).unwrap();
        assert!(input.next_row().unwrap().is_some());
        assert!(matches!(input.next_row(), Err(InputError::Endless(3, _))));
    }
}
