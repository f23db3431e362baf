//! What a client takes of memory at its peak, for a model of Qwen2-0.5B's shape with its vocabulary of
//! 151,936 and a microbatch of 4 x 512 tokens, against the size of two full float32 logit tensors of
//! that microbatch: the logits and their gradient, which a loss that is not computed by chunks holds.
//!
//! Weights are random, the server is a process of its own, and each client is a fresh process that
//! takes two training steps. Its peak is the kernel's (VmHWM): weights, what loading them touched,
//! tapes, the head, libtorch itself.

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand, ValueEnum};
use offshoot_adapters::{AdamW, LoraSpec};
use offshoot_benches::{ModelSize, peak_resident, random_model, share_cores};
use offshoot_client::{Client, LoraConfig, OpenSession, WireDType};
use offshoot_model::weights::Checkpoint;
use offshoot_model::{ModelConfig, SplitPoints};
use offshoot_server::{Server, ServerConfig};
use offshoot_trainer::data::{Batch, Sample};
use offshoot_trainer::loss::{CrossEntropy, Loss};
use offshoot_trainer::{Checkpointing, Microbatches, SplitModel, SplitOptions};
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tch::{Device, Kind};

const SIZE: ModelSize = ModelSize { vocab: 151_936, ..ModelSize::QWEN2_05B };
const SEQUENCES: usize = 4;
const TOKENS: usize = 512;
/// The recommended one, and one with layers on both sides.
const CUTS: [[usize; 2]; 2] = [[0, 14], [2, 20]];

#[derive(Parser)]
struct Args {
    #[command(subcommand)]
    role: Option<Role>,
    /// cargo says that it is a bench.
    #[arg(long, hide = true, global = true)]
    bench: bool,
}

/// What this program is started as by itself.
#[derive(Subcommand)]
enum Role {
    #[command(hide = true)]
    Serve { model: PathBuf, from: usize, to: usize },
    #[command(hide = true)]
    Client { model: PathBuf, server: String, dtype: DType, keep: Keep },
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum DType {
    F32,
    Bf16,
}

/// What `--gradient-checkpointing` is.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Keep {
    Auto,
    Off,
}

fn main() -> Result<()> {
    // As the server and the client have it.
    share_cores()?;
    let runtime = tokio::runtime::Runtime::new()?;
    match Args::parse().role {
        None => measure_all(),
        Some(Role::Serve { model, from, to }) => runtime.block_on(serve(&model, [from, to])),
        Some(Role::Client { model, server, dtype, keep }) => {
            runtime.block_on(train(&model, &server, dtype, keep))
        }
    }
}

fn measure_all() -> Result<()> {
    let two_logits = (2 * SEQUENCES * TOKENS * SIZE.vocab * 4) as f64;
    println!(
        "{SIZE:?}, random weights; {SEQUENCES} x {TOKENS} tokens, rank 8 on all linear layers, {} threads",
        tch::get_num_threads()
    );
    println!("two float32 logit tensors: {:.3} GB\n", two_logits / 1e9);
    let model = random_model(SIZE, 1)?;
    println!(
        "| trunk | weights | gradient checkpointing | client's peak GB | of two logit tensors \
         | GB after loading | seconds of the second step |"
    );
    println!("|---|---|---|---|---|---|---|");
    let mut worst: f64 = 0.0;
    // The defaults first: they are what the bar is for.
    for keep in [Keep::Auto, Keep::Off] {
        for [from, to] in CUTS {
            let server = Process::serve(model.path(), [from, to])?;
            for dtype in [DType::F32, DType::Bf16] {
                let Figures { peak, loaded, seconds } =
                    Process::client(model.path(), &server.address, dtype, keep)?;
                let ratio = peak / two_logits;
                println!(
                    "| {from}..{to} | {dtype:?} | {keep:?} | {:.3} | {ratio:.2} | {:.3} | {seconds:.1} |",
                    peak / 1e9,
                    loaded / 1e9
                );
                if matches!(keep, Keep::Auto) {
                    worst = worst.max(ratio);
                }
            }
        }
    }
    println!(
        "\nHighest peak with the defaults: {worst:.2} of two logit tensors (the bar is below 1)"
    );
    Ok(())
}

/// A server, killed when it goes out of scope.
struct Process {
    child: Child,
    address: String,
}

/// What a client printed.
struct Figures {
    /// Bytes.
    peak: f64,
    loaded: f64,
    seconds: f64,
}

