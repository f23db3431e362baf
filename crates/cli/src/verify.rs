use crate::accelerator;
use crate::connection_args::ConnectionArgs;
use crate::own_server::OwnServer;
use anyhow::{bail, ensure};
use clap::Args;
use offshoot_adapters::peft;
use offshoot_client::{Client, ClientOptions};
use offshoot_model::weights::Checkpoint;
use offshoot_model::{ModelConfig, Part, PartSpec, SplitPoints};
use offshoot_server::ServerConfig;
use offshoot_trainer::verify::{self, Comparison, Reference, Subject};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use tch::{Device, Kind};

/// Prove that cutting a model changes no number.
///
/// One microbatch runs through bottom, a server's trunk on a real socket, and top, and through the
/// same model uncut in this process, in float32. The table gives the relative error (norm of the
/// difference over norm of the reference) of loss, logits and every LoRA tensor's gradient. Exit
/// status 0: all are below their bounds; 1: not.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct VerifyArgs {
    /// Model: a Hugging Face directory, a GGUF file or a hub name.
    #[arg(long, alias = "model-name", value_name = "NAME|PATH")]
    model: String,
    /// First layer of the trunk [default: the server's, or a quarter of the layers].
    #[arg(long, value_name = "LAYER")]
    split_point_1: Option<usize>,
    /// First layer behind the trunk [default: the server's, or three quarters of the layers].
    #[arg(long, value_name = "LAYER")]
    split_point_2: Option<usize>,
    /// A PEFT adapter of the whole model [default: a random one on every linear layer].
    #[arg(long, value_name = "PEFT_DIR")]
    adapter: Option<PathBuf>,
    /// JSON with "input_ids", a list of unequal lists of token ids [default: random ones].
    #[arg(long, value_name = "FILE")]
    case: Option<PathBuf>,
    /// Recorded numbers to compare with as well: a safetensors file with logits.0, logits.1, ... and
    /// grad.NAME for the names of peft_model.named_parameters(). Needs --adapter and --case.
    #[arg(long, value_name = "FILE", requires = "case", requires = "adapter")]
    reference: Option<PathBuf>,
    /// A running float32 server [default: one in this process, on a free port of loopback].
    #[arg(long, value_name = "URL", conflicts_with = "device")]
    server: Option<String>,
    /// Where the trunk of the server in this process runs: cpu, cuda or cuda:N.
    #[arg(long, default_value = "cpu")]
    device: String,
    #[command(flatten)]
    connection: ConnectionArgs,
}

const EXAMPLES: &str = "\
Examples:
  offshoot verify --model ./gpt2
  offshoot verify --model Qwen/Qwen2-0.5B --split-point-1 2 --split-point-2 20 --adapter run/adapter
  offshoot verify --model tests/fixtures/llama --adapter tests/fixtures/llama/adapter \\
      --case tests/fixtures/llama/case.json --reference tests/fixtures/llama/reference.safetensors";

pub fn run(args: VerifyArgs) -> anyhow::Result<ExitCode> {
    // Loads CUDA if the server of this process is to use it.
    accelerator::device(&args.device)?;
    tokio::runtime::Runtime::new()?.block_on(compare(args))
}

async fn compare(args: VerifyArgs) -> anyhow::Result<ExitCode> {
    let given = args.reference.as_deref().map(Reference::read).transpose()?;
    let checkpoint = Checkpoint::find(&args.model)?;
    let config = ModelConfig::from_json(checkpoint.config())?;
    let there = match &args.server {
        Some(url) => {
            let options = args.connection.options(ClientOptions::default())?;
            Some(Client::connect_with(url, options).await?)
        }
        None => None,
    };
    let split = split_points(&args, &config, there.as_ref()).await?;
    let mut adapter = match &args.adapter {
        Some(dir) => peft::read_dir(dir)?,
        None => random_adapter(&checkpoint, &config)?,
    };
    if given.is_some() {
        // Split and uncut draw the same masks, PyTorch draws others.
        adapter.spec.lora_dropout = 0.0;
    }
    let sequences = match &args.case {
        Some(path) => verify::read_case(path)?,
        None => verify::draw_case(&config, 1),
    };
    let subject = Subject { checkpoint, config, split, adapter, sequences };
    subject.check()?;

    let uncut = subject.uncut()?;
    let numbers = match there {
        Some(client) => subject.split(&client).await?,
        None => {
            let own = OwnServer::start(server_config(&args, split)).await?;
            let client = Client::connect(&own.address().to_string()).await?;
            let numbers = subject.split(&client).await;
            own.stop().await;
            numbers?
        }
    };
    let against_uncut = numbers.compare(&uncut);
    let against_given = given.map(|given| numbers.compare_recorded(&given));
    let lengths: Vec<usize> = subject.sequences.iter().map(Vec::len).collect();
    println!(
        "{} ({}), trunk layers {}..{} of {}, sequences of {lengths:?} tokens, loss {:.6}",
        subject.checkpoint.name(),
        subject.config.family.name(),
        split.s1,
        split.s2,
        subject.config.n_layers,
        numbers.loss
    );
    Ok(print_table(&against_uncut, against_given.as_deref()))
}

