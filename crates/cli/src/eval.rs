use crate::accelerator;
use crate::base::Base;
use crate::noise_args::{HiddenNoiseArgs, in_words};
use crate::server_args::ServerArgs;
use crate::telemetry::TelemetryArgs;
use crate::train::column_args::ColumnArgs;
use crate::train::compute_args::DType;
use crate::train::samples_args::SamplesArgs;
use anyhow::{Context, ensure};
use clap::Args;
use offshoot_client::{Client, ClientOptions, WireDType};
use offshoot_trainer::adapter::{Adapter, Step};
use offshoot_trainer::data::source::DataSpec;
use offshoot_trainer::data::{Batch, DataOptions, DataSet, MicrobatchSize};
use offshoot_trainer::evaluate::{self, Evaluation, Subject, Through, Uncut};
use offshoot_trainer::fit;
use offshoot_trainer::noise::PrivacyOptions;
use offshoot_trainer::tokenizer::Tokenizer;
use serde_json::{Value, json};
use std::path::PathBuf;
use std::process::ExitCode;
use tch::Kind;

/// Loss and perplexity of a model, without and with an adapter, on a data set.
///
/// The whole model is evaluated in this process; with --server, the first and last layers here and
/// the trunk there, in a session that is forgotten afterwards. For a merged model name it as
/// --model-name. The loss is the mean cross-entropy in nats of the tokens that training would learn
/// from: of texts all, of prompts with completions the completions, of conversations the
/// assistant's turns (--loss-on).
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct EvalArgs {
    /// The model: a Hugging Face directory, a GGUF file or a hub name [default: the one that the
    /// adapter names].
    #[arg(long, value_name = "NAME|PATH", required_unless_present = "adapter")]
    model_name: Option<String>,
    /// A PEFT directory, the --output-dir of a run, or a checkpoint_step_N.
    #[arg(long, value_name = "PATH")]
    adapter: Option<PathBuf>,
    /// Which checkpoint, if --adapter is a run: latest, best or a step's number.
    #[arg(long, value_name = "STEP", requires = "adapter")]
    step: Option<Step>,
    /// Leave the base model out.
    #[arg(long, requires = "adapter")]
    no_base: bool,
    #[command(flatten)]
    data: EvalData,
    #[command(flatten)]
    samples: SamplesArgs,
    #[command(flatten)]
    server: ServerArgs,
    #[command(flatten)]
    privacy: HiddenNoiseArgs,
    /// Where this side's layers run: cpu, cuda or cuda:N.
    #[arg(long, value_name = "DEVICE", default_value = "cpu", help_heading = "Compute")]
    device: String,
    /// Type of this side's layers.
    #[arg(long, value_enum, default_value_t = DType::F32, help_heading = "Compute")]
    dtype: DType,
    /// Most tokens at once; changes no number.
    #[arg(long, value_name = "TOKENS", default_value_t = 2048, help_heading = "Compute")]
    max_tokens_per_batch: usize,
    /// Print JSON instead of a table.
    #[arg(long, help_heading = "Output")]
    json: bool,
    #[command(flatten)]
    pub telemetry: TelemetryArgs,
}

#[derive(Args)]
#[command(next_help_heading = "Data")]
struct EvalData {
    /// A file or a folder, of any kind that `offshoot train` reads; may be repeated.
    #[arg(long, value_name = "PATH")]
    eval_file: Vec<PathBuf>,
    /// A data set of the hub, or a folder with splits.
    #[arg(long, value_name = "NAME|PATH", conflicts_with = "eval_file")]
    dataset_name: Option<String>,
    /// Which config of a data set that has several, such as wikitext-2-raw-v1.
    #[arg(long, value_name = "NAME", requires = "dataset_name")]
    dataset_config: Option<String>,
    /// Which of its splits [default: validation, or else test].
    #[arg(long, value_name = "NAME", requires = "dataset_name")]
    eval_split: Option<String>,
    /// Only the first so many samples.
    #[arg(long, value_name = "N")]
    max_eval_samples: Option<usize>,
    #[command(flatten)]
    columns: ColumnArgs,
}

impl From<EvalData> for DataSpec {
    fn from(data: EvalData) -> DataSpec {
        DataSpec {
            dataset_name: data.dataset_name,
            dataset_config: data.dataset_config,
            eval_split: data.eval_split,
            eval_files: data.eval_file,
            columns: data.columns.into(),
            max_eval_samples: data.max_eval_samples,
            ..DataSpec::default()
        }
    }
}

const EXAMPLES: &str = "\
Examples:
  offshoot eval --model-name ./gpt2 --adapter run --eval-file held-out.jsonl
  offshoot eval --model-name ./gpt2 --adapter run --step best --eval-file held-out.jsonl \\
      --server trunk.local:50051
  offshoot eval --model-name ./merged --eval-file held-out.jsonl --json";

