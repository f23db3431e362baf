//! CSV and TSV: a header row, then one record in each row.

use super::columns::{Columns, Rows};
use super::input::{Input, Origin};
use crate::TrainError;
use crate::data::source::Place;
use csv::{ByteRecord, ErrorKind, Position};
use serde_json::Value;
use std::collections::VecDeque;
use std::io::{self, BufRead, Read};
use std::sync::{Arc, Mutex, PoisonError};

/// What may stand between the fields of a .csv file; spreadsheets of half of Europe write the second.
const SEPARATORS: [u8; 3] = [b',', b';', b'\t'];
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// The rows below the header. `separator`: none to see it from the header.
pub(super) fn rows(
    mut input: Input,
    separator: Option<u8>,
    columns: &Columns,
) -> Result<Rows, TrainError> {
    let origin = input.origin.clone();
    let failed = |error| origin.failed(&origin.line(1), &error);
    if input.reader.fill_buf().map_err(failed)?.starts_with(BYTE_ORDER_MARK) {
        input.reader.consume(BYTE_ORDER_MARK.len());
    }
    let beginning = input.reader.fill_buf().map_err(failed)?;
    let separator = separator.unwrap_or_else(|| most_frequent(beginning));
    let (lines, quotes) = (LineEnds::default(), Arc::new(Mutex::new(Quotes::new(separator))));
    let seen =
        Seen { reader: input.reader, offset: 0, lines: lines.clone(), quotes: quotes.clone() };
    let mut reader = csv::ReaderBuilder::new().delimiter(separator).from_reader(seen);
    let mut table = Table { origin, lines, quotes };
    let header = table.check(reader.byte_headers().cloned())?;
    let place = table.place(header.position());
    let names = strings(&header, &place)?;
    if names.iter().all(String::is_empty) {
        return Ok(Box::new(std::iter::empty()));
    }
    let known: Vec<&str> = names.iter().map(String::as_str).collect();
    let layout = columns.layout(&known).map_err(|problem| place.wrong(problem))?;
    for column in layout.columns() {
        if known.iter().filter(|name| **name == column).count() > 1 {
            return Err(place.wrong(format!("the header names the column \"{column}\" twice")));
        }
    }
    Ok(Box::new(reader.into_byte_records().map(move |record| {
        let record = table.check(record)?;
        let place = table.place(record.position());
        let values = strings(&record, &place)?.into_iter().map(Value::String);
        Ok((place, names.iter().cloned().zip(values).collect()))
    })))
}

fn most_frequent(beginning: &[u8]) -> u8 {
    let header = beginning.split(|&byte| byte == b'\n').next().unwrap_or_default();
    let mut quoted = false;
    let outside = |byte: &&u8| {
        quoted ^= **byte == b'"';
        !quoted
    };
    let outside: Vec<u8> = header.iter().filter(outside).copied().collect();
    let count = |separator: u8| outside.iter().filter(|&&byte| byte == separator).count();
    // The comma wins where nothing separates anything.
    SEPARATORS.into_iter().rev().max_by_key(|&separator| count(separator)).unwrap_or(b',')
}

fn strings(record: &ByteRecord, place: &Place) -> Result<Vec<String>, TrainError> {
    let fields = record.iter().map(|field| String::from_utf8(field.to_vec()));
    fields
        .collect::<Result<_, _>>()
        .map_err(|_| place.wrong("not UTF-8 text; save the table as UTF-8"))
}

struct Table {
    origin: Origin,
    lines: LineEnds,
    quotes: Arc<Mutex<Quotes>>,
}

impl Table {
    /// What the parser made of the next record. It takes all that follows a quote that is never
    /// closed for one field, and says nothing.
    fn check(&mut self, record: csv::Result<ByteRecord>) -> Result<ByteRecord, TrainError> {
        let unclosed = self.quotes.lock().unwrap_or_else(PoisonError::into_inner).unclosed();
        if let Some(line) = unclosed {
            return Err(self.origin.line(line).wrong(
                "the quote that begins a field here is never closed: everything behind it would be this \
                 field; close it, or write a field that begins with a quote as \"\"\"...\"",
            ));
        }
        record.map_err(|error| self.problem(&error))
    }

