use super::column_args::ColumnArgs;
use super::samples_args::SamplesArgs;
use clap::Args;
use offshoot_trainer::data::DataOptions;
use offshoot_trainer::data::source::DataSpec;
use std::path::PathBuf;

#[derive(Args)]
#[command(next_help_heading = "Data")]
pub struct DataArgs {
    /// A file to train on, or a folder of them; may be repeated. Text (.txt: each paragraph, up to a
    /// blank line, is a sample), .jsonl, .json (a list of objects), .csv and .tsv (with a header),
    /// .parquet, each also with .gz or .zst. Objects and tables have a column "text", or "prompt" and
    /// "completion" (only the completion is learned), or "messages" (only the assistant's turns are
    /// learned), or "chosen" and "rejected" (for --loss dpo); other names are told with
    /// --text-column and the options beside it.
    #[arg(long, value_name = "PATH")]
    train_file: Vec<PathBuf>,
    /// The same for evaluation.
    #[arg(long, value_name = "PATH")]
    eval_file: Vec<PathBuf>,
    /// Instead of --train-file: a file or folder if there is one of this name, otherwise a data set of
    /// the hub, such as wikitext or OWNER/NAME. Its splits are seen from its card, or from the names
    /// of its files and folders (train, validation, test). It is fetched once, as HF_HOME,
    /// HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE say.
    #[arg(long, value_name = "NAME|PATH")]
    dataset_name: Option<String>,
    /// Which config of a data set that has several, such as wikitext-2-raw-v1.
    #[arg(long, value_name = "NAME")]
    dataset_config: Option<String>,
    /// The split of the data set to train on.
    #[arg(long, value_name = "NAME", default_value = "train")]
    train_split: String,
    /// The split of the data set to evaluate on [default: validation, or else test, if there is one].
    #[arg(long, value_name = "NAME")]
    eval_split: Option<String>,
    /// Take this part of the training data out of training, such as 0.05, and evaluate on it. Which
    /// records follows from --seed and from what is in them: the same ones in every run, and equal
    /// records stay on one side. Without it, without --eval-file and without an evaluation split,
    /// nothing is evaluated.
    #[arg(long, value_name = "FRACTION", default_value_t = 0.0, allow_negative_numbers = true)]
    eval_fraction: f64,
    /// Train on the first so many samples only.
    #[arg(long, value_name = "N")]
    max_train_samples: Option<usize>,
    /// Evaluate on the first so many samples only: every evaluation goes through all of them.
    #[arg(long, value_name = "N")]
    max_eval_samples: Option<usize>,
    #[command(flatten)]
    columns: ColumnArgs,
    #[command(flatten)]
    samples: SamplesArgs,
}

impl DataArgs {
    /// What the trainer takes: where the texts are, and how they become samples.
    pub fn into_options(self) -> (DataSpec, DataOptions) {
        let sources = DataSpec {
            dataset_name: self.dataset_name,
            dataset_config: self.dataset_config,
            train_split: self.train_split,
            eval_split: self.eval_split,
            train_files: self.train_file,
            eval_files: self.eval_file,
            columns: self.columns.into(),
            eval_fraction: self.eval_fraction,
            max_train_samples: self.max_train_samples,
            max_eval_samples: self.max_eval_samples,
            ..DataSpec::default()
        };
        (sources, self.samples.into_options())
    }
}
