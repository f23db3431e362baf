use crate::TrainError;
use crate::checkpoint::Best;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use serde_json::Value;
use std::fs::{self, File, OpenOptions};
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};

/// One line of `metrics.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// An optimizer step.
    Step(StepEvent),
    /// An evaluation, after `step` steps.
    Eval {
        /// Optimizer steps taken.
        step: u64,
        /// Mean cross-entropy in nats.
        loss: f64,
        /// The lowest so far.
        best: f64,
    },
    /// A text drawn from the model.
    Sample {
        /// Optimizer steps taken.
        step: u64,
        /// As given.
        prompt: String,
        /// What the model went on with.
        text: String,
    },
    /// A checkpoint was written.
    Checkpoint {
        /// Optimizer steps taken.
        step: u64,
        /// Its directory's name in the output directory.
        name: String,
    },
    /// The run ended, or was stopped.
    Done(DoneEvent),
}

/// One optimizer step.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StepEvent {
    /// This step's number; the first is 1.
    pub step: u64,
    /// Mean cross-entropy in nats over the predicted tokens of the step.
    pub loss: f64,
    /// Of this step.
    pub learning_rate: f64,
    /// Norm of all gradients of the whole model, before clipping.
    pub grad_norm: f64,
    /// One over the duration of this step.
    pub steps_per_second: f64,
    /// Tokens over the duration of this step.
    pub tokens_per_second: f64,
    /// Part of this step's duration in which nothing was computed here, because the next answer of
    /// the server had not arrived: the trunk's time and the wire's, as far as nothing overlapped.
    pub wait_seconds: f64,
    /// Tokens that went through the model in this step.
    pub tokens: u64,
    /// Most that the trunk held for one microbatch of this step.
    pub tape_bytes: u64,
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DoneEvent {
    /// Optimizer steps taken.
    pub step: u64,
    /// Stopped before its last step.
    pub interrupted: bool,
    /// Wall time of this process's part.
    pub seconds: f64,
    /// Of its training steps alone.
    pub training_seconds: f64,
    /// Of those, waiting for the server.
    pub wait_seconds: f64,
    /// Tokens of this process's part.
    pub tokens: u64,
    /// The lowest evaluation loss.
    pub best: Option<Best>,
    /// What the wire dtype has cost.
    pub wire_error: WireErrors,
}

/// Relative errors by rounding to the wire dtype, of a process's part of a run: the root of summed
/// squared errors over summed squares, on a sample of the rows of every tensor. 0 where the dtype
/// loses nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct WireErrors {
    /// Hidden states into the trunk.
    pub hidden_sent: f64,
    /// Hidden states out of the trunk.
    pub hidden_received: f64,
    /// Gradients into the trunk.
    pub gradients_sent: f64,
    /// Gradients out of the trunk.
    pub gradients_received: f64,
}

/// Tells people and `metrics.jsonl` how a run goes.
pub(crate) struct Reporter {
    metrics: File,
    path: PathBuf,
    bar: Option<ProgressBar>,
    log_interval: u64,
    n_steps: u64,
    /// Since the last line.
    interval: Interval,
}

#[derive(Default)]
struct Interval {
    /// Of steps only: evaluations and checkpoints do not slow training down.
    seconds: f64,
    wait_seconds: f64,
    n_steps: u64,
    loss: f64,
    tokens: u64,
}

