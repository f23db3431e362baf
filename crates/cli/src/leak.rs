mod table;

use crate::accelerator;
use crate::base::Base;
use crate::noise_args::{GradientNoiseArgs, HiddenNoiseArgs};
use crate::train::column_args::ColumnArgs;
use crate::train::compute_args::DType;
use crate::train::samples_args::SamplesArgs;
use anyhow::ensure;
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use offshoot_trainer::adapter::Step;
use offshoot_trainer::data::source::DataSpec;
use offshoot_trainer::data::{DataOptions, DataSet};
use offshoot_trainer::evaluate::Subject;
use offshoot_trainer::fit;
use offshoot_trainer::leak::{LeakData, LeakOptions, measure};
use offshoot_trainer::noise::PrivacyOptions;
use offshoot_trainer::tokenizer::Tokenizer;
use serde_json::json;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use table::Shown;
use tch::Kind;

/// Measure how much of your text a server could read from what training would send it.
///
/// Nothing is sent: bottom and readers run in this process. For each first split point, three simple
/// readers try to name every token of a sample of your text from its row of hidden states, as the
/// server would see it:
///
///   nearest: the token whose embedding points most nearly where the row does (cosine);
///   centred: the same, after the mean of all rows and of all embeddings is taken off;
///   linear: a least-squares map from rows to embeddings, fitted on text that the reader knows, then
///   the nearest embedding.
///
/// "top 1" is the share of tokens that the reader's first guess names, "top 10" the share that is among
/// its first ten. Compare both with the line above the table: what one gets by always guessing the
/// commonest tokens. "frequent" are the commonest tokens that together make up half of the text, "rare"
/// all others: names, numbers and what a text is about are among these. Norms of rows are what
/// --hidden-clip-norm is chosen by.
///
/// By default the linear reader learns from the half of your text that is not measured: somebody who
/// knows texts like yours. With --reader-data it learns from that file and the public model only:
/// somebody who knows nothing of yours. With --split-point-2 it is also measured how many labels
/// (next tokens) can be read from the gradients that go back.
#[derive(Args)]
#[command(after_help = EXAMPLES, verbatim_doc_comment)]
pub struct LeakArgs {
    /// The model: a Hugging Face directory, a GGUF file or a hub name [default: the one that the
    /// adapter names].
    #[arg(long, value_name = "NAME|PATH", required_unless_present = "adapter")]
    model_name: Option<String>,
    /// The first layer of the trunk; several are measured in one pass [default: 1 2 4 8, as far as
    /// the model has so many layers in front of --split-point-2].
    #[arg(long, value_name = "LAYER", num_args = 1.., value_delimiter = ',')]
    split_point_1: Vec<usize>,
    /// The first layer behind the trunk: measure labels, too. The number of layers: no layer is left
    /// to the client. Loads the whole model [default: labels are not measured].
    #[arg(long, value_name = "LAYER")]
    split_point_2: Option<usize>,
    /// The adapter of a run, whose bottom counts: a PEFT directory, the --output-dir of a run, or a
    /// checkpoint_step_N [default: none, as before the first step].
    #[arg(long, value_name = "PATH")]
    adapter: Option<PathBuf>,
    /// Which checkpoint, if --adapter is a run: latest, best or a step's number.
    #[arg(long, value_name = "STEP", requires = "adapter")]
    step: Option<Step>,
    #[command(flatten)]
    data: LeakText,
    #[command(flatten)]
    samples: SamplesArgs,
    #[command(flatten)]
    hidden: HiddenNoiseArgs,
    #[command(flatten)]
    gradients: GradientNoiseArgs,
    /// Where it is computed: cpu, cuda or cuda:N.
    #[arg(long, value_name = "DEVICE", default_value = "cpu", help_heading = "Compute")]
    device: String,
    /// Type of the layers.
    #[arg(long, value_enum, default_value_t = DType::F32, help_heading = "Compute")]
    dtype: DType,
    /// Show so many samples beside what the linear reader makes of them.
    #[arg(long, value_name = "N", default_value_t = 3, help_heading = "Output")]
    show: usize,
    /// Print JSON instead of tables.
    #[arg(long, help_heading = "Output")]
    json: bool,
}

