//! JSON files, value by value: a list of objects, an object with such a list, or objects one after
//! the other. Only the value that is being read stands in memory.

use super::columns::{Columns, Row, Rows};
use super::input::{Input, Origin};
use super::lines::{object, without_line};
use crate::TrainError;
use crate::data::source::Place;
use std::io::BufRead;

/// Where in the file the records are.
#[derive(Debug, PartialEq)]
enum Shape {
    /// `[{...}, {...}]`
    List,
    /// `{"data": [{...}, {...}], ...}`
    ListIn(String),
    /// `{...} {...}`, or a single `{...}`
    Objects,
}

/// The objects of the file that `open` opens; it is opened twice, as its beginning says how the
/// rest is read.
pub(super) fn rows(
    open: impl Fn() -> Result<Input, TrainError>,
    columns: &Columns,
) -> Result<Rows, TrainError> {
    let Some(shape) = Scanner::new(open()?).shape(columns)? else {
        return Ok(Box::new(std::iter::empty()));
    };
    let mut scanner = Scanner::new(open()?);
    match &shape {
        Shape::List => {
            scanner.space()?;
            scanner.expect(b'[', "a list")?;
        }
        Shape::ListIn(field) => scanner.enter(field)?,
        Shape::Objects => {
            return Ok(Box::new(std::iter::from_fn(move || scanner.next().transpose())));
        }
    }
    let trailing = shape == Shape::List;
    let mut ended = false;
    let mut next = move || {
        if ended {
            return Ok(None);
        }
        let row = scanner.element()?;
        ended = row.is_none();
        if ended && trailing && scanner.space()?.is_some() {
            let place = scanner.origin.line(scanner.line);
            return Err(place.wrong("something follows the end of the list"));
        }
        Ok(row)
    };
    Ok(Box::new(std::iter::from_fn(move || next().transpose())))
}

/// Finds where values begin and end; what is in them is the parser's business.
struct Scanner {
    reader: Box<dyn BufRead + Send>,
    origin: Origin,
    line: usize,
    /// An element of the list came before.
    after_element: bool,
}

impl Scanner {
    fn new(input: Input) -> Self {
        Scanner { reader: input.reader, origin: input.origin, line: 1, after_element: false }
    }

    fn wrong(&self, problem: impl Into<String>) -> TrainError {
        self.origin.line(self.line).wrong(problem)
    }

    /// The next byte, which stays.
    fn peek(&mut self) -> Result<Option<u8>, TrainError> {
        let place = || self.origin.line(self.line);
        let buffer = self.reader.fill_buf();
        Ok(buffer.map_err(|error| self.origin.failed(&place(), &error))?.first().copied())
    }

    /// The next byte, which is taken.
    fn take(&mut self) -> Result<Option<u8>, TrainError> {
        let byte = self.peek()?;
        if let Some(byte) = byte {
            self.reader.consume(1);
            self.line += usize::from(byte == b'\n');
        }
        Ok(byte)
    }

    /// Passes over white space (and the mark at the start of some files); the byte after it.
    fn space(&mut self) -> Result<Option<u8>, TrainError> {
        loop {
            match self.peek()? {
                Some(b' ' | b'\t' | b'\n' | b'\r' | 0xef | 0xbb | 0xbf) => self.take()?,
                other => return Ok(other),
            };
        }
    }

    fn expect(&mut self, byte: u8, what: &str) -> Result<(), TrainError> {
        match self.space()? {
            Some(found) if found == byte => self.take().map(|_| ()),
            found => Err(self.not(found, &format!("'{}' of {what}", char::from(byte)))),
        }
    }

    fn not(&self, found: Option<u8>, expected: &str) -> TrainError {
        self.wrong(match found {
            None => format!("not JSON: the file ends where {expected} is expected; is it cut off?"),
            Some(found) => {
                format!(
                    "not JSON: expected {expected}, found '{}'",
                    char::from(found).escape_default()
                )
            }
        })
    }

    /// Takes one value, from its first byte on, into `bytes` if they are wanted. `depth` brackets
    /// are open already.
    fn value(
        &mut self,
        mut depth: usize,
        mut bytes: Option<&mut Vec<u8>>,
    ) -> Result<(), TrainError> {
        let mut in_string = false;
        let mut escaped = false;
        loop {
            let Some(byte) = self.peek()? else {
                return match depth > 0 || in_string {
                    true => Err(self.not(None, "the rest of a value")),
                    false => Ok(()),
                };
            };
            let between = matches!(byte, b',' | b']' | b'}' | b':' | b' ' | b'\n' | b'\r' | b'\t');
            if depth == 0 && !in_string && between {
                return Ok(());
            }
            self.take()?;
            if let Some(bytes) = &mut bytes {
                bytes.push(byte);
            }
            match byte {
                _ if escaped => escaped = false,
                b'\\' if in_string => escaped = true,
                b'"' => in_string = !in_string,
                b'{' | b'[' if !in_string => depth += 1,
                b'}' | b']' if !in_string => depth -= 1,
                _ => {}
            }
            if depth == 0 && !in_string && matches!(byte, b'"' | b'}' | b']') {
                return Ok(());
            }
        }
    }

