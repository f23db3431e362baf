use bytesize::ByteSize;
use clap::{Args, ValueEnum};
use offshoot_model::weights::Checkpoint;
use offshoot_trainer::adapter::{Adapter, Step};
use offshoot_trainer::merge::{MergeOptions, merge};
use std::path::PathBuf;
use std::process::ExitCode;
use tch::Kind;

/// Write a full model with an adapter merged into its weights.
///
/// The directory is a usual one of Hugging Face: safetensors, config.json, tokenizer and chat
/// template. Transformers, inference servers and this program load it as any other model. The sum is
/// computed in f32; no more than one tensor is in memory at a time.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct MergeArgs {
    /// The base model: a Hugging Face directory, a GGUF file (its weights are dequantised) or a hub
    /// name.
    #[arg(long, value_name = "NAME|PATH")]
    model_name: String,
    /// A PEFT directory, the --output-dir of a run, or a checkpoint_step_N.
    #[arg(long, value_name = "PATH")]
    adapter: PathBuf,
    /// Which checkpoint, if --adapter is a run: latest, best or a step's number.
    #[arg(long, value_name = "STEP")]
    step: Option<Step>,
    /// Where the model goes: a new folder, or an empty one.
    #[arg(long, value_name = "DIR")]
    output_dir: PathBuf,
    /// Type of all tensors [default: each keeps its own; f32 for those of a quantised file].
    #[arg(long, value_enum)]
    dtype: Option<ModelDType>,
    /// Most bytes of one file, such as 5GB or 800MB.
    #[arg(long, value_name = "SIZE", default_value = "5GB")]
    max_shard_size: ByteSize,
}

#[derive(Clone, Copy, PartialEq, Debug, ValueEnum)]
enum ModelDType {
    F32,
    Bf16,
    F16,
}

impl From<ModelDType> for Kind {
    fn from(dtype: ModelDType) -> Self {
        match dtype {
            ModelDType::F32 => Kind::Float,
            ModelDType::Bf16 => Kind::BFloat16,
            ModelDType::F16 => Kind::Half,
        }
    }
}

const EXAMPLES: &str = "\
Examples:
  offshoot merge --model-name Qwen/Qwen2-0.5B --adapter run --output-dir my-model
  offshoot merge --model-name model.gguf --adapter run --step best --output-dir my-model \\
      --dtype bf16 --max-shard-size 2GB";

/// Runs the subcommand.
pub fn run(args: MergeArgs) -> anyhow::Result<ExitCode> {
    let adapter = Adapter::find(&args.adapter, args.step)?;
    let checkpoint = Checkpoint::find(&args.model_name)?;
    let options = MergeOptions {
        output_dir: args.output_dir,
        kind: args.dtype.map(Kind::from),
        max_shard_bytes: args.max_shard_size.as_u64(),
    };
    let merged = merge(&checkpoint, adapter, &options)?;
    println!(
        "{}: {} tensors, {} of them changed, {} in {} {}",
        options.output_dir.display(),
        merged.n_tensors,
        merged.n_changed,
        ByteSize::b(merged.bytes),
        merged.n_files,
        if merged.n_files == 1 { "file" } else { "files" },
    );
    Ok(ExitCode::SUCCESS)
}
