use clap::Args;
use offshoot_model::weights::{Checkpoint, HubSettings, WeightsError};
use std::path::Path;
use std::process::ExitCode;

/// Fetch a model from the hub, so that what runs later needs no hub.
///
/// It goes to the cache that all Hugging Face tools share (HF_HOME, HF_HUB_CACHE), and its folder is
/// printed. A model that is there as a whole is left as it is and the hub is not asked, so that every
/// start finds the same weights; --refresh looks for a newer version.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct FetchArgs {
    /// A hub name, such as Qwen/Qwen2-0.5B.
    #[arg(value_name = "MODEL")]
    model_name: String,
    /// Ask the hub for a newer version of a model that is there.
    #[arg(long)]
    refresh: bool,
}

const EXAMPLES: &str = "\
Examples:
  offshoot fetch Qwen/Qwen2-0.5B
  HF_TOKEN_PATH=hub.token HF_HOME=/models offshoot fetch meta-llama/Llama-3.1-8B

Before a server that is to start without the hub:
  offshoot fetch Qwen/Qwen2-0.5B && HF_HUB_OFFLINE=1 offshoot serve --model-name Qwen/Qwen2-0.5B ...";

/// Runs the subcommand.
pub fn run(args: FetchArgs) -> anyhow::Result<ExitCode> {
    let FetchArgs { model_name, refresh } = args;
    anyhow::ensure!(
        !Path::new(&model_name).exists(),
        "{model_name} is here as a file or folder: expected the name of a model on the hub, such as \
         Qwen/Qwen2-0.5B. A path needs no fetching"
    );
    let hub = HubSettings::from_env();
    let here = Checkpoint::find_with(&model_name, &HubSettings { offline: true, ..hub.clone() });
    let checkpoint = match here {
        Ok(checkpoint) if !refresh => {
            tracing::info!(name = model_name, "it is there");
            checkpoint
        }
        Ok(_) | Err(WeightsError::NotCached { .. }) => Checkpoint::find_with(&model_name, &hub)?,
        Err(error) => return Err(error.into()),
    };
    println!("{}", checkpoint.path().display());
    Ok(ExitCode::SUCCESS)
}
