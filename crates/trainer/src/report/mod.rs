//! How a run goes, told three times: to people on stdout, to programs in `metrics.jsonl`, and to
//! TensorBoard. `docs/monitoring.md` says what is found where.

mod console;
mod event;
mod tensorboard;

pub(crate) use console::duration;
pub use event::{DoneEvent, EvalEvent, Event, StartEvent, StepEvent, WireErrors};

use crate::TrainError;
use console::Console;
use serde::Serialize;
use serde_json::Value;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use tensorboard::TensorBoard;
use time::OffsetDateTime;

/// The file of events in a run's directory.
pub const METRICS_FILE: &str = "metrics.jsonl";

/// What a report is about.
pub(crate) struct ReportOptions<'a> {
    pub output_dir: &'a Path,
    /// Steps taken before: events up to it stay. With 0 the report begins anew.
    pub step: u64,
    /// Of the whole run.
    pub n_steps: u64,
    /// Steps between lines for people.
    pub log_interval: u64,
    /// Whether no lines for people are printed.
    pub quiet: bool,
    /// Whether there are event files.
    pub tensorboard: bool,
}

/// Tells people and files how a run goes.
pub(crate) struct Reporter {
    metrics: File,
    path: PathBuf,
    board: Option<TensorBoard>,
    console: Console,
}

/// An event as it is written.
#[derive(Serialize)]
struct Line<'a> {
    #[serde(flatten)]
    event: &'a Event,
    time: String,
}

impl Reporter {
    /// Goes on with what is known up to `options.step`.
    pub fn new(options: &ReportOptions<'_>) -> Result<Self, TrainError> {
        let ReportOptions { output_dir, step, n_steps, log_interval, quiet, tensorboard } =
            *options;
        let path = output_dir.join(METRICS_FILE);
        let metrics = forget_after(&path, step)?;
        let board = match tensorboard {
            true => Some(TensorBoard::open(output_dir, step)?),
            false => None,
        };
        let console = Console::new(step, n_steps, log_interval);
        let console = if quiet { console.silenced() } else { console };
        Ok(Reporter { metrics, path, board, console })
    }

    /// Takes back all events after `step`, which is about to be replayed.
    pub fn rewind(&mut self, step: u64) -> Result<(), TrainError> {
        self.metrics = forget_after(&self.path, step)?;
        if let Some(board) = &mut self.board {
            board.rewind(step)?;
        }
        self.console.rewind(step);
        Ok(())
    }

    /// A line for people.
    pub fn line(&self, text: &str) {
        self.console.line(text);
    }

    /// A line of `metrics.jsonl`, and what TensorBoard and people see of it.
    pub fn event(&mut self, event: &Event) -> Result<(), TrainError> {
        let line = Line { event, time: now() };
        let line = serde_json::to_string(&line).expect("plain fields can be written") + "\n";
        self.metrics.write_all(line.as_bytes()).map_err(TrainError::io(&self.path))?;
        if let Some(board) = &mut self.board {
            board.event(event)?;
        }
        self.console.event(event);
        Ok(())
    }
}

/// RFC 3339, in UTC, always to the millisecond: such times sort as text.
fn now() -> String {
    let now = OffsetDateTime::now_utc();
    let (date, (hour, minute, second, millisecond)) = (now.date(), now.to_hms_milli());
    let (year, month, day) = date.to_calendar_date();
    let month = u8::from(month);
    format!("{year}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{millisecond:03}Z")
}

/// Opens the file for more events, with those after `step` removed.
fn forget_after(path: &Path, step: u64) -> Result<File, TrainError> {
    let mut kept = String::new();
    if step > 0 && path.exists() {
        for line in fs::read_to_string(path).map_err(TrainError::io(path))?.lines() {
            // A line cut off by a crash is no event.
            let event: Value = serde_json::from_str(line).unwrap_or_default();
            if event["event"] != "done" && event["step"].as_u64().is_some_and(|s| s <= step) {
                kept += line;
                kept.push('\n');
            }
        }
    }
    // Renamed into place: a crash here must not take the history along.
    let fresh = path.with_extension("jsonl.new");
    fs::write(&fresh, kept).map_err(TrainError::io(&fresh))?;
    fs::rename(&fresh, path).map_err(TrainError::io(path))?;
    OpenOptions::new().append(true).open(path).map_err(TrainError::io(path))
}

#[cfg(test)]
mod tests;
