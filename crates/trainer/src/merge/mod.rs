//! A full model directory with an adapter merged into its weights: W + scaling * B A, computed in
//! float32, written tensor by tensor.

mod settings;
mod shards;
mod tokenizer_files;

use crate::TrainError;
use crate::adapter::Adapter;
use offshoot_adapters::peft::module_path;
use offshoot_model::weights::Checkpoint;
use offshoot_model::{ModelConfig, ModelError, Parameter};
use shards::Plan;
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor};

/// What [`merge`] writes, and where.
pub struct MergeOptions {
    /// Must not exist, or be empty.
    pub output_dir: PathBuf,
    /// dtype of all tensors. None: each keeps its own; those of quantised files become float32.
    pub kind: Option<Kind>,
    /// Most bytes of tensors in one file.
    pub max_shard_bytes: u64,
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Merged {
    /// Tensors that the adapter changed.
    pub n_changed: usize,
    pub n_tensors: usize,
    pub n_files: usize,
    /// Of the tensors.
    pub bytes: u64,
}

/// Writes a directory that Transformers and [`Checkpoint::open`] load. It gets its name when it is
/// whole. No more than one tensor and its product are in memory at a time.
///
/// # Errors
/// If the directory has something in it, if the adapter does not fit, and for GGUF files whose
/// rotary positions or tokenizer Transformers cannot express.
pub fn merge(
    checkpoint: &Checkpoint,
    adapter: Adapter,
    options: &MergeOptions,
) -> Result<Merged, TrainError> {
    let dir = &options.output_dir;
    refuse_existing(dir)?;
    let config = ModelConfig::from_json(checkpoint.config())?;
    let adapter = adapter.fit(&config)?;
    let settings = settings::config_json(checkpoint, options.kind)?;

    let source = Source::new(checkpoint, &config, &adapter, options.kind);
    let fresh = beside(dir);
    remove(&fresh)?;
    fs::create_dir_all(&fresh).map_err(TrainError::io(&fresh))?;
    let written = write(&fresh, &source, &settings, options.max_shard_bytes);
    let Ok(merged) = written else {
        // Half a model serves nobody.
        remove(&fresh)?;
        return written;
    };
    if dir.exists() {
        fs::remove_dir(dir).map_err(TrainError::io(dir))?;
    }
    fs::rename(&fresh, dir).map_err(TrainError::io(dir))?;
    Ok(merged)
}

fn write(
    dir: &Path,
    source: &Source<'_>,
    settings: &serde_json::Value,
    max_shard_bytes: u64,
) -> Result<Merged, TrainError> {
    tokenizer_files::write(dir, source.checkpoint)?;
    write_json(&dir.join(settings::CONFIG), settings)?;
    let plan = Plan::new(source.tensors(), max_shard_bytes);
    plan.write(dir, source)?;
    Ok(Merged {
        n_changed: source.pairs.len(),
        n_tensors: plan.n_tensors(),
        n_files: plan.n_files(),
        bytes: plan.bytes(),
    })
}

fn write_json(path: &Path, value: &serde_json::Value) -> Result<(), TrainError> {
    let text = serde_json::to_string_pretty(value).expect("a JSON value can be written");
    fs::write(path, text + "\n").map_err(TrainError::io(path))
}

/// The same folder under a name that says that it is not whole.
fn beside(dir: &Path) -> PathBuf {
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    dir.with_file_name(format!(".{name}.new"))
}

fn remove(dir: &Path) -> Result<(), TrainError> {
    if dir.exists() {
        fs::remove_dir_all(dir).map_err(TrainError::io(dir))?;
    }
    Ok(())
}

/// Only a folder that is not there, or is empty, is written to.
fn refuse_existing(dir: &Path) -> Result<(), TrainError> {
    let is_free = !dir.exists() || fs::read_dir(dir).map_err(TrainError::io(dir))?.next().is_none();
    if is_free && dir.file_name().is_some() {
        return Ok(());
    }
    Err(TrainError::Option {
        option: "output-dir",
        value: dir.display().to_string(),
        problem: "it has something in it already; name a new folder, or remove it first".into(),
    })
}

/// The merged tensors, made when they are asked for.
struct Source<'a> {
    checkpoint: &'a Checkpoint,
    parameters: Vec<Parameter>,
    /// A and B of a linear layer by its path.
    pairs: HashMap<&'a str, [&'a Tensor; 2]>,
    scaling: f64,
    /// Weights are stored `[in, out]` (GPT-2's Conv1D).
    fan_in_fan_out: bool,
    kind: Option<Kind>,
}

impl<'a> Source<'a> {
    fn new(
        checkpoint: &'a Checkpoint,
        config: &ModelConfig,
        adapter: &'a Adapter,
        kind: Option<Kind>,
    ) -> Self {
        let mut pairs: HashMap<&str, [&Tensor; 2]> = HashMap::new();
        for (name, tensor) in &adapter.tensors {
            if let Some(path) = module_path(name) {
                let pair = pairs.entry(path).or_insert([tensor; 2]);
                pair[usize::from(name.ends_with("lora_B.weight"))] = tensor;
            }
        }
        Source {
            checkpoint,
            parameters: config.parameters(),
            pairs,
            scaling: adapter.spec.scaling(),
            fan_in_fan_out: config.family.fan_in_fan_out(),
            kind,
        }
    }

    /// Every tensor with the dtype in which it is written.
    fn tensors(&self) -> impl Iterator<Item = (&Parameter, Kind)> {
        self.parameters.iter().map(|parameter| (parameter, self.kind_of(&parameter.name)))
    }

    fn kind_of(&self, name: &str) -> Kind {
        let own = match self.checkpoint.stored_kind(name) {
            Some(kind @ (Kind::BFloat16 | Kind::Half)) => kind,
            _ => Kind::Float,
        };
        self.kind.unwrap_or(own)
    }

    /// A tensor of the merged model, on the host in `kind`.
    fn tensor(&self, parameter: &Parameter, kind: Kind) -> Result<Tensor, TrainError> {
        let Parameter { name, shape } = parameter;
        let pair = name.strip_suffix(".weight").and_then(|path| self.pairs.get(path));
        let read_as = if pair.is_some() { Kind::Float } else { kind };
        let weight =
            self.checkpoint.tensor(name, read_as, Device::Cpu).map_err(ModelError::from)?;
        if weight.size() != *shape {
            let (found, expected) = (weight.size(), shape.clone());
            return Err(ModelError::Shape { name: name.clone(), found, expected }.into());
        }
        let Some([a, b]) = pair else { return Ok(weight) };
        let _guard = tch::no_grad_guard();
        // B A is [d_out, d_in].
        let delta = if self.fan_in_fan_out { a.tr().matmul(&b.tr()) } else { b.matmul(a) };
        Ok((weight + delta * self.scaling).to_kind(kind))
    }
}

#[cfg(test)]
mod tests;
