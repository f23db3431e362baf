use clap::Args;
use offshoot_adapters::LoraSpec;
use offshoot_trainer::options::LoraOptions;

#[derive(Args)]
#[command(next_help_heading = "LoRA")]
pub struct LoraArgs {
    /// Rank. 8 up to 500M parameters, 16 up to 2B, 32 above is a good start.
    #[arg(long, value_name = "R", default_value_t = 8)]
    lora_rank: usize,
    /// The adapter counts alpha / rank times; twice the rank is usual.
    #[arg(long, value_name = "ALPHA", default_value_t = 16.0)]
    lora_alpha: f64,
    /// Chance that an input of an adapter is left out in training.
    #[arg(long, value_name = "P", default_value_t = 0.1)]
    lora_dropout: f64,
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
        let spec = LoraSpec {
            r: self.lora_rank,
            lora_alpha: self.lora_alpha,
            lora_dropout: self.lora_dropout,
            use_rslora: self.use_rslora,
            target_modules: self.target_modules,
        };
        LoraOptions { spec }
    }
}
