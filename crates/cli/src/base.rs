//! The model that a command works on, and the adapter that goes with it, if one was named.

use anyhow::Context;
use offshoot_model::ModelConfig;
use offshoot_model::weights::Checkpoint;
use offshoot_trainer::adapter::{Adapter, Step};
use std::path::Path;

pub struct Base {
    /// As it was given, or as the adapter names it.
    pub name: String,
    pub checkpoint: Checkpoint,
    pub config: ModelConfig,
    /// It fits the model.
    pub adapter: Option<Adapter>,
}

impl Base {
    /// `step`: of the adapter's run, if it is one.
    pub fn find(
        model_name: Option<String>,
        adapter: Option<&Path>,
        step: Option<Step>,
    ) -> anyhow::Result<Self> {
        let adapter = adapter.map(|path| Adapter::find(path, step)).transpose()?;
        let of_adapter = adapter.as_ref().and_then(|adapter| adapter.base_model.clone());
        let name = model_name.or(of_adapter).context(
            "--model-name is missing: name a Hugging Face directory, a GGUF file or a hub name; only an \
             adapter that names its base model can do without",
        )?;
        let checkpoint = Checkpoint::find(&name)?;
        let config = ModelConfig::from_json(checkpoint.config())?;
        let adapter = adapter.map(|adapter| adapter.fit(&config)).transpose()?;
        Ok(Base { name, checkpoint, config, adapter })
    }
}
