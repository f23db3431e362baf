use clap::{Args, ValueEnum};
use offshoot_adapters::AdamW;
use offshoot_trainer::options::{OptimizerOptions, StepOptions};
use offshoot_trainer::{Scheduler, Warmup};

#[derive(Args)]
#[command(next_help_heading = "Training")]
pub struct TrainingArgs {
    /// Samples (pairs, for preferences) in a microbatch [default: 4; with --max-tokens-per-batch as
    /// many as fit].
    #[arg(long, value_name = "N")]
    batch_size: Option<usize>,
    /// Fill each microbatch with as many samples as fit into so many tokens, instead of a fixed number
    /// of samples; nothing is padded. At least the longest sample. With --batch-size, no more than so
    /// many samples.
    #[arg(long, value_name = "TOKENS")]
    max_tokens_per_batch: Option<usize>,
    /// Microbatches in an optimizer step; the loss is the mean over all predicted tokens of them.
    #[arg(long, value_name = "N", default_value_t = 1)]
    gradient_accumulation_steps: usize,
    /// Microbatches of a step, or of an evaluation, on their way at once: while the server has one,
    /// this side computes for another. Each in flight costs memory on both sides, and none changes
    /// what is learned. A step of one microbatch gains nothing: half the --batch-size with twice
    /// the --gradient-accumulation-steps takes the same samples into a step.
    #[arg(long, value_name = "N", default_value_t = 2)]
    microbatches_in_flight: usize,
    /// Highest learning rate; it rises linearly during the warm-up, then --lr-scheduler takes over.
    #[arg(
        long,
        alias = "lr",
        value_name = "LR",
        default_value_t = 1e-4,
        allow_negative_numbers = true
    )]
    learning_rate: f64,
    /// How the learning rate goes after the warm-up.
    #[arg(long, value_enum, default_value_t = LrScheduler::Cosine)]
    lr_scheduler: LrScheduler,
    /// Where a falling learning rate ends.
    #[arg(long, value_name = "LR", default_value_t = 0.0, allow_negative_numbers = true)]
    min_learning_rate: f64,
    /// Decoupled weight decay of AdamW.
    #[arg(long, value_name = "X", default_value_t = 0.01, allow_negative_numbers = true)]
    weight_decay: f64,
    /// Steps of warm-up; at most a tenth of the run.
    #[arg(long, value_name = "STEPS", default_value_t = 100)]
    warmup_steps: u64,
    /// Warm-up as a share of all steps, such as 0.03, instead of --warmup-steps.
    #[arg(
        long,
        value_name = "SHARE",
        conflicts_with = "warmup_steps",
        allow_negative_numbers = true
    )]
    warmup_ratio: Option<f64>,
    /// Gradients of the whole model, trunk included, are scaled down to this norm; 0 for never.
    #[arg(long, value_name = "NORM", default_value_t = 1.0, allow_negative_numbers = true)]
    max_grad_norm: f64,
    /// How often all samples are seen.
    #[arg(long, value_name = "N", default_value_t = 3)]
    num_epochs: u64,
    /// Optimizer steps of the run, instead of --num-epochs.
    #[arg(long, value_name = "STEPS")]
    max_steps: Option<u64>,
    /// Seed of initial values, dropout, the order of the samples, and sample texts.
    #[arg(long, value_name = "N", default_value_t = 42)]
    pub seed: u64,
}

#[derive(Clone, Copy, ValueEnum)]
enum LrScheduler {
    /// it stays
    Constant,
    /// it falls by the same amount in each step
    Linear,
    /// it falls along half a cosine
    Cosine,
}

impl TrainingArgs {
    /// What a step takes, and how many there are.
    pub fn steps(&self) -> StepOptions {
        StepOptions {
            batch_size: self.batch_size,
            max_tokens_per_batch: self.max_tokens_per_batch,
            gradient_accumulation_steps: self.gradient_accumulation_steps,
            microbatches_in_flight: self.microbatches_in_flight,
            num_epochs: self.num_epochs,
            max_steps: self.max_steps,
        }
    }

    /// Optimizer and learning rate.
    pub fn optimizer(&self) -> OptimizerOptions {
        OptimizerOptions {
            adamw: AdamW { weight_decay: self.weight_decay, ..AdamW::default() },
            learning_rate: self.learning_rate,
            scheduler: match self.lr_scheduler {
                LrScheduler::Constant => Scheduler::Constant,
                LrScheduler::Linear => Scheduler::Linear,
                LrScheduler::Cosine => Scheduler::Cosine,
            },
            min_learning_rate: self.min_learning_rate,
            warmup: self.warmup_ratio.map_or(Warmup::Steps(self.warmup_steps), Warmup::Ratio),
            max_grad_norm: self.max_grad_norm,
        }
    }
}
