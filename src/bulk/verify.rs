//! Links of an earlier run, looked at again: Creem does not say how long a link lives.

use std::io::Read;
use std::sync::Arc;

use csv::ByteRecord;

use super::columns::{self, Column, Defaults, RESULT};
use super::input::{InputError, Job, Wishes, judge, swallows};
use super::layout::REQUEST_ID;
use super::records::Records;
use super::source::Format;
use super::table::{guarded, meant};
use crate::creem::Seen;
use crate::job::{Rules, Status, printable};

/// What is added to each line.
pub const ADDED: [&str; 2] = ["link", "checked_at"];

/// What has become of a link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Link {
    /// It can be paid.
    Open,
    /// Somebody is paying.
    Processing,
    /// It was paid.
    Paid,
    /// It is dead.
    Expired,
    /// Creem knows no such session.
    Gone,
    /// It could not be learned, and why.
    Unknown(String),
}

impl Link {
    /// The word in the column.
    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Processing => "processing",
            Self::Paid => "paid",
            Self::Expired => "expired",
            Self::Gone => "gone",
            Self::Unknown(_) => "unknown",
        }
    }

    /// Whether a buyer can pay by it or one has.
    #[must_use]
    pub const fn is_usable(&self) -> bool {
        matches!(self, Self::Open | Self::Processing | Self::Paid)
    }

    /// Whether a buyer cannot pay by it and none has.
    #[must_use]
    pub const fn is_dead(&self) -> bool {
        matches!(self, Self::Expired | Self::Gone)
    }
}

impl From<Seen> for Link {
    fn from(seen: Seen) -> Self {
        match seen {
            Seen::Status(status) => match status.as_str() {
                "pending" => Self::Open,
                "processing" => Self::Processing,
                "completed" => Self::Paid,
                "expired" => Self::Expired,
                _ => Self::Unknown(format!("Creem calls it {status}")),
            },
            Seen::Gone => Self::Gone,
            Seen::Never(why) | Seen::Later { why, .. } => Self::Unknown(why),
        }
    }
}

/// Where the cells are that count.
#[derive(Debug, Clone, Copy)]
struct Places {
    /// The first of those that a run has added.
    status: usize,
    request_id: usize,
    /// The first of those that are added here, if an earlier look has added them.
    link: Option<usize>,
}

/// A file of links that is being read.
pub struct Links {
    records: Records,
    names: Vec<String>,
    header: ByteRecord,
    places: Places,
    making: Arc<Making>,
}

impl std::fmt::Debug for Links {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Links").field("format", &self.format()).finish_non_exhaustive()
    }
}

/// Why a file is no file of links.
#[derive(Debug, thiserror::Error)]
pub enum LinksError {
    /// It cannot be read.
    #[error(transparent)]
    Input(#[from] InputError),
    /// It is something else.
    #[error(
        "it is no output of `bulk`: the columns status, checkout_id, checkout_url, error_code, error_message or request_id are missing"
    )]
    Foreign,
    /// Somebody has written behind a line.
    #[error(
        "the row that begins on line {line} has {count} cells and the header {expected}: take out what was written behind it, or give it a column of its own in the first line"
    )]
    Length {
        /// Where it begins, from 1.
        line: u64,
        /// Its cells.
        count: usize,
        /// The header's.
        expected: usize,
    },
    /// A quote swallows rows.
    #[error(
        "in the row that begins on line {line}, the cell of column {column:?} goes on over lines that look like rows: is a quote (\") left open?"
    )]
    Swallows {
        /// Where it begins, from 1.
        line: u64,
        /// The cell's.
        column: String,
    },
}

impl Links {
    /// Begins to read a file that an earlier run has made.
    ///
    /// # Errors
    /// See [`LinksError`].
    pub fn open(
        source: impl Read + Send + 'static,
        Wishes { defaults, carry, rules }: Wishes,
    ) -> Result<Self, LinksError> {
        let mut records = Records::open(source)?;
        if records.format() == Format::Ndjson {
            return Err(LinksError::Foreign);
        }
        let header = records.read()?.ok_or(InputError::Empty)?;
        let names: Vec<String> =
            header.iter().map(|name| String::from_utf8_lossy(name).into_owned()).collect();
        let places = places(&names).ok_or(LinksError::Foreign)?;
        let own = &names[..places.status];
        // A column that is no field's was carried through.
        let carry: Vec<String> = own
            .iter()
            .filter(|name| {
                carry.contains(name) || columns::read_columns(&[(*name).clone()], &[], &[]).is_err()
            })
            .cloned()
            .collect();
        let columns =
            columns::read_columns(own, &carry, &rules.extra_fields).map_err(InputError::Header)?;
        let making = Arc::new(Making { columns, defaults, rules });
        Ok(Self { records, names, header, places, making })
    }

