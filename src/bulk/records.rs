//! The records of a file of rows: each with the line on which it begins, and none larger than a row may be.

use std::io::{self, BufReader, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use csv::ByteRecord;

use super::input::InputError;
use super::source::{Bounded, End, EndMet, Format, LOOK_AT, recognise};

/// Largest row in bytes: with a quote left open, the rest of the file is one.
const MAX_ROW: u64 = 1024 * 1024;

/// Records, with the line on which each begins; one of more than 1 MiB ends the reading.
pub(super) struct Records {
    reader: csv::Reader<Bounded>,
    bound: Arc<AtomicU64>,
    end: End,
    format: Format,
    /// Lines before the first record that are none.
    passed: u64,
}

impl Records {
    /// Begins to read.
    ///
    /// # Errors
    /// See [`InputError`].
    pub(super) fn open(source: impl Read + Send + 'static) -> Result<Self, InputError> {
        let recognised = recognise(source)?;
        let format = recognised.format;
        let bound = Arc::new(AtomicU64::new(u64::MAX));
        let end = End::of(format);
        let source = BufReader::with_capacity(LOOK_AT, recognised.rest);
        let bounded = Bounded::new(source, bound.clone(), end.tail());
        let mut builder = csv::ReaderBuilder::new();
        builder.has_headers(false).flexible(true);
        match format {
            Format::Csv { delimiter, .. } => builder.delimiter(delimiter),
            // Nothing is a quote or a cell in it; only lines count.
            Format::Ndjson => builder.quoting(false).delimiter(0),
        };
        let reader = builder.from_reader(bounded);
        Ok(Self { reader, bound, end, format, passed: recognised.lines })
    }

    /// What kind of file it is.
    pub(super) const fn format(&self) -> Format {
        self.format
    }

    /// How many bytes have been read so far.
    pub(super) fn position(&self) -> u64 {
        self.reader.position().byte()
    }

    /// The next record, or `None` behind the last one.
    ///
    /// # Errors
    /// See [`InputError`].
    pub(super) fn read(&mut self) -> Result<Option<ByteRecord>, InputError> {
        // The first of the two characters that end a line on Windows was read, and no line is over yet.
        let begins = self.line() + u64::from(self.ended_with(b'\r'));
        self.bound.store(self.position().saturating_add(MAX_ROW), Ordering::Relaxed);
        let mut record = ByteRecord::new();
        match self.reader.read_byte_record(&mut record) {
            Ok(true) => match self.end.seen(&record) {
                Some(EndMet::End) => Ok(None),
                Some(EndMet::InACell) => Err(InputError::OpenQuote(begins)),
                None => Ok(Some(record)),
            },
            Ok(false) => Ok(None),
            Err(error) => {
                let csv::ErrorKind::Io(error) = error.into_kind() else {
                    return Err(InputError::Io(io::Error::other("it is no table")));
                };
                if error.kind() == io::ErrorKind::FileTooLarge {
                    let advice = match self.format {
                        Format::Csv { .. } => ": is a quote (\") left open in it?",
                        Format::Ndjson => "",
                    };
                    return Err(InputError::Endless(begins, advice));
                }
                Err(InputError::Io(error))
            }
        }
    }

    /// The line on which the record begins that was read last. The reader itself counts from where the one
    /// before it ended, empty lines and the rest of a line's end included.
    pub(super) fn line_of(&self, record: &ByteRecord) -> u64 {
        let breaks = record.iter().flatten().filter(|byte| **byte == b'\n').count();
        self.line().saturating_sub(u64::from(self.ended_with(b'\n')) + breaks as u64)
    }

    /// How many lines are over, and one.
    fn line(&self) -> u64 {
        self.passed + self.reader.position().line()
    }

    fn ended_with(&self, byte: u8) -> bool {
        self.reader.get_ref().byte_before(self.position()) == Some(byte)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_counted_however_they_end() {
        let begins = |text: &str| {
            let mut records = Records::open(io::Cursor::new(text.to_owned())).unwrap();
            let mut lines = Vec::new();
            while let Some(record) = records.read().unwrap() {
                lines.push(records.line_of(&record));
            }
            lines
        };
        for text in ["a,b\n1,2\n3,4\n5,6", "a,b\r\n1,2\r\n3,4\r\n5,6", "a,b\n1,2\r\n3,4\n5,6\r\n"] {
            assert_eq!(begins(text), [1, 2, 3, 4], "{text:?}");
        }
        assert_eq!(begins("sep=;\r\na;b\r\n1;2\r\n3;4\r\n"), [2, 3, 4]);
        assert_eq!(begins("\r\n\na;b\n\"1\n\";2\n3;4\n"), [3, 4, 6]);
        assert_eq!(begins("{\"a\":1}\r\n{\"a\":2}\r\n\r\n{\"a\":3}\r\n"), [1, 2, 4]);
        // Across what is read at once.
        let many: Vec<String> = (0..20_000).map(|row| format!("{row},x\r\n")).collect();
        assert_eq!(begins(&many.concat()), (1..=20_000).collect::<Vec<u64>>());
    }

    /// Gives a text piece by piece.
    struct Pieces(Vec<&'static str>);

    impl Read for Pieces {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            if self.0.is_empty() {
                return Ok(0);
            }
            let piece = self.0.remove(0).as_bytes();
            buffer[..piece.len()].copy_from_slice(piece);
            Ok(piece.len())
        }
    }

    #[test]
    fn what_comes_in_pieces_is_recognised_as_if_it_were_whole() {
        for (pieces, delimiter, cells) in [
            (vec!["product_id,na", "me;units;note\r\n", "1,2;3;4\r\n"], b';', 3),
            (vec!["\u{feff}", "product_id;name\n", "p1;x\n"], b';', 2),
            (vec!["\n", "\r\n", "a|b", "\n1|2\n"], b'|', 2),
            (vec!["a", ",", "b"], b',', 2),
        ] {
            let mut records = Records::open(Pieces(pieces.clone())).unwrap();
            let told = matches!(records.format(), Format::Csv { delimiter: told, .. } if told == delimiter);
            assert!(told, "{pieces:?}: {:?}", records.format());
            assert_eq!(records.read().unwrap().map(|header| header.len()), Some(cells));
        }
        let records = Records::open(Pieces(vec!["\n", "{\"product_id\":", "\"p1\"}\n"])).unwrap();
        assert_eq!(records.format(), Format::Ndjson);
    }
}
