mod validate;

use crate::data::source::DataSpec;
use crate::data::{DataOptions, MicrobatchSize};
use crate::generate::{GenerateOptions, Sampling};
pub use crate::loss::LossOptions;
use crate::noise::PrivacyOptions;
use crate::schedule::{Scheduler, Warmup};
pub use crate::split::Checkpointing;
use offshoot_adapters::{AdamW, LoraSpec};
use offshoot_client::{ClientOptions, Retry, WireDType};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tch::{Device, Kind};
use tokio::sync::watch;

/// How long a run waits for its server: longer than other commands, since it may be a night's work.
pub const TRAINING_RETRY: Retry = Retry { max_elapsed: Duration::from_secs(600), ..Retry::DEFAULT };

/// A training run, as `offshoot train` is asked for it: one struct for each group of its options.
#[derive(Clone, Debug)]
pub struct TrainOptions {
    /// Which model, and which server holds its trunk.
    pub model: ModelOptions,
    /// Where the texts are. Its `seed` and `columns.preferences` follow the run's seed and loss.
    pub sources: DataSpec,
    /// How they become samples. Its `max_samples` follows `sources`.
    pub data: DataOptions,
    /// The adapter.
    pub lora: LoraOptions,
    /// What a step takes, and how many steps there are.
    pub steps: StepOptions,
    /// Optimizer and learning rate.
    pub optimizer: OptimizerOptions,
    /// What is minimised.
    pub loss: LossOptions,
    /// When the evaluation data are looked at, and what follows from it.
    pub evaluation: EvaluationOptions,
    /// What is written, and from where a run goes on.
    pub output: OutputOptions,
    /// Where and in which types is computed.
    pub compute: ComputeOptions,
    /// Texts that the model goes on from, before and after training.
    pub samples: SampleTexts,
    /// What is done to hidden states and gradients before they are sent.
    pub privacy: PrivacyOptions,
    /// Of initial values, dropout, data order and samples.
    pub seed: u64,
}

/// Which model, and which server holds its trunk.
#[derive(Clone, Debug)]
pub struct ModelOptions {
    /// Path or hub name.
    pub name: String,
    /// Checked against the model's own, if given.
    pub model_type: Option<String>,
    /// Checked against the server's, if given.
    pub split_point_1: Option<usize>,
    /// Checked against the server's, if given.
    pub split_point_2: Option<usize>,
    /// `host:port` or `http://host:port`.
    pub server: String,
    /// How the server is reached.
    pub client: ClientOptions,
    /// For lists and logs of the server.
    pub session_name: String,
}

/// The adapter.
#[derive(Clone, Debug, Default)]
pub struct LoraOptions {
    /// Begins with this adapter: a PEFT directory, a checkpoint or a run. What is None, or empty,
    /// below is as it has it; else as the checkpoint that is resumed has it; else the usual.
    pub init_adapter: Option<PathBuf>,
    /// Rank.
    pub r: Option<usize>,
    /// The adapter counts alpha / r times.
    pub lora_alpha: Option<f64>,
    /// Chance that an input of an adapter is left out in training.
    pub lora_dropout: Option<f64>,
    /// Whether it counts alpha / sqrt(r) times.
    pub use_rslora: Option<bool>,
    /// Linear layers that carry LoRA. Usual are the server's default ones.
    pub target_modules: Vec<String>,
}

/// Without a number of samples or tokens.
const DEFAULT_BATCH_SIZE: usize = 4;

/// What a step takes, and how many steps there are.
#[derive(Clone, Debug)]
pub struct StepOptions {
    /// Most samples in a microbatch (pairs, for preferences). None: 4, or with
    /// `max_tokens_per_batch` as many as fit.
    pub batch_size: Option<usize>,
    /// Tokens of a microbatch: as many samples as fit share it.
    pub max_tokens_per_batch: Option<usize>,
    /// Microbatches in a step.
    pub gradient_accumulation_steps: usize,
    /// Microbatches of a step that may be on their way at once; bounded by the server's limits.
    pub microbatches_in_flight: usize,
    /// Times that all samples are seen.
    pub num_epochs: u64,
    /// Ends the run earlier or later than `num_epochs`.
    pub max_steps: Option<u64>,
}