    /// What kind of file it is.
    #[must_use]
    pub fn format(&self) -> Format {
        self.records.format()
    }

    /// The header with what is added.
    #[must_use]
    pub fn header(&self) -> ByteRecord {
        let mut header = self.header.clone();
        if self.places.link.is_none() {
            for name in ADDED {
                header.push_field(name.as_bytes());
            }
        }
        header
    }

    /// The next line.
    ///
    /// # Errors
    /// See [`LinksError`].
    pub fn next_line(&mut self) -> Result<Option<Line>, LinksError> {
        let Some(mut cells) = self.records.read()? else { return Ok(None) };
        let line = self.records.line_of(&cells);
        let (count, expected) = (cells.len(), self.header.len());
        if cells.iter().skip(expected).any(|cell| !cell.is_empty()) {
            return Err(LinksError::Length { line, count, expected });
        }
        if let Some(column) = swallows(&self.names, self.format(), &cells) {
            return Err(LinksError::Swallows { line, column: printable(column, 60) });
        }
        cells.truncate(expected);
        while cells.len() < self.header.len() {
            cells.push_field(b"");
        }
        Ok(Some(Line { cells, places: self.places }))
    }

    /// Whether a line's job can be made again as far as its product goes.
    #[must_use]
    pub fn names_the_product(&self) -> bool {
        self.making.columns.contains(&Column::Text("product_id"))
            || self.making.defaults.product_id.is_some()
    }

    /// What makes the job of a line again.
    #[must_use]
    pub fn renewal(&self, line: &Line) -> Renewal {
        let cells = (0..self.places.status).map(|at| meant(&line.text(at)).to_owned()).collect();
        Renewal { making: self.making.clone(), cells, id: line.request_id() }
    }
}

/// What jobs are made of again.
#[derive(Debug)]
struct Making {
    columns: Vec<Column>,
    defaults: Defaults,
    rules: Rules,
}

/// A line's job, under one id after another.
#[derive(Debug)]
pub struct Renewal {
    making: Arc<Making>,
    cells: Vec<String>,
    id: String,
}

impl Renewal {
    /// The job under the line's own id, as far as the line and the flags tell.
    ///
    /// # Errors
    /// What makes it none.
    pub fn own_job(&self) -> Job {
        self.job(&self.id)
    }

    fn job(&self, id: &str) -> Job {
        let cells: Vec<&str> = self.cells.iter().map(String::as_str).collect();
        let Making { columns, defaults, rules } = &*self.making;
        judge(&columns::write_job(columns, &cells, defaults, Some(id)), rules).1
    }

    /// Has the next job be the one with that number, if it would be an earlier one.
    pub fn go_on_with(&mut self, number: u32) {
        let last = numbered(&self.id).map_or(0, |(_, last)| last);
        if let Some(before) = number.checked_sub(1).filter(|before| *before > last) {
            self.id = format!("{}.r{before}", stem(&self.id));
        }
    }

    /// The job under the next id that follows from the last: `x` becomes `x.r1`, and that `x.r2`.
    pub fn next_job(&mut self) -> (String, Job) {
        self.id = next_id(&self.id);
        (self.id.clone(), self.job(&self.id))
    }
}

/// A line of a file of links.
#[derive(Debug, Clone)]
pub struct Line {
    cells: ByteRecord,
    places: Places,
}

impl Line {
    fn text(&self, at: usize) -> String {
        String::from_utf8_lossy(self.cells.get(at).unwrap_or_default()).into_owned()
    }

    /// Its row's id.
    #[must_use]
    pub fn request_id(&self) -> String {
        meant(&self.text(self.places.request_id)).trim().to_owned()
    }

    /// The session whose link it has, if it has one.
    #[must_use]
    pub fn checkout_id(&self) -> Option<String> {
        let status = self.text(self.places.status);
        let linked = Status::parse(status.trim()) == Some(Status::Succeeded);
        Some(meant(&self.text(self.places.status + 1)).trim().to_owned())
            .filter(|id| linked && !id.is_empty())
    }

