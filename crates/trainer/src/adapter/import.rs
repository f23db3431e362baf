//! An existing adapter as the first checkpoint of a run.

use super::Adapter;
use crate::TrainError;
use crate::checkpoint::{self, Contents, RunSettings, TrainingState};
use crate::split::ClientState;
use offshoot_model::weights::Checkpoint;
use offshoot_model::{ModelConfig, SplitPoints};
use std::path::{Path, PathBuf};

/// Where [`Adapter::import`] goes.
pub struct ImportOptions<'a> {
    /// Of the run; must not hold checkpoints.
    pub output_dir: &'a Path,
    /// As the run will name it.
    pub model_name: &'a str,
    pub checkpoint: &'a Checkpoint,
    pub split: SplitPoints,
}

impl Adapter {
    /// Splits the adapter into bottom, trunk and top and writes them as a checkpoint of step 0,
    /// without optimizer and session: a run that is resumed from it opens one. Gives its path.
    pub fn import(self, options: &ImportOptions<'_>) -> Result<PathBuf, TrainError> {
        let ImportOptions { output_dir, model_name, checkpoint, split } = options;
        if let Some(last) = checkpoint::list(output_dir)?.pop() {
            return Err(TrainError::Option {
                option: "output-dir",
                value: output_dir.display().to_string(),
                problem: format!(
                    "it holds checkpoints of another run, up to step {}; name another folder",
                    last.state.step
                ),
            });
        }
        let config = ModelConfig::from_json(checkpoint.config())?;
        let adapter = self.fit(&config)?;
        let SplitPoints { s1, s2 } = *split;
        let state = TrainingState::without_session(RunSettings {
            model_name: model_name.to_string(),
            fingerprint: checkpoint.fingerprint(),
            split_point_1: s1,
            split_point_2: s2,
            lora: adapter.spec.clone(),
            ..RunSettings::default()
        });
        let layers = [0..s1, s1..s2, s2..config.n_layers];
        let contents = Contents {
            state: &state,
            n_layers: config.n_layers,
            fan_in_fan_out: config.family.fan_in_fan_out(),
            client: &ClientState { bottom: None, top: None },
            tensors: layers.map(|layers| adapter.of_layers(layers)),
        };
        std::fs::create_dir_all(output_dir).map_err(TrainError::io(output_dir))?;
        checkpoint::write(output_dir, &contents)
    }
}