/// Optimizer and learning rate.
#[derive(Clone, Debug)]
pub struct OptimizerOptions {
    /// Of all three parts.
    pub adamw: AdamW,
    /// Highest learning rate.
    pub learning_rate: f64,
    /// How it goes after the warm-up.
    pub scheduler: Scheduler,
    /// Where a falling rate ends.
    pub min_learning_rate: f64,
    /// How long it rises.
    pub warmup: Warmup,
    /// Limit of the norm of all gradients; 0: none.
    pub max_grad_norm: f64,
}

/// When the evaluation data are looked at, and what follows from it.
#[derive(Clone, Debug)]
pub struct EvaluationOptions {
    /// Steps between evaluations.
    pub interval: u64,
    /// After so many evaluations in a row without improvement the run ends.
    pub patience: Option<usize>,
    /// By how much the loss must fall for an improvement.
    pub threshold: f64,
}

/// What is written, and from where a run goes on.
#[derive(Clone, Debug)]
pub struct OutputOptions {
    /// Checkpoints, metrics and the adapter go there.
    pub dir: PathBuf,
    /// Steps between checkpoints.
    pub save_interval: u64,
    /// Steps between lines.
    pub log_interval: u64,
    /// Whether no lines for people are printed.
    pub quiet: bool,
    /// Whether TensorBoard's event files are written, to the folder `tensorboard`.
    pub tensorboard: bool,
    /// Whether the server is told each step's loss, for its operator's and the tenant's own eyes.
    pub share_loss: bool,
    /// Newest checkpoints that stay, beside the best one.
    pub keep_last: usize,
    /// Which step's adapter is exported at the end.
    pub adapter: AdapterChoice,
    /// `latest`, `best`, or a checkpoint's path.
    pub resume: Option<String>,
    /// Stored as `config.toml`, so that others can see and repeat the run.
    pub config: Option<String>,
}

/// Which step's adapter a run exports at its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AdapterChoice {
    /// The one with the lowest evaluation loss. Each evaluation that is the best so far is followed
    /// by a checkpoint.
    Best,
    /// The last step's.
    Last,
}

/// Where and in which types is computed.
#[derive(Clone, Debug)]
pub struct ComputeOptions {
    /// Whether the client's layers are computed again in the backward, to save memory.
    pub checkpointing: Checkpointing,
    /// Of the client's layers: a copy on each. The first one leads; microbatches of a step are dealt
    /// to all.
    pub devices: Vec<Device>,
    /// dtype of the client's layers.
    pub kind: Kind,
    /// dtype of hidden states and gradients between the two sides.
    pub wire_dtype: WireDType,
}

/// Texts that the model goes on from, before and after training.
#[derive(Clone, Debug)]
pub struct SampleTexts {
    /// What they begin with.
    pub prompts: Vec<String>,
    /// How the model goes on.
    pub options: GenerateOptions,
}

impl LoraOptions {
    /// What an adapter is where nothing else is asked for.
    pub(crate) fn usual() -> LoraSpec {
        LoraSpec { lora_dropout: 0.1, ..LoraSpec::default() }
    }

    /// What is asked for, and for the rest `base`.
    pub(crate) fn over(&self, base: &LoraSpec) -> LoraSpec {
        let targets = &self.target_modules;
        LoraSpec {
            r: self.r.unwrap_or(base.r),
            lora_alpha: self.lora_alpha.unwrap_or(base.lora_alpha),
            lora_dropout: self.lora_dropout.unwrap_or(base.lora_dropout),
            use_rslora: self.use_rslora.unwrap_or(base.use_rslora),
            target_modules: if targets.is_empty() { &base.target_modules } else { targets }.clone(),
        }
    }
}

impl Default for StepOptions {
    fn default() -> Self {
        StepOptions {
            batch_size: None,
            max_tokens_per_batch: None,
            gradient_accumulation_steps: 1,
            microbatches_in_flight: 2,
            num_epochs: 3,
            max_steps: None,
        }
    }
}

