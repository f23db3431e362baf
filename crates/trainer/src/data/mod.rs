//! Texts to samples, and samples to packed batches.
//!
//! # What is a sample
//!
//! - Text file: a paragraph, that is, lines up to a blank line. `eos` ends it. A paragraph longer
//!   than the limit becomes several samples, one after the other.
//! - JSONL, `{"text": ...}`: the text, in the same way.
//! - JSONL, `{"prompt": ..., "completion": ...}`: both, one after the other, `eos` at the end; the
//!   loss is on the completion only. See [`PromptFormat`] for what stands between.
//! - JSONL, `{"messages": [{"role": ..., "content": ...}, ...]}`: the conversation through the
//!   model's chat template; the loss is on the assistant's turns only.
//!
//! Prompts with completions, and conversations, are cut off at the limit. A sample in which nothing
//! is left to predict is passed over and counted.

mod order;
mod read;
pub mod source;

pub use order::{Order, Place};

use crate::TrainError;
use crate::tokenizer::Tokenizer;
use serde::{Deserialize, Serialize};
use source::Record;
use std::path::PathBuf;

/// The label of a position whose next token is not to be predicted, as in PyTorch.
pub const NOT_PREDICTED: i64 = -100;

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

/// How files become samples.
#[derive(Clone, Debug)]
pub struct DataOptions {
    /// No sample has more tokens.
    pub max_seq_length: usize,
    /// Reading stops after so many samples.
    pub max_samples: Option<usize>,
    /// For `prompt` and `completion`.
    pub prompt_format: PromptFormat,
}

/// One sequence to learn from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// Token ids.
    pub ids: Vec<i64>,
    /// For each token, whether it is to be predicted from those before it. The first never is.
    pub learn: Vec<bool>,
}

impl Sample {
    /// Labels of the packed rows: the token after each position, or [`NOT_PREDICTED`].
    fn labels(&self) -> impl Iterator<Item = i64> {
        let next = self.ids.iter().zip(&self.learn).skip(1);
        next.map(|(&id, &learn)| if learn { id } else { NOT_PREDICTED }).chain([NOT_PREDICTED])
    }

    fn n_predicted(&self) -> usize {
        self.learn.iter().skip(1).filter(|&&learn| learn).count()
    }
}

/// All samples of a run, in the order of the files.
#[derive(Debug)]
pub struct DataSet {
    /// In the order of the files.
    pub samples: Vec<Sample>,
    /// Records in which nothing was left to predict.
    pub n_skipped: usize,
}

impl DataSet {
    /// Reads files, and the data files of folders, in the order given.
    pub fn load(
        paths: &[PathBuf],
        options: &DataOptions,
        tokenizer: &Tokenizer,
    ) -> Result<Self, TrainError> {
        let mut data = DataSet { samples: Vec::new(), n_skipped: 0 };
        for source in read::sources(paths)? {
            for located in source.records()? {
                let (place, record) = located?;
                if options.max_samples.is_some_and(|n| data.samples.len() >= n) {
                    return Ok(data);
                }
                data.add(record, &place, options, tokenizer)?;
            }
        }
        if let Some(n) = options.max_samples {
            data.samples.truncate(n);
        }
        if data.samples.is_empty() {
            return Err(TrainError::NoSamples {
                files: paths.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join(", "),
                problem: match data.n_skipped {
                    0 => "the files hold no text".into(),
                    n => format!(
                        "in each of the {n} records nothing is left to predict after cutting to {} tokens; raise --max-seq-length, or look for empty completions",
                        options.max_seq_length
                    ),
                },
            });
        }
        Ok(data)
    }

    fn add(
        &mut self,
        record: Record,
        place: &source::Place,
        options: &DataOptions,
        tokenizer: &Tokenizer,
    ) -> Result<(), TrainError> {
        let limit = options.max_seq_length;
        let before = self.samples.len();
        let samples = match record {
            Record::Text(text) => split_text(&text, limit, tokenizer)?,
            Record::Completion { prompt, completion } => {
                vec![match options.prompt_format {
                    PromptFormat::Plain => plain_completion(&prompt, &completion, tokenizer)?,
                    PromptFormat::Chat => conversation(
                        &[
                            serde_json::json!({ "role": "user", "content": prompt }),
                            serde_json::json!({ "role": "assistant", "content": completion }),
                        ],
                        tokenizer,
                    )
                    .map_err(|e| place.explain(e))?,
                }]
            }
            Record::Chat { messages, .. } => {
                vec![conversation(&messages, tokenizer).map_err(|e| place.explain(e))?]
            }
            Record::Preference { .. } => {
                return Err(place.wrong("a preference pair: not learned from yet"));
            }
        };
        for mut sample in samples {
            sample.ids.truncate(limit);
            sample.learn.truncate(limit);
            if sample.n_predicted() > 0 {
                self.samples.push(sample);
            }
        }
        self.n_skipped += usize::from(self.samples.len() == before);
        Ok(())
    }

