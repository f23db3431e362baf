use crate::accelerator;
use crate::legacy::LegacyTrain;
use anyhow::{Context, bail};
use clap::{Args, ValueEnum};
use offshoot_adapters::{AdamW, LoraSpec};
use offshoot_client::{ClientOptions, WireDType};
use offshoot_trainer::data::{DataOptions, PromptFormat};
use offshoot_trainer::sample::SampleOptions;
use offshoot_trainer::{CancelToken, TrainOptions, train};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use tch::Kind;

/// Train a LoRA adapter through a trunk server.
///
/// The text, the first and last layers and the loss stay here; the server computes the layers
/// between. OUTPUT_DIR gets checkpoints, metrics.jsonl, and at the end adapter/, a PEFT adapter for
/// the whole model. Ctrl-C saves a checkpoint; --resume latest goes on from it exactly.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct TrainArgs {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    data: DataArgs,
    #[command(flatten)]
    lora: LoraArgs,
    #[command(flatten)]
    training: TrainingArgs,
    #[command(flatten)]
    output: OutputArgs,
    #[command(flatten)]
    compute: ComputeArgs,
    #[command(flatten)]
    legacy: LegacyTrain,
}

const EXAMPLES: &str = "\
Examples:
  offshoot train --model-name Qwen/Qwen2-0.5B --train-file texts.jsonl --output-dir run
  offshoot train --model-name ./gpt2 --server-host trunk.local --train-file corpus/ \\
      --eval-file held-out.txt --lora-rank 16 --lora-alpha 32 --max-steps 2000
  offshoot train ... --resume latest";

#[derive(Args)]
#[command(next_help_heading = "Model and server")]
struct ModelArgs {
    /// Model: a Hugging Face directory, a GGUF file or a hub name; the same one as the server's.
    #[arg(long, value_name = "NAME|PATH")]
    model_name: String,
    /// gpt2, llama, qwen2, qwen3 or gemma; only checked, the model says itself what it is.
    #[arg(long, value_name = "TYPE")]
    model_type: Option<String>,
    /// First layer of the trunk [default: what the server has]; another one is an error.
    #[arg(long, value_name = "LAYER")]
    split_point_1: Option<usize>,
    /// First layer behind the trunk [default: what the server has]; another one is an error.
    #[arg(long, value_name = "LAYER")]
    split_point_2: Option<usize>,
    /// The trunk server's host.
    #[arg(long, value_name = "HOST", default_value = "localhost")]
    server_host: String,
    /// The trunk server's port.
    #[arg(long, value_name = "PORT", default_value_t = 50051)]
    server_port: u16,
    /// Host and port in one, such as trunk.local:50051.
    #[arg(long, value_name = "URL", conflicts_with_all = ["server_host", "server_port"])]
    server: Option<String>,
    /// Shown in the server's list of sessions [default: the output directory's name].
    #[arg(long, value_name = "NAME")]
    session_name: Option<String>,
}

#[derive(Args)]
#[command(next_help_heading = "Data")]
struct DataArgs {
    /// Text or JSONL to train on, or a folder of them; may be repeated. In a text file each
    /// paragraph (up to a blank line) is a sample. A JSONL line has "text", or "prompt" and
    /// "completion" (only the completion is learned), or "messages" (only the assistant's turns
    /// are learned).
    #[arg(long, value_name = "PATH")]
    train_file: Vec<PathBuf>,
    /// The same for evaluation; without it nothing is evaluated.
    #[arg(long, value_name = "PATH")]
    eval_file: Vec<PathBuf>,
    /// Longest sample in tokens. Longer texts become several samples; longer prompts with
    /// completions, and conversations, are cut off.
    #[arg(long, value_name = "TOKENS", default_value_t = 512)]
    max_seq_length: usize,
    /// Train on the first so many samples only.
    #[arg(long, value_name = "N")]
    max_train_samples: Option<usize>,
    /// What a prompt with its completion, and a sample prompt, become.
    #[arg(long, value_enum, default_value_t = Format::Plain)]
    prompt_format: Format,
}

#[derive(Clone, Copy, ValueEnum)]
enum Format {
    /// The prompt, a line break unless there is white space already, the completion.
    Plain,
    /// One user message and one answer through the model's chat template, for Instruct models.
    Chat,
}