async fn split_points(
    args: &VerifyArgs,
    config: &ModelConfig,
    server: Option<&Client>,
) -> anyhow::Result<SplitPoints> {
    let n = config.n_layers;
    let (mut s1, mut s2) = (n / 4, (3 * n).div_ceil(4));
    if let Some(client) = server {
        let there = client.describe().await?;
        ensure!(
            there.compute_dtype == "f32",
            "the server computes in {}, and the proof is one of float32; start it with --dtype f32",
            there.compute_dtype
        );
        (s1, s2) = (there.split_point_1 as usize, there.split_point_2 as usize);
        for (option, given, have) in [
            ("--split-point-1", args.split_point_1, s1),
            ("--split-point-2", args.split_point_2, s2),
        ] {
            if let Some(given) = given.filter(|given| *given != have) {
                bail!("{option} is {given}, the server has {have}");
            }
        }
    }
    let (s1, s2) = (args.split_point_1.unwrap_or(s1), args.split_point_2.unwrap_or(s2));
    Ok(SplitPoints::new(s1, s2, n)?)
}

fn server_config(args: &VerifyArgs, split: SplitPoints) -> ServerConfig {
    let mut config = ServerConfig::default();
    config.model.name = args.model.clone();
    config.model.split_point_1 = split.s1;
    config.model.split_point_2 = split.s2;
    config.model.device = args.device.clone();
    config
}

fn random_adapter(
    checkpoint: &Checkpoint,
    config: &ModelConfig,
) -> anyhow::Result<peft::PeftAdapter> {
    let part = Part::load(checkpoint, config, PartSpec::whole(config), Kind::Float, Device::Cpu)?;
    Ok(verify::draw_adapter(config, &part.sites(&config.default_targets())?, 1))
}

/// Prints one line for each quantity; the exit status says whether all pass.
fn print_table(uncut: &[Comparison], given: Option<&[Comparison]>) -> ExitCode {
    let by_name: Option<BTreeMap<&str, &Comparison>> =
        given.map(|rows| rows.iter().map(|row| (row.what.as_str(), row)).collect());
    let width = uncut.iter().map(|row| row.what.len()).max().unwrap_or(0);
    let header = if given.is_some() { "  reference" } else { "" };
    println!("{:width$}  {:>9}{header}  bound", "relative error against", "uncut");
    for row in uncut {
        let with_given = by_name.as_ref().and_then(|rows| rows.get(row.what.as_str()));
        let given_text = match (&by_name, with_given) {
            (None, _) => String::new(),
            (Some(_), Some(with)) => format!("  {:>9.1e}", with.error),
            (Some(_), None) => format!("  {:>9}", "-"),
        };
        let passes = row.passes() && with_given.is_none_or(|with| with.passes());
        let mark = if passes { "" } else { "  FAILS" };
        println!("{:width$}  {:>9.1e}{given_text}  {:.0e}{mark}", row.what, row.error, row.bound);
    }
    // What the file names and the split run has not cannot stand beside an uncut number.
    let unknown = |row: &&Comparison| !uncut.iter().any(|known| known.what == row.what);
    for row in given.into_iter().flatten().filter(unknown) {
        println!("{}: in the reference, but not in the split run  FAILS", row.what);
    }
    let rows: Vec<&Comparison> = uncut.iter().chain(given.into_iter().flatten()).collect();
    let failed = rows.iter().filter(|row| !row.passes()).count();
    if failed == 0 {
        println!("passed: {} comparisons", rows.len());
        ExitCode::SUCCESS
    } else {
        println!("failed: {failed} of {} comparisons", rows.len());
        ExitCode::FAILURE
    }
}
