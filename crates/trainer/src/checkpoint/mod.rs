//! The client's directories for single steps. Each names the server's snapshot of the same step.
//!
//! ```text
//! OUTPUT_DIR/checkpoint_step_500/
//!   training_state.json                  step, data position, seeds, session, snapshot, settings
//!   {bottom,trunk,top}/metadata.json     layers, model, fingerprint
//!   {bottom,trunk,top}/lora_adapters/    a PEFT directory each, where layers carry LoRA
//!   {bottom,top}/optimizer.safetensors   parameters, moments; the trunk's are in the snapshot
//! ```
//!
//! A checkpoint is written under another name, synced and renamed: what has its name is whole.

mod state;

pub use state::{Best, RunSettings, TrainingState};

use crate::TrainError;
use crate::split::ClientState;
use offshoot_adapters::AdapterState;
use offshoot_adapters::peft::{self, PeftConfig};
use serde_json::{Value, json};
use state::FORMAT;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use tch::Tensor;

/// Why there is no best one.
const NONE_EVALUATED: &str = "none of its checkpoints has an evaluation loss, so none is the best: train with --eval-file, with --save-interval a multiple of --eval-interval or with --adapter best";

const PREFIX: &str = "checkpoint_step_";
const STATE_FILE: &str = "training_state.json";

/// What goes into a checkpoint's directory.
pub struct Contents<'a> {
    /// Step, settings, names.
    pub state: &'a TrainingState,
    /// Layers of the whole model.
    pub n_layers: usize,
    /// Of the model's family, for PEFT.
    pub fan_in_fan_out: bool,
    /// Parameters and moments of bottom and top.
    pub client: &'a ClientState,
    /// PEFT tensors of bottom, trunk and top.
    pub tensors: [Vec<(String, Tensor)>; 3],
}

const PARTS: [&str; 3] = ["bottom", "trunk", "top"];

/// Writes `output_dir/checkpoint_step_N`, in place of one of the same step.
pub fn write(output_dir: &Path, contents: &Contents<'_>) -> Result<PathBuf, TrainError> {
    let name = format!("{PREFIX}{}", contents.state.step);
    let path = output_dir.join(&name);
    let (fresh, old) =
        (output_dir.join(format!(".{name}.new")), output_dir.join(format!(".{name}.old")));
    remove(&fresh)?;
    fs::create_dir_all(&fresh).map_err(TrainError::io(&fresh))?;
    write_parts(&fresh, contents)?;
    let state = serde_json::to_string_pretty(contents.state).expect("plain fields can be written");
    let file = fresh.join(STATE_FILE);
    fs::write(&file, state + "\n").map_err(TrainError::io(&file))?;
    sync_tree(&fresh)?;

    remove(&old)?;
    if path.exists() {
        fs::rename(&path, &old).map_err(TrainError::io(&path))?;
    }
    fs::rename(&fresh, &path).map_err(TrainError::io(&path))?;
    sync(output_dir)?;
    remove(&old)?;
    Ok(path)
}

fn write_parts(dir: &Path, contents: &Contents<'_>) -> Result<(), TrainError> {
    let settings = &contents.state.settings;
    let (s1, s2) = (settings.split_point_1, settings.split_point_2);
    let layers: [Range<usize>; 3] = [0..s1, s1..s2, s2..contents.n_layers];
    let states = [&contents.client.bottom, &None, &contents.client.top];
    for (((part, layers), tensors), state) in
        PARTS.iter().zip(layers).zip(&contents.tensors).zip(states)
    {
        let dir = dir.join(part);
        fs::create_dir_all(&dir).map_err(TrainError::io(&dir))?;
        let metadata = json!({
            "part": part,
            "first_layer": layers.start,
            "end_layer": layers.end,
            "n_layers": contents.n_layers,
            "model_name": settings.model_name,
            "fingerprint": settings.fingerprint,
            "step": contents.state.step,
            "n_lora_tensors": tensors.len(),
        });
        let file = dir.join("metadata.json");
        let text = serde_json::to_string_pretty(&metadata).expect("a JSON value can be written");
        fs::write(&file, text + "\n").map_err(TrainError::io(&file))?;
        if !tensors.is_empty() {
            let config = peft_config(settings, contents.fan_in_fan_out);
            peft::write_dir(&dir.join("lora_adapters"), &config, tensors)?;
        }
        if let Some(state) = state {
            let file = dir.join("optimizer.safetensors");
            fs::write(&file, state.to_safetensors()).map_err(TrainError::io(&file))?;
        }
    }
    Ok(())
}

