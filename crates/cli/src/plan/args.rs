use crate::serve_config::{DType, bytes};
use crate::train::compute_args::Wire;
use anyhow::ensure;
use clap::{ArgGroup, Args};

/// Say how many sessions fit on a device, what they take of it, and what they need of the network.
///
/// Nothing is served: the bytes are those that a server's ledger would count, from the model's
/// config.json alone, and sessions are let in by its rules. Without the model's weights, a folder with
/// only a config.json will do, or that file itself; of a hub name only config.json is fetched. With
/// --measure the trunk is loaded and run on this machine for some seconds, which takes the weights.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
#[command(group(ArgGroup::new("memory").required(true).args(["gpu_memory", "memory_limit"])))]
pub struct PlanArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub device: DeviceArgs,
    #[command(flatten)]
    pub sessions: SessionArgs,
    /// Load the trunk and run such sessions on this machine, for the time of a step.
    #[arg(long, help_heading = "Time")]
    pub measure: bool,
    /// How long, loading apart.
    #[arg(long, value_name = "SECONDS", default_value_t = 20.0, help_heading = "Time")]
    pub measure_seconds: f64,
    /// Print JSON instead of tables.
    #[arg(long)]
    pub json: bool,
}

const EXAMPLES: &str = "\
Examples:
  offshoot plan --model Qwen/Qwen2-7B --dtype bf16 --gpu-memory 80GiB --sessions 40 --lora-rank 32
  offshoot plan --model ./config.json --memory-limit 16GiB --tokens-per-microbatch 1024
  offshoot plan --model ./smollm2 --memory-limit 8GiB --sessions 20 --measure
  offshoot plan --model ./smollm2 --gpu-memory 24GB --json";

#[derive(Args)]
#[command(next_help_heading = "Model")]
pub struct ModelArgs {
    /// The model: a Hugging Face directory, a config.json, a GGUF file or a hub name.
    #[arg(long, visible_alias = "model", value_name = "NAME|PATH")]
    pub model_name: String,
    /// First layer of the trunk [default: 2].
    #[arg(long, value_name = "LAYER")]
    pub split_point_1: Option<usize>,
    /// First layer behind the trunk [default: two before the last].
    #[arg(long, value_name = "LAYER")]
    pub split_point_2: Option<usize>,
    /// Type of the trunk's weights and products, as for `offshoot serve`.
    #[arg(long, value_enum, default_value_t = DType::F32)]
    pub dtype: DType,
}

#[derive(Args)]
#[command(next_help_heading = "Device")]
pub struct DeviceArgs {
    /// Memory of the accelerator, such as 80GiB. A tenth of it, and what one optimizer step takes, are
    /// left to what the ledger does not count; the rest is to be limits.memory_bytes.
    #[arg(long, value_name = "SIZE", value_parser = bytes)]
    pub gpu_memory: Option<u64>,
    /// What weights, adapters, tapes and workspace may take together: limits.memory_bytes itself.
    #[arg(long, value_name = "SIZE", value_parser = bytes)]
    pub memory_limit: Option<u64>,
    /// cpu, cuda or cuda:N [default: cuda with --gpu-memory, else cpu].
    #[arg(long, value_name = "DEVICE")]
    pub device: Option<String>,
    /// limits.host_memory_bytes: what idle sessions that left an accelerator may take of the host's
    /// memory; behind it they go to disk.
    #[arg(long, value_name = "SIZE", value_parser = bytes)]
    pub host_memory: Option<u64>,
    /// limits.max_tokens_per_microbatch: adapters leave room for the largest microbatch that a client
    /// may send.
    #[arg(long, value_name = "TOKENS", default_value_t = 8192)]
    pub max_tokens_per_microbatch: usize,
}

#[derive(Args)]
#[command(next_help_heading = "Sessions")]
pub struct SessionArgs {
    /// Sessions that train at the same time [default: as many as fit].
    #[arg(long, value_name = "N")]
    pub sessions: Option<u64>,
    /// LoRA rank of each.
    #[arg(long, visible_alias = "rank", value_name = "R", default_value_t = 8)]
    pub lora_rank: usize,
    /// Linear layers that carry LoRA, separated by commas, such as q_proj,v_proj, or all-linear
    /// [default: the server's for this model: all linear layers of a block].
    #[arg(long, value_name = "NAMES", value_delimiter = ',', num_args = 1..)]
    pub target_modules: Vec<String>,
    /// Tokens of one microbatch.
    #[arg(long, value_name = "TOKENS", default_value_t = 2048)]
    pub tokens_per_microbatch: usize,
    /// Microbatches of one optimizer step.
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub microbatches: u64,
    /// Of those so many are on their way at once.
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub microbatches_in_flight: u64,
    /// Type of what travels, both ways.
    #[arg(long, value_enum, default_value_t = Wire::Bf16)]
    pub wire_dtype: Wire,
}

impl PlanArgs {
    pub fn check(&self) -> anyhow::Result<()> {
        let SessionArgs { sessions, lora_rank, tokens_per_microbatch, .. } = &self.sessions;
        let at_least_1 = [
            ("--sessions", sessions.unwrap_or(1)),
            ("--lora-rank", *lora_rank as u64),
            ("--tokens-per-microbatch", *tokens_per_microbatch as u64),
            ("--max-tokens-per-microbatch", self.device.max_tokens_per_microbatch as u64),
            ("--microbatches", self.sessions.microbatches),
            ("--microbatches-in-flight", self.sessions.microbatches_in_flight),
        ];
        for (name, value) in at_least_1 {
            ensure!(value >= 1, "{name} is {value}, expected at least 1");
            ensure!(value <= 1 << 31, "{name} is {value}, expected at most 2147483648");
        }
        let seconds = self.measure_seconds;
        ensure!(
            (0.1..=3600.0).contains(&seconds),
            "--measure-seconds is {seconds}, expected 0.1 to 3600"
        );
        Ok(())
    }
}