impl Reporter {
    /// Goes on with the events of a run up to `step`; with 0, begins anew.
    pub fn new(
        output_dir: &Path,
        step: u64,
        n_steps: u64,
        log_interval: u64,
    ) -> Result<Self, TrainError> {
        let path = output_dir.join("metrics.jsonl");
        let metrics = forget_after(&path, step)?;
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = "{bar:24} {pos}/{len} [{elapsed} < {eta}] {msg}";
            let style = ProgressStyle::with_template(style).expect("a fixed template");
            ProgressBar::new(n_steps).with_style(style).with_position(step)
        });
        let interval = Interval::default();
        Ok(Reporter { metrics, path, bar, log_interval, n_steps, interval })
    }

    /// Takes back all events after `step`, which is about to be replayed.
    pub fn rewind(&mut self, step: u64) -> Result<(), TrainError> {
        self.metrics = forget_after(&self.path, step)?;
        if let Some(bar) = &self.bar {
            bar.set_position(step);
        }
        self.interval = Interval::default();
        Ok(())
    }

    /// A line for people.
    pub fn line(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| println!("{text}")),
            None => println!("{text}"),
        }
    }

    /// A line of `metrics.jsonl`, and what people see of it.
    pub fn event(&mut self, event: &Event) -> Result<(), TrainError> {
        let line = serde_json::to_string(event).expect("plain fields can be written") + "\n";
        self.metrics.write_all(line.as_bytes()).map_err(TrainError::io(&self.path))?;
        match event {
            Event::Step(step) => self.step(step),
            Event::Eval { step, loss, best } => {
                self.line(&format!("eval at step {step}  loss {loss:.4}  best {best:.4}"));
            }
            Event::Sample { step, prompt, text } => {
                self.line(&format!("sample at step {step}  {prompt:?} -> {text:?}"));
            }
            Event::Checkpoint { step, name } => {
                self.line(&format!("checkpoint at step {step}  {name}"));
            }
            Event::Done(_) => {
                if let Some(bar) = &self.bar {
                    bar.finish_and_clear();
                }
            }
        }
        Ok(())
    }

    fn step(&mut self, event: &StepEvent) {
        self.interval.seconds += 1.0 / event.steps_per_second;
        self.interval.wait_seconds += event.wait_seconds;
        self.interval.n_steps += 1;
        self.interval.loss += event.loss;
        self.interval.tokens += event.tokens;
        if let Some(bar) = &self.bar {
            bar.set_position(event.step);
            bar.set_message(format!("loss {:.4}", event.loss));
        }
        let due = event.step.is_multiple_of(self.log_interval) || event.step == self.n_steps;
        if due || event.step == 1 {
            let Interval { seconds, wait_seconds, n_steps, loss, tokens } = &self.interval;
            let text = format!(
                "step {}/{}  loss {:.4}  lr {:.2e}  grad norm {:.3}  {:.2} steps/s  {:.0} tokens/s  {:.0}% waiting",
                event.step,
                self.n_steps,
                loss / *n_steps as f64,
                event.learning_rate,
                event.grad_norm,
                *n_steps as f64 / seconds,
                *tokens as f64 / seconds,
                100.0 * wait_seconds / seconds,
            );
            self.line(&text);
            self.interval = Interval::default();
        }
    }
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
    fs::write(path, kept).map_err(TrainError::io(path))?;
    OpenOptions::new().append(true).open(path).map_err(TrainError::io(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn eval(step: u64) -> Event {
        Event::Eval { step, loss: 1.5, best: 1.25 }
    }

    #[test]
    fn a_resumed_run_goes_on_in_the_same_file() {
        let dir = tempfile::tempdir().unwrap();
        let mut report = Reporter::new(dir.path(), 0, 9, 1).unwrap();
        for step in [0, 3, 6] {
            report.event(&eval(step)).unwrap();
        }
        drop(report);
        let path = dir.path().join("metrics.jsonl");
        fs::write(&path, fs::read_to_string(&path).unwrap() + "{\"event\":\"st").unwrap();
        let mut report = Reporter::new(dir.path(), 3, 9, 1).unwrap();
        report.event(&eval(7)).unwrap();
        report.rewind(3).unwrap();
        report.event(&eval(8)).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        assert_eq!(
            text,
            "{\"event\":\"eval\",\"step\":0,\"loss\":1.5,\"best\":1.25}\n\
             {\"event\":\"eval\",\"step\":3,\"loss\":1.5,\"best\":1.25}\n\
             {\"event\":\"eval\",\"step\":8,\"loss\":1.5,\"best\":1.25}\n"
        );
        Reporter::new(dir.path(), 0, 9, 1).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "");
    }
}
