//! Text from a model, token by token: split, with the trunk on a server, or whole on this machine.
//!
//! A [`Decoder`] is the model with a text that grows, [`GenerateOptions`] say how a token is chosen
//! and when it is enough, and [`Decoder::generate`] gives the text away piece by piece while it comes.
//!
//! ```no_run
//! use offshoot_model::{ModelConfig, weights::Checkpoint};
//! use offshoot_trainer::generate::{Decoder, GenerateOptions, Request, WholeModel, end_ids};
//! use offshoot_trainer::tokenizer::Tokenizer;
//!
//! # async fn write() -> Result<(), Box<dyn std::error::Error>> {
//! let checkpoint = Checkpoint::find("gpt2")?;
//! let config = ModelConfig::from_json(checkpoint.config())?;
//! let tokenizer = Tokenizer::load(&checkpoint)?;
//! let model = WholeModel::load(&checkpoint, &config, None, (tch::Kind::Float, tch::Device::Cpu))?;
//! let request = Request {
//!     prompt: &tokenizer.encode("The trunk of a tree")?,
//!     options: &GenerateOptions::default(),
//!     end_ids: &end_ids(&checkpoint, Some(&tokenizer))?,
//!     tokenizer: Some(&tokenizer),
//! };
//! let done = Decoder::whole(&model).generate(&request, &mut |piece| print!("{piece}")).await?;
//! println!("\n{} tokens, ended by {}", done.ids.len(), done.end);
//! # Ok(())
//! # }
//! ```

mod decoder;
mod options;
mod sampling;
mod text;
mod whole;

pub use crate::split::Traffic;
pub use decoder::Decoder;
pub use options::{GenerateOptions, Sampling};
pub use whole::WholeModel;

use crate::TrainError;
use crate::tokenizer::Tokenizer;
use offshoot_model::weights::Checkpoint;
use sampling::{Place, Sampler};
use serde_json::Value;
use std::time::{Duration, Instant};
use text::Writer;

/// What is to be continued, and how.
pub struct Request<'a> {
    /// Token ids; not empty.
    pub prompt: &'a [u32],
    pub options: &'a GenerateOptions,
    /// Tokens that end the text; see [`end_ids`].
    pub end_ids: &'a [u32],
    /// Without one only token ids come, and no stop string is found.
    pub tokenizer: Option<&'a Tokenizer>,
}

/// Why a text ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EndReason {
    /// The model drew an end token.
    Eos,
    /// A stop string came.
    Stop,
    /// As many tokens as were asked for.
    Length,
    /// The model, or the server, takes no longer text.
    Context,
}

impl EndReason {
    /// A word for programs.
    pub fn name(self) -> &'static str {
        match self {
            EndReason::Eos => "eos",
            EndReason::Stop => "stop",
            EndReason::Length => "length",
            EndReason::Context => "context",
        }
    }
}

impl std::fmt::Display for EndReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            EndReason::Eos => "the model's end token",
            EndReason::Stop => "a stop string",
            EndReason::Length => "the limit of new tokens",
            EndReason::Context => "the end of the model's context",
        })
    }
}

/// What came.
#[derive(Debug, Clone, PartialEq)]
pub struct Generated {
    /// What was given away piece by piece: up to a stop string, without special tokens.
    pub text: String,
    /// The new tokens, those of a stop string included, without the end token.
    pub ids: Vec<u32>,
    pub end: EndReason,
    /// Tokens of the prompt.
    pub n_prompt: usize,
    /// From the beginning to the first token: the prompt's pass.
    pub first_token: Duration,
    /// From the beginning to the last one.
    pub total: Duration,
    /// Bytes of hidden states that travelled; none without a server.
    pub traffic: Traffic,
    /// Tokens drawn, an end token included.
    n_drawn: usize,
}

impl Generated {
    /// After the first token; none if there was only one.
    pub fn tokens_per_second(&self) -> Option<f64> {
        let seconds = self.total.saturating_sub(self.first_token).as_secs_f64();
        (self.n_drawn > 1 && seconds > 0.0).then(|| (self.n_drawn - 1) as f64 / seconds)
    }
}

