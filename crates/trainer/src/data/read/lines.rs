use super::columns::Row;
use super::input::{Input, Origin};
use crate::TrainError;
use crate::data::source::{Located, Place, Record};
use std::io::BufRead;

/// A text without blank lines is given out in pieces of this size, so that it is never whole in memory.
const MAX_PARAGRAPH_BYTES: usize = 16 << 20;

/// Lines of UTF-8 text with their number from 1, without what ends them.
pub(super) struct Lines {
    reader: Box<dyn BufRead + Send>,
    pub origin: Origin,
    n: usize,
}

impl Lines {
    pub fn new(input: Input) -> Self {
        Lines { reader: input.reader, origin: input.origin, n: 0 }
    }

    fn read(&mut self) -> Result<Option<String>, TrainError> {
        let mut bytes = Vec::new();
        let place = || self.origin.line(self.n + 1);
        let read = self.reader.read_until(b'\n', &mut bytes);
        if read.map_err(|error| self.origin.failed(&place(), &error))? == 0 {
            return Ok(None);
        }
        let text = String::from_utf8(bytes)
            .map_err(|_| place().wrong("not UTF-8 text; is it a compressed or binary file?"))?;
        self.n += 1;
        let text = text.strip_suffix('\n').unwrap_or(&text);
        let text = text.strip_suffix('\r').unwrap_or(text);
        let first = self.n == 1;
        Ok(Some(text.strip_prefix('\u{feff}').filter(|_| first).unwrap_or(text).to_string()))
    }
}

impl Iterator for Lines {
    type Item = Result<(usize, String), TrainError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.read().transpose().map(|line| line.map(|text| (self.n, text)))
    }
}

/// Lines up to a blank one are one text.
pub(super) fn paragraphs(mut lines: Lines) -> impl Iterator<Item = Located> + Send {
    let mut open = String::new();
    let mut first = 0;
    std::iter::from_fn(move || {
        loop {
            let line = match lines.next() {
                Some(Err(error)) => return Some(Err(error)),
                Some(Ok(line)) => Some(line),
                None => None,
            };
            let ended = line.is_none();
            if let Some((n, text)) = line.filter(|(_, text)| !text.trim().is_empty()) {
                if open.is_empty() {
                    first = n;
                } else {
                    open.push('\n');
                }
                open.push_str(&text);
                if open.len() < MAX_PARAGRAPH_BYTES {
                    continue;
                }
            }
            if !open.is_empty() {
                let text = std::mem::take(&mut open).trim().to_string();
                return Some(Ok((lines.origin.line(first), Record::Text(text))));
            }
            if ended {
                return None;
            }
        }
    })
}

/// One object on each line that is not blank.
pub(super) fn json_lines(
    lines: Lines,
) -> impl Iterator<Item = Result<(Place, Row), TrainError>> + Send {
    let origin = lines.origin.clone();
    lines.filter(|line| !matches!(line, Ok((_, text)) if text.trim().is_empty())).map(move |line| {
        let (n, text) = line?;
        let place = origin.line(n);
        let row = object(text.as_bytes(), |error| {
            place.wrong(format!("not a JSON object: {}", without_line(error)))
        })?;
        Ok((place, row))
    })
}

/// Parses one JSON object.
pub(super) fn object(
    bytes: &[u8],
    wrong: impl FnOnce(&serde_json::Error) -> TrainError,
) -> Result<Row, TrainError> {
    serde_json::from_slice(bytes).map_err(|error| wrong(&error))
}

/// The parser counts lines from the start of what it was given: the place says the real one.
pub(super) fn without_line(error: &serde_json::Error) -> String {
    let text = error.to_string();
    match text.split_once(" at line ") {
        Some((problem, _)) => format!("{problem}, at column {}", error.column()),
        None => text,
    }
}