    /// The line with what was learned of its link.
    #[must_use]
    pub fn with(&self, link: Option<&Link>, checked_at: &str) -> ByteRecord {
        // Somebody may have edited it since.
        let mut cells: Vec<Vec<u8>> = self.cells.iter().map(guarded).collect();
        let (word, at) = match link {
            Some(link) => (link.as_str(), checked_at),
            None => ("", ""),
        };
        match self.places.link {
            Some(place) => {
                cells[place] = word.into();
                cells[place + 1] = at.into();
            }
            None => cells.extend([word.into(), at.into()]),
        }
        ByteRecord::from(cells)
    }

    /// The line with another outcome, under another id.
    #[must_use]
    pub fn renewed(&self, id: &str, outcome: &super::layout::Outcome) -> Self {
        let mut cells: Vec<Vec<u8>> = self.cells.iter().map(<[u8]>::to_vec).collect();
        let at = self.places.status;
        let texts = [
            Some(outcome.status.as_str()),
            outcome.checkout_id.as_deref(),
            outcome.checkout_url.as_deref(),
            outcome.error_code.as_deref(),
            outcome.error_message.as_deref(),
        ];
        for (cell, text) in cells[at..].iter_mut().zip(texts) {
            *cell = super::table::harmless(text.unwrap_or_default().as_bytes());
        }
        cells[self.places.request_id] = id.into();
        Self { cells: ByteRecord::from(cells), places: self.places }
    }
}

fn places(names: &[String]) -> Option<Places> {
    // The last one that has all of them behind it: an input may have a column of the same name.
    let status = names.windows(RESULT.len()).rposition(|window| window.iter().eq(RESULT))?;
    let request_id = names.iter().rposition(|name| name.trim() == REQUEST_ID)?;
    // The input may have such columns, too.
    let behind = status + RESULT.len();
    let link = names[behind..].windows(ADDED.len()).rposition(|window| window.iter().eq(ADDED));
    let link = link.map(|at| behind + at);
    Some(Places { status, request_id, link })
}

fn next_id(id: &str) -> String {
    match numbered(id) {
        Some((stem, number)) => format!("{stem}.r{}", number.saturating_add(1)),
        None => format!("{id}.r1"),
    }
}

/// What all ids begin with that follow from one another.
#[must_use]
pub fn stem(id: &str) -> &str {
    numbered(id).map_or(id, |(stem, _)| stem)
}