    fn place(&mut self, position: Option<&Position>) -> Place {
        self.origin.line(self.lines.line_at(position.map_or(0, Position::byte)))
    }

    fn problem(&mut self, error: &csv::Error) -> TrainError {
        match error.kind() {
            ErrorKind::UnequalLengths { pos, expected_len, len } => self.place(pos.as_ref()).wrong(format!(
                "{len} fields, but the header has {expected_len}; put a field that holds the separator, a quote or a line break in \"quotes\", and write a quote within as \"\""
            )),
            ErrorKind::Io(error) => {
                let place = self.place(None);
                self.origin.failed(&place, error)
            }
            _ => self.origin.whole().wrong(error.to_string()),
        }
    }
}

/// Where the lines of what was read end, from the record that was looked up last: the parser's own
/// count is one behind after `\r\n`, and before blank lines.
#[derive(Clone, Default)]
struct LineEnds(Arc<Mutex<Ends>>);

#[derive(Default)]
struct Ends {
    /// Offsets of `\r` and `\n` (true).
    ahead: VecDeque<(u64, bool)>,
    /// `\n` before those.
    passed: usize,
}

impl LineEnds {
    fn add(&self, offset: u64, bytes: &[u8]) {
        let mut ends = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let found = (offset..).zip(bytes).filter(|(_, byte)| matches!(byte, b'\r' | b'\n'));
        ends.ahead.extend(found.map(|(at, &byte)| (at, byte == b'\n')));
    }

    /// The line of the record for which the parser began to look at `offset`. Offsets never fall.
    fn line_at(&self, mut offset: u64) -> usize {
        let mut ends = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Ends of lines right where it began to look do not belong to the record.
        while let Some(&(at, feed)) = ends.ahead.front().filter(|(at, _)| *at <= offset) {
            ends.ahead.pop_front();
            ends.passed += usize::from(feed);
            offset = offset.max(at + 1);
        }
        ends.passed + 1
    }
}

/// Which quotes are open, as the parser sees them: one that begins a field lasts until the next that
/// is not doubled.
struct Quotes {
    separator: u8,
    at: At,
    line: usize,
    /// The line where the last one began.
    opened: usize,
    is_over: bool,
}

#[derive(Clone, Copy, PartialEq)]
enum At {
    FieldBegin,
    Outside,
    Inside,
    /// Behind a quote within quotes: their end, or the first half of a doubled one.
    QuoteInside,
}

impl Quotes {
    fn new(separator: u8) -> Self {
        Quotes { separator, at: At::FieldBegin, line: 1, opened: 1, is_over: false }
    }

    /// The next bytes of the file; none at its end.
    fn see(&mut self, bytes: &[u8]) {
        self.is_over = bytes.is_empty();
        for &byte in bytes {
            self.at = match (self.at, byte) {
                (At::FieldBegin, b'"') => {
                    self.opened = self.line;
                    At::Inside
                }
                (At::Inside, b'"') => At::QuoteInside,
                (At::Inside, _) | (At::QuoteInside, b'"') => At::Inside,
                (_, b'\n' | b'\r') => At::FieldBegin,
                (_, byte) if byte == self.separator => At::FieldBegin,
                _ => At::Outside,
            };
            self.line += usize::from(byte == b'\n');
        }
    }

    /// The line of the one that is open at the file's end.
    fn unclosed(&self) -> Option<usize> {
        (self.is_over && self.at == At::Inside).then_some(self.opened)
    }
}

/// What is read on its way to the parser, which asks for more only when it has used up all before:
/// at the file's end every record but the last has been given.
struct Seen {
    reader: Box<dyn BufRead + Send>,
    offset: u64,
    lines: LineEnds,
    quotes: Arc<Mutex<Quotes>>,
}

impl Read for Seen {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.reader.read(buffer)?;
        self.lines.add(self.offset, &buffer[..n]);
        self.quotes.lock().unwrap_or_else(PoisonError::into_inner).see(&buffer[..n]);
        self.offset += n as u64;
        Ok(n)
    }
}
