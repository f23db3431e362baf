use crate::run_config::Resolved;
use clap::Args;
use clap::builder::ArgPredicate::IsPresent;
use offshoot_trainer::options::LoraOptions;
use std::path::PathBuf;

/// What a run begins with may have settings of its own.
const OPEN: [(&str, clap::builder::ArgPredicate, Option<&str>); 2] =
    [("init_adapter", IsPresent, None), ("resume", IsPresent, None)];

#[derive(Args)]
#[command(next_help_heading = "LoRA")]
pub struct LoraArgs {
    /// Begin with this adapter instead of a fresh one: a PEFT directory, a checkpoint or a run. Rank,
    /// alpha, dropout and targets are its own.
    #[arg(long, value_name = "PATH")]
    init_adapter: Option<PathBuf>,
    /// Rank. 8 up to 500M parameters, 16 up to 2B, 32 above is a good start.
    #[arg(long, value_name = "R", default_value = "8", default_value_ifs = OPEN)]
    lora_rank: Option<usize>,
    /// The adapter counts alpha / rank times; twice the rank is usual.
    #[arg(long, value_name = "ALPHA", default_value = "16", default_value_ifs = OPEN, allow_negative_numbers = true)]
    lora_alpha: Option<f64>,
    /// Chance that an input of an adapter is left out in training.
    #[arg(long, value_name = "P", default_value = "0.1", default_value_ifs = OPEN, allow_negative_numbers = true)]
    lora_dropout: Option<f64>,
    /// Count the adapter alpha / sqrt(rank) times.
    #[arg(long)]
    use_rslora: bool,
    /// Linear layers that carry LoRA, separated by commas, such as q_proj,v_proj, or all-linear
    /// [default: the server's for this model: all linear layers of a block].
    #[arg(long, value_name = "NAMES", value_delimiter = ',', num_args = 1..)]
    target_modules: Vec<String>,
}

impl LoraArgs {
    /// What the trainer takes.
    pub fn into_options(self) -> LoraOptions {
        LoraOptions {
            init_adapter: self.init_adapter,
            r: self.lora_rank,
            lora_alpha: self.lora_alpha,
            lora_dropout: self.lora_dropout,
            use_rslora: self.use_rslora.then_some(true),
            target_modules: self.target_modules,
        }
    }
}

/// What stood open in the options is as the adapter or the checkpoint that the run begins from has it.
pub fn fill(resolved: &mut Resolved, lora: &LoraOptions) {
    if let Some(r) = lora.r {
        resolved.set("lora_rank", r as i64);
    }
    for (name, value) in [("lora_alpha", lora.lora_alpha), ("lora_dropout", lora.lora_dropout)] {
        if let Some(value) = value {
            resolved.set(name, value);
        }
    }
    resolved.set("use_rslora", lora.use_rslora.unwrap_or_default());
    if !lora.target_modules.is_empty() {
        resolved.set("target_modules", lora.target_modules.clone());
    }
}
