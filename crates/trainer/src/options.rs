use crate::TrainError;
use crate::data::DataOptions;
use crate::sample::SampleOptions;
use offshoot_adapters::{AdamW, LoraSpec};
use offshoot_client::{ClientOptions, WireDType};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tch::{Device, Kind};

/// A training run, as `offshoot train` is asked for it.
#[derive(Clone, Debug)]
pub struct TrainOptions {
    /// Path or hub name.
    pub model_name: String,
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
    /// Without `target_modules`: the server's default ones.
    pub lora: LoraSpec,
    /// Optimizer.
    pub adamw: AdamW,
    /// Files and folders to train on.
    pub train_files: Vec<PathBuf>,
    /// Files and folders to evaluate on; may be empty.
    pub eval_files: Vec<PathBuf>,
    /// How they become samples. `max_samples` is for training only.
    pub data: DataOptions,
    /// Sequences in a microbatch.
    pub batch_size: usize,
    /// Microbatches in a step.
    pub gradient_accumulation_steps: usize,
    /// Microbatches of a step that may be on their way at once; bounded by the server's limits.
    pub microbatches_in_flight: usize,
    /// Highest learning rate.
    pub learning_rate: f64,
    /// Steps of rising learning rate; at most a tenth of the run.
    pub warmup_steps: u64,
    /// Limit of the norm of all gradients; 0: none.
    pub max_grad_norm: f64,
    /// Times that all samples are seen.
    pub num_epochs: u64,
    /// Ends the run earlier or later than `num_epochs`.
    pub max_steps: Option<u64>,
    /// Checkpoints, metrics and the adapter go there.
    pub output_dir: PathBuf,
    /// Steps between checkpoints.
    pub save_interval: u64,
    /// Steps between lines.
    pub log_interval: u64,
    /// Steps between evaluations.
    pub eval_interval: u64,
    /// Of the client's layers.
    pub device: Device,
    /// dtype of the client's layers.
    pub kind: Kind,
    /// dtype of hidden states and gradients between the two sides.
    pub wire_dtype: WireDType,
    /// Of initial values, dropout, data order and samples.
    pub seed: u64,
    /// `latest`, or a checkpoint's path.
    pub resume: Option<String>,
    /// Texts that the model goes on from, before and after training.
    pub sample_prompts: Vec<String>,
    /// How it goes on.
    pub sample: SampleOptions,
}

impl TrainOptions {
    /// A run with the defaults of `offshoot train`: what is left to say is where.
    pub fn new(model_name: &str, server: &str, train_file: PathBuf, output_dir: PathBuf) -> Self {
        TrainOptions {
            model_name: model_name.into(),
            model_type: None,
            split_point_1: None,
            split_point_2: None,
            server: server.into(),
            client: ClientOptions::default(),
            session_name: String::new(),
            lora: LoraSpec { lora_dropout: 0.1, ..LoraSpec::default() },
            adamw: AdamW::default(),
            train_files: vec![train_file],
            eval_files: Vec::new(),
            data: DataOptions {
                max_seq_length: 512,
                max_samples: None,
                prompt_format: Default::default(),
            },
            batch_size: 4,
            gradient_accumulation_steps: 1,
            microbatches_in_flight: 2,
            learning_rate: 1e-4,
            warmup_steps: 100,
            max_grad_norm: 1.0,
            num_epochs: 3,
            max_steps: None,
            output_dir,
            save_interval: 500,
            log_interval: 10,
            eval_interval: 100,
            device: Device::Cpu,
            kind: Kind::Float,
            wire_dtype: WireDType::Bf16,
            seed: 42,
            resume: None,
            sample_prompts: Vec::new(),
            sample: SampleOptions { n_tokens: 40, temperature: 0.0, top_k: 50, seed: 42 },
        }
    }

    /// The first option that no run can have.
    pub fn validate(&self) -> Result<(), TrainError> {
        let wrong = |option, value: String, problem: &str| {
            Err(TrainError::Option { option, value, problem: problem.into() })
        };
        for (option, value) in [
            ("batch-size", self.batch_size as u64),
            ("gradient-accumulation-steps", self.gradient_accumulation_steps as u64),
            ("microbatches-in-flight", self.microbatches_in_flight as u64),
            ("save-interval", self.save_interval),
            ("log-interval", self.log_interval),
            ("eval-interval", self.eval_interval),
            ("num-epochs", self.num_epochs),
            ("max-steps", self.max_steps.unwrap_or(1)),
            ("max-train-samples", self.data.max_samples.unwrap_or(1) as u64),
        ] {
            if value == 0 {
                return wrong(option, "0".into(), "expected at least 1");
            }
        }
        if self.data.max_seq_length < 2 {
            let value = self.data.max_seq_length.to_string();
            return wrong(
                "max-seq-length",
                value,
                "expected at least 2: one token to predict another from",
            );
        }
        if !(self.learning_rate.is_finite() && self.learning_rate > 0.0) {
            return wrong(
                "learning-rate",
                self.learning_rate.to_string(),
                "expected a positive number such as 1e-4",
            );
        }
        if !(self.max_grad_norm.is_finite() && self.max_grad_norm >= 0.0) {
            return wrong(
                "max-grad-norm",
                self.max_grad_norm.to_string(),
                "expected a positive number, or 0 for no clipping",
            );
        }
        if self.train_files.is_empty() {
            return wrong("train-file", "(none)".into(), "expected at least one file or folder");
        }
        self.lora.validate()?;
        Ok(self.adamw.validate()?)
    }
}

/// Asks a run to save and end after the step that it is in. Clones ask the same run.
#[derive(Clone, Debug, Default)]
pub struct CancelToken(Arc<AtomicBool>);

impl CancelToken {
    /// Asks.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether it was asked.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}