/// For PEFT directories of a run.
pub fn peft_config(settings: &RunSettings, fan_in_fan_out: bool) -> PeftConfig<'_> {
    PeftConfig { spec: &settings.lora, base_model: &settings.model_name, fan_in_fan_out }
}

/// A checkpoint on disk, its state read.
#[derive(Clone, Debug, PartialEq)]
pub struct Saved {
    /// The directory.
    pub path: PathBuf,
    /// What `training_state.json` says.
    pub state: TrainingState,
}

impl Saved {
    /// Reads a checkpoint's directory.
    pub fn read(path: &Path) -> Result<Self, TrainError> {
        let file = path.join(STATE_FILE);
        let wrong = |problem| TrainError::Checkpoint { path: path.into(), problem };
        let text = fs::read_to_string(&file).map_err(|e| {
            wrong(format!("{STATE_FILE} cannot be read ({e}); expected a {PREFIX}N directory"))
        })?;
        let value: Value = serde_json::from_str(&text)
            .map_err(|e| wrong(format!("{STATE_FILE} is not JSON: {e}")))?;
        if value["format"] != FORMAT {
            return Err(wrong(format!(
                "its format is {}, this version reads {FORMAT}; was it written by another version?",
                value["format"]
            )));
        }
        let state =
            serde_json::from_value(value).map_err(|e| wrong(format!("{STATE_FILE}: {e}")))?;
        Ok(Saved { path: path.into(), state })
    }

    /// When it was written, in UTC as RFC 3339 has it: as it says itself, else as its file does.
    pub fn saved_at(&self) -> Option<String> {
        let of_file = || {
            let modified = fs::metadata(self.path.join(STATE_FILE)).ok()?.modified().ok()?;
            state::rfc3339(modified.into())
        };
        self.state.saved_at.clone().or_else(of_file)
    }

    /// Bytes of all its files.
    pub fn n_bytes(&self) -> Result<u64, TrainError> {
        n_bytes(&self.path)
    }

    /// Parameters and moments of bottom and top.
    pub fn client_state(&self) -> Result<ClientState, TrainError> {
        let part = |part: &str| -> Result<Option<AdapterState>, TrainError> {
            let file = self.path.join(part).join("optimizer.safetensors");
            if !file.is_file() {
                return Ok(None);
            }
            let bytes = fs::read(&file).map_err(TrainError::io(&file))?;
            Ok(Some(AdapterState::from_safetensors(&bytes)?))
        };
        Ok(ClientState { bottom: part("bottom")?, top: part("top")? })
    }
}

/// The checkpoints of a run, lowest step first. Directories that are no whole checkpoint are passed
/// over.
pub fn list(output_dir: &Path) -> Result<Vec<Saved>, TrainError> {
    if !output_dir.exists() {
        return Ok(Vec::new());
    }
    let mut saved = Vec::new();
    for entry in fs::read_dir(output_dir).map_err(TrainError::io(output_dir))? {
        let path = entry.map_err(TrainError::io(output_dir))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.strip_prefix(PREFIX).is_some_and(|step| step.parse::<u64>().is_ok()) {
            saved.extend(Saved::read(&path).ok());
        }
    }
    saved.sort_by_key(|s| s.state.step);
    Ok(saved)
}