    fn parsed(&mut self) -> Result<(Place, Row), TrainError> {
        let first = self.line;
        let mut bytes = Vec::new();
        self.value(0, Some(&mut bytes))?;
        let row = object(&bytes, |error| {
            let place = self.origin.line(first + error.line().max(1) - 1);
            place.wrong(format!("not a JSON object: {}", without_line(error)))
        })?;
        Ok((self.origin.line(first), row))
    }

    /// The next of several objects that stand one after the other.
    fn next(&mut self) -> Result<Option<(Place, Row)>, TrainError> {
        match self.space()? {
            None => Ok(None),
            Some(b'{') => self.parsed().map(Some),
            found => Err(self.not(found, "'{' of an object")),
        }
    }

    /// The next element of the list that is open.
    fn element(&mut self) -> Result<Option<(Place, Row)>, TrainError> {
        let mut found = self.space()?;
        if found == Some(b']') {
            return self.take().map(|_| None);
        }
        if self.after_element {
            self.expect(b',', "the next element")?;
            found = self.space()?;
        }
        match found {
            Some(b'{') => {}
            Some(b'"' | b'[' | b'0'..=b'9') => {
                let problem =
                    "the list holds other things than objects; expected such as {\"text\": ...}";
                return Err(self.wrong(problem));
            }
            found => return Err(self.not(found, "'{' of an object")),
        }
        self.after_element = true;
        self.parsed().map(Some)
    }

    /// The name of the next field of the object that is open, and the byte its value begins with.
    fn field(&mut self, first: bool) -> Result<Option<(String, Option<u8>)>, TrainError> {
        if self.space()? == Some(b'}') {
            return self.take().map(|_| None);
        }
        if !first {
            self.expect(b',', "the next field")?;
        }
        if self.space()? != Some(b'"') {
            let found = self.peek()?;
            return Err(self.not(found, "the name of a field"));
        }
        let mut bytes = Vec::new();
        self.value(0, Some(&mut bytes))?;
        let name = serde_json::from_slice(&bytes)
            .map_err(|error| self.wrong(format!("not JSON: {}", without_line(&error))))?;
        self.expect(b':', "a field")?;
        Ok(Some((name, self.space()?)))
    }

    /// Reads up to the end of the first value, at most. None for a file without any.
    fn shape(&mut self, columns: &Columns) -> Result<Option<Shape>, TrainError> {
        match self.space()? {
            None => return Ok(None),
            Some(b'[') => return Ok(Some(Shape::List)),
            Some(b'{') => self.take()?,
            found => return Err(self.not(found, "'[' of a list of objects, or '{' of an object")),
        };
        let (mut names, mut lists) = (Vec::new(), Vec::new());
        while let Some((name, begin)) = self.field(names.is_empty())? {
            if begin == Some(b'[') {
                self.take()?;
                if self.space()? == Some(b'{') {
                    lists.push(name.clone());
                }
                self.value(1, None)?;
            } else {
                self.value(0, None)?;
            }
            names.push(name);
        }
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        if self.space()?.is_some() || columns.layout(&names).is_ok() {
            return Ok(Some(Shape::Objects));
        }
        match lists.len() {
            0 => Ok(Some(Shape::Objects)),
            1 => Ok(lists.pop().map(Shape::ListIn)),
            _ => Err(self.origin.whole().wrong(format!(
                "the object holds several lists ({}), expected one; write each into a file of its own",
                lists.join(", ")
            ))),
        }
    }

    /// Goes to the first element of the list that is the field `wanted`.
    fn enter(&mut self, wanted: &str) -> Result<(), TrainError> {
        self.expect(b'{', "an object")?;
        let mut first = true;
        while let Some((name, _)) = self.field(first)? {
            first = false;
            if name == wanted {
                return self.expect(b'[', "a list");
            }
            self.value(0, None)?;
        }
        Err(self.wrong(format!("the field \"{wanted}\" is gone: the file changed meanwhile")))
    }
}
