//! What a line of links looks like: the input's own cells, and what came of the row.

use std::fs::File;
use std::io::{self, BufWriter, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::Path;

use csv::ByteRecord;

use super::columns::RESULT;
use super::input::Row;
use super::source::Format;
use super::table::{BOM, harmless, meant};
use crate::job::Status;

/// The id of each row, where the input does not show it as it is.
pub const REQUEST_ID: &str = "request_id";

/// What came of a row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// In a word.
    pub status: Status,
    /// Creem's id of the session.
    pub checkout_id: Option<String>,
    /// The link.
    pub checkout_url: Option<String>,
    /// The broken rule or the cause.
    pub error_code: Option<String>,
    /// In a sentence.
    pub error_message: Option<String>,
}

/// A link that an earlier run has written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EarlierLink {
    /// Its row's id.
    pub request_id: String,
    /// Creem's id of the session.
    pub checkout_id: String,
}

/// What the lines of an output look like.
#[derive(Debug, Clone)]
pub struct Layout {
    pub(super) format: Format,
    pub(super) header: ByteRecord,
    /// How many cells of a line are the input's.
    own: usize,
    shows_ids: bool,
    /// Which cell has the row's id.
    id_at: usize,
}

impl Layout {
    /// The output of an input with that header.
    #[must_use]
    pub fn new(format: Format, names: &[String], shows_ids: bool) -> Self {
        let mut header = ByteRecord::new();
        if format == Format::Ndjson {
            header.push_field(REQUEST_ID.as_bytes());
        }
        for name in names {
            header.push_field(&harmless(name.as_bytes()));
        }
        let own = header.len();
        for name in RESULT {
            header.push_field(name.as_bytes());
        }
        let shows_ids = shows_ids || format == Format::Ndjson;
        if !shows_ids {
            header.push_field(REQUEST_ID.as_bytes());
        }
        // As it was read: whatever is around the name, and the last one, where an input has two.
        let shown = names.iter().rposition(|name| name.trim() == REQUEST_ID);
        let id_at = match shown.filter(|_| shows_ids) {
            Some(at) => at,
            None if format == Format::Ndjson => 0,
            None => header.len() - 1,
        };
        Self { format, header, own, shows_ids, id_at }
    }

    pub(super) fn own_cells(&self, row: &Row) -> ByteRecord {
        let mut cells = ByteRecord::new();
        if self.format == Format::Ndjson {
            cells.push_field(row.request_id.as_deref().unwrap_or_default().as_bytes());
        }
        for cell in &row.cells {
            cells.push_field(&harmless(cell));
        }
        cells
    }

    pub(super) fn line(&self, row: &Row, outcome: &Outcome) -> ByteRecord {
        let mut line = self.own_cells(row);
        let Outcome { status, checkout_id, checkout_url, error_code, error_message } = outcome;
        line.push_field(status.as_str().as_bytes());
        for cell in [checkout_id, checkout_url, error_code, error_message] {
            line.push_field(&harmless(cell.as_deref().unwrap_or_default().as_bytes()));
        }
        if !self.shows_ids {
            line.push_field(row.request_id.as_deref().unwrap_or_default().as_bytes());
        }
        line
    }

    /// What came of a row in an earlier run, if the line is of that row.
    pub(super) fn outcome_in(&self, line: &ByteRecord, row: &Row) -> Option<Outcome> {
        let id = row.request_id.as_deref().unwrap_or_default().as_bytes();
        let same = line.len() == self.header.len()
            && line.iter().take(self.own).eq(self.own_cells(row).iter())
            && (self.shows_ids || line.iter().next_back() == Some(id));
        let cell = |at: usize| std::str::from_utf8(line.get(self.own + at)?).ok();
        let text = |at: usize| cell(at).filter(|text| !text.is_empty()).map(str::to_owned);
        let status = Status::parse(cell(0)?).filter(|_| same)?;
        Some(Outcome {
            status,
            checkout_id: text(1),
            checkout_url: text(2),
            error_code: text(3),
            error_message: text(4),
        })
    }

    /// The id of a line that is of the same row, if it has another one.
    pub(super) fn other_id(&self, line: &ByteRecord, row: &Row) -> Option<String> {
        let same = !self.shows_ids
            && line.len() == self.header.len()
            && line.iter().take(self.own).eq(self.own_cells(row).iter());
        let was = std::str::from_utf8(line.iter().next_back()?).ok().filter(|_| same)?;
        let (was, now) = (meant(was), row.request_id.as_deref()?);
        (!was.is_empty() && was != now).then(|| was.to_owned())
    }

