use crate::TrainError;
use crate::checkpoint::RunSettings;
use crate::data::{DataOptions, DataSet, Order};
use crate::fit;
use crate::loss::Losses;
use crate::options::{OptimizerOptions, TrainOptions};
use crate::schedule::Schedule;
use crate::split::{SplitModel, SplitOptions};
use crate::tokenizer::Tokenizer;
use offshoot_adapters::LoraSpec;
use offshoot_client::{AdamWConfig, Client, LoraConfig, OpenSession, ServerDescription, Session};
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
    pub data: DataSet,
    pub eval: Option<DataSet>,
    pub order: Order,
    pub schedule: Schedule,
    pub split: SplitModel,
    pub losses: Losses,
}

/// Connects, checks that both sides hold one model, reads the data and loads bottom and top. The
/// cheap checks come first.
pub(crate) async fn prepare(options: &TrainOptions) -> Result<Prepared, TrainError> {
    options.validate()?;
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

    let tokenizer = Tokenizer::load(&checkpoint)?;
    check_lengths(options, &server, &config)?;
    let data = DataSet::load(&options.sources.train_files, &options.data, &tokenizer)?;
    fit::vocabulary(highest_id(&data), &tokenizer, &config)?;
    let eval = if options.sources.eval_files.is_empty() {
        None
    } else {
        let of_eval = DataOptions { max_samples: None, ..options.data.clone() };
        let eval = DataSet::load(&options.sources.eval_files, &of_eval, &tokenizer)?;
        fit::vocabulary(highest_id(&eval), &tokenizer, &config)?;
        Some(eval)
    };

    let per_step = options.steps.batch_size * options.steps.gradient_accumulation_steps;
    let order = Order::new(data.samples.len(), per_step, options.seed);
    let n_steps =
        options.steps.max_steps.unwrap_or(options.steps.num_epochs * order.steps_per_epoch());
    let schedule = schedule(&options.optimizer, n_steps);
    let lora = resolve_targets(&options.lora.spec, &server, &config);
    let settings = settings(options, &server, fingerprint, lora, &data, n_steps, &schedule);
    let s1 = server.split_point_1 as usize;
    let split = SplitModel::load(
        &checkpoint,
        &config,
        &SplitOptions {
            split: SplitPoints::new(s1, server.split_point_2 as usize, config.n_layers)?,
            lora: settings.lora.clone(),
            adamw: options.optimizer.adamw.clone(),
            seed: options.seed,
            kind: options.compute.kind,
            devices: options.compute.devices.clone(),
        },
    )?;
    let losses = Losses::new(&options.loss);
    Ok(Prepared {
        client,
        server,
        config,
        settings,
        tokenizer,
        data,
        eval,
        order,
        schedule,
        split,
        losses,
    })
}

/// A fresh session as the settings say.
pub(crate) async fn open(
    client: &Client,
    options: &TrainOptions,
    settings: &RunSettings,
) -> Result<Session, TrainError> {
    let LoraSpec { r, lora_alpha, lora_dropout, use_rslora, target_modules } =
        settings.lora.clone();
    let adamw = &options.optimizer.adamw;
    let session = client.open(OpenSession {
        name: options.model.session_name.clone(),
        fingerprint: settings.fingerprint.clone(),
        split_point_1: settings.split_point_1 as u32,
        split_point_2: settings.split_point_2 as u32,
        lora: LoraConfig { r: r as u32, lora_alpha, lora_dropout, use_rslora, target_modules },
        adamw: AdamWConfig {
            beta1: adamw.beta1,
            beta2: adamw.beta2,
            eps: adamw.eps,
            weight_decay: adamw.weight_decay,
        },
        seed: options.seed,
        wire_dtype: options.compute.wire_dtype,
        initial_adapter: Vec::new(),
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
            "the server takes at most {limit} tokens at once; lower it, or raise the server's limits.max_tokens_per_microbatch"
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

fn highest_id(data: &DataSet) -> i64 {
    data.samples.iter().flat_map(|s| &s.ids).max().copied().unwrap_or_default()
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

fn resolve_targets(lora: &LoraSpec, server: &ServerDescription, config: &ModelConfig) -> LoraSpec {
    let mut lora = lora.clone();
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
        batch_size: options.steps.batch_size,
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
    }
}
