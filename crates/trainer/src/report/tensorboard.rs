//! TensorBoard's event files: records of a length, a message and two sums over them.
//!
//! A message is written whole as soon as there is one, so that a process that dies leaves at most
//! one record cut off, behind which nothing stands. A run that goes on at an earlier step begins a
//! new file: what stands in the older ones for later steps is cut off, and the new one begins with
//! the mark by which a TensorBoard that has already shown those steps takes them back.

mod messages;
#[cfg(test)]
mod tests;

use super::event::{EvalEvent, Event, StartEvent, StepEvent};
use crate::TrainError;
use messages::{
    Content, Dim, Metadata, OF_TENSORS, Plugin, Record, START, STRINGS, SessionLog, Shape, Summary,
    TextTensor, Value, What,
};
use prost::Message;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use time::OffsetDateTime;

/// The folder in a run's directory.
pub const FOLDER: &str = "tensorboard";

/// Readers take a later file for the newer one by its name, in the order of text.
const PREFIX: &str = "events.out.tfevents.";
const SUFFIX: &str = ".offshoot";

/// Characters of a prompt that name its texts.
const TAG_CHARS: usize = 60;

/// Writes a run's event files.
pub(super) struct TensorBoard {
    dir: PathBuf,
    path: PathBuf,
    file: File,
}

impl TensorBoard {
    /// In `output_dir/tensorboard`, behind what is known up to `step`; with 0, begins anew.
    pub fn open(output_dir: &Path, step: u64) -> Result<Self, TrainError> {
        let dir = output_dir.join(FOLDER);
        fs::create_dir_all(&dir).map_err(TrainError::io(&dir))?;
        let first_new = if step == 0 { 0 } else { step as i64 + 1 };
        let known = event_files(&dir)?;
        for path in &known {
            cut_off(path, first_new)?;
        }
        let path = dir.join(next_name(known.last()));
        let mut options = OpenOptions::new();
        let file = options.create_new(true).append(true).open(&path);
        let file = file.map_err(TrainError::io(&path))?;
        let mut board = TensorBoard { dir: output_dir.into(), path, file };
        board.write(0, What::FileVersion("brain.Event:2".into()))?;
        board.write(first_new, What::SessionLog(SessionLog { status: START }))?;
        Ok(board)
    }

    /// Takes back all steps after `step`.
    pub fn rewind(&mut self, step: u64) -> Result<(), TrainError> {
        *self = TensorBoard::open(&self.dir, step)?;
        Ok(())
    }

    /// What TensorBoard shows of an event.
    pub fn event(&mut self, event: &Event) -> Result<(), TrainError> {
        match summary(event) {
            Some((step, summary)) => self.write(step as i64, What::Summary(summary)),
            None => Ok(()),
        }
    }

    fn write(&mut self, step: i64, what: What) -> Result<(), TrainError> {
        let wall_time = OffsetDateTime::now_utc().unix_timestamp_nanos() as f64 * 1e-9;
        let record = Record { wall_time, step, what: Some(what) };
        self.file.write_all(&framed(&record)).map_err(TrainError::io(&self.path))
    }
}

/// An event's step and values, if TensorBoard has a place for them.
fn summary(event: &Event) -> Option<(u64, Summary)> {
    let (step, value) = match event {
        Event::Start(start) => (start.step, vec![text("Run".into(), describe(start))]),
        Event::Step(step) => (step.step, step_values(step)),
        Event::Eval(eval) => (eval.step, eval_values(eval)),
        Event::Sample { step, prompt, text: drawn } => {
            let shown = format!("{}\n**goes on with**\n\n{}", verbatim(prompt), verbatim(drawn));
            (*step, vec![text(sample_tag(prompt), shown)])
        }
        Event::Checkpoint { .. } | Event::Done(_) => return None,
    };
    Some((step, Summary { value }))
}

/// Names of an event's values.
#[cfg(test)]
pub(super) fn tags(event: &Event) -> Vec<String> {
    let values = summary(event).map_or(Vec::new(), |(_, summary)| summary.value);
    values.into_iter().map(|value| value.tag).collect()
}

fn step_values(step: &StepEvent) -> Vec<Value> {
    let mut values = vec![
        scalar("Loss/train", step.loss),
        scalar("LR/learning_rate", step.learning_rate),
        scalar("Gradient/norm", step.grad_norm),
        scalar("Throughput/tokens_per_second", step.tokens_per_second),
        scalar("Throughput/steps_per_second", step.steps_per_second),
        scalar("Time/wait_seconds", step.wait_seconds),
        scalar("Time/epoch", step.epoch),
    ];
    values.extend(step.extra.iter().map(|(name, value)| scalar(name, *value)));
    values
}

fn eval_values(eval: &EvalEvent) -> Vec<Value> {
    let mut values = vec![scalar("Loss/eval", eval.loss), scalar("Loss/eval_best", eval.best)];
    let extra = eval.extra.iter();
    values.extend(extra.map(|(name, value)| scalar(&format!("eval_{name}"), *value)));
    values
}