impl Default for OptimizerOptions {
    fn default() -> Self {
        OptimizerOptions {
            adamw: AdamW::default(),
            learning_rate: 1e-4,
            scheduler: Scheduler::Cosine,
            min_learning_rate: 0.0,
            warmup: Warmup::Steps(100),
            max_grad_norm: 1.0,
        }
    }
}

impl Default for EvaluationOptions {
    fn default() -> Self {
        EvaluationOptions { interval: 100, patience: None, threshold: 0.0 }
    }
}

impl Default for ComputeOptions {
    fn default() -> Self {
        let (devices, checkpointing) = (vec![Device::Cpu], Checkpointing::Auto);
        ComputeOptions { devices, checkpointing, kind: Kind::Float, wire_dtype: WireDType::Bf16 }
    }
}

impl OutputOptions {
    /// Into this folder, with the usual intervals.
    pub fn new(dir: PathBuf) -> Self {
        OutputOptions {
            dir,
            save_interval: 500,
            log_interval: 10,
            quiet: false,
            tensorboard: true,
            share_loss: false,
            keep_last: 5,
            adapter: AdapterChoice::Last,
            resume: None,
            config: None,
        }
    }
}

impl TrainOptions {
    /// A run with the defaults of `offshoot train`: what is left to say is where.
    pub fn new(model_name: &str, server: &str, train_file: PathBuf, output_dir: PathBuf) -> Self {
        TrainOptions {
            model: ModelOptions {
                name: model_name.into(),
                model_type: None,
                split_point_1: None,
                split_point_2: None,
                server: server.into(),
                client: ClientOptions { retry: TRAINING_RETRY, ..ClientOptions::default() },
                session_name: String::new(),
            },
            sources: DataSpec::files(vec![train_file]),
            data: DataOptions::default(),
            lora: LoraOptions::default(),
            steps: StepOptions::default(),
            optimizer: OptimizerOptions::default(),
            loss: LossOptions::default(),
            evaluation: EvaluationOptions::default(),
            output: OutputOptions::new(output_dir),
            compute: ComputeOptions::default(),
            samples: SampleTexts {
                prompts: Vec::new(),
                options: GenerateOptions {
                    max_new_tokens: 40,
                    sampling: Sampling { temperature: 0.0, top_p: 1.0, ..Sampling::default() },
                    ..GenerateOptions::default()
                },
            },
            privacy: PrivacyOptions::default(),
            seed: 42,
        }
    }

    /// Microbatches of a step that may be on their way at once: one for each device at least.
    pub(crate) fn most_in_flight(&self) -> usize {
        self.steps.microbatches_in_flight.max(self.compute.devices.len())
    }
}

impl StepOptions {
    /// What ends a microbatch.
    pub fn microbatch_size(&self) -> MicrobatchSize {
        match self.max_tokens_per_batch {
            None => MicrobatchSize::Samples(self.batch_size.unwrap_or(DEFAULT_BATCH_SIZE)),
            Some(max_tokens) => MicrobatchSize::Tokens { max_tokens, max_samples: self.batch_size },
        }
    }

    /// Most samples of a microbatch, if anything limits them but tokens.
    pub(crate) fn most_samples(&self) -> Option<usize> {
        match self.microbatch_size() {
            MicrobatchSize::Samples(n) => Some(n),
            MicrobatchSize::Tokens { max_samples, .. } => max_samples,
        }
    }
}

/// Asks a run to save and end after the step that it is in; at once, while the server is away. Clones
/// ask the same run.
#[derive(Clone, Debug, Default)]
pub struct CancelToken(Arc<watch::Sender<bool>>);

impl CancelToken {
    /// Asks.
    pub fn cancel(&self) {
        self.0.send_replace(true);
    }

    /// Whether it was asked.
    pub fn is_cancelled(&self) -> bool {
        *self.0.borrow()
    }

    /// Returns once it was asked.
    pub(crate) async fn cancelled(&self) {
        // The sender is in here.
        let _ = self.0.subscribe().wait_for(|asked| *asked).await;
    }
}