#[derive(Args)]
#[command(next_help_heading = "Data")]
struct LeakText {
    /// The text: a file or folder, of any kind that `offshoot train` reads; may be repeated.
    #[arg(long, value_name = "PATH")]
    train_file: Vec<PathBuf>,
    /// A data set of the hub, or a folder with splits.
    #[arg(long, value_name = "NAME|PATH", conflicts_with = "train_file")]
    dataset_name: Option<String>,
    /// Which config of a data set that has several, such as wikitext-2-raw-v1.
    #[arg(long, value_name = "NAME", requires = "dataset_name")]
    dataset_config: Option<String>,
    /// Which of its splits.
    #[arg(long, value_name = "NAME", requires = "dataset_name", default_value = "train")]
    train_split: String,
    /// What the linear reader learns from, such as public text: a file or folder; may be repeated
    /// [default: the rest of your text].
    #[arg(long, value_name = "PATH")]
    reader_data: Vec<PathBuf>,
    /// Measure at most so many tokens, drawn from all samples: the same ones every time.
    #[arg(long, value_name = "N", default_value_t = 4000)]
    tokens: usize,
    /// The linear reader learns from at most so many.
    #[arg(long, value_name = "N", default_value_t = 20000)]
    reader_tokens: usize,
    #[command(flatten)]
    columns: ColumnArgs,
}

/// Enough for a share to within some percent, in some seconds.
const MOST_LABELS: usize = 100;

const EXAMPLES: &str = "\
Examples:
  offshoot leak --model-name Qwen/Qwen2-0.5B --train-file texts.jsonl
  offshoot leak --model-name ./gpt2 --train-file texts.jsonl --split-point-1 2 \\
      --hidden-clip-norm 60 --hidden-noise 0.25
  offshoot leak --adapter run --train-file texts.jsonl --reader-data public.txt --split-point-2 10

Low numbers are no proof: these readers are simple, and a stronger one recovers more.";

/// Runs the subcommand.
pub fn run(args: LeakArgs) -> anyhow::Result<ExitCode> {
    args.data.check()?;
    let device = accelerator::device(&args.device)?;
    let privacy = PrivacyOptions {
        hidden: args.hidden.into(),
        gradients: args.gradients.into(),
        noise_key: None,
    };
    privacy.validate()?;
    let base = Base::find(args.model_name, args.adapter.as_deref(), args.step)?;
    let Base { name, checkpoint, config, adapter } = base;
    let samples = args.samples.into_options();
    config.check_length(samples.max_seq_length)?;
    let tokenizer = Tokenizer::load_with(&checkpoint, samples.chat_template.as_deref())?;
    let (n_tokens, n_reader_tokens) = (args.data.tokens, args.data.reader_tokens);
    let (text, reader) = args.data.load(&samples, &tokenizer)?;
    for data in [Some(&text), reader.as_ref()].into_iter().flatten() {
        fit::vocabulary(data.highest_id(), &tokenizer, &config)?;
    }
    let options = LeakOptions {
        subject: Subject {
            checkpoint: &checkpoint,
            config: &config,
            kind: Kind::from(args.dtype),
            device,
        },
        adapter: adapter.as_ref(),
        split_points_1: match args.split_point_1.is_empty() {
            true => usual_points(args.split_point_2.unwrap_or(config.n_layers), config.n_layers),
            false => args.split_point_1,
        },
        split_point_2: args.split_point_2,
        privacy,
        n_tokens,
        n_reader_tokens,
        n_labels: MOST_LABELS,
    };
    let data = LeakData { text: &text, reader: reader.as_ref() };
    let leak = with_bar(|progress| measure(&options, &data, progress))?;
    if args.json {
        let mut result = json!({
            "model": name,
            "adapter": args.adapter,
            "hidden_clip_norm": options.privacy.hidden.clip_norm,
            "hidden_noise": options.privacy.hidden.noise,
            "gradient_clip_norm": options.privacy.gradients.clip_norm,
            "gradient_noise": options.privacy.gradients.noise,
        });
        if let (Some(result), serde_json::Value::Object(leak)) =
            (result.as_object_mut(), serde_json::to_value(&leak)?)
        {
            result.extend(leak);
        }
        println!("{result}");
    } else {
        let shown = Shown { leak: &leak, tokenizer: &tokenizer, privacy: &options.privacy };
        print!("{}", shown.text(args.show)?);
    }
    Ok(ExitCode::SUCCESS)
}