fn scalar(tag: &str, value: f64) -> Value {
    Value { tag: tag.into(), metadata: None, content: Some(Content::Scalar(value as f32)) }
}

/// `markdown` in the plugin for texts.
fn text(tag: String, markdown: String) -> Value {
    let plugin = Plugin { name: "text".into() };
    let tensor = TextTensor {
        dtype: STRINGS,
        shape: Some(Shape { dim: vec![Dim { size: 1 }] }),
        strings: vec![markdown.into_bytes()],
    };
    Value {
        tag,
        metadata: Some(Metadata { plugin: Some(plugin), data_class: OF_TENSORS }),
        content: Some(Content::Tensor(tensor)),
    }
}

fn describe(start: &StartEvent) -> String {
    format!(
        "| | |\n|---|---|\n| model | {} |\n| trunk | layers [{}, {}) |\n| loss | {} |\n| LoRA \
         rank | {} |\n| steps | {} |\n| samples | {}, and {} for evaluation |\n| session | {} |\n| offshoot | {} |",
        start.model,
        start.split_point_1,
        start.split_point_2,
        start.loss,
        start.lora_rank,
        start.n_steps,
        start.samples,
        start.eval_samples,
        start.session,
        start.version,
    )
}

/// The beginning of the prompt: TensorBoard shows the texts of one tag below each other.
fn sample_tag(prompt: &str) -> String {
    let words = prompt.split_whitespace().collect::<Vec<_>>().join(" ");
    format!("Sample/{}", words.chars().take(TAG_CHARS).collect::<String>())
}

/// As markdown that keeps its line breaks and signs.
fn verbatim(text: &str) -> String {
    text.lines().map(|line| format!("    {line}\n")).collect()
}

/// TFRecord: length, its sum, message, its sum; all numbers little-endian.
fn framed(record: &Record) -> Vec<u8> {
    let message = record.encode_to_vec();
    let length = (message.len() as u64).to_le_bytes();
    let mut framed = Vec::with_capacity(message.len() + FRAMING);
    framed.extend(length);
    framed.extend(masked_sum(&length).to_le_bytes());
    framed.extend(&message);
    framed.extend(masked_sum(&message).to_le_bytes());
    framed
}

/// Bytes around a message.
const FRAMING: usize = 8 + 4 + 4;

/// A sum over data that contain sums is masked in TFRecord.
fn masked_sum(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// The first record of `bytes`, if it is whole, and its bytes with their framing.
fn first_record(bytes: &[u8]) -> Option<(Record, usize)> {
    let (length, rest) = bytes.split_first_chunk::<8>()?;
    let (sum, rest) = rest.split_first_chunk::<4>()?;
    if masked_sum(length) != u32::from_le_bytes(*sum) {
        return None;
    }
    let length = usize::try_from(u64::from_le_bytes(*length)).ok()?;
    let (message, rest) = rest.split_at_checked(length)?;
    let sum = rest.first_chunk::<4>()?;
    if masked_sum(message) != u32::from_le_bytes(*sum) {
        return None;
    }
    Some((Record::decode(message).ok()?, length + FRAMING))
}

/// Removes the summaries of `first_new` and later steps, and a record that is not whole. Steps only
/// rise within one file.
fn cut_off(path: &Path, first_new: i64) -> Result<(), TrainError> {
    let bytes = fs::read(path).map_err(TrainError::io(path))?;
    let mut kept = 0;
    while let Some((record, length)) = first_record(&bytes[kept..]) {
        if matches!(record.what, Some(What::Summary(_))) && record.step >= first_new {
            break;
        }
        kept += length;
    }
    if kept < bytes.len() {
        let file = OpenOptions::new().write(true).open(path).map_err(TrainError::io(path))?;
        file.set_len(kept as u64).map_err(TrainError::io(path))?;
    }
    Ok(())
}

/// Those of this program, oldest first.
fn event_files(dir: &Path) -> Result<Vec<PathBuf>, TrainError> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).map_err(TrainError::io(dir))? {
        let path = entry.map_err(TrainError::io(dir))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with(PREFIX) && name.ends_with(SUFFIX) {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// A name that sorts behind `last`, even if the clock was set back or has not moved since.
fn next_name(last: Option<&PathBuf>) -> String {
    let name = last.and_then(|path| path.file_name()?.to_str()?.strip_prefix(PREFIX));
    let mut parts = name.unwrap_or_default().split('.').map(|part| part.parse::<i64>().ok());
    let (seconds, number) = (parts.next().flatten(), parts.next().flatten());
    let now = OffsetDateTime::now_utc().unix_timestamp();
    let seconds = seconds.map_or(now, |seconds| seconds.max(now));
    format!("{PREFIX}{seconds:010}.{:04}{SUFFIX}", number.map_or(0, |number| number + 1))
}
