use crate::connection_args::ConnectionArgs;
use anyhow::{Context, ensure};
use clap::Args;
use offshoot_client::{Client, ClientOptions};
use offshoot_model::weights::Checkpoint;
use offshoot_model::{ModelConfig, SplitPoints};
use offshoot_trainer::adapter::{Adapter, ImportOptions, Step};
use std::path::PathBuf;
use std::process::ExitCode;

/// Split an existing PEFT adapter into bottom, trunk and top, and go on training it.
///
/// Writes OUTPUT_DIR/checkpoint_step_0, from which `offshoot train --output-dir OUTPUT_DIR --resume
/// latest` goes on with the adapter's rank, alpha and targets. No server is needed to import.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct ImportArgs {
    /// A PEFT directory; or a run, or a checkpoint_step_N, SplitLearn's too.
    #[arg(value_name = "ADAPTER")]
    adapter: PathBuf,
    /// The base model: a Hugging Face directory, a GGUF file or a hub name.
    #[arg(long, value_name = "NAME|PATH")]
    model_name: String,
    /// Of the run that is to begin.
    #[arg(long, value_name = "DIR")]
    output_dir: PathBuf,
    /// First layer of the trunk.
    #[arg(long, value_name = "LAYER")]
    split_point_1: Option<usize>,
    /// First layer behind the trunk.
    #[arg(long, value_name = "LAYER")]
    split_point_2: Option<usize>,
    /// Cut where this server's trunk is, and check that it has the same model.
    #[arg(long, value_name = "URL", conflicts_with_all = ["split_point_1", "split_point_2"])]
    server: Option<String>,
    /// Which checkpoint, if ADAPTER is a run: latest, best or a step's number.
    #[arg(long, value_name = "STEP")]
    step: Option<Step>,
    #[command(flatten)]
    connection: ConnectionArgs,
}

const EXAMPLES: &str = "\
Examples:
  offshoot import my-adapter --model-name Qwen/Qwen2-0.5B --output-dir run \\
      --split-point-1 2 --split-point-2 20
  offshoot import my-adapter --model-name ./gpt2 --output-dir run --server trunk.local:50051
  offshoot train --model-name ./gpt2 --server trunk.local:50051 --train-file more.jsonl \\
      --output-dir run --resume latest";

/// Runs the subcommand.
pub fn run(args: ImportArgs) -> anyhow::Result<ExitCode> {
    let adapter = Adapter::find(&args.adapter, args.step)?;
    let checkpoint = Checkpoint::find(&args.model_name)?;
    let config = ModelConfig::from_json(checkpoint.config())?;
    let (s1, s2) = match &args.server {
        Some(url) => split_of_server(url, &args.connection, &checkpoint)?,
        None => args.split_point_1.zip(args.split_point_2).context(
            "where is the model cut? Name --split-point-1 and --split-point-2, or with --server the server that has the trunk",
        )?,
    };
    let split = SplitPoints::new(s1, s2, config.n_layers)?;
    let (r, alpha) = (adapter.spec.r, adapter.spec.lora_alpha);
    let path = adapter.import(&ImportOptions {
        output_dir: &args.output_dir,
        model_name: &args.model_name,
        checkpoint: &checkpoint,
        split,
    })?;
    println!(
        "{}: r {r}, alpha {alpha}; bottom [0, {s1}), trunk [{s1}, {s2}), top [{s2}, {}). Go on with offshoot train --model-name {} --output-dir {} --resume latest",
        path.display(),
        config.n_layers,
        args.model_name,
        args.output_dir.display(),
    );
    Ok(ExitCode::SUCCESS)
}

fn split_of_server(
    url: &str,
    connection: &ConnectionArgs,
    checkpoint: &Checkpoint,
) -> anyhow::Result<(usize, usize)> {
    let options = connection.options(ClientOptions::default())?;
    let server = tokio::runtime::Runtime::new()?
        .block_on(async { Client::connect_with(url, options).await?.describe().await })?;
    ensure!(
        server.fingerprint == checkpoint.fingerprint(),
        "the server {url} holds another model: {} ({}, {} layers)",
        server.model_name,
        server.model_type,
        server.n_layers,
    );
    Ok((server.split_point_1 as usize, server.split_point_2 as usize))
}
