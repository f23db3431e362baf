use super::samples_args::SamplesArgs;
use crate::legacy::LegacyTrain;
use anyhow::bail;
use clap::Args;
use offshoot_trainer::data::DataOptions;
use offshoot_trainer::options::SourceOptions;
use std::path::{Path, PathBuf};

#[derive(Args)]
#[command(next_help_heading = "Data")]
pub struct DataArgs {
    /// Text or JSONL to train on, or a folder of them; may be repeated. In a text file each
    /// paragraph (up to a blank line) is a sample. A JSONL line has "text", or "prompt" and
    /// "completion" (only the completion is learned), or "messages" (only the assistant's turns
    /// are learned).
    #[arg(long, value_name = "PATH")]
    train_file: Vec<PathBuf>,
    /// The same for evaluation; without it nothing is evaluated.
    #[arg(long, value_name = "PATH")]
    eval_file: Vec<PathBuf>,
    /// Train on the first so many samples only.
    #[arg(long, value_name = "N")]
    max_train_samples: Option<usize>,
    #[command(flatten)]
    samples: SamplesArgs,
}

impl DataArgs {
    /// What the trainer takes: where the texts are, and how they become samples.
    pub fn into_options(
        self,
        legacy: &LegacyTrain,
    ) -> anyhow::Result<(SourceOptions, DataOptions)> {
        let train_files = train_files(self.train_file, legacy)?;
        let sources = SourceOptions { train_files, eval_files: self.eval_file };
        let data =
            DataOptions { max_samples: self.max_train_samples, ..self.samples.into_options() };
        Ok((sources, data))
    }
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