impl Decoder<'_> {
    /// Goes on from the prompt until something ends the text. `each` gets every piece as soon as it
    /// cannot change any more: whole characters, and nothing of a stop string.
    ///
    /// # Errors
    /// If the prompt is empty, longer than the [`context`](Decoder::context) or has tokens that the
    /// model lacks; what the server refuses; scores that are no numbers.
    pub async fn generate(
        &mut self,
        request: &Request<'_>,
        each: &mut dyn FnMut(&str),
    ) -> Result<Generated, TrainError> {
        let Request { prompt, options, end_ids, tokenizer } = *request;
        options.validate()?;
        self.check(request)?;
        let (began, before) = (Instant::now(), self.traffic());
        let mut sampler = Sampler::new(&options.sampling);
        let mut writer = tokenizer.map(|tokenizer| Writer::new(tokenizer, &options.stop));
        let mut ids = prompt.to_vec();
        let mut n_drawn = 0;
        let mut first_token = None;
        let end = loop {
            let n_new = ids.len() - prompt.len();
            if n_new == options.max_new_tokens {
                break EndReason::Length;
            }
            if ids.len() > self.context() {
                break EndReason::Context;
            }
            let scores = self.scores(&ids).await?;
            check_scores(&scores)?;
            let forbidden = if n_new < options.min_new_tokens { end_ids } else { &[] };
            let id = sampler.choose(scores, &Place { ids: &ids, forbidden });
            n_drawn += 1;
            first_token.get_or_insert_with(|| began.elapsed());
            if end_ids.contains(&id) {
                break EndReason::Eos;
            }
            ids.push(id);
            if let Some(writer) = &mut writer {
                let piece = writer.push(id)?;
                if !piece.text.is_empty() {
                    each(&piece.text);
                }
                if piece.stopped {
                    break EndReason::Stop;
                }
            }
            // Without a server nothing here waits: whoever wants to interrupt gets a turn.
            tokio::task::yield_now().await;
        };
        let text = match writer {
            Some(writer) => finish(writer, end, each)?,
            None => String::new(),
        };
        Ok(Generated {
            text,
            n_prompt: prompt.len(),
            ids: ids.split_off(prompt.len()),
            end,
            first_token: first_token.unwrap_or_default(),
            total: began.elapsed(),
            traffic: self.traffic().since(before),
            n_drawn,
        })
    }

    fn check(&self, request: &Request) -> Result<(), TrainError> {
        let wrong = |problem: String| Err(TrainError::Prompt { problem });
        let Request { prompt, .. } = request;
        let (n, context) = (prompt.len(), self.context());
        if n == 0 {
            return wrong("it is empty: give the model at least one word to go on from".into());
        }
        if n > context {
            return wrong(format!(
                "it has {n} tokens, the model and the server take {context} with the answer; shorten it"
            ));
        }
        let highest = prompt.iter().max().copied().unwrap_or_default();
        match request.tokenizer {
            Some(tokenizer) => crate::fit::vocabulary(highest.into(), tokenizer, self.config()),
            None if i64::from(highest) >= self.config().vocab_size => wrong(format!(
                "it has token {highest}, the model knows 0 to {}",
                self.config().vocab_size - 1
            )),
            None => Ok(()),
        }
    }
}

fn check_scores(scores: &[f32]) -> Result<(), TrainError> {
    match scores.iter().any(|score| score.is_nan()) {
        true => Err(TrainError::NoScores),
        false => Ok(()),
    }
}

fn finish(
    mut writer: Writer,
    end: EndReason,
    each: &mut dyn FnMut(&str),
) -> Result<String, TrainError> {
    if end != EndReason::Stop {
        let last = writer.finish()?;
        if !last.is_empty() {
            each(&last);
        }
    }
    Ok(writer.into_text())
}

/// The tokens that end a text: `eos_token_id` of the model's generation_config.json (one or several),
/// else of its configuration, and the tokenizer's end token.
pub fn end_ids(
    checkpoint: &Checkpoint,
    tokenizer: Option<&Tokenizer>,
) -> Result<Vec<u32>, TrainError> {
    let path = checkpoint.path().join("generation_config.json");
    let mut found = Vec::new();
    if path.is_file() {
        let text = std::fs::read_to_string(&path).map_err(TrainError::io(&path))?;
        let config: Value = serde_json::from_str(&text).map_err(|e| TrainError::Tokenizer {
            origin: path.display().to_string(),
            problem: format!("not JSON: {e}"),
        })?;
        found = ids_of(&config["eos_token_id"]);
    }
    if found.is_empty() {
        found = ids_of(&checkpoint.config()["eos_token_id"]);
    }
    found.extend(tokenizer.and_then(Tokenizer::eos_id));
    found.sort_unstable();
    found.dedup();
    Ok(found)
}

/// A number, or a list of them.
fn ids_of(value: &Value) -> Vec<u32> {
    let one = |value: &Value| value.as_u64().and_then(|id| id.try_into().ok());
    match value.as_array() {
        Some(list) => list.iter().filter_map(one).collect(),
        None => one(value).into_iter().collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn end_tokens_are_the_models_and_the_tokenizers() {
        let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/tiny_text");
        let dir = tempfile::tempdir().unwrap();
        for file in std::fs::read_dir(fixture).unwrap().flatten() {
            std::fs::copy(file.path(), dir.path().join(file.file_name())).unwrap();
        }
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        let tokenizer = Tokenizer::load(&checkpoint).unwrap();
        let eos = tokenizer.eos_id().unwrap();
        assert_eq!(end_ids(&checkpoint, None).unwrap(), [eos], "of config.json");

        let path = dir.path().join("generation_config.json");
        let found = |json: &str| {
            std::fs::write(&path, json).unwrap();
            end_ids(&checkpoint, Some(&tokenizer)).map_err(|error| error.to_string())
        };
        assert_eq!(found("{\"eos_token_id\": [300, 301]}").unwrap(), [eos, 300, 301]);
        assert_eq!(found("{\"eos_token_id\": 300}").unwrap(), [eos, 300]);
        assert_eq!(found("{}").unwrap(), [eos]);
        assert!(found("{").unwrap_err().contains("generation_config.json: not JSON"));
    }
}