    /// Tokens of all samples.
    pub fn n_tokens(&self) -> usize {
        self.samples.iter().map(|s| s.ids.len()).sum()
    }

    /// Equal for equal samples in equal order; a resumed run must see the same.
    pub fn fingerprint(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        for sample in &self.samples {
            hasher.update(&(sample.ids.len() as u64).to_le_bytes());
            for (id, learn) in sample.ids.iter().zip(&sample.learn) {
                hasher.update(&id.to_le_bytes()).update(&[u8::from(*learn)]);
            }
        }
        hasher.finalize().to_hex()[..32].to_string()
    }

    /// Packs samples into microbatches of at most `batch_size` sequences and `max_tokens` tokens.
    pub fn batches(&self, samples: &[usize], batch_size: usize, max_tokens: usize) -> Vec<Batch> {
        let mut batches: Vec<Batch> = Vec::new();
        for of_batch in samples.chunks(batch_size) {
            // Neighbours of one length are cheaper for attention; the sum over them is the same.
            let mut of_batch = of_batch.to_vec();
            of_batch.sort_by_key(|&i| std::cmp::Reverse(self.samples[i].ids.len()));
            let mut open = Batch::default();
            for i in of_batch {
                let sample = &self.samples[i];
                if open.n_tokens() > 0 && open.n_tokens() + sample.ids.len() > max_tokens {
                    batches.push(std::mem::take(&mut open));
                }
                open.push(sample);
            }
            batches.push(open);
        }
        batches
    }
}

/// Sequences packed one after the other, without padding: what one microbatch runs on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// `[N]` token ids.
    pub ids: Vec<i64>,
    /// Tokens of each sequence; they sum to N.
    pub seq_lens: Vec<usize>,
    /// `[N]`, the token after each position, or [`NOT_PREDICTED`].
    pub labels: Vec<i64>,
    /// For each sequence, which sample of its [`DataSet`] it is; counted from 0 where there is none.
    pub samples: Vec<usize>,
}

impl Batch {
    /// Adds a sequence at the end.
    pub fn push(&mut self, sample: &Sample) {
        self.ids.extend(&sample.ids);
        self.labels.extend(sample.labels());
        self.samples.push(self.seq_lens.len());
        self.seq_lens.push(sample.ids.len());
    }

    /// N.
    pub fn n_tokens(&self) -> usize {
        self.ids.len()
    }

    /// Positions that count in the loss.
    pub fn n_predicted(&self) -> usize {
        self.labels.iter().filter(|&&label| label != NOT_PREDICTED).count()
    }
}

fn widen(ids: &[u32]) -> impl Iterator<Item = i64> {
    ids.iter().map(|&id| i64::from(id))
}

fn with_eos(mut ids: Vec<u32>, tokenizer: &Tokenizer) -> Vec<u32> {
    if let Some(eos) = tokenizer.eos_id().filter(|eos| ids.last() != Some(eos)) {
        ids.push(eos);
    }
    ids
}

/// A text in pieces of `limit` tokens.
fn split_text(text: &str, limit: usize, tokenizer: &Tokenizer) -> Result<Vec<Sample>, TrainError> {
    let ids = with_eos(tokenizer.encode(text)?, tokenizer);
    let piece = |ids: &[u32]| Sample { ids: widen(ids).collect(), learn: vec![true; ids.len()] };
    Ok(ids.chunks(limit).map(piece).collect())
}

fn plain_completion(
    prompt: &str,
    completion: &str,
    tokenizer: &Tokenizer,
) -> Result<Sample, TrainError> {
    let apart =
        prompt.ends_with(char::is_whitespace) || completion.starts_with(char::is_whitespace);
    let prompt = if apart { prompt.to_string() } else { format!("{prompt}\n") };
    // Each for itself, so that the prompt's tokens are those that generation will begin with.
    let prompt = tokenizer.encode(&prompt)?;
    let completion = with_eos(tokenizer.encode_continuation(completion)?, tokenizer);
    let mut learn = vec![false; prompt.len()];
    learn.resize(prompt.len() + completion.len(), true);
    Ok(Sample { ids: widen(&prompt).chain(widen(&completion)).collect(), learn })
}

fn conversation(
    messages: &[serde_json::Value],
    tokenizer: &Tokenizer,
) -> Result<Sample, TrainError> {
    let tokens = tokenizer.encode_chat(crate::tokenizer::Conversation::new(messages), 0)?;
    Ok(Sample { ids: widen(&tokens.ids).collect(), learn: tokens.from_assistant })
}

#[cfg(test)]
mod tests;