pub(super) fn numbered(id: &str) -> Option<(&str, u32)> {
    let (stem, number) = id.rsplit_once(".r")?;
    Some((stem, number.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;
    use crate::bulk::layout::Outcome;

    #[test]
    fn ids_follow_from_one_another() {
        for (id, next) in [("a", "a.r1"), ("a.r1", "a.r2"), ("a.r9", "a.r10"), ("a.rx", "a.rx.r1")]
        {
            assert_eq!(next_id(id), next);
        }
    }

    #[test]
    fn a_dead_link_is_renewed_from_its_own_line_and_the_flags() {
        let text = "product_id,units,metadata.note,status,checkout_id,checkout_url,error_code,error_message,request_id\nprod_1,'=A,'=b,succeeded,ch_1,https://x/1,,,fair-1\nprod_1,B,,failed,,,c,m,fair-2\n";
        let defaults = Defaults { discount_code: Some("AUTUMN".into()), ..Defaults::default() };
        let wishes = Wishes { defaults, carry: vec!["units".into()], ..Wishes::default() };
        let mut links = Links::open(io::Cursor::new(text), wishes).unwrap();
        let line = links.next_line().unwrap().unwrap();
        assert_eq!(line.checkout_id().as_deref(), Some("ch_1"));
        let mut renewal = links.renewal(&line);
        let (id, job) = renewal.next_job();
        assert_eq!((id.as_str(), renewal.next_job().0.as_str()), ("fair-1.r1", "fair-1.r2"));
        let wire = String::from_utf8(job.unwrap().wire).unwrap();
        assert_eq!(
            wire,
            r#"{"request_id":"fair-1.r1","product_id":"prod_1","discount_code":"AUTUMN","metadata":{"note":"=b"}}"#
        );
        let outcome = Outcome {
            status: Status::Succeeded,
            checkout_id: Some("ch_2".into()),
            checkout_url: Some("https://x/2".into()),
            error_code: None,
            error_message: None,
        };
        let renewed = line.renewed(&id, &outcome).with(Some(&Link::Open), "now");
        let cells: Vec<&str> =
            renewed.iter().map(|cell| std::str::from_utf8(cell).unwrap()).collect();
        assert_eq!(
            cells,
            [
                "prod_1",
                "'=A",
                "'=b",
                "succeeded",
                "ch_2",
                "https://x/2",
                "",
                "",
                "fair-1.r1",
                "open",
                "now"
            ]
        );
        assert_eq!(links.next_line().unwrap().unwrap().checkout_id(), None);
        assert!(links.next_line().unwrap().is_none());
    }

    #[test]
    fn what_was_written_behind_a_line_or_swallows_others_is_told() {
        let header = "request_id,Name,status,checkout_id,checkout_url,error_code,error_message";
        let line = |id: &str| format!("{id},Ada,succeeded,ch_{id},u,,");
        let next = |text: &str| {
            let text = format!("{header}\n{text}");
            Links::open(io::Cursor::new(text), Wishes::default()).unwrap().next_line()
        };
        let behind = next(&format!("{},,paid by phone\n", line("a")));
        assert!(
            matches!(behind, Err(LinksError::Length { line: 2, count: 9, expected: 7 })),
            "{behind:?}"
        );
        assert!(next(&format!("{},,\n", line("a"))).is_ok());
        let open = line("a").replace("Ada", "\"Ada");
        let closed = line("c").replace("Ada", "Ada\"");
        let swallowed = next(&format!("{open}\n{}\n{closed}\n", line("b")));
        assert!(matches!(swallowed, Err(LinksError::Swallows { line: 2, .. })), "{swallowed:?}");
        let endless = next(&format!("\"{}", "x\n".repeat(1024 * 1024)));
        assert!(
            matches!(endless, Err(LinksError::Input(InputError::Endless(2, _)))),
            "{endless:?}"
        );
    }

    #[test]
    fn an_output_needs_no_column_of_a_job() {
        let text = "Name|status|checkout_id|checkout_url|error_code|error_message|request_id\nAda|succeeded|ch_1|u|||a\n";
        let mut links = Links::open(io::Cursor::new(text), Wishes::default()).unwrap();
        let line = links.next_line().unwrap().unwrap();
        assert_eq!(
            (line.request_id().as_str(), line.checkout_id().as_deref()),
            ("a", Some("ch_1"))
        );
    }

    #[test]
    fn a_renewal_goes_on_with_a_later_number_only() {
        let text = "request_id,status,checkout_id,checkout_url,error_code,error_message\na.r2,succeeded,ch_1,u,,\n";
        let next = |number: Option<u32>| {
            let mut links = Links::open(io::Cursor::new(text), Wishes::default()).unwrap();
            let mut renewal = links.next_line().unwrap().map(|line| links.renewal(&line)).unwrap();
            if let Some(number) = number {
                renewal.go_on_with(number);
            }
            renewal.next_job().0
        };
        let ids = [None, Some(0), Some(2), Some(3), Some(7)].map(next);
        assert_eq!(ids, ["a.r3", "a.r3", "a.r3", "a.r3", "a.r7"]);
    }

    #[test]
    fn a_second_look_takes_the_place_of_the_first() {
        let text = "request_id,status,checkout_id,checkout_url,error_code,error_message,link,checked_at\na,succeeded,ch_1,u,,,open,then\n";
        let mut links = Links::open(io::Cursor::new(text), Wishes::default()).unwrap();
        assert_eq!(links.header().len(), 8);
        let line = links.next_line().unwrap().unwrap().with(Some(&Link::Paid), "now");
        assert_eq!(line.iter().skip(6).collect::<Vec<_>>(), [b"paid".as_slice(), b"now"]);
        // The input's own columns are not written over.
        let text = "request_id,link,checked_at,status,checkout_id,checkout_url,error_code,error_message\na,mine,as well,succeeded,ch_1,u,,\n";
        let mut links = Links::open(io::Cursor::new(text), Wishes::default()).unwrap();
        let line = links.next_line().unwrap().unwrap().with(Some(&Link::Paid), "now");
        let cells: Vec<_> = line.iter().map(|cell| String::from_utf8_lossy(cell)).collect();
        assert_eq!(
            cells,
            ["a", "mine", "as well", "succeeded", "ch_1", "u", "", "", "paid", "now"]
        );
        let other = Links::open(io::Cursor::new("a,b\n"), Wishes::default());
        assert!(matches!(other, Err(LinksError::Foreign)));
    }
}
