//! Tables as other programs read them.

use std::io;

use super::source::Format;

/// What a spreadsheet knows UTF-8 by.
pub const BOM: &[u8] = b"\xef\xbb\xbf";

/// A cell as a spreadsheet may have it: none that begins like a formula is left so (OWASP, "CSV
/// injection"), as cells and Creem's words are other people's. Plain numbers stay. One that looks as if this
/// had been done to it gets another quote, so that [`meant`] gives every cell back.
#[must_use]
pub fn harmless(cell: &[u8]) -> Vec<u8> {
    let quotes = cell.iter().take_while(|byte| **byte == b'\'').count();
    if is_formula(&cell[quotes..]) { [b"'", cell].concat() } else { cell.to_vec() }
}

/// The same for a cell of a file that was written here: one that is harmless is left as it is.
#[must_use]
pub fn guarded(cell: &[u8]) -> Vec<u8> {
    if is_formula(cell) { [b"'", cell].concat() } else { cell.to_vec() }
}

fn is_formula(cell: &[u8]) -> bool {
    if cell.first().is_none_or(u8::is_ascii_alphanumeric) {
        return false;
    }
    let text = String::from_utf8_lossy(cell);
    let shows =
        |char: &char| !(char.is_whitespace() || char.is_control()) || "\t\r".contains(*char);
    let first = text.chars().find(shows);
    // The wide ones are taken for the others where people write with them.
    let begins =
        first.is_some_and(|first| "=+-@\t\r\u{ff1d}\u{ff0b}\u{ff0d}\u{ff20}".contains(first));
    let digits = cell.strip_prefix(b"-").or_else(|| cell.strip_prefix(b"+")).unwrap_or(cell);
    let number = digits.iter().all(|byte| byte.is_ascii_digit() || b".,".contains(byte))
        && digits.iter().any(u8::is_ascii_digit);
    begins && !number
}

/// What a cell meant before it was made harmless.
#[must_use]
pub fn meant(cell: &str) -> &str {
    match cell.strip_prefix('\'') {
        Some(meant) if harmless(meant.as_bytes()) != meant.as_bytes() => meant,
        _ => cell,
    }
}

/// Writes a table with commas, line by line.
#[derive(Debug)]
pub struct Writer<W: io::Write>(csv::Writer<W>);

impl<W: io::Write> Writer<W> {
    /// Begins a table.
    pub fn new(inner: W) -> Self {
        let mut builder = csv::WriterBuilder::new();
        Self(builder.terminator(csv::Terminator::Any(b'\n')).from_writer(inner))
    }

    /// Begins a table as another one is: with its delimiter, ends of lines and byte order mark.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn like(mut inner: W, format: Format) -> io::Result<Self> {
        if matches!(format, Format::Csv { bom: true, .. }) {
            inner.write_all(BOM)?;
        }
        Ok(Self(format.writer(inner)))
    }

    /// Writes a line of cells that are harmless.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn record(&mut self, cells: &csv::ByteRecord) -> io::Result<()> {
        self.0.write_byte_record(cells).map_err(io::Error::from)
    }

    /// Writes a line.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn line(&mut self, cells: &[&str]) -> io::Result<()> {
        let cells = cells.iter().map(|cell| harmless(cell.as_bytes()));
        self.0.write_record(cells).map_err(|error| {
            let csv::ErrorKind::Io(error) = error.into_kind() else {
                return io::Error::other("the line cannot be written");
            };
            error
        })
    }

    /// Hands what is written to the operating system.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }

    /// Writes whatever is left.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn finish(mut self) -> io::Result<()> {
        self.0.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_begins_like_a_formula_is_text_and_numbers_stay() {
        for (cell, safe) in [
            ("=1+1", "'=1+1"),
            ("+1+1", "'+1+1"),
            ("-2-3", "'-2-3"),
            (" =cmd", "' =cmd"),
            ("\n=cmd", "'\n=cmd"),
            ("@SUM(A1)", "'@SUM(A1)"),
            ("\u{ff1d}1+1", "'\u{ff1d}1+1"),
            ("\u{a0}=cmd", "'\u{a0}=cmd"),
            ("\u{b}=cmd", "'\u{b}=cmd"),
            ("-5", "-5"),
            ("+49,50", "+49,50"),
            ("-1.234,5", "-1.234,5"),
            ("'=1+1", "''=1+1"),
            ("''=1+1", "'''=1+1"),
            ("'-5", "'-5"),
            ("'", "'"),
            ("plain", "plain"),
            ("", ""),
        ] {
            assert_eq!(harmless(cell.as_bytes()), safe.as_bytes(), "{cell:?}");
            assert_eq!(meant(safe), cell, "{cell:?}");
        }
    }
}
