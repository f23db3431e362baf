use crate::TrainError;
use crate::adapter::lora_config;
use crate::checkpoint::RunSettings;
use crate::data::source::{DataSpec, Sources};
use crate::data::{DataOptions, DataSet, Plan, PlanOptions};
use crate::fit;
use crate::generate::end_ids;
use crate::loss::Losses;
use crate::noise::{self, PrivacyOptions};
use crate::options::{OptimizerOptions, TrainOptions};
use crate::origin::Origin;
use crate::schedule::Schedule;
use crate::split::{SplitModel, SplitOptions};
use crate::tokenizer::Tokenizer;
use offshoot_adapters::LoraSpec;
use offshoot_client::{AdamWConfig, Client, OpenSession, ServerDescription, Session};
use offshoot_model::weights::Checkpoint;
use offshoot_model::{ModelConfig, SplitPoints};
use tch::Kind;

/// Everything of a run that does not change while it trains.
pub(crate) struct Prepared {
    pub client: Client,
    pub server: ServerDescription,
    pub config: ModelConfig,
    pub settings: RunSettings,
    pub tokenizer: Tokenizer,
    /// Tokens that end a text.
    pub end_ids: Vec<u32>,
    pub data: DataSet,
    pub eval: Option<DataSet>,
    pub plan: Plan,
    pub schedule: Schedule,
    pub split: SplitModel,
    /// With the run's noise key.
    pub privacy: PrivacyOptions,
    pub losses: Losses,
    pub origin: Origin,
}

/// Connects, checks that both sides hold one model, reads the data and loads bottom and top. The
/// cheap checks come first. `own`: sources instead of those that the options name.
pub(crate) async fn prepare(
    options: &TrainOptions,
    own: Option<Sources>,
    origin: Origin,
) -> Result<Prepared, TrainError> {
    match &own {
        None => options.validate()?,
        Some(own) => options.validate_without_sources(!own.eval.is_empty())?,
    }
    let client = Client::connect_with(&options.model.server, options.model.client.clone()).await?;
    let server = client.describe().await?;
    let model = &options.model;
    let wanted = [model.split_point_1, model.split_point_2];
    fit::split_points(&model.server, &server, wanted)?;
    fit::wire_dtype(&server, options.compute.wire_dtype)?;

    let checkpoint =
        Checkpoint::find(&options.model.name).map_err(offshoot_model::ModelError::from)?;
    let config = ModelConfig::from_json(checkpoint.config())?;
    let fingerprint = checkpoint.fingerprint();
    fit::model_type(&model.name, &config, model.model_type.as_deref())?;
    fit::fingerprint(&server, &model.name, &config, &fingerprint)?;
    let origin = origin.fit(&config, &fingerprint, &options.lora)?;
    fit::rank(&server, origin.lora(&options.lora).r)?;

    let template = options.data.chat_template.as_deref();
    let tokenizer = Tokenizer::load_with(&checkpoint, template)?;
    let end_ids = end_ids(&checkpoint, Some(&tokenizer))?;
    check_lengths(options, &server, &config)?;
    let sources = match own {
        Some(own) => own,
        None => open_sources(options)?,
    };
    let samples = |max_samples| DataOptions { max_samples, ..options.data.clone() };
    let of_train = samples(options.sources.max_train_samples);
    let data = DataSet::load(&sources.train, &of_train, &tokenizer)?;
    fit::vocabulary(data.highest_id(), &tokenizer, &config)?;
    let eval = if sources.eval.is_empty() {
        None
    } else {
        let of_eval = samples(options.sources.max_eval_samples);
        let eval = DataSet::load(&sources.eval, &of_eval, &tokenizer)?;
        fit::vocabulary(eval.highest_id(), &tokenizer, &config)?;
        Some(eval)
    };

    if eval.is_none() {
        options.refuse_without_evaluation()?;
    }
    options.loss.check_data([Some(&data), eval.as_ref()])?;

    let plan = PlanOptions {
        size: options.steps.microbatch_size(),
        gradient_accumulation_steps: options.steps.gradient_accumulation_steps,
        server_max_tokens: server.limits.max_tokens_per_microbatch as usize,
        seed: options.seed,
    };
    let plan = Plan::new(&data, plan)?;
    let n_steps = options.steps.max_steps.unwrap_or_else(|| plan.n_steps(options.steps.num_epochs));
    let schedule = schedule(&options.optimizer, n_steps);
    let lora = resolve_targets(origin.lora(&options.lora), &server, &config);
    let settings = settings(options, &server, fingerprint, lora, &data, n_steps, &schedule);
    let s1 = server.split_point_1 as usize;
    let mut split = SplitModel::load(
        &checkpoint,
        &config,
        &SplitOptions {
            split: SplitPoints::new(s1, server.split_point_2 as usize, config.n_layers)?,
            lora: settings.lora.clone(),
            adamw: options.optimizer.adamw.clone(),
            seed: options.seed,
            kind: options.compute.kind,
            checkpointing: options.compute.checkpointing,
            devices: options.compute.devices.clone(),
        },
    )?;
    if let Origin::Adapter { adapter, .. } = &origin {
        split.load_adapter(&adapter.tensors)?;
    }
    let noise_key = Some(noise::of_run(&options.privacy, origin.checkpoint())?);
    let privacy = PrivacyOptions { noise_key, ..options.privacy.clone() };
    split.perturb(&privacy)?;
    let losses = Losses::new(&options.loss);
    Ok(Prepared {
        client,
        server,
        config,
        settings,
        tokenizer,
        end_ids,
        data,
        eval,
        plan,
        schedule,
        split,
        privacy,
        losses,
        origin,
    })
}

