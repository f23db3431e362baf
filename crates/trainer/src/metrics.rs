//! A run's `metrics.jsonl` read back, also of a run that is still going on or that broke.

use crate::TrainError;
use crate::report::METRICS_FILE;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// What is known of a run.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RunLog {
    /// The file.
    pub path: PathBuf,
    /// Path or hub name of the base model; none in files of older versions.
    pub model: Option<String>,
    /// Name of the loss that is minimised; none in files of older versions.
    pub loss: Option<String>,
    /// Optimizer steps that the run is to have; none in files of older versions.
    pub n_steps: Option<u64>,
    /// Lowest step first; steps without a finite loss are left out.
    pub steps: Vec<StepPoint>,
    /// Lowest step first; evaluations without a finite loss are left out.
    pub evaluations: Vec<EvalPoint>,
    /// Whether the run has come to its end, or was stopped in order.
    pub end: End,
    /// Whole lines that are no event. A last line that is being written does not count.
    pub n_unreadable: usize,
}

/// How a run's file ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum End {
    /// The run is going on, or its process died.
    #[default]
    Open,
    /// It was stopped before its last step, with a checkpoint.
    Interrupted,
    /// It took its last step.
    Done,
}

/// One optimizer step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepPoint {
    /// The first is 1.
    pub step: u64,
    /// Mean loss of the step.
    pub loss: f64,
    /// Of this step.
    pub learning_rate: f64,
    /// Tokens over the duration of this step.
    pub tokens_per_second: f64,
}

/// One evaluation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EvalPoint {
    /// Optimizer steps taken before.
    pub step: u64,
    /// Mean loss over the evaluation data.
    pub loss: f64,
}

impl RunLog {
    /// Reads the file of a run's directory, or the file itself.
    pub fn read(run: &Path) -> Result<Self, TrainError> {
        let path = if run.is_dir() { run.join(METRICS_FILE) } else { run.to_path_buf() };
        if !path.is_file() {
            return Err(TrainError::Metrics { path: run.into(), problem: missing(run) });
        }
        let bytes = fs::read(&path).map_err(TrainError::io(&path))?;
        let log = RunLog { path, ..Self::parse(&bytes) };
        if log.steps.is_empty() && log.evaluations.is_empty() {
            let problem = match log.n_unreadable {
                0 => "no training step and no evaluation is in it yet; wait for the first step, \
                      or see why the run did not get there"
                    .into(),
                n => format!(
                    "none of its lines is a step or an evaluation, and {n} are no events at all; \
                     expected the {METRICS_FILE} that `offshoot train` writes"
                ),
            };
            return Err(TrainError::Metrics { path: log.path, problem });
        }
        Ok(log)
    }

    fn parse(bytes: &[u8]) -> Self {
        let mut log = RunLog::default();
        // Of a step that is there twice, the later line counts.
        let (mut steps, mut evaluations) = (BTreeMap::new(), BTreeMap::new());
        // What stands behind the last line's end is being written, or its writer died.
        let whole = bytes.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
        for line in bytes[..whole].split(|&byte| byte == b'\n').filter(|line| !line.is_empty()) {
            let event: Value = serde_json::from_slice(line).unwrap_or_default();
            let number = |name: &str| event[name].as_f64().unwrap_or(f64::NAN);
            let (step, loss) = (event["step"].as_u64(), number("loss"));
            match (event["event"].as_str(), step) {
                (Some("start"), Some(_)) => {
                    log.model = event["model"].as_str().map(String::from);
                    log.loss = event["loss"].as_str().map(String::from);
                    log.n_steps = event["n_steps"].as_u64();
                    log.end = End::Open;
                }
                (Some("step"), Some(step)) => {
                    let learning_rate = number("learning_rate");
                    let tokens_per_second = number("tokens_per_second");
                    let point = StepPoint { step, loss, learning_rate, tokens_per_second };
                    steps.insert(step, point);
                }
                (Some("eval"), Some(step)) => {
                    evaluations.insert(step, EvalPoint { step, loss });
                }
                (Some("done"), _) => {
                    let interrupted = event["interrupted"].as_bool().unwrap_or(false);
                    log.end = if interrupted { End::Interrupted } else { End::Done };
                }
                (Some(_), _) => {}
                (None, _) => log.n_unreadable += 1,
            }
        }
        log.steps = steps.into_values().filter(|point| point.loss.is_finite()).collect();
        log.evaluations =
            evaluations.into_values().filter(|point| point.loss.is_finite()).collect();
        log
    }

