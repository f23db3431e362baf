//! TensorBoard's event files: records of a length, a message and two sums over them.
//!
//! A message is written whole as soon as there is one, so that a process that dies leaves at most
//! one record cut off, behind which nothing stands. A run that goes on at an earlier step begins a
//! new file: what stands in the older ones for later steps is cut off, and the new one begins with
//! the mark by which a TensorBoard that has already shown those steps takes them back.

use super::event::{EvalEvent, Event, StartEvent, StepEvent};
use crate::TrainError;
use prost::Message;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use time::OffsetDateTime;

/// The folder in a run's directory.
pub const FOLDER: &str = "tensorboard";

/// Readers take a later file for the newer one by its name, in the order of text.
const PREFIX: &str = "events.out.tfevents.";

/// Characters of a prompt that name its texts.
const TAG_CHARS: usize = 60;

/// A record's message. Field numbers are those of TensorFlow's event.proto and summary.proto.
#[derive(Clone, PartialEq, Message)]
struct Record {
    /// Seconds since 1970.
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(oneof = "What", tags = "3, 5, 7")]
    what: Option<What>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum What {
    #[prost(string, tag = "3")]
    FileVersion(String),
    #[prost(message, tag = "5")]
    Summary(Summary),
    #[prost(message, tag = "7")]
    SessionLog(SessionLog),
}

#[derive(Clone, PartialEq, Message)]
struct SessionLog {
    #[prost(int32, tag = "1")]
    status: i32,
}

/// SessionLog.START: with a second one in a folder, readers drop what they have of its step and
/// later ones.
const START: i32 = 1;

#[derive(Clone, PartialEq, Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    value: Vec<Value>,
}

#[derive(Clone, PartialEq, Message)]
struct Value {
    #[prost(string, tag = "1")]
    tag: String,
    #[prost(message, optional, tag = "9")]
    metadata: Option<Metadata>,
    #[prost(oneof = "Content", tags = "2, 8")]
    content: Option<Content>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum Content {
    #[prost(float, tag = "2")]
    Scalar(f32),
    #[prost(message, tag = "8")]
    Tensor(TextTensor),
}

#[derive(Clone, PartialEq, Message)]
struct Metadata {
    #[prost(message, optional, tag = "1")]
    plugin: Option<Plugin>,
    #[prost(int32, tag = "4")]
    data_class: i32,
}

/// DATA_CLASS_TENSOR.
const OF_TENSORS: i32 = 2;

#[derive(Clone, PartialEq, Message)]
struct Plugin {
    #[prost(string, tag = "1")]
    name: String,
}

/// A TensorProto that holds strings.
#[derive(Clone, PartialEq, Message)]
struct TextTensor {
    #[prost(int32, tag = "1")]
    dtype: i32,
    #[prost(message, optional, tag = "2")]
    shape: Option<Shape>,
    #[prost(bytes = "vec", repeated, tag = "8")]
    strings: Vec<Vec<u8>>,
}

/// DT_STRING.
const STRINGS: i32 = 7;

#[derive(Clone, PartialEq, Message)]
struct Shape {
    #[prost(message, repeated, tag = "2")]
    dim: Vec<Dim>,
}

#[derive(Clone, PartialEq, Message)]
struct Dim {
    #[prost(int64, tag = "1")]
    size: i64,
}

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
        let (step, value) = match event {
            Event::Start(start) => (start.step, vec![text("Run".into(), describe(start))]),
            Event::Step(step) => (step.step, step_values(step)),
            Event::Eval(eval) => (eval.step, eval_values(eval)),
            Event::Sample { step, prompt, text: drawn } => {
                (*step, vec![text(sample_tag(prompt), verbatim(&format!("{prompt}{drawn}")))])
            }
            Event::Checkpoint { .. } | Event::Done(_) => return Ok(()),
        };
        self.write(step as i64, What::Summary(Summary { value }))
    }

    fn write(&mut self, step: i64, what: What) -> Result<(), TrainError> {
        let wall_time = OffsetDateTime::now_utc().unix_timestamp_nanos() as f64 * 1e-9;
        let record = Record { wall_time, step, what: Some(what) };
        let framed = frame(&record.encode_to_vec());
        self.file.write_all(&framed).map_err(TrainError::io(&self.path))
    }
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
        "| | |\n|---|---|\n| model | {} |\n| trunk | layers [{}, {}) |\n| LoRA rank | {} |\n| \
         steps | {} |\n| samples | {}, and {} for evaluation |\n| session | {} |\n| offshoot | {} |",
        start.model,
        start.split_point_1,
        start.split_point_2,
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
fn frame(message: &[u8]) -> Vec<u8> {
    let length = (message.len() as u64).to_le_bytes();
    let mut framed = Vec::with_capacity(message.len() + FRAMING);
    framed.extend(length);
    framed.extend(masked_sum(&length).to_le_bytes());
    framed.extend(message);
    framed.extend(masked_sum(message).to_le_bytes());
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

/// Oldest first.
fn event_files(dir: &Path) -> Result<Vec<PathBuf>, TrainError> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).map_err(TrainError::io(dir))? {
        let path = entry.map_err(TrainError::io(dir))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with(PREFIX) {
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
    format!("{PREFIX}{seconds:010}.{:04}.offshoot", number.map_or(0, |number| number + 1))
}