/// The checkpoint that `--resume` means: `latest` or `best` in the output directory, a checkpoint, a
/// run's directory for the latest one in it, or one of the two words behind a run's directory.
pub fn find(resume: &str, output_dir: &Path) -> Result<Saved, TrainError> {
    let (dir, wanted) = match Path::new(resume) {
        path if path == Path::new("latest") || path == Path::new("best") => (output_dir, path),
        path if path.exists() => (path, Path::new("latest")),
        path if path.ends_with("latest") || path.ends_with("best") => {
            (path.parent().unwrap_or(path), path)
        }
        path => (path, Path::new("latest")),
    };
    if dir.join(STATE_FILE).exists() {
        return Saved::read(dir);
    }
    let none = |problem: String| TrainError::Checkpoint { path: dir.into(), problem };
    let mut saved = list(dir)?;
    if saved.is_empty() {
        return Err(none(format!(
            "there is no {PREFIX}N directory with a {STATE_FILE} in it to resume from"
        )));
    }
    if wanted.ends_with("best") {
        let found = best(&saved).cloned();
        return found.ok_or_else(|| none(NONE_EVALUATED.into()));
    }
    Ok(saved.pop().expect("there is one"))
}

/// The checkpoint with the lowest evaluation loss.
pub fn best(saved: &[Saved]) -> Option<&Saved> {
    let evaluated = saved.iter().filter(|s| s.state.eval_loss.is_some());
    evaluated
        .min_by(|a, b| a.state.eval_loss.partial_cmp(&b.state.eval_loss).expect("both are finite"))
}

/// Removes all but the last `keep_last` and the best.
pub fn prune(output_dir: &Path, keep_last: usize) -> Result<(), TrainError> {
    let saved = list(output_dir)?;
    let best = best(&saved).map(|s| s.path.clone());
    for old in saved.iter().rev().skip(keep_last) {
        if Some(&old.path) != best.as_ref() {
            remove(&old.path)?;
        }
    }
    Ok(())
}

/// Moves the checkpoints of later steps into a folder of their own in the output directory. Gives
/// that folder, if there were any.
pub(crate) fn set_aside_after(output_dir: &Path, step: u64) -> Result<Option<PathBuf>, TrainError> {
    let mut later = list(output_dir)?;
    later.retain(|saved| saved.state.step > step);
    if later.is_empty() {
        return Ok(None);
    }
    let mut names = (1..).map(|n| match n {
        1 => format!("after_step_{step}"),
        n => format!("after_step_{step}_{n}"),
    });
    let aside = names.find_map(|name| {
        let path = output_dir.join(name);
        (!path.exists()).then_some(path)
    });
    let aside = aside.expect("some number is free");
    fs::create_dir_all(&aside).map_err(TrainError::io(&aside))?;
    for saved in later {
        let name = saved.path.file_name().unwrap_or_default();
        fs::rename(&saved.path, aside.join(name)).map_err(TrainError::io(&saved.path))?;
    }
    sync(&aside)?;
    sync(output_dir)?;
    Ok(Some(aside))
}

/// Removes the checkpoints of later steps.
pub(crate) fn remove_after(output_dir: &Path, step: u64) -> Result<(), TrainError> {
    for saved in list(output_dir)?.iter().filter(|saved| saved.state.step > step) {
        remove(&saved.path)?;
    }
    Ok(())
}

fn remove(path: &Path) -> Result<(), TrainError> {
    if path.exists() {
        fs::remove_dir_all(path).map_err(TrainError::io(path))?;
    }
    Ok(())
}

fn n_bytes(path: &Path) -> Result<u64, TrainError> {
    if !path.is_dir() {
        return Ok(fs::metadata(path).map_err(TrainError::io(path))?.len());
    }
    let mut sum = 0;
    for entry in fs::read_dir(path).map_err(TrainError::io(path))? {
        sum += n_bytes(&entry.map_err(TrainError::io(path))?.path())?;
    }
    Ok(sum)
}

fn sync_tree(path: &Path) -> Result<(), TrainError> {
    if path.is_dir() {
        for entry in fs::read_dir(path).map_err(TrainError::io(path))? {
            sync_tree(&entry.map_err(TrainError::io(path))?.path())?;
        }
    }
    sync(path)
}

fn sync(path: &Path) -> Result<(), TrainError> {
    fs::File::open(path).and_then(|file| file.sync_all()).map_err(TrainError::io(path))
}

#[cfg(test)]
mod tests;
