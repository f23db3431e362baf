use crate::TrainError;
use crate::adapter::Adapter;
use crate::checkpoint::{self, Saved};
use crate::options::{LoraOptions, TrainOptions};
use offshoot_adapters::LoraSpec;
use offshoot_model::ModelConfig;

/// What a run begins from.
pub(crate) enum Origin {
    /// Values that are a function of the seed.
    Seed,
    /// An existing adapter at step 0, with a fresh optimizer.
    Adapter(Adapter),
    /// A checkpoint, its snapshot on the server included: the run goes on.
    Checkpoint(Saved),
}

impl Origin {
    /// As `--resume` and `--init-adapter` say. The former is the stronger one: what a run began with
    /// is in its checkpoint.
    pub fn find(options: &TrainOptions) -> Result<Self, TrainError> {
        if let Some(resume) = &options.output.resume {
            let saved = checkpoint::find(resume, &options.output.dir)?;
            if saved.state.snapshot().is_some() {
                return Ok(Origin::Checkpoint(saved));
            }
            // Imported: there is nothing but the adapter.
            return Ok(Origin::Adapter(Adapter::read(&saved.path)?));
        }
        match &options.lora.init_adapter {
            Some(path) => Ok(Origin::Adapter(Adapter::read(path)?)),
            None => Ok(Origin::Seed),
        }
    }

    /// The checkpoint, if the run goes on from one.
    pub fn checkpoint(&self) -> Option<&Saved> {
        match self {
            Origin::Checkpoint(saved) => Some(saved),
            Origin::Seed | Origin::Adapter(_) => None,
        }
    }

    /// Refuses an adapter that is not for this model.
    pub fn fit(self, config: &ModelConfig) -> Result<Self, TrainError> {
        match self {
            Origin::Adapter(adapter) => Ok(Origin::Adapter(adapter.fit(config)?)),
            other => Ok(other),
        }
    }

    /// The adapter's settings: what the options leave open is as what the run begins from has it.
    pub fn lora(&self, options: &LoraOptions) -> Result<LoraSpec, TrainError> {
        let usual = LoraOptions::usual();
        let spec = options.over(match self {
            Origin::Seed => &usual,
            Origin::Adapter(adapter) => &adapter.spec,
            Origin::Checkpoint(saved) => &saved.state.settings.lora,
        });
        // A checkpoint's are compared with all its other settings.
        if let Origin::Adapter(adapter) = self {
            check_same(&spec, adapter)?;
        }
        Ok(spec)
    }
}

/// The options of an adapter that is there already change what it does, except for dropout.
fn check_same(wanted: &LoraSpec, adapter: &Adapter) -> Result<(), TrainError> {
    let has = &adapter.spec;
    let sorted = |spec: &LoraSpec| {
        let mut targets = spec.target_modules.clone();
        targets.sort();
        targets.join(",")
    };
    for (option, wanted, has) in [
        ("lora-rank", wanted.r.to_string(), has.r.to_string()),
        ("lora-alpha", wanted.lora_alpha.to_string(), has.lora_alpha.to_string()),
        ("use-rslora", wanted.use_rslora.to_string(), has.use_rslora.to_string()),
        ("target-modules", sorted(wanted), sorted(has)),
    ] {
        if wanted != has {
            return Err(TrainError::Option {
                option,
                value: wanted,
                problem: format!(
                    "the adapter in {} has {has}; leave the option out to train that one on",
                    adapter.origin.display()
                ),
            });
        }
    }
    Ok(())
}

/// Sets what the LoRA options leave open to what the run would have: as the adapter or the checkpoint
/// that it begins from has it, else the usual.
pub fn resolve_lora(options: &mut TrainOptions) -> Result<(), TrainError> {
    let spec = Origin::find(options)?.lora(&options.lora)?;
    let lora = &mut options.lora;
    (lora.r, lora.lora_alpha) = (Some(spec.r), Some(spec.lora_alpha));
    (lora.lora_dropout, lora.use_rslora) = (Some(spec.lora_dropout), Some(spec.use_rslora));
    lora.target_modules = spec.target_modules;
    Ok(())
}
