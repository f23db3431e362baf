use clap::Args;
use offshoot_adapters::AdamW;
use offshoot_trainer::options::{LossOptions, OptimizerOptions, StepOptions};

#[derive(Args)]
#[command(next_help_heading = "Training")]
pub struct TrainingArgs {
    /// Samples in a microbatch.
    #[arg(long, value_name = "N", default_value_t = 4)]
    batch_size: usize,
    /// Microbatches in an optimizer step; the loss is the mean over all predicted tokens of them.
    #[arg(long, value_name = "N", default_value_t = 1)]
    gradient_accumulation_steps: usize,
    /// Microbatches of a step, or of an evaluation, on their way at once: while the server has one,
    /// this side computes for another. Each in flight costs memory on both sides, and none changes
    /// what is learned. A step of one microbatch gains nothing: half the --batch-size with twice
    /// the --gradient-accumulation-steps takes the same samples into a step.
    #[arg(long, value_name = "N", default_value_t = 2)]
    microbatches_in_flight: usize,
    /// Highest learning rate; it rises linearly during the warm-up and then falls to 0 as a cosine.
    #[arg(long, value_name = "LR", default_value_t = 1e-4)]
    learning_rate: f64,
    /// Decoupled weight decay of AdamW.
    #[arg(long, value_name = "X", default_value_t = 0.01)]
    weight_decay: f64,
    /// Steps of warm-up; at most a tenth of the run.
    #[arg(long, value_name = "STEPS", default_value_t = 100)]
    warmup_steps: u64,
    /// Gradients of the whole model, trunk included, are scaled down to this norm; 0 for never.
    #[arg(long, value_name = "NORM", default_value_t = 1.0)]
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

impl TrainingArgs {
    /// What a step takes, and how many there are.
    pub fn steps(&self) -> StepOptions {
        StepOptions {
            batch_size: self.batch_size,
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
            warmup_steps: self.warmup_steps,
            max_grad_norm: self.max_grad_norm,
        }
    }

    /// What is minimised.
    pub fn loss(&self) -> LossOptions {
        LossOptions {}
    }
}