/// First split points of whoever names none, all in front of `end`.
fn usual_points(end: usize, n_layers: usize) -> Vec<usize> {
    let points = [1, 2, 4, 8].into_iter().filter(|point| *point < end.min(n_layers));
    match points.collect::<Vec<_>>() {
        // Only then is there a trunk at all.
        none if none.is_empty() => vec![0],
        points => points,
    }
}

impl LeakText {
    fn check(&self) -> anyhow::Result<()> {
        ensure!(
            self.dataset_name.is_some() || !self.train_file.is_empty(),
            "name the text to measure: a file or folder with --train-file, or a data set of the hub with --dataset-name"
        );
        Ok(())
    }

    /// The text, and what the reader knows, if that is something else.
    fn load(
        self,
        options: &DataOptions,
        tokenizer: &Tokenizer,
    ) -> anyhow::Result<(DataSet, Option<DataSet>)> {
        let own = DataSpec {
            dataset_name: self.dataset_name,
            dataset_config: self.dataset_config,
            train_split: self.train_split,
            train_files: self.train_file,
            columns: self.columns.into(),
            ..DataSpec::default()
        };
        // Columns that were named are those of one's own text.
        let reader = Some(self.reader_data).filter(|files| !files.is_empty()).map(DataSpec::files);
        let load = |spec: DataSpec| DataSet::load(&spec.open()?.train, options, tokenizer);
        Ok((load(own)?, reader.map(load).transpose()?))
    }
}

/// With a bar, if stderr is a terminal.
fn with_bar<T>(work: impl FnOnce(&mut dyn FnMut(usize, usize)) -> T) -> T {
    if !std::io::stderr().is_terminal() {
        return work(&mut |_, _| {});
    }
    let style = ProgressStyle::with_template("{bar:24} {percent:>3}% [{elapsed} < {eta}]");
    let bar = ProgressBar::new(1).with_style(style.expect("a fixed template"));
    let done = work(&mut |done, total| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
    });
    bar.finish_and_clear();
    done
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Cli, Command};
    use clap::Parser;

    fn parse(line: &str) -> Result<LeakArgs, clap::Error> {
        let cli = Cli::try_parse_from(format!("offshoot leak {line}").split_whitespace())?;
        let Command::Leak(args) = cli.command else { unreachable!("leak was asked for") };
        Ok(*args)
    }

    #[test]
    fn the_usual_split_points_are_in_front_of_the_second_one() {
        assert_eq!(usual_points(28, 30), [1, 2, 4, 8]);
        assert_eq!(usual_points(2, 30), [1]);
        assert_eq!(usual_points(1, 30), [0]);
        assert_eq!(usual_points(40, 3), [1, 2]);
    }

    #[test]
    fn several_split_points_are_a_list() {
        let args = parse("--model-name m --split-point-1 1 2 4 --train-file t").unwrap();
        assert_eq!(args.split_point_1, [1, 2, 4]);
        let args = parse("--model-name m --train-file t --split-point-1 1,2").unwrap();
        assert_eq!((args.split_point_1, args.show), (vec![1, 2], 3));
        let text = parse("--model-name m").unwrap().data.check().unwrap_err().to_string();
        assert!(text.contains("--train-file") && text.contains("--dataset-name"), "{text}");
        assert!(parse("--train-file t").is_err(), "no model");
    }
}
