use super::{Content, DataSource, Located, Record};
use crate::TrainError;
use serde_json::Value;
use std::sync::Arc;

/// One of the two parts that the records of some sources fall into.
pub(super) struct HeldOut {
    sources: Arc<Vec<Box<dyn DataSource>>>,
    fraction: f64,
    seed: u64,
    /// Whether this is the part that is held out, or the rest.
    held_out: bool,
}

impl HeldOut {
    /// The rest, and the part of about `fraction` that is held out.
    pub fn split(sources: Vec<Box<dyn DataSource>>, fraction: f64, seed: u64) -> (Self, Self) {
        let sources = Arc::new(sources);
        let rest = HeldOut { sources: sources.clone(), fraction, seed, held_out: false };
        (rest, HeldOut { sources, fraction, seed, held_out: true })
    }

    /// A function of seed and content only: not of the record's place, and so neither of the order
    /// of the files nor of what else there is.
    fn takes(&self, record: &Record) -> bool {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.seed.to_le_bytes());
        hash(record, &mut hasher);
        let mut first = [0; 8];
        first.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
        let point = u64::from_le_bytes(first) as f64 / u64::MAX as f64;
        (point < self.fraction) == self.held_out
    }

    fn empty(&self) -> TrainError {
        let problem = match self.held_out {
            true => {
                "no record fell into the part that is held out; raise --eval-fraction, or name a file with --eval-file"
            }
            false => {
                "every record fell into the part that is held out; lower --eval-fraction, or name a file with --eval-file. (A record of a text file is a paragraph: blank lines part them)"
            }
        };
        TrainError::Data { path: self.name().into(), line: None, problem: problem.into() }
    }
}

fn hash(record: &Record, hasher: &mut blake3::Hasher) {
    let mut part = |kind: u8, text: &str| {
        hasher.update(&[kind]).update(&(text.len() as u64).to_le_bytes()).update(text.as_bytes());
    };
    let list = |messages: &[Value]| serde_json::Value::from(messages.to_vec()).to_string();
    match record {
        Record::Text(text) => part(0, text),
        Record::Completion { prompt, completion } => {
            part(1, prompt);
            part(2, completion);
        }
        Record::Chat { messages, tools } => {
            part(3, &list(messages));
            part(4, &list(tools));
        }
        Record::Preference { prompt, chosen, rejected } => {
            for (kind, content) in [(5, prompt), (6, chosen), (7, rejected)] {
                match content {
                    Content::Text(text) => part(kind, text),
                    Content::Messages(messages) => part(kind, &list(messages)),
                }
            }
        }
    }
}

impl DataSource for HeldOut {
    fn name(&self) -> String {
        let names: Vec<_> = self.sources.iter().map(|source| source.name()).collect();
        let part = if self.held_out { self.fraction } else { 1.0 - self.fraction };
        format!("{} (about {}% of it)", names.join(", "), (1e4 * part).round() / 100.0)
    }

    fn records(&self) -> Result<Box<dyn Iterator<Item = Located> + Send + '_>, TrainError> {
        let mut sources = self.sources.iter();
        let mut open: Option<Box<dyn Iterator<Item = Located> + Send + '_>> = None;
        let (mut any, mut ended) = (false, false);
        let mut next = move || {
            while !ended {
                if let Some(located) = open.as_mut().and_then(|records| records.next()) {
                    let (place, record) = located?;
                    if self.takes(&record) {
                        any = true;
                        return Ok(Some((place, record)));
                    }
                    continue;
                }
                match sources.next() {
                    Some(source) => open = Some(source.records()?),
                    None => ended = true,
                }
                if ended && !any {
                    return Err(self.empty());
                }
            }
            Ok(None)
        };
        let mut failed = false;
        Ok(Box::new(std::iter::from_fn(move || {
            let located = if failed { None } else { next().transpose() };
            failed = matches!(located, Some(Err(_)));
            located
        })))
    }

    fn fingerprint(&self) -> Result<Option<String>, TrainError> {
        let mut hasher = blake3::Hasher::new();
        let how = format!("{} {} {}", self.fraction, self.seed, self.held_out);
        hasher.update(how.as_bytes());
        for source in self.sources.iter() {
            match source.fingerprint()? {
                Some(fingerprint) => hasher.update(fingerprint.as_bytes()),
                None => return Ok(None),
            };
        }
        Ok(Some(hasher.finalize().to_hex()[..32].to_string()))
    }
}
