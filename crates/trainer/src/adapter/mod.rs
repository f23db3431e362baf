//! Adapters as files: read from wherever they lie, stitched to one for the whole model, checked
//! against the model that they are to change.

mod export;
mod fitting;
mod import;
mod read;
mod stitch;
mod visit;

pub use export::ExportOptions;
pub use import::ImportOptions;
pub use read::Step;
pub use visit::{Visit, VisitOptions};

use crate::TrainError;
use crate::wire::to_wire;
use offshoot_adapters::peft::{self, PeftAdapter};
use offshoot_adapters::{AdapterError, LoraSpec};
use offshoot_client::{HostTensor, LoraConfig, WireDType};
use offshoot_model::{ModelConfig, SplitPoints};
use std::ops::Range;
use std::path::{Path, PathBuf};
use tch::Tensor;

/// A LoRA adapter for a whole model, on the host.
#[derive(Debug)]
pub struct Adapter {
    /// Rank, alpha and the rest, exactly as they were saved.
    pub spec: LoraSpec,
    /// A `[r, d_in]` and B `[d_out, r]`, float32, under PEFT's names for the whole model.
    pub tensors: Vec<(String, Tensor)>,
    /// The base model that the files name.
    pub base_model: Option<String>,
    /// Where it was read.
    pub origin: PathBuf,
}

impl Adapter {
    /// Reads a PEFT directory; or a `checkpoint_step_N`, whose bottom, trunk and top are stitched,
    /// SplitLearn's too; or a run's directory: its `adapter`, else its newest checkpoint.
    ///
    /// # Errors
    /// If there is none of these, if a file is cut off, if the parts do not belong together, and for
    /// kinds of adapter that are not plain LoRA.
    pub fn read(path: &Path) -> Result<Self, TrainError> {
        read::read(path)
    }

    /// Reads the checkpoint of a run that `step` means.
    pub fn read_step(run: &Path, step: Step) -> Result<Self, TrainError> {
        read::read_step(run, step)
    }

    /// [`Adapter::read_step`] if a step is asked for, else [`Adapter::read`].
    pub fn find(path: &Path, step: Option<Step>) -> Result<Self, TrainError> {
        match step {
            Some(step) => Adapter::read_step(path, step),
            None => Adapter::read(path),
        }
    }

    /// Checks that every linear layer that the settings mean has its A and B, of the right shapes,
    /// and that there is nothing else; then `target_modules` are the shortest that mean the same.
    pub fn fit(self, config: &ModelConfig) -> Result<Self, TrainError> {
        fitting::fit(self, config)
    }

    /// The tensors of a range of layers.
    pub fn of_layers(&self, layers: Range<usize>) -> Vec<(String, Tensor)> {
        let inside = |name: &str| layer_of(name).is_some_and(|layer| layers.contains(&layer));
        let tensors = self.tensors.iter().filter(|(name, _)| inside(name));
        tensors.map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect()
    }

    /// The trunk's tensors as a session is opened with them.
    pub fn trunk(&self, split: SplitPoints) -> Vec<(String, HostTensor)> {
        let tensors = self.of_layers(split.s1..split.s2);
        tensors
            .iter()
            .map(|(name, tensor)| (name.clone(), to_wire(tensor, WireDType::F32)))
            .collect()
    }

    /// The settings as a session is opened with them.
    pub fn lora_config(&self) -> LoraConfig {
        lora_config(&self.spec)
    }

    fn from_peft(adapter: PeftAdapter, origin: &Path) -> Self {
        let PeftAdapter { spec, tensors, base_model } = adapter;
        Adapter { spec, tensors, base_model, origin: origin.into() }
    }
}

/// Settings as a session is opened with them.
pub(crate) fn lora_config(spec: &LoraSpec) -> LoraConfig {
    let LoraSpec { r, lora_alpha, lora_dropout, use_rslora, target_modules } = spec.clone();
    LoraConfig { r: r as u32, lora_alpha, lora_dropout, use_rslora, target_modules }
}

/// The layer that a tensor's name in a PEFT file speaks of.
fn layer_of(name: &str) -> Option<usize> {
    peft::module_path(name)?.split('.').find_map(|part| part.parse().ok())
}

fn does_not_fit(origin: &Path, problems: String) -> TrainError {
    AdapterError::DoesNotFit { origin: origin.display().to_string(), problems }.into()
}

#[cfg(test)]
mod tests;