#[derive(Args)]
#[command(next_help_heading = "LoRA")]
struct LoraArgs {
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

#[derive(Args)]
#[command(next_help_heading = "Training")]
struct TrainingArgs {
    /// Samples in a microbatch.
    #[arg(long, value_name = "N", default_value_t = 4)]
    batch_size: usize,
    /// Microbatches in an optimizer step; the loss is the mean over all predicted tokens of them.
    #[arg(long, value_name = "N", default_value_t = 1)]
    gradient_accumulation_steps: usize,
    /// Microbatches of a step, or of an evaluation, on their way at once: while the server has one,
    /// this side computes for another. Each in flight costs memory on both sides, and none changes
    /// what is learned. A step of one microbatch gains nothing: half the --batch-size with twice
    /// the --gradient-accumulation-steps takes the same samples into a step.
    #[arg(long, value_name = "N", default_value_t = 2)]
    microbatches_in_flight: usize,
    /// Highest learning rate; it rises linearly during the warm-up and then falls to 0 as a cosine.
    #[arg(long, value_name = "LR", default_value_t = 1e-4)]
    learning_rate: f64,
    /// Decoupled weight decay of AdamW.
    #[arg(long, value_name = "X", default_value_t = 0.01)]
    weight_decay: f64,
    /// Steps of warm-up; at most a tenth of the run.
    #[arg(long, value_name = "STEPS", default_value_t = 100)]
    warmup_steps: u64,
    /// Gradients of the whole model, trunk included, are scaled down to this norm; 0 for never.
    #[arg(long, value_name = "NORM", default_value_t = 1.0)]
    max_grad_norm: f64,
    /// How often all samples are seen.
    #[arg(long, value_name = "N", default_value_t = 3)]
    num_epochs: u64,
    /// Optimizer steps of the run, instead of --num-epochs.
    #[arg(long, value_name = "STEPS")]
    max_steps: Option<u64>,
    /// Seed of initial values, dropout, the order of the samples, and sample texts.
    #[arg(long, value_name = "N", default_value_t = 42)]
    seed: u64,
}

#[derive(Args)]
#[command(next_help_heading = "Output")]
struct OutputArgs {
    /// Where checkpoints, metrics.jsonl and adapter/ go.
    #[arg(long, value_name = "DIR", default_value = "./checkpoints")]
    output_dir: PathBuf,
    /// Steps between checkpoints. The last five stay, and the best by evaluation loss.
    #[arg(long, value_name = "STEPS", default_value_t = 500)]
    save_interval: u64,
    /// Steps between lines; metrics.jsonl has every step.
    #[arg(long, value_name = "STEPS", default_value_t = 10)]
    log_interval: u64,
    /// Steps between evaluations; also before the first step and after the last.
    #[arg(long, value_name = "STEPS", default_value_t = 100)]
    eval_interval: u64,
    /// Go on from `latest` in the output directory, or from a checkpoint's path.
    #[arg(long, value_name = "latest|PATH")]
    resume: Option<String>,
    /// Text that the model goes on from before and after training; may be repeated.
    #[arg(long, value_name = "TEXT")]
    sample_prompt: Vec<String>,
    /// Most tokens of such a sample.
    #[arg(long, value_name = "N", default_value_t = 40)]
    sample_tokens: usize,
    /// 0 takes the likeliest token each time; higher draws more freely, from the 50 likeliest.
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    sample_temperature: f64,
}

#[derive(Args)]
#[command(next_help_heading = "Compute")]
struct ComputeArgs {
    /// Where this side's layers run: cpu, cuda or cuda:N.
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: String,
    /// Type of this side's layers; adapters and optimizer are always f32.
    #[arg(long, value_enum, default_value_t = DType::F32)]
    dtype: DType,
    /// The same as --dtype bf16.
    #[arg(long, conflicts_with = "dtype")]
    mixed_precision: bool,
    /// Type of what travels, both ways. The errors are relative ones of SmolLM2 cut at layers 2 and
    /// 26; a run ends with its own.
    #[arg(long, value_enum, default_value_t = Wire::Bf16)]
    wire_dtype: Wire,
}

#[derive(Clone, Copy, PartialEq, Debug, ValueEnum)]
enum Wire {
    /// 4 bytes a value, nothing is rounded: to compare with an uncut run
    F32,
    /// 2 bytes, error 0.2%: for most runs
    Bf16,
    /// 2 bytes, error 0.02%; takes more computing to pack: for precision on a slow network
    F16,
    /// 1.1 bytes, error 0.2% to 0.7%: where the network is what a run waits for
    Int8,
}

impl From<Wire> for WireDType {
    fn from(wire: Wire) -> Self {
        match wire {
            Wire::F32 => WireDType::F32,
            Wire::Bf16 => WireDType::Bf16,
            Wire::F16 => WireDType::F16,
            Wire::Int8 => WireDType::Int8,
        }
    }
}

#[derive(Clone, Copy, PartialEq, Debug, ValueEnum)]
enum DType {
    F32,
    Bf16,
}

/// Runs the subcommand. Exit status 130 if it was stopped by Ctrl-C.
pub fn run(args: TrainArgs) -> anyhow::Result<ExitCode> {
    let options = args.into_options()?;
    let cancel = CancelToken::default();
    // The trainer computes on this thread; the connection lives on the runtime's.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start threads")?;
    runtime.spawn(stop_on_ctrl_c(cancel.clone()));
    let summary = runtime.block_on(train(options, cancel))?;
    Ok(if summary.interrupted { ExitCode::from(130) } else { ExitCode::SUCCESS })
}

async fn stop_on_ctrl_c(cancel: CancelToken) {
    use tokio::signal::unix::{SignalKind, signal};
    let Ok(mut terminate) = signal(SignalKind::terminate()) else { return };
    let mut asked = false;
    loop {
        tokio::select! {
            _ = tokio::signal::ctrl_c() => {}
            _ = terminate.recv() => {}
        }
        if asked {
            // What is saved stays whole: checkpoints are renamed into place.
            std::process::exit(130);
        }
        asked = true;
        cancel.cancel();
        eprintln!("stopping after this step with a checkpoint; once more ends at once");
    }
}

impl TrainArgs {
    fn into_options(self) -> anyhow::Result<TrainOptions> {
        let TrainArgs { model, data, lora, training, output, compute, legacy } = self;
        let server = model.server.unwrap_or_else(|| address(&model.server_host, model.server_port));
        let bf16 = compute.mixed_precision || compute.dtype == DType::Bf16;
        Ok(TrainOptions {
            session_name: model.session_name.unwrap_or_else(|| last_part(&output.output_dir)),
            model_name: model.model_name,
            model_type: model.model_type,
            split_point_1: model.split_point_1,
            split_point_2: model.split_point_2,
            server,
            client: ClientOptions::default(),
            lora: LoraSpec {
                r: lora.lora_rank,
                lora_alpha: lora.lora_alpha,
                lora_dropout: lora.lora_dropout,
                use_rslora: lora.use_rslora,
                target_modules: lora.target_modules,
            },
            adamw: AdamW { weight_decay: training.weight_decay, ..AdamW::default() },
            train_files: train_files(data.train_file, &legacy)?,
            eval_files: data.eval_file,
            data: DataOptions {
                max_seq_length: data.max_seq_length,
                max_samples: data.max_train_samples,
                prompt_format: match data.prompt_format {
                    Format::Plain => PromptFormat::Plain,
                    Format::Chat => PromptFormat::Chat,
                },
            },
            batch_size: training.batch_size,
            gradient_accumulation_steps: training.gradient_accumulation_steps,
            microbatches_in_flight: training.microbatches_in_flight,
            learning_rate: training.learning_rate,
            warmup_steps: training.warmup_steps,
            max_grad_norm: training.max_grad_norm,
            num_epochs: training.num_epochs,
            max_steps: training.max_steps,
            output_dir: output.output_dir,
            save_interval: output.save_interval,
            log_interval: output.log_interval,
            eval_interval: output.eval_interval,
            device: accelerator::device(&compute.device)?,
            kind: if bf16 { Kind::BFloat16 } else { Kind::Float },
            wire_dtype: compute.wire_dtype.into(),
            seed: training.seed,
            resume: output.resume,
            sample_prompts: output.sample_prompt,
            sample: SampleOptions {
                n_tokens: output.sample_tokens,
                temperature: output.sample_temperature,
                top_k: 50,
                seed: training.seed,
            },
        })
    }
}

/// An IPv6 address needs brackets before a port.
fn address(host: &str, port: u16) -> String {
    if host.contains(':') && !host.starts_with('[') {
        format!("http://[{host}]:{port}")
    } else {
        format!("http://{host}:{port}")
    }
}

fn last_part(dir: &Path) -> String {
    let whole = std::path::absolute(dir).unwrap_or_else(|_| dir.into());
    whole.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn train_files(given: Vec<PathBuf>, legacy: &LegacyTrain) -> anyhow::Result<Vec<PathBuf>> {
    if !given.is_empty() {
        return Ok(given);
    }
    match &legacy.dataset_name {
        Some(name) if Path::new(name).exists() => Ok(vec![name.into()]),
        Some(name) => bail!(
            "--dataset-name {name}: data sets of the hub are not fetched yet. Write the texts to a file and name it with --train-file: plain text with a blank line between samples, or JSONL with one {{\"text\": ...}} on each line"
        ),
        None => {
            bail!("--train-file is missing: name a text file, a JSONL file or a folder of them")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Cli, Command};
    use clap::Parser;

    fn parse(line: &str) -> anyhow::Result<TrainOptions> {
        let cli = Cli::try_parse_from(format!("offshoot train {line}").split_whitespace())?;
        let Command::Train(args) = cli.command else { unreachable!("train was asked for") };
        args.into_options()
    }

    #[test]
    fn defaults_are_those_of_the_library_and_of_the_predecessor() {
        let options = parse("--model-name m --train-file t").unwrap();
        let server = "http://localhost:50051";
        let mut expected = TrainOptions::new("m", server, "t".into(), "./checkpoints".into());
        expected.session_name = "checkpoints".into();
        assert_eq!(format!("{options:?}"), format!("{expected:?}"));
    }

    #[test]
    fn the_predecessors_command_line_parses() {
        let options = parse(
            "--model-type qwen2 --model-name Qwen/Qwen2-0.5B --split-point-1 0 --split-point-2 14 \
             --server-host localhost --server-port 50052 --lora-rank 8 --lora-alpha 16 \
             --lora-dropout 0.1 --batch-size 4 --learning-rate 1e-4 --num-epochs 3 \
             --max-seq-length 512 --gradient-accumulation-steps 1 --max-grad-norm 1.0 \
             --warmup-steps 100 --dataset-name . --dataset-config wikitext-2-raw-v1 \
             --max-train-samples 10000 --output-dir ./checkpoints --save-interval 500 \
             --log-interval 10 --eval-interval 100 --device cpu --mixed-precision",
        )
        .unwrap();
        assert_eq!(options.server, "http://localhost:50052");
        assert_eq!((options.split_point_1, options.split_point_2), (Some(0), Some(14)));
        assert_eq!(options.data.max_samples, Some(10000));
        assert_eq!(options.kind, Kind::BFloat16);
        assert_eq!(options.train_files, [PathBuf::from(".")]);
    }

    #[test]
    fn a_hub_data_set_says_what_to_do_instead() {
        let error = parse("--model-name m --dataset-name wikitext").unwrap_err().to_string();
        assert!(error.contains("--train-file"), "{error}");
        let error = parse("--model-name m").unwrap_err().to_string();
        assert!(error.contains("--train-file is missing"), "{error}");
    }

    #[test]
    fn servers_and_targets_are_lists_and_addresses() {
        let line = "--model-name m --train-file a --train-file b --target-modules q_proj,v_proj";
        let options = parse(&format!("{line} --server http://h:7")).unwrap();
        assert_eq!(options.server, "http://h:7");
        assert_eq!(options.lora.target_modules, ["q_proj", "v_proj"]);
        assert_eq!(options.train_files.len(), 2);
        assert_eq!(
            parse(&format!("{line} --server-host ::1")).unwrap().server,
            "http://[::1]:50051"
        );
        assert!(parse(&format!("{line} --server http://h:7 --server-host h")).is_err());
    }
}