/// Finds or fetches what the options name.
fn open_sources(options: &TrainOptions) -> Result<Sources, TrainError> {
    let mut spec = DataSpec { seed: options.seed, ..options.sources.clone() };
    spec.columns.preferences = options.loss.wants_pairs();
    spec.open()
}

/// A fresh session as the settings say, with the adapter that the run begins with, if there is one.
pub(crate) async fn open(
    options: &TrainOptions,
    prepared: &Prepared,
) -> Result<Session, TrainError> {
    let Prepared { client, settings, config, origin, .. } = prepared;
    let initial_adapter = match origin {
        Origin::Adapter { adapter, .. } => {
            let (s1, s2) = (settings.split_point_1, settings.split_point_2);
            adapter.trunk(SplitPoints::new(s1, s2, config.n_layers)?)
        }
        Origin::Seed | Origin::Checkpoint(_) => Vec::new(),
    };
    let adamw = &options.optimizer.adamw;
    let session = client.open(OpenSession {
        name: options.model.session_name.clone(),
        fingerprint: settings.fingerprint.clone(),
        split_point_1: settings.split_point_1 as u32,
        split_point_2: settings.split_point_2 as u32,
        lora: lora_config(&settings.lora),
        adamw: AdamWConfig {
            beta1: adamw.beta1,
            beta2: adamw.beta2,
            eps: adamw.eps,
            weight_decay: adamw.weight_decay,
        },
        seed: options.seed,
        wire_dtype: options.compute.wire_dtype,
        initial_adapter,
    });
    Ok(session.await?)
}

fn check_lengths(
    options: &TrainOptions,
    server: &ServerDescription,
    config: &ModelConfig,
) -> Result<(), TrainError> {
    let length = options.data.max_seq_length;
    let wrong = |problem| {
        Err(TrainError::Option { option: "max-seq-length", value: length.to_string(), problem })
    };
    let limit = server.limits.max_tokens_per_microbatch as usize;
    if length > limit {
        return wrong(format!(
            "the server takes at most {limit} tokens at once; lower it, or raise the server's limits.max_tokens_per_microbatch or the tenant's quota tokens_per_microbatch"
        ));
    }
    if length > config.max_positions {
        if config.rope.is_none() {
            return wrong(format!("this model has {} learned positions", config.max_positions));
        }
        tracing::warn!(
            length,
            "sequences are longer than the {} of the model",
            config.max_positions
        );
    }
    Ok(())
}

fn schedule(options: &OptimizerOptions, n_steps: u64) -> Schedule {
    Schedule {
        scheduler: options.scheduler,
        base: options.learning_rate,
        lowest: options.min_learning_rate,
        n_warmup: options.warmup.n_steps(n_steps),
        n_steps,
    }
}

fn resolve_targets(
    mut lora: LoraSpec,
    server: &ServerDescription,
    config: &ModelConfig,
) -> LoraSpec {
    if lora.target_modules.is_empty() {
        lora.target_modules = server.default_target_modules.clone();
    }
    // PEFT knows "all-linear" as a word of its own only, not in a list of modules.
    if lora.target_modules.is_empty() || lora.target_modules.iter().any(|t| t == "all-linear") {
        lora.target_modules = config.default_targets();
    }
    lora
}

fn settings(
    options: &TrainOptions,
    server: &ServerDescription,
    fingerprint: String,
    lora: LoraSpec,
    data: &DataSet,
    n_steps: u64,
    schedule: &Schedule,
) -> RunSettings {
    RunSettings {
        model_name: options.model.name.clone(),
        fingerprint,
        split_point_1: server.split_point_1 as usize,
        split_point_2: server.split_point_2 as usize,
        lora,
        seed: options.seed,
        data_fingerprint: data.fingerprint(),
        batch_size: options.steps.most_samples().unwrap_or_default(),
        max_tokens_per_batch: options.steps.max_tokens_per_batch,
        gradient_accumulation_steps: options.steps.gradient_accumulation_steps,
        microbatches_in_flight: options.steps.microbatches_in_flight,
        n_steps,
        learning_rate: options.optimizer.learning_rate,
        weight_decay: options.optimizer.adamw.weight_decay,
        min_learning_rate: options.optimizer.min_learning_rate,
        lr_scheduler: options.optimizer.scheduler,
        warmup_steps: schedule.n_warmup,
        max_grad_norm: options.optimizer.max_grad_norm,
        dtype: match options.compute.kind {
            Kind::Float => "f32".into(),
            Kind::BFloat16 => "bf16".into(),
            other => format!("{other:?}"),
        },
        wire_dtype: options.compute.wire_dtype.name().into(),
        loss: options.loss.to_string(),
        hidden_clip_norm: options.privacy.hidden.clip_norm,
        hidden_noise: options.privacy.hidden.noise,
        gradient_clip_norm: options.privacy.gradients.clip_norm,
        gradient_noise: options.privacy.gradients.noise,
    }
}