    /// A line's link. A spreadsheet may have saved the file since, and leave out empty cells at the end of lines.
    pub(super) fn link_in(&self, line: &ByteRecord) -> Option<EarlierLink> {
        let text = |at: usize| {
            let cell = std::str::from_utf8(line.get(at)?).ok()?;
            Some(meant(cell).trim().to_owned()).filter(|text| !text.is_empty())
        };
        Status::parse(&text(self.own)?).filter(|status| *status == Status::Succeeded)?;
        Some(EarlierLink { request_id: text(self.id_at)?, checkout_id: text(self.own + 1)? })
    }

    /// The next link in the lines of an output, of which so many bytes are whole lines' at most; `None` behind the last
    /// one.
    pub(super) fn next_link(
        &self,
        lines: &mut csv::Reader<File>,
        whole: u64,
    ) -> io::Result<Option<EarlierLink>> {
        let mut line = ByteRecord::new();
        while lines.read_byte_record(&mut line).map_err(io::Error::from)? {
            // However whole a line looks that does not end.
            if self.end_of_cells(lines) <= whole
                && let Some(link) = self.link_in(&line)
            {
                return Ok(Some(link));
            }
        }
        Ok(None)
    }

    /// Whether a file holds no more than the beginning of what every output begins with.
    pub(super) fn begins_like(&self, path: &Path) -> bool {
        let mut start = if self.bom_len() > 0 { BOM.to_vec() } else { Vec::new() };
        let mut writer = self.writer(&mut start);
        let written = writer.write_byte_record(&self.header).is_ok() && writer.flush().is_ok();
        drop(writer);
        written && std::fs::read(path).is_ok_and(|text| start.starts_with(&text))
    }

    /// Where the line ends that was read last.
    pub(super) fn end_of_line(&self, reader: &csv::Reader<File>) -> u64 {
        // A reader is satisfied with the first of two characters that end a line.
        self.end_of_cells(reader) + u64::from(self.format.is_crlf())
    }

    /// Behind the first of the characters that end the line that was read last, whichever they are.
    pub(super) fn end_of_cells(&self, reader: &csv::Reader<File>) -> u64 {
        self.bom_len() + reader.position().byte()
    }

    pub(super) fn bom_len(&self) -> u64 {
        if matches!(self.format, Format::Csv { bom: true, .. }) { BOM.len() as u64 } else { 0 }
    }

    pub(super) fn writer<W: io::Write>(&self, inner: W) -> csv::Writer<W> {
        self.format.writer(inner)
    }

    /// Begins to write behind what a file has; in an empty one, behind the header.
    pub(super) fn append_to(&self, mut file: File) -> io::Result<csv::Writer<BufWriter<File>>> {
        let empty = file.seek(SeekFrom::End(0))? == 0;
        if empty && self.bom_len() > 0 {
            file.write_all(BOM)?;
        }
        let mut writer = self.writer(BufWriter::new(file));
        if empty {
            writer.write_byte_record(&self.header).map_err(io::Error::other)?;
        }
        Ok(writer)
    }

    pub(super) fn reader(&self, mut file: File) -> io::Result<Option<csv::Reader<File>>> {
        if self.bom_len() > 0 {
            let mut start = [0; BOM.len()];
            if file.read_exact(&mut start).is_err() || start != BOM {
                return Ok(None);
            }
        }
        let begins = file.stream_position()?;
        let mut builder = csv::ReaderBuilder::new();
        builder.has_headers(false).flexible(true).delimiter(self.format.delimiter());
        // A file of something else may be one line of gigabytes.
        let cells: usize = self.header.iter().map(|name| 2 * name.len() + 8).sum();
        let mut first = builder.from_reader((&file).take(cells as u64 + 2));
        let mut header = ByteRecord::new();
        let read = first.read_byte_record(&mut header).map_err(io::Error::other)?;
        if !read || header != self.header {
            return Ok(None);
        }
        file.seek(SeekFrom::Start(begins))?;
        let mut reader = builder.from_reader(file);
        reader.read_byte_record(&mut header).map_err(io::Error::other)?;
        Ok(Some(reader))
    }
}

pub(super) fn next_line(reader: &mut csv::Reader<File>) -> Option<ByteRecord> {
    let mut line = ByteRecord::new();
    reader.read_byte_record(&mut line).ok().filter(|read| *read).map(|_| line)
}
