//! Records to samples, on all cores, without ever having all texts in memory.

use super::make::{Made, Maker};
use super::source::{DataSource, Located, Place, Record};
use super::{DataOptions, DataSet};
use crate::TrainError;
use crate::tokenizer::Tokenizer;
use indicatif::{ProgressBar, ProgressStyle};
use std::io::IsTerminal;
use std::num::NonZero;
use std::thread;
use std::time::Duration;

/// Records that are read before they are made to samples together.
const CHUNK: usize = 2048;
/// The same by their bytes: long texts come in smaller chunks.
const CHUNK_BYTES: usize = 8 << 20;
/// Without a terminal, a line after so many records.
const RECORDS_PER_LINE: usize = 100_000;

/// All samples of these sources, or the first `max_samples`.
pub(super) fn samples_of(
    sources: &[Box<dyn DataSource>],
    options: &DataOptions,
    tokenizer: &Tokenizer,
) -> Result<DataSet, TrainError> {
    let maker = Maker { tokenizer, options };
    let mut reader = Reader { sources: sources.iter(), open: None, failed: None };
    let mut data = DataSet::default();
    let mut progress = Progress::new();
    // No record gives less than nothing: reading more than are missing might read too far.
    let missing = |data: &DataSet| options.max_samples.map_or(CHUNK, |n| n - data.n_units());
    let mut chunk = reader.next_chunk(missing(&data))?;
    while !chunk.is_empty() {
        // Where reading may go on to the end, it does so while the cores work.
        let ahead = if options.max_samples.is_none() { CHUNK } else { 0 };
        let (made, next) = at_once(&maker, &chunk, || reader.next_chunk(ahead));
        for (made, (place, _)) in made.into_iter().zip(&chunk) {
            if options.max_samples.is_some_and(|n| data.n_units() >= n) {
                break;
            }
            data.add(made?, place, options.max_samples)?;
        }
        progress.tell(&data);
        chunk = next?;
        if chunk.is_empty() && missing(&data) > 0 {
            chunk = reader.next_chunk(missing(&data))?;
        }
    }
    progress.end();
    Ok(data)
}

impl DataSet {
    fn add(
        &mut self,
        made: Made,
        place: &Place,
        max_units: Option<usize>,
    ) -> Result<(), TrainError> {
        self.stats.n_records += 1;
        self.stats.n_truncated += usize::from(made.truncated);
        self.stats.n_split += usize::from(made.samples.len() > made.unit);
        self.stats.n_skipped += usize::from(made.samples.is_empty());
        if self.is_empty() {
            self.unit = made.unit;
        }
        if self.unit != made.unit && !made.samples.is_empty() {
            return Err(place.wrong(
                "preference pairs and other records in one run; expected all records to be of one kind, as a loss is for the one or the other",
            ));
        }
        for unit in made.samples.chunks(made.unit) {
            if max_units.is_some_and(|n| self.n_units() >= n) {
                break;
            }
            for (ids, learn) in unit {
                self.push(ids.iter().copied(), learn);
            }
        }
        Ok(())
    }
}

/// The records of several sources, one after the other.
struct Reader<'a> {
    sources: std::slice::Iter<'a, Box<dyn DataSource>>,
    open: Option<Box<dyn Iterator<Item = Located> + Send + 'a>>,
    /// What ends reading, once the records before it have had their turn.
    failed: Option<TrainError>,
}

impl Reader<'_> {
    /// At most `most` of the next records; none at the end.
    fn next_chunk(&mut self, most: usize) -> Result<Vec<(Place, Record)>, TrainError> {
        let (mut chunk, mut bytes) = (Vec::new(), 0);
        while chunk.len() < most.min(CHUNK) && bytes < CHUNK_BYTES && self.failed.is_none() {
            match self.next() {
                Some(Ok((place, record))) => {
                    bytes += size(&record);
                    chunk.push((place, record));
                }
                Some(Err(error)) => self.failed = Some(error),
                None => break,
            }
        }
        match self.failed.take_if(|_| chunk.is_empty() && most > 0) {
            Some(error) => Err(error),
            None => Ok(chunk),
        }
    }

    fn next(&mut self) -> Option<Located> {
        loop {
            if let Some(located) = self.open.as_mut().and_then(Iterator::next) {
                return Some(located);
            }
            match self.sources.next()?.records() {
                Ok(records) => self.open = Some(records),
                Err(error) => return Some(Err(error)),
            }
        }
    }
}

/// Bytes of a record's texts, roughly.
fn size(record: &Record) -> usize {
    use super::source::Content;
    let messages = |list: &[serde_json::Value]| -> usize {
        list.iter().map(|m| m["content"].as_str().map_or(100, str::len)).sum()
    };
    let content = |content: &Content| match content {
        Content::Text(text) => text.len(),
        Content::Messages(list) => messages(list),
    };
    match record {
        Record::Text(text) => text.len(),
        Record::Completion { prompt, completion } => prompt.len() + completion.len(),
        Record::Chat { messages: list, .. } => messages(list),
        Record::Preference { prompt, chosen, rejected } => {
            content(prompt) + content(chosen) + content(rejected)
        }
    }
}

/// What the records become, on all cores, and what `meanwhile` gives on this one.
fn at_once<T>(
    maker: &Maker,
    chunk: &[(Place, Record)],
    meanwhile: impl FnOnce() -> T,
) -> (Vec<Result<Made, TrainError>>, T) {
    let n_threads = thread::available_parallelism().map_or(1, NonZero::get);
    let of_thread = chunk.len().div_ceil(n_threads).max(1);
    let make = |part: &[(Place, Record)]| -> Vec<Result<Made, TrainError>> {
        part.iter().map(|(place, record)| maker.make(place, record)).collect()
    };
    thread::scope(|scope| {
        let parts = chunk.chunks(of_thread).map(|part| scope.spawn(move || make(part)));
        let parts: Vec<_> = parts.collect();
        let meanwhile = meanwhile();
        let made = parts
            .into_iter()
            .flat_map(|part| part.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        (made.collect(), meanwhile)
    })
}

/// A bar on a terminal, now and then a line elsewhere.
struct Progress {
    bar: Option<ProgressBar>,
    told: usize,
}

impl Progress {
    fn new() -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{spinner} {msg} [{elapsed}]");
            let bar = ProgressBar::new_spinner().with_style(style.expect("a fixed template"));
            bar.enable_steady_tick(Duration::from_millis(200));
            bar.with_message("reading and tokenising")
        });
        Progress { bar, told: 0 }
    }

    fn tell(&mut self, data: &DataSet) {
        let n_records = data.stats.n_records;
        let text = || format!("tokenised {n_records} records, {} tokens", data.n_tokens());
        match &self.bar {
            Some(bar) => bar.set_message(text()),
            None if n_records >= self.told + RECORDS_PER_LINE => {
                self.told = n_records;
                eprintln!("{}", text());
            }
            None => {}
        }
    }

    fn end(self) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
    }
}
