//! Which directory is meant.

use super::{Adapter, stitch};
use crate::TrainError;
use crate::checkpoint;
use offshoot_adapters::peft;
use std::path::{Path, PathBuf};
use std::str::FromStr;

const CHECKPOINT: &str = "checkpoint_step_";
/// Of a run that came to its end.
const FINISHED: &str = "adapter";

/// A checkpoint of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The one with the highest step.
    Latest,
    /// The one with the lowest evaluation loss.
    Best,
    /// The one after so many optimizer steps.
    At(u64),
}

impl FromStr for Step {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "latest" => Ok(Step::Latest),
            "best" => Ok(Step::Best),
            _ => text
                .parse()
                .map(Step::At)
                .map_err(|_| format!("\"{text}\": expected latest, best or a step's number")),
        }
    }
}

pub(super) fn read(path: &Path) -> Result<Adapter, TrainError> {
    if path.join(peft::CONFIG).exists() {
        return Ok(Adapter::from_peft(peft::read_dir(path)?, path));
    }
    if stitch::is_checkpoint(path) {
        return stitch::read(path);
    }
    if path.join(FINISHED).join(peft::CONFIG).exists() {
        return read(&path.join(FINISHED));
    }
    match checkpoints(path)?.pop() {
        Some((_, newest)) => stitch::read(&newest),
        None => Err(nothing(path)),
    }
}

pub(super) fn read_step(run: &Path, step: Step) -> Result<Adapter, TrainError> {
    stitch::read(&step_dir(run, step)?)
}

/// The checkpoint itself, or the one of a run.
pub(super) fn checkpoint_dir(source: &Path, step: Step) -> Result<PathBuf, TrainError> {
    if stitch::is_checkpoint(source) { Ok(source.into()) } else { step_dir(source, step) }
}

fn step_dir(run: &Path, step: Step) -> Result<PathBuf, TrainError> {
    let mut known = checkpoints(run)?;
    let wrong = |problem: String| TrainError::Checkpoint { path: run.into(), problem };
    let found = match step {
        Step::Latest => known.pop(),
        Step::At(step) => {
            let steps: Vec<String> = known.iter().map(|(step, _)| step.to_string()).collect();
            let found = known.into_iter().find(|(known, _)| *known == step);
            if found.is_none() && !steps.is_empty() {
                return Err(wrong(format!(
                    "it has no checkpoint of step {step}; there are those of {}",
                    steps.join(", ")
                )));
            }
            found
        }
        Step::Best => {
            let saved = checkpoint::list(run)?;
            let best = checkpoint::best(&saved);
            if best.is_none() && !known.is_empty() {
                return Err(wrong(
                    "no checkpoint of it was evaluated, so none is the best; train with --eval-file, or choose --step latest".into(),
                ));
            }
            best.map(|best| (best.state.step, best.path.clone()))
        }
    };
    found.map(|(_, path)| path).ok_or_else(|| nothing(run))
}

/// The checkpoints in a directory, lowest step first.
fn checkpoints(run: &Path) -> Result<Vec<(u64, PathBuf)>, TrainError> {
    if !run.is_dir() {
        return Err(nothing(run));
    }
    let mut found = Vec::new();
    for entry in std::fs::read_dir(run).map_err(TrainError::io(run))? {
        let path = entry.map_err(TrainError::io(run))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let step = name.strip_prefix(CHECKPOINT).and_then(|step| step.parse().ok());
        if let Some(step) = step.filter(|_| stitch::is_checkpoint(&path)) {
            found.push((step, path));
        }
    }
    found.sort();
    Ok(found)
}

fn nothing(path: &Path) -> TrainError {
    let found = if !path.exists() {
        "there is no such directory".to_string()
    } else if path.is_file() {
        "it is a file; name the directory that holds it".into()
    } else if path.join("config.json").exists() {
        "it holds a model, not an adapter; for the base model leave the option out".into()
    } else {
        "there is nothing of that kind in it".into()
    };
    TrainError::NoAdapter {
        path: path.into(),
        problem: format!(
            "{found}. Expected an adapter: a PEFT directory ({} and {}), a {CHECKPOINT}N directory, or the --output-dir of a run",
            peft::CONFIG,
            peft::WEIGHTS
        ),
    }
}