/// Runs the subcommand.
pub fn run(args: EvalArgs) -> anyhow::Result<ExitCode> {
    let device = accelerator::device(&args.device)?;
    let server = args.server.address();
    let base = Base::find(args.model_name, args.adapter.as_deref(), args.step)?;
    let Base { name, checkpoint, config, adapter } = base;
    let kind = Kind::from(args.dtype);
    let subject = Subject { checkpoint: &checkpoint, config: &config, kind, device };
    let models = match (&adapter, args.no_base) {
        (None, _) => vec![None],
        (Some(adapter), true) => vec![Some(adapter)],
        (Some(adapter), false) => vec![None, Some(adapter)],
    };
    let task = Task {
        subject,
        models,
        sources: args.data.into(),
        options: args.samples.into_options(),
        max_tokens: args.max_tokens_per_batch,
        wire_dtype: args.server.wire_dtype.into(),
        device: args.device,
        privacy: args.privacy.into_options(server.as_deref())?,
    };
    // The model computes on this thread; the connection lives on the runtime's.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start threads")?;
    let rows = match &server {
        None => task.uncut()?,
        Some(address) => {
            let way = args.server.connection.options(ClientOptions::default())?;
            runtime.block_on(task.split(address, way))?
        }
    };
    if args.json {
        let mut result = json!({
            "model": name,
            "adapter": args.adapter,
            "server": server,
            "dtype": dtype_name(kind),
            "hidden_clip_norm": task.privacy.hidden.clip_norm,
            "hidden_noise": task.privacy.hidden.noise,
        });
        add_rows(&mut result, &rows);
        println!("{result}");
    } else {
        print(&rows, &task.place(server.as_deref()));
    }
    Ok(ExitCode::SUCCESS)
}

/// What is evaluated, on what.
struct Task<'a> {
    subject: Subject<'a>,
    /// None: the base model.
    models: Vec<Option<&'a Adapter>>,
    sources: DataSpec,
    options: DataOptions,
    max_tokens: usize,
    wire_dtype: WireDType,
    /// As it was asked for.
    device: String,
    privacy: PrivacyOptions,
}

/// "base" or "adapter", and what came of it.
type Row = (&'static str, Evaluation);

fn name(adapter: Option<&Adapter>) -> &'static str {
    if adapter.is_some() { "adapter" } else { "base" }
}

impl Task<'_> {
    fn uncut(&self) -> anyhow::Result<Vec<Row>> {
        let batches = self.batches(usize::MAX)?;
        let model = Uncut::load(&self.subject)?;
        let each = self.models.iter().copied();
        each.map(|adapter| Ok((name(adapter), model.evaluate(adapter, &batches)?))).collect()
    }

    async fn split(&self, address: &str, way: ClientOptions) -> anyhow::Result<Vec<Row>> {
        let client = Client::connect_with(address, way).await?;
        let server = client.describe().await?;
        // Before the data are read, which may take longer.
        let Subject { checkpoint, config, .. } = self.subject;
        fit::fingerprint(&server, checkpoint.name(), config, &checkpoint.fingerprint())?;
        let batches = self.batches(server.limits.max_tokens_per_microbatch as usize)?;
        let mut rows = Vec::new();
        let (wire_dtype, privacy) = (self.wire_dtype, &self.privacy);
        let through = Through { client: &client, wire_dtype, privacy };
        for adapter in self.models.iter().copied() {
            let split = evaluate::split(&self.subject, &through, adapter, &batches);
            rows.push((name(adapter), split.await?));
        }
        Ok(rows)
    }

    fn batches(&self, server_max_tokens: usize) -> anyhow::Result<Vec<Batch>> {
        let options = &self.options;
        self.subject.config.check_length(options.max_seq_length)?;
        let template = options.chat_template.as_deref();
        let tokenizer = Tokenizer::load_with(self.subject.checkpoint, template)?;
        ensure!(
            self.sources.dataset_name.is_some() || !self.sources.eval_files.is_empty(),
            "name what to evaluate on: a file or folder with --eval-file, or a data set of the hub with --dataset-name"
        );
        let sources = self.sources.open_evaluation()?;
        let max_samples = self.sources.max_eval_samples;
        let options = DataOptions { max_samples, ..options.clone() };
        let data = DataSet::load(&sources, &options, &tokenizer)?;
        fit::vocabulary(data.highest_id(), &tokenizer, self.subject.config)?;
        ensure!(
            data.unit == 1,
            "the data are preferences (chosen and rejected), and there is no perplexity of a pair; offshoot train --loss dpo evaluates them"
        );
        let max_tokens = self.max_tokens.max(options.max_seq_length);
        let max_tokens = max_tokens.min(server_max_tokens);
        let size = MicrobatchSize::Tokens { max_tokens, max_samples: None };
        Ok(data.in_order(size, server_max_tokens)?)
    }

    /// Where it was computed.
    fn place(&self, through: Option<&str>) -> String {
        let (dtype, device) = (dtype_name(self.subject.kind), &self.device);
        match through {
            None => format!("uncut, {dtype} on {device}"),
            Some(address) => format!(
                "through {address}, {dtype} on {device} here, {} between{}",
                self.wire_dtype.name(),
                match self.privacy.hidden {
                    none if none.is_none() => String::new(),
                    hidden => format!(", hidden states {}", in_words(hidden)),
                }
            ),
        }
    }
}

fn dtype_name(kind: Kind) -> &'static str {
    if kind == Kind::Float { "f32" } else { "bf16" }
}

fn print(rows: &[Row], place: &str) {
    println!("{:8} {:>10} {:>12}", "", "loss", "perplexity");
    for (name, of) in rows {
        println!("{name:8} {:>10.6} {:>12.4}", of.loss, of.perplexity());
    }
    if let Some((_, Evaluation { samples, tokens, predicted, .. })) = rows.first() {
        println!("{samples} samples, {tokens} tokens, {predicted} of them predicted; {place}");
    }
}

fn add_rows(result: &mut Value, rows: &[Row]) {
    for (name, of) in rows {
        result["samples"] = of.samples.into();
        result["tokens"] = of.tokens.into();
        result["predicted_tokens"] = of.predicted.into();
        result[*name] = json!({ "loss": of.loss, "perplexity": of.perplexity() });
    }
}
