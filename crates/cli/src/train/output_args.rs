use clap::Args;
use offshoot_trainer::options::{EvaluationOptions, OutputOptions, SampleTexts};
use offshoot_trainer::sample::SampleOptions;
use std::path::PathBuf;

#[derive(Args)]
#[command(next_help_heading = "Output")]
pub struct OutputArgs {
    /// Where checkpoints, metrics.jsonl and adapter/ go.
    #[arg(long, value_name = "DIR", default_value = "./checkpoints")]
    pub output_dir: PathBuf,
    /// Steps between checkpoints. The last five stay, and the best by evaluation loss.
    #[arg(long, value_name = "STEPS", default_value_t = 500)]
    save_interval: u64,
    /// Steps between lines; metrics.jsonl has every step.
    #[arg(long, value_name = "STEPS", default_value_t = 10)]
    log_interval: u64,
    /// Steps between evaluations; also before the first step and after the last.
    #[arg(long, value_name = "STEPS", default_value_t = 100)]
    eval_interval: u64,
    /// Go on from `latest` in the output directory, or from a checkpoint's path.
    #[arg(long, value_name = "latest|PATH")]
    resume: Option<String>,
    /// Text that the model goes on from before and after training; may be repeated.
    #[arg(long, value_name = "TEXT")]
    sample_prompt: Vec<String>,
    /// Most tokens of such a sample.
    #[arg(long, value_name = "N", default_value_t = 40)]
    sample_tokens: usize,
    /// 0 takes the likeliest token each time; higher draws more freely, from the 50 likeliest.
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    sample_temperature: f64,
}

impl OutputArgs {
    /// When the evaluation data are looked at.
    pub fn evaluation(&self) -> EvaluationOptions {
        EvaluationOptions { interval: self.eval_interval }
    }

    /// Texts before and after training, drawn with this seed.
    pub fn samples(&self, seed: u64) -> SampleTexts {
        SampleTexts {
            prompts: self.sample_prompt.clone(),
            options: SampleOptions {
                n_tokens: self.sample_tokens,
                temperature: self.sample_temperature,
                top_k: 50,
                seed,
            },
        }
    }

    /// What is written, and from where the run goes on.
    pub fn into_options(self) -> OutputOptions {
        OutputOptions {
            dir: self.output_dir,
            save_interval: self.save_interval,
            log_interval: self.log_interval,
            resume: self.resume,
        }
    }
}
