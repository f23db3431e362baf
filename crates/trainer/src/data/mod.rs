//! Texts to samples, and samples to packed batches.
//!
//! # What is a sample
//!
//! - Text: the text of a record (a paragraph of a text file, `text` of JSONL and tables). `eos` ends
//!   it. A text longer than the limit becomes several samples, one after the other.
//! - Prompt and completion: both, one after the other, `eos` at the end; the loss is on the
//!   completion only. See [`PromptFormat`] for what stands between.
//! - Messages: the conversation through the model's chat template; the loss is on the assistant's
//!   turns only.
//! - Preference: two samples, the prompt with the chosen answer and with the rejected one; the loss
//!   is on the answers only.
//!
//! [`LossOn`] and [`LongSamples`] are what can be chosen about it. A record of which nothing is left
//! to predict is passed over and counted.
//!
//! # The way
//!
//! [`source`] gives records, [`DataSet::load`] makes them to samples on all cores, or finds the
//! samples of an earlier run; [`Plan`] says which of them are in which microbatch of which step, and
//! [`DataSet::batch`] packs one.

mod cache;
mod hub;
mod make;
mod order;
mod pack;
mod read;
mod sample;
pub mod source;
mod tokenise;

pub use cache::default_cache_dir;
pub use order::{MicrobatchSize, Place, Plan, PlanOptions};
pub use sample::{Batch, DataSet, LoadStats, NOT_PREDICTED, Sample};

use crate::TrainError;
use crate::tokenizer::Tokenizer;
use cache::Cached;
use serde::{Deserialize, Serialize};
use source::DataSource;
use std::path::PathBuf;

/// How a prompt and its completion become one text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PromptFormat {
    /// The prompt, a line break, the completion. No line break is added where the prompt ends, or
    /// the completion begins, with white space.
    #[default]
    Plain,
    /// A conversation of one user message and one answer, through the model's chat template.
    Chat,
}

/// What becomes of a record that is longer than the limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LongSamples {
    /// One sample, without what is too much. Where the answer (of a conversation, the first one)
    /// would lose words, the prompt loses its beginning first, down to a quarter of the limit: its
    /// end is mostly what is asked. Then the end goes.
    Truncate,
    /// Several samples, one after the other.
    Split,
}

/// Of which tokens the loss is. Of plain texts it is of all, of preference pairs of the answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LossOn {
    /// The completion; of a conversation, the assistant's last turn.
    Completion,
    /// The completion; of a conversation, all turns of the assistant.
    Assistant,
    /// Everything, prompts and other people's turns too.
    All,
}

/// How records become samples.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataOptions {
    /// No sample has more tokens.
    pub max_seq_length: usize,
    /// Reading stops after so many samples (pairs, for preferences).
    pub max_samples: Option<usize>,
    /// For `prompt` and `completion`.
    pub prompt_format: PromptFormat,
    /// None: texts are split, all others truncated.
    pub long_samples: Option<LongSamples>,
    /// None: completions, and the assistant's turns.
    pub loss_on: Option<LossOn>,
    /// Another chat template than the model's default one: the name of one of its own, or a file.
    pub chat_template: Option<String>,
    /// Samples are kept there for the next run, see [`default_cache_dir`]. None: they are not.
    pub cache_dir: Option<PathBuf>,
}

impl Default for DataOptions {
    fn default() -> Self {
        DataOptions {
            max_seq_length: 512,
            max_samples: None,
            prompt_format: PromptFormat::Plain,
            long_samples: None,
            loss_on: None,
            chat_template: None,
            cache_dir: None,
        }
    }
}

impl DataSet {
    /// All samples of these sources, in their order. They are read in pieces and tokenised on all
    /// cores; or taken from the cache, if the same records were made to samples in the same way.
    ///
    /// # Errors
    /// Of the first record that cannot be read, or that the chat template refuses; and if there is no
    /// sample at all.
    pub fn load(
        sources: &[Box<dyn DataSource>],
        options: &DataOptions,
        tokenizer: &Tokenizer,
    ) -> Result<Self, TrainError> {
        let cached = match &options.cache_dir {
            Some(dir) => Some(Cached::find(dir, sources, options, tokenizer)?),
            None => None,
        };
        if let Some(data) = cached.as_ref().and_then(Cached::read) {
            return Ok(data);
        }
        let data = tokenise::samples_of(sources, options, tokenizer)?;
        if data.is_empty() {
            let names: Vec<String> = sources.iter().map(|source| source.name()).collect();
            let problem = match data.stats.n_records {
                0 => "there is no record".into(),
                n => format!(
                    "in each of the {n} records nothing is left to predict after cutting to {} tokens; raise --max-seq-length, or look for empty completions",
                    options.max_seq_length
                ),
            };
            return Err(TrainError::NoSamples { files: names.join(", "), problem });
        }
        if let Some(cached) = cached {
            cached.write(&data);
        }
        Ok(data)
    }
}

#[cfg(test)]
mod tests;
