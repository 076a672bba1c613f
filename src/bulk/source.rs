//! The bytes of a file of rows: what kind of file it is, how far is read of it, and where it ends.

use std::io::{self, BufReader, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use csv::ByteRecord;

use super::input::InputError;
use super::table::BOM;

/// What is looked at to tell what kind of file it is.
pub(super) const LOOK_AT: usize = 64 * 1024;

/// What kind of file it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// A table.
    Csv {
        /// Between two cells.
        delimiter: u8,
        /// Whether lines end as Windows has them.
        crlf: bool,
        /// Whether it begins with a byte order mark.
        bom: bool,
    },
    /// One JSON object a line.
    Ndjson,
}

impl Format {
    /// Whether lines end as Windows has them.
    pub(super) const fn is_crlf(self) -> bool {
        matches!(self, Self::Csv { crlf: true, .. })
    }

    /// What is between two cells; of what is no table, in the table that is made of it.
    pub(super) const fn delimiter(self) -> u8 {
        match self {
            Self::Csv { delimiter, .. } => delimiter,
            Self::Ndjson => b',',
        }
    }

    /// Makes a writer of such a table; for anything else, of one with commas.
    pub(super) fn writer<W: io::Write>(self, inner: W) -> csv::Writer<W> {
        let end = if self.is_crlf() { csv::Terminator::CRLF } else { csv::Terminator::Any(b'\n') };
        let mut builder = csv::WriterBuilder::new();
        builder.flexible(true).delimiter(self.delimiter()).terminator(end).from_writer(inner)
    }
}

/// What the beginning of a file tells.
pub(super) struct Recognised {
    pub(super) format: Format,
    /// All of it, but for what is no row or header.
    pub(super) rest: Box<dyn Read + Send>,
    /// How many lines that are left out.
    pub(super) lines: u64,
}

/// Looks at the beginning, and passes over a byte order mark and what tells Excel the delimiter.
pub(super) fn recognise(mut source: impl Read + Send + 'static) -> Result<Recognised, InputError> {
    let look = beginning(&mut source)?;
    if look.is_empty() {
        return Err(InputError::Empty);
    }
    if look.starts_with(b"\xff\xfe") || look.starts_with(b"\xfe\xff") {
        return Err(InputError::Utf16);
    }
    // A ZIP archive, and what Excel wrote before it wrote those.
    if look.starts_with(b"PK\x03\x04") || look.starts_with(b"\xd0\xcf\x11\xe0") {
        return Err(InputError::Workbook);
    }
    let bom = look.starts_with(BOM);
    let mut passed = if bom { BOM.len() } else { 0 };
    let text = &look[passed..];
    let begins = text.trim_ascii_start();
    if let Some(first) = begins.strip_prefix(b"[").map(<[u8]>::trim_ascii_start)
        && matches!(first.first(), Some(b'{' | b'[' | b']') | None)
    {
        return Err(InputError::Array);
    }
    let format = if begins.starts_with(b"{") {
        Format::Ndjson
    } else {
        let header = behind_empty_lines(text);
        let (line, ended) = first_line(header);
        if !ended && begins_with_cr_line(line) {
            return Err(InputError::OldMac);
        }
        let crlf = ended && line.last() == Some(&b'\r');
        let told = told_delimiter(line);
        if told.is_some() {
            passed += text.len() - header.len() + line.len() + usize::from(ended);
        }
        Format::Csv { delimiter: told.unwrap_or_else(|| delimiter(line)), crlf, bom }
    };
    let lines = (look[..passed].split(|byte| *byte == b'\n').count() - 1) as u64;
    let mut look = io::Cursor::new(look);
    look.set_position(passed as u64);
    Ok(Recognised { format, rest: Box::new(look.chain(source)), lines })
}

/// The first bytes of a file up to the end of its first line that is not empty, if that is not too long: a pipe may
/// give them piece by piece.
fn beginning(source: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut look = Vec::new();
    loop {
        let text = look.strip_prefix(BOM).unwrap_or(&look);
        if look.len() == LOOK_AT || first_line(behind_empty_lines(text)).1 {
            return Ok(look);
        }
        let length = look.len();
        look.resize(LOOK_AT, 0);
        let read = loop {
            match source.read(&mut look[length..]) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                read => break read?,
            }
        };
        look.truncate(length + read);
        if read == 0 {
            return Ok(look);
        }
    }
}

fn behind_empty_lines(text: &[u8]) -> &[u8] {
    let empty = text.iter().take_while(|byte| matches!(byte, b'\r' | b'\n')).count();
    &text[empty..]
}

/// What Excel is told by a line before the header, `sep=;`.
fn told_delimiter(line: &[u8]) -> Option<u8> {
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    match line.strip_prefix(b"sep=")? {
        [told @ (b',' | b';' | b'\t' | b'|')] => Some(*told),
        _ => None,
    }
}

