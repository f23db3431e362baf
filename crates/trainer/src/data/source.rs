//! Where a run's texts come from: a [`DataSource`] gives [`Record`]s, each with the [`Place`] where
//! it stands. Files, folders and data sets of the hub are sources ([`DataSpec`] opens them); a source
//! of your own is one `impl`:
//!
//! ```
//! use offshoot_trainer::TrainError;
//! use offshoot_trainer::data::source::{DataSource, Located, Place, Record};
//!
//! /// Answers that a support team wrote, straight from memory.
//! struct Answers(Vec<(String, String)>);
//!
//! impl DataSource for Answers {
//!     fn name(&self) -> String {
//!         "answers".into()
//!     }
//!
//!     fn records(&self) -> Result<Box<dyn Iterator<Item = Located> + Send + '_>, TrainError> {
//!         Ok(Box::new(self.0.iter().enumerate().map(|(i, (question, answer))| {
//!             let record = Record::Completion { prompt: question.clone(), completion: answer.clone() };
//!             Ok((Place::row("answers", i + 1), record))
//!         })))
//!     }
//! }
//!
//! let source = Answers(vec![("Why is it slow?".into(), "Turn it off and on again.".into())]);
//! let (place, _) = source.records()?.next().expect("there is one")?;
//! assert_eq!(place.to_string(), "answers, row 1");
//! # Ok::<(), TrainError>(())
//! ```
//!
//! `examples/custom_source.rs` trains on such a source.

mod held_out;
mod spec;

pub use super::hub::DataSetError;
pub use super::read::Columns;
pub use spec::{DataSpec, Sources};

use crate::TrainError;
use serde_json::Value;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

/// What one piece of a source says, before it is tokens.
#[derive(Clone, Debug, PartialEq)]
pub enum Record {
    /// All of it is learned.
    Text(String),
    /// The completion is learned, the prompt is read only.
    Completion { prompt: String, completion: String },
    /// Messages with `role` and `content`, as chat templates take them; the assistant's are learned.
    /// `tools` are descriptions of functions, for templates that know them; mostly there are none.
    Chat { messages: Vec<Value>, tools: Vec<Value> },
    /// One prompt, the answer that was preferred and the one that was not: for `--loss dpo`.
    Preference { prompt: Content, chosen: Content, rejected: Content },
}

/// A prompt or an answer: as it is, or as messages for the chat template.
#[derive(Clone, Debug, PartialEq)]
pub enum Content {
    Text(String),
    /// Objects with `role` and `content`.
    Messages(Vec<Value>),
}

/// Where a record stands, for errors: `answers.jsonl:3`, or `part.parquet, row 3`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    name: Arc<str>,
    at: At,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    Whole,
    Line(usize),
    Row(usize),
}

impl Place {
    /// A source, or a file, as a whole.
    pub fn whole(name: impl Into<Arc<str>>) -> Place {
        Place { name: name.into(), at: At::Whole }
    }

    /// A line of a file, counted from 1.
    pub fn line(name: impl Into<Arc<str>>, line: usize) -> Place {
        Place { name: name.into(), at: At::Line(line) }
    }

    /// A row of a table, or an entry of a list, counted from 1.
    pub fn row(name: impl Into<Arc<str>>, row: usize) -> Place {
        Place { name: name.into(), at: At::Row(row) }
    }

    /// The error that something is wrong here.
    pub fn wrong(&self, problem: impl Into<String>) -> TrainError {
        let (path, line) = match self.at {
            At::Whole => (PathBuf::from(&*self.name), None),
            At::Line(line) => (PathBuf::from(&*self.name), Some(line)),
            At::Row(_) => (PathBuf::from(self.to_string()), None),
        };
        TrainError::Data { path, line, problem: problem.into() }
    }

    /// Adds the place to an error of the chat template, which only this record may provoke.
    pub fn explain(&self, error: TrainError) -> TrainError {
        match error {
            TrainError::ChatTemplate { .. } => self.wrong(error.to_string()),
            other => other,
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self.at {
            At::Whole => f.write_str(&self.name),
            At::Line(line) => write!(f, "{}:{line}", self.name),
            At::Row(row) => write!(f, "{}, row {row}", self.name),
        }
    }
}

/// A record and where it stands, or why it, or what follows it, cannot be read.
pub type Located = Result<(Place, Record), TrainError>;

/// Something that gives records in an order of its own, the same each time it is asked.
pub trait DataSource: Send + Sync {
    /// For messages: a path, a data set's name.
    fn name(&self) -> String;

    /// All records from the first on. Read as they are asked for, so that a large source never
    /// stands in memory as a whole.
    ///
    /// # Errors
    /// Here if the source cannot be opened; otherwise in the place of the record that is wrong, and
    /// reading ends there.
    fn records(&self) -> Result<Box<dyn Iterator<Item = Located> + Send + '_>, TrainError>;

    /// Equal for equal records in equal order, and cheaper than reading them: by it, samples that
    /// were made before are found again. Without one the records are compared.
    ///
    /// # Errors
    /// If the source cannot be opened.
    fn fingerprint(&self) -> Result<Option<String>, TrainError> {
        Ok(None)
    }
}

#[cfg(test)]
mod tests;
