//! CSV and TSV: a header row, then one record in each row.

use super::columns::{Columns, Rows};
use super::input::{Input, Origin};
use crate::TrainError;
use crate::data::source::Place;
use csv::{ByteRecord, ErrorKind};
use serde_json::Value;
use std::io::BufRead;

/// What may stand between the fields of a .csv file; spreadsheets of half of Europe write the second.
const SEPARATORS: [u8; 3] = [b',', b';', b'\t'];

/// The rows below the header. `separator`: none to see it from the header.
pub(super) fn rows(
    mut input: Input,
    separator: Option<u8>,
    columns: &Columns,
) -> Result<Rows, TrainError> {
    let origin = input.origin.clone();
    let header_line = origin.line(1);
    let beginning = input.reader.fill_buf().map_err(|error| origin.failed(&header_line, &error))?;
    let separator = separator.unwrap_or_else(|| most_frequent(beginning));
    let mut reader = csv::ReaderBuilder::new().delimiter(separator).from_reader(input.reader);
    let header = reader.byte_headers().map_err(|error| problem(&origin, &error))?.clone();
    let names = strings(&header, &header_line)?;
    if names.iter().all(String::is_empty) {
        return Ok(Box::new(std::iter::empty()));
    }
    let known: Vec<&str> = names.iter().map(String::as_str).collect();
    let layout = columns.layout(&known).map_err(|problem| header_line.wrong(problem))?;
    for column in layout.columns() {
        if known.iter().filter(|name| **name == column).count() > 1 {
            return Err(
                header_line.wrong(format!("the header names the column \"{column}\" twice"))
            );
        }
    }
    Ok(Box::new(reader.into_byte_records().map(move |record| {
        let record = record.map_err(|error| problem(&origin, &error))?;
        let place = origin.line(record.position().map_or(0, |at| at.line() as usize));
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

fn problem(origin: &Origin, error: &csv::Error) -> TrainError {
    match error.kind() {
        ErrorKind::UnequalLengths { pos, expected_len, len } => {
            let place = origin.line(pos.as_ref().map_or(0, |at| at.line() as usize));
            place.wrong(format!(
                "{len} fields, but the header has {expected_len}; put a field that holds the separator, a quote or a line break in \"quotes\", and write a quote within as \"\""
            ))
        }
        ErrorKind::Io(error) => origin.failed(&origin.whole(), error),
        _ => origin.whole().wrong(error.to_string()),
    }
}
