use clap::{Args, ValueEnum};
use offshoot_trainer::generate::{GenerateOptions, Sampling};
use offshoot_trainer::options::{AdapterChoice, EvaluationOptions, OutputOptions, SampleTexts};
use std::path::PathBuf;

#[derive(Args)]
#[command(next_help_heading = "Output")]
pub struct OutputArgs {
    /// Where checkpoints, metrics.jsonl and adapter/ go.
    #[arg(long, value_name = "DIR", default_value = "./checkpoints")]
    pub output_dir: PathBuf,
    /// Steps between checkpoints.
    #[arg(long, value_name = "STEPS", default_value_t = 500)]
    save_interval: u64,
    /// So many of the newest checkpoints stay, and the best by evaluation loss.
    #[arg(long, value_name = "N", default_value_t = 5)]
    keep_last: usize,
    /// Steps between lines; metrics.jsonl has every step.
    #[arg(long, value_name = "STEPS", default_value_t = 10)]
    log_interval: u64,
    /// Print nothing; metrics.jsonl has all of it.
    #[arg(long)]
    quiet: bool,
    /// Write no event files for TensorBoard; else they are in tensorboard/ in the output directory.
    #[arg(long)]
    no_tensorboard: bool,
    /// Tell the server each step's training loss, so that its operator and your team see it in the
    /// console and in offshoot top. Without it the server never learns of any loss.
    #[arg(long)]
    share_loss: bool,
    /// Steps between evaluations; also before the first step and after the last.
    #[arg(long, value_name = "STEPS", default_value_t = 100)]
    eval_interval: u64,
    /// The run ends after so many evaluations in a row without improvement.
    #[arg(long, value_name = "N")]
    early_stopping_patience: Option<usize>,
    /// By how much the evaluation loss must fall below the last one that counted, to count.
    #[arg(long, value_name = "LOSS", default_value_t = 0.0, allow_negative_numbers = true)]
    early_stopping_threshold: f64,
    /// Which step's adapter is exported at the end. With `best` each evaluation that is the best so
    /// far is followed by a checkpoint [default: best with --early-stopping-patience, else last].
    #[arg(long, value_enum)]
    adapter: Option<Adapter>,
    /// Go on from `latest` or `best` in the output directory, or from a checkpoint's path.
    #[arg(long, value_name = "latest|best|PATH")]
    resume: Option<String>,
    /// Text that the model goes on from before and after training; may be repeated.
    #[arg(long, value_name = "TEXT")]
    sample_prompt: Vec<String>,
    /// Most tokens of such a sample.
    #[arg(long, value_name = "N", default_value_t = 40)]
    sample_tokens: usize,
    /// 0 takes the likeliest token each time; higher draws more freely, from the 50 likeliest.
    #[arg(long, value_name = "T", default_value_t = 0.0, allow_negative_numbers = true)]
    sample_temperature: f64,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Adapter {
    /// the one with the lowest evaluation loss
    Best,
    /// the last step's
    Last,
}

impl OutputArgs {
    /// When the evaluation data are looked at.
    pub fn evaluation(&self) -> EvaluationOptions {
        EvaluationOptions {
            interval: self.eval_interval,
            patience: self.early_stopping_patience,
            threshold: self.early_stopping_threshold,
        }
    }

    /// Texts before and after training, drawn with this seed.
    pub fn samples(&self, seed: u64) -> SampleTexts {
        SampleTexts {
            prompts: self.sample_prompt.clone(),
            options: GenerateOptions {
                max_new_tokens: self.sample_tokens,
                sampling: Sampling {
                    temperature: self.sample_temperature,
                    top_p: 1.0,
                    seed,
                    ..Sampling::default()
                },
                ..GenerateOptions::default()
            },
        }
    }

    /// What is written, and from where the run goes on.
    pub fn into_options(self) -> OutputOptions {
        let adapter = match self.adapter {
            Some(Adapter::Best) => AdapterChoice::Best,
            Some(Adapter::Last) => AdapterChoice::Last,
            None if self.early_stopping_patience.is_some() => AdapterChoice::Best,
            None => AdapterChoice::Last,
        };
        OutputOptions {
            dir: self.output_dir,
            save_interval: self.save_interval,
            log_interval: self.log_interval,
            quiet: self.quiet,
            tensorboard: !self.no_tensorboard,
            share_loss: self.share_loss,
            keep_last: self.keep_last,
            adapter,
            resume: self.resume,
            config: None,
        }
    }
}