    /// The lowest evaluation loss, at its earliest step.
    pub fn best(&self) -> Option<EvalPoint> {
        self.evaluations.iter().copied().min_by(|a, b| a.loss.total_cmp(&b.loss))
    }
}

/// Why there is no file, and where there are some.
fn missing(run: &Path) -> String {
    if !run.exists() {
        return "there is no such file or directory; expected the --output-dir of a run".into();
    }
    let mut runs: Vec<_> = fs::read_dir(run)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.join(METRICS_FILE).is_file())
        .map(|path| path.display().to_string())
        .collect();
    runs.sort();
    let hint = match runs.is_empty() {
        true => "`offshoot train` writes one there before its first step".into(),
        false => format!("runs below it: {}", runs.join(", ")),
    };
    format!("there is no {METRICS_FILE} in it; expected the --output-dir of a run; {hint}")
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINES: &str = r#"{"event":"start","step":0,"n_steps":9,"model":"tiny"}
{"event":"eval","step":0,"loss":2.5,"best":2.5}
{"event":"step","step":1,"loss":2.25,"learning_rate":0.001,"tokens_per_second":8.0}
{"event":"step","step":2,"loss":null,"learning_rate":0.002,"tokens_per_second":8.0}
not an event
{"event":"step","step":3,"loss":2.0,"learning_rate":0.003,"tokens_per_second":8.0}
{"event":"eval","step":3,"loss":1.75,"best":1.75}
{"event":"eval","step":6,"loss":1.75,"best":1.75}
{"event":"checkpoint","step":6,"name":"checkpoint_step_6"}
"#;

    #[test]
    fn a_run_that_is_going_on_is_read_up_to_its_last_whole_line() {
        let dir = tempfile::tempdir().unwrap();
        let half = format!("{LINES}{{\"event\":\"step\",\"step\":4,\"lo");
        fs::write(dir.path().join(METRICS_FILE), &half).unwrap();
        let log = RunLog::read(dir.path()).unwrap();
        assert_eq!(
            (log.model.as_deref(), log.n_steps, log.end),
            (Some("tiny"), Some(9), End::Open)
        );
        assert_eq!(
            log.steps.iter().map(|p| (p.step, p.loss)).collect::<Vec<_>>(),
            [(1, 2.25), (3, 2.0)]
        );
        assert_eq!(log.best(), Some(EvalPoint { step: 3, loss: 1.75 }));
        assert_eq!(log.n_unreadable, 1);
        assert_eq!(RunLog::read(&dir.path().join(METRICS_FILE)).unwrap(), log);

        let done = format!("{LINES}{{\"event\":\"done\",\"step\":6,\"interrupted\":true}}\n");
        assert_eq!(RunLog::parse(done.as_bytes()).end, End::Interrupted);
        // Resumed.
        let on =
            format!("{done}{{\"event\":\"start\",\"step\":6,\"n_steps\":12,\"model\":\"tiny\"}}\n");
        let log = RunLog::parse(on.as_bytes());
        assert_eq!((log.end, log.n_steps), (End::Open, Some(12)));
    }

    #[test]
    fn a_folder_without_a_run_is_told_from_one_without_steps() {
        let dir = tempfile::tempdir().unwrap();
        let error = |path: &Path| RunLog::read(path).unwrap_err().to_string();
        let says = |text: String, words: &str| assert!(text.contains(words), "{text}");
        says(error(&dir.path().join("nowhere")), "no such file or directory");
        says(error(dir.path()), "there is no metrics.jsonl in it");
        let run = dir.path().join("run-7");
        fs::create_dir(&run).unwrap();
        fs::write(run.join(METRICS_FILE), "").unwrap();
        says(error(dir.path()), "run-7");
        says(error(&run), "no training step and no evaluation is in it yet");
        fs::write(run.join(METRICS_FILE), "step,loss\n1,2\n").unwrap();
        says(error(&run), "2 are no events at all");
    }
}
