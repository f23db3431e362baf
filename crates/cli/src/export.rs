use crate::connection_args::ConnectionArgs;
use anyhow::{Context, bail};
use clap::{Args, ValueEnum};
use offshoot_client::{Client, ClientOptions, SessionId};
use offshoot_model::ModelConfig;
use offshoot_model::weights::Checkpoint;
use offshoot_trainer::adapter::{Adapter, ExportOptions, Step};
use std::path::PathBuf;
use std::process::ExitCode;
use tch::Kind;

/// Write an adapter as one PEFT directory for the whole model.
///
/// The source is a run, one of its checkpoints (SplitLearn's too), or a PEFT directory; bottom, trunk
/// and top become one adapter, with rank and alpha as they were. PEFT loads it with
/// PeftModel.from_pretrained, and LoRA-serving engines take it as it is.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct ExportArgs {
    /// --output-dir of a run, a checkpoint_step_N, or a PEFT directory. Of a run: its adapter/, or
    /// else its newest checkpoint.
    #[arg(value_name = "SOURCE", required_unless_present = "session")]
    source: Option<PathBuf>,
    /// Where the adapter goes: a new folder, or an empty one.
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// Which checkpoint of a run: latest, best (by evaluation loss) or a step's number.
    #[arg(long, value_name = "STEP")]
    step: Option<Step>,
    /// Check the adapter against this model, and write the shortest target_modules.
    #[arg(long, value_name = "NAME|PATH")]
    model_name: Option<String>,
    /// base_model_name_or_path of the result [default: what the source says, or --model-name].
    #[arg(long, value_name = "NAME")]
    base_model: Option<String>,
    /// Type of the tensors; f32 is what was trained.
    #[arg(long, value_enum, default_value_t = AdapterDType::F32)]
    dtype: AdapterDType,
    /// Take the trunk from this server: from the session that the checkpoint names, which may be live
    /// or parked, and must be at the checkpoint's step.
    #[arg(long, value_name = "URL")]
    server: Option<String>,
    /// A session of the server, if the trunk is the only part with LoRA: no SOURCE is needed.
    #[arg(long, value_name = "ID", requires = "server", requires = "model_name")]
    #[arg(conflicts_with = "source")]
    session: Option<String>,
    #[command(flatten)]
    connection: ConnectionArgs,
}

#[derive(Clone, Copy, PartialEq, Debug, ValueEnum)]
enum AdapterDType {
    F32,
    Bf16,
    F16,
}

impl From<AdapterDType> for Kind {
    fn from(dtype: AdapterDType) -> Self {
        match dtype {
            AdapterDType::F32 => Kind::Float,
            AdapterDType::Bf16 => Kind::BFloat16,
            AdapterDType::F16 => Kind::Half,
        }
    }
}

const EXAMPLES: &str = "\
Examples:
  offshoot export run --output my-adapter
  offshoot export run --step best --output my-adapter --dtype bf16 --base-model Qwen/Qwen2-0.5B
  offshoot export run --server trunk.local:50051 --output my-adapter";

/// Runs the subcommand.
pub fn run(args: ExportArgs) -> anyhow::Result<ExitCode> {
    let mut adapter = match &args.server {
        Some(server) => tokio::runtime::Runtime::new()?.block_on(from_server(&args, server))?,
        None => {
            let source = args.source.as_ref().context("SOURCE is missing")?;
            Adapter::find(source, args.step)?
        }
    };
    if let Some(name) = &args.model_name {
        let checkpoint = Checkpoint::find(name)?;
        adapter = adapter.fit(&ModelConfig::from_json(checkpoint.config())?)?;
    }
    let named = args.base_model.or(adapter.base_model.clone()).or(args.model_name);
    let Some(base_model) = named else {
        bail!("the source does not name its base model; say it with --base-model");
    };
    let options = ExportOptions {
        output_dir: &args.output,
        base_model: &base_model,
        kind: args.dtype.into(),
    };
    adapter.export(&options)?;
    let spec = &adapter.spec;
    println!(
        "{}: {} tensors, r {}, alpha {}{}, targets {}, base model {base_model}",
        args.output.display(),
        adapter.tensors.len(),
        spec.r,
        spec.lora_alpha,
        if spec.use_rslora { " (rslora)" } else { "" },
        spec.target_modules.join(", "),
    );
    Ok(ExitCode::SUCCESS)
}

async fn from_server(args: &ExportArgs, server: &str) -> anyhow::Result<Adapter> {
    let client =
        Client::connect_with(server, args.connection.options(ClientOptions::default())?).await?;
    Ok(match (&args.session, &args.source) {
        (Some(id), _) => Adapter::of_trunk(&client, &SessionId::from(id.clone())).await?,
        (None, Some(source)) => {
            Adapter::of_session(&client, source, args.step.unwrap_or(Step::Latest)).await?
        }
        (None, None) => bail!("SOURCE is missing"),
    })
}