/// The first line outside of quotes, and whether it ends within what is looked at.
fn first_line(text: &[u8]) -> (&[u8], bool) {
    let mut quoted = false;
    for (at, byte) in text.iter().enumerate() {
        match byte {
            b'"' => quoted = !quoted,
            b'\n' if !quoted => return (&text[..at], true),
            _ => {}
        }
    }
    (text, false)
}

/// Whether a line that never ends with LF ends with CR, outside of quotes, and goes on.
fn begins_with_cr_line(line: &[u8]) -> bool {
    let mut quoted = false;
    let end = line.iter().position(|byte| {
        quoted ^= *byte == b'"';
        *byte == b'\r' && !quoted
    });
    end.is_some_and(|end| !line[end..].trim_ascii().is_empty())
}

/// Whatever of the usual delimiters the header has most of; pipes, where it has no other.
fn delimiter(line: &[u8]) -> u8 {
    let mut counts = [(b',', 0_usize), (b';', 0), (b'\t', 0), (b'|', 0)];
    let mut quoted = false;
    for byte in line {
        if *byte == b'"' {
            quoted = !quoted;
        }
        if let Some((_, count)) = counts.iter_mut().find(|(known, _)| known == byte && !quoted) {
            *count += 1;
        }
    }
    let [others @ .., (_, pipes)] = &mut counts;
    if others.iter().any(|(_, count)| *count > 0) {
        *pipes = 0;
    }
    // Of equals the first one: a single column has none.
    let most = counts.iter().map(|(_, count)| *count).max().unwrap_or(0);
    counts.iter().find(|(_, count)| *count == most).map_or(b',', |(byte, _)| *byte)
}

/// A line of its own that is put behind a table: whatever swallows it has a quote left open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct End {
    line: Vec<u8>,
    line_break: &'static str,
}

/// Where the end was met.
pub(super) enum EndMet {
    /// Behind the last row.
    End,
    /// In its last cell.
    InACell,
}

impl End {
    pub(super) fn of(format: Format) -> Self {
        let line = match format {
            // Nobody can have written that number into a file.
            Format::Csv { .. } => {
                let mut number = [0; 16];
                getrandom::fill(&mut number).unwrap_or_default();
                format!("end-{:032x}", u128::from_le_bytes(number)).into_bytes()
            }
            Format::Ndjson => Vec::new(),
        };
        Self { line, line_break: if format.is_crlf() { "\r\n" } else { "\n" } }
    }

    /// What comes behind the last byte of the file.
    pub(super) fn tail(&self) -> io::Cursor<Vec<u8>> {
        if self.line.is_empty() {
            return io::Cursor::default();
        }
        let line_break = self.line_break.as_bytes();
        io::Cursor::new([line_break, &self.line, line_break].concat())
    }

    pub(super) fn seen(&self, record: &ByteRecord) -> Option<EndMet> {
        let last = record.iter().next_back().filter(|_| !self.line.is_empty())?;
        if record.len() == 1 && last == self.line {
            return Some(EndMet::End);
        }
        let cut = last.strip_suffix(self.line_break.as_bytes()).unwrap_or(last);
        cut.ends_with(&self.line).then_some(EndMet::InACell)
    }
}

/// Gives no more than a row's bytes beyond where a row begins, and the end behind the last one.
pub(super) struct Bounded {
    source: BufReader<Box<dyn Read + Send>>,
    /// How many bytes were given.
    read: u64,
    /// The last of them.
    last: Vec<u8>,
    /// How far may be read, beyond what the reader has in its own buffer.
    bound: Arc<AtomicU64>,
    end: io::Cursor<Vec<u8>>,
}

impl Bounded {
    pub(super) fn new(
        source: BufReader<Box<dyn Read + Send>>,
        bound: Arc<AtomicU64>,
        end: io::Cursor<Vec<u8>>,
    ) -> Self {
        Self { source, read: 0, last: Vec::new(), bound, end }
    }

    /// The byte before a place among those that were given last.
    pub(super) fn byte_before(&self, at: u64) -> Option<u8> {
        let behind = usize::try_from(self.read.checked_sub(at)?).ok()?;
        self.last.get(self.last.len().checked_sub(behind + 1)?).copied()
    }
}

impl Read for Bounded {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.read > self.bound.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        let mut count = self.source.read(buffer)?;
        if count == 0 {
            count = self.end.read(buffer)?;
        }
        self.read += u64::try_from(count).unwrap_or(u64::MAX);
        if count > 0 {
            self.last.clear();
            self.last.extend_from_slice(&buffer[..count]);
        }
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pipes_are_between_cells_where_nothing_else_is() {
        for (line, expected) in [
            ("a|b", b'|'),
            ("request_id,product_id,metadata.tags a|b|c|d", b','),
            ("\"a,b\"|c", b'|'),
            ("a;b,c;d", b';'),
            ("a\tb", b'\t'),
            ("a", b','),
        ] {
            assert_eq!(delimiter(line.as_bytes()), expected, "{line}");
        }
    }
}