impl Process {
    fn start(args: &[&str]) -> Result<Child> {
        let program = std::env::current_exe().context("cannot find this program's own file")?;
        let mut command = Command::new(program);
        let command = command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped());
        command.spawn().context("cannot start this program again")
    }

    fn serve(model: &Path, [from, to]: [usize; 2]) -> Result<Process> {
        let (model, from, to) = (model.display().to_string(), from.to_string(), to.to_string());
        let mut child = Self::start(&["serve", &model, &from, &to])?;
        let mut address = String::new();
        let stdout = child.stdout.take().context("the server has a stdout")?;
        BufReader::new(stdout).read_line(&mut address)?;
        ensure!(!address.is_empty(), "the server did not start; what it said stands above");
        Ok(Process { child, address: address.trim().into() })
    }

    fn client(model: &Path, server: &str, dtype: DType, keep: Keep) -> Result<Figures> {
        let name = |value: &dyn Fn() -> Option<clap::builder::PossibleValue>| {
            value().map(|value| value.get_name().to_string()).unwrap_or_default()
        };
        let (dtype, keep) =
            (name(&|| dtype.to_possible_value()), name(&|| keep.to_possible_value()));
        let client = Self::start(&["client", &model.display().to_string(), server, &dtype, &keep])?;
        let output = client.wait_with_output()?;
        ensure!(output.status.success(), "the client failed; what it said stands above");
        let text = String::from_utf8(output.stdout)?;
        let numbers = text.split_whitespace().map(str::parse).collect::<Result<Vec<f64>, _>>()?;
        let [peak, loaded, seconds] = numbers[..] else {
            anyhow::bail!("the client printed {text:?}, expected three numbers");
        };
        Ok(Figures { peak, loaded, seconds })
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Nothing of it is needed any more.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Until standard input ends.
async fn serve(model: &Path, [from, to]: [usize; 2]) -> Result<()> {
    let store = tempfile::tempdir()?;
    let mut config = ServerConfig::default();
    config.listen.port = 0;
    config.model.name = model.display().to_string();
    (config.model.split_point_1, config.model.split_point_2) = (from, to);
    config.store.dir = store.path().into();
    let server = Server::start(config).await?;
    println!("{}", server.local_addr());
    tokio::task::spawn_blocking(|| std::io::stdin().read_to_end(&mut Vec::new())).await??;
    server.drain(Duration::from_secs(5)).await;
    Ok(())
}

/// Two steps. Prints the peak and what was resident after loading, in bytes, and the seconds of the
/// second step.
async fn train(model: &Path, server: &str, dtype: DType, keep: Keep) -> Result<()> {
    let client = Client::connect(server).await?;
    let described = client.describe().await?;
    let (mut split, fingerprint) = load(
        model,
        [described.split_point_1 as usize, described.split_point_2 as usize],
        dtype,
        keep,
    )?;
    let loaded = peak_resident()?;
    let session = client.open(OpenSession {
        name: "client memory".into(),
        fingerprint,
        split_point_1: described.split_point_1,
        split_point_2: described.split_point_2,
        lora: LoraConfig { r: 8, lora_alpha: 16.0, lora_dropout: 0.1, ..Default::default() },
        adamw: offshoot_client::ADAMW_DEFAULTS,
        seed: 1,
        wire_dtype: WireDType::Bf16,
        initial_adapter: vec![],
    });
    let session = session.await?;
    let mut batch = Batch::default();
    for sequence in 0..SEQUENCES {
        let id = |i: usize| ((i * 7919 + sequence * 104_729) % SIZE.vocab) as i64;
        batch.push(&Sample { ids: (0..TOKENS).map(id).collect(), learn: vec![true; TOKENS] });
    }
    let batches = [batch];
    let loss: Arc<dyn Loss> = Arc::new(CrossEntropy::default());
    let scale = 1.0 / loss.weight(&batches[0]);
    let mut seconds = 0.0;
    for first_number in 0..2 {
        let began = Instant::now();
        let (batches, loss) = (&batches, &loss);
        let step = Microbatches { batches, loss, first_number, scale, in_flight: 2 };
        let done = split.accumulate(&session, step).await?;
        ensure!(done.mean_loss(scale).0.is_finite(), "the loss is not finite");
        split.step(&session, 1e-4, 1.0).await?;
        seconds = began.elapsed().as_secs_f64();
    }
    println!("{} {loaded} {seconds}", peak_resident()?);
    session.close(true).await?;
    Ok(())
}

/// Bottom and top, and the model's fingerprint. The checkpoint's mapping ends with it, as in a run.
fn load(
    model: &Path,
    [s1, s2]: [usize; 2],
    dtype: DType,
    keep: Keep,
) -> Result<(SplitModel, String)> {
    let checkpoint = Checkpoint::find(&model.display().to_string())?;
    let config = ModelConfig::from_json(checkpoint.config())?;
    let target_modules = config.default_targets();
    let options = SplitOptions {
        split: SplitPoints::new(s1, s2, config.n_layers)?,
        lora: LoraSpec { target_modules, lora_dropout: 0.1, ..LoraSpec::default() },
        adamw: AdamW::default(),
        seed: 1,
        kind: match dtype {
            DType::F32 => Kind::Float,
            DType::Bf16 => Kind::BFloat16,
        },
        checkpointing: match keep {
            Keep::Auto => Checkpointing::Auto,
            Keep::Off => Checkpointing::Off,
        },
        devices: vec![Device::Cpu],
    };
    Ok((SplitModel::load(&checkpoint, &config, &options)?, checkpoint.fingerprint()))
}
