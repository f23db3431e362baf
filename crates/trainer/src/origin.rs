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
    Adapter {
        adapter: Adapter,
        /// Of the base model that it was imported for, if it was.
        fingerprint: Option<String>,
    },
    /// A checkpoint, its snapshot on the server included: the run goes on.
    Checkpoint(Box<Saved>),
}

impl Origin {
    /// As `--resume` and `--init-adapter` say. The former is the stronger one: what a run began with
    /// is in its checkpoint.
    pub fn find(options: &TrainOptions) -> Result<Self, TrainError> {
        if let Some(resume) = &options.output.resume {
            let saved = checkpoint::find(resume, &options.output.dir)?;
            if saved.state.snapshot().is_some() {
                return Ok(Origin::Checkpoint(Box::new(saved)));
            }
            // Imported: there is nothing but the adapter.
            let adapter = Adapter::read(&saved.path)?;
            let fingerprint = Some(saved.state.settings.fingerprint);
            return Ok(Origin::Adapter { adapter, fingerprint });
        }
        match &options.lora.init_adapter {
            Some(path) => Ok(Origin::Adapter { adapter: Adapter::read(path)?, fingerprint: None }),
            None => Ok(Origin::Seed),
        }
    }

    /// The checkpoint, if the run goes on from one.
    pub fn checkpoint(&self) -> Option<&Saved> {
        match self {
            Origin::Checkpoint(saved) => Some(saved),
            Origin::Seed | Origin::Adapter { .. } => None,
        }
    }

    /// Refuses an adapter that is not for this model, and options that it cannot have.
    pub fn fit(
        self,
        config: &ModelConfig,
        fingerprint: &str,
        options: &LoraOptions,
    ) -> Result<Self, TrainError> {
        let Origin::Adapter { adapter, fingerprint: made_for } = self else { return Ok(self) };
        if let Some(made_for) = made_for.filter(|made_for| made_for != fingerprint) {
            return Err(TrainError::Checkpoint {
                path: adapter.origin,
                problem: format!(
                    "it was imported for another model (fingerprint {made_for}, this one's is {fingerprint}); import the adapter for this one, or begin with it by --init-adapter"
                ),
            });
        }
        let adapter = adapter.fit(config)?;
        check_same(options, &adapter, config)?;
        Ok(Origin::Adapter { adapter, fingerprint: None })
    }

    /// The adapter's settings: what the options leave open is as what the run begins from has it.
    pub fn lora(&self, options: &LoraOptions) -> LoraSpec {
        match self {
            Origin::Seed => options.over(&LoraOptions::usual()),
            Origin::Checkpoint(saved) => options.over(&saved.state.settings.lora),
            // What else the options say was found to be the same.
            Origin::Adapter { adapter, .. } => LoraSpec {
                lora_dropout: options.lora_dropout.unwrap_or(adapter.spec.lora_dropout),
                ..adapter.spec.clone()
            },
        }
    }
}

/// The options of an adapter that is there already would change what it does, except for dropout.
fn check_same(
    options: &LoraOptions,
    adapter: &Adapter,
    config: &ModelConfig,
) -> Result<(), TrainError> {
    let has = &adapter.spec;
    let wanted = options.over(has);
    let targets = |spec: &LoraSpec| -> Result<Vec<String>, TrainError> {
        let sites = config.sites(0..config.n_layers, &spec.target_modules)?;
        Ok(sites.into_iter().map(|site| site.path).collect())
    };
    let same_targets = targets(&wanted)? == targets(has)?;
    for (option, same, value, has) in [
        ("lora-rank", wanted.r == has.r, wanted.r.to_string(), has.r.to_string()),
        (
            "lora-alpha",
            wanted.lora_alpha == has.lora_alpha,
            wanted.lora_alpha.to_string(),
            has.lora_alpha.to_string(),
        ),
        (
            "use-rslora",
            wanted.use_rslora == has.use_rslora,
            wanted.use_rslora.to_string(),
            has.use_rslora.to_string(),
        ),
        (
            "target-modules",
            same_targets,
            wanted.target_modules.join(","),
            has.target_modules.join(","),
        ),
    ] {
        if !same {
            return Err(TrainError::Option {
                option,
                value,
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
    let origin = Origin::find(options)?;
    let spec = origin.lora(&options.lora);
    let lora = &mut options.lora;
    lora.r.get_or_insert(spec.r);
    lora.lora_alpha.get_or_insert(spec.lora_alpha);
    lora.lora_dropout.get_or_insert(spec.lora_dropout);
    lora.use_rslora.get_or_insert(spec.use_rslora);
    // An adapter's own are as its file has them until it is known for which model they are.
    if lora.target_modules.is_empty() && !matches!(origin, Origin::Adapter { .. }) {
        lora.target_modules = spec.target_modules;
    }
    Ok(())
}
