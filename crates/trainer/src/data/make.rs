//! One record to its samples: tokens, what of them is learned, and what is done about the limit.

use super::source::{Content, Place, Record};
use super::{DataOptions, LongSamples, LossOn, PromptFormat};
use crate::TrainError;
use crate::tokenizer::{Conversation, Tokenizer};
use serde_json::{Value, json};
use std::ops::Range;

pub(super) struct Maker<'a> {
    pub tokenizer: &'a Tokenizer,
    pub options: &'a DataOptions,
}

/// What a record becomes.
#[derive(Debug, Default)]
pub(super) struct Made {
    /// Tokens, and which of them are learned. Empty: there was nothing to learn.
    pub samples: Vec<(Vec<u32>, Vec<bool>)>,
    /// How many of them belong together: 2 for a preference pair.
    pub unit: usize,
    /// Tokens were lost.
    pub truncated: bool,
}

/// A whole text.
struct Tokens {
    ids: Vec<u32>,
    learn: Vec<bool>,
    /// Stands in front whatever is cut off behind it: BOS.
    n_front: usize,
    /// The first answer. What is before it is its prompt.
    answer: Range<usize>,
}

impl Tokens {
    fn new(ids: Vec<u32>, learn: Vec<bool>, answer: Range<usize>, tokenizer: &Tokenizer) -> Self {
        let begins = ids.first().is_some_and(|&first| tokenizer.bos_id() == Some(first));
        Tokens { n_front: usize::from(begins).min(answer.start), ids, learn, answer }
    }

    /// Tokens of the prompt that are left where all are `limit`. An answer is not cut for the sake of
    /// the beginning of a long prompt; but a quarter of the limit stays the prompt's, since an answer
    /// to nothing teaches nothing.
    fn room_for_prompt(&self, limit: usize) -> usize {
        let (n_prompt, n_answer) = (self.answer.start, self.answer.len());
        if n_prompt + n_answer <= limit {
            return n_prompt;
        }
        limit.saturating_sub(n_answer).max(n_prompt.min(limit / 4))
    }

    /// Without what is too much: first the prompt's beginning, down to `prompt` tokens, then the end.
    fn cut(mut self, limit: usize, prompt: usize) -> (Vec<u32>, Vec<bool>) {
        let n_lost = self.answer.start.saturating_sub(prompt);
        let n_front = self.n_front.min(prompt);
        self.ids.drain(n_front..n_front + n_lost);
        self.learn.drain(n_front..n_front + n_lost);
        self.ids.truncate(limit);
        self.learn.truncate(limit);
        (self.ids, self.learn)
    }
}

impl Maker<'_> {
    /// # Errors
    /// With the record's place, if its chat template refuses it.
    pub fn make(&self, place: &Place, record: &Record) -> Result<Made, TrainError> {
        let made = match record {
            Record::Text(text) => {
                let ids = self.with_eos(self.tokenizer.encode(text)?);
                let (n, learn) = (ids.len(), vec![true; ids.len()]);
                let tokens = Tokens::new(ids, learn, 0..n, self.tokenizer);
                self.one(tokens, LongSamples::Split)
            }
            Record::Completion { prompt, completion } => {
                let mut tokens = self.answer(prompt, completion).map_err(|e| place.explain(e))?;
                if self.options.loss_on == Some(LossOn::All) && tokens.learn.contains(&true) {
                    tokens.learn.fill(true);
                }
                self.one(tokens, LongSamples::Truncate)
            }
            Record::Chat { messages, tools } => {
                let tokens = self.chat(Conversation { messages, tools });
                self.one(tokens.map_err(|e| place.explain(e))?, LongSamples::Truncate)
            }
            Record::Preference { prompt, chosen, rejected } => {
                let side = |answer: &Content| self.preferred(prompt, answer);
                let pair = side(chosen).and_then(|chosen| Ok([chosen, side(rejected)?]));
                self.pair(pair.map_err(|e| place.explain(e))?)
            }
        };
        Ok(made)
    }

    /// A sample, or several.
    fn one(&self, tokens: Tokens, usually: LongSamples) -> Made {
        let limit = self.options.max_seq_length;
        let too_long = tokens.ids.len() > limit;
        let mut made = Made { unit: 1, ..Made::default() };
        match self.options.long_samples.unwrap_or(usually) {
            LongSamples::Split => {
                let pieces = tokens.ids.chunks(limit).zip(tokens.learn.chunks(limit));
                made.samples = pieces.map(|(ids, learn)| (ids.to_vec(), learn.to_vec())).collect();
            }
            LongSamples::Truncate => {
                made.truncated = too_long;
                let prompt = tokens.room_for_prompt(limit);
                made.samples = vec![tokens.cut(limit, prompt)];
            }
        }
        made.samples.retain(|(_, learn)| is_learned(learn));
        made
    }

    /// Two samples with one prompt: what is cut off it is cut off both.
    fn pair(&self, sides: [Tokens; 2]) -> Made {
        let limit = self.options.max_seq_length;
        let truncated = sides.iter().any(|tokens| tokens.ids.len() > limit);
        let prompts = sides.each_ref().map(|tokens| tokens.room_for_prompt(limit));
        // The shorter answer's prompt may be cut for the longer one's sake, not the other way.
        let kept = prompts[0].min(prompts[1]);
        let samples = sides.map(|tokens| tokens.cut(limit, kept));
        let all = samples.iter().all(|(_, learn)| is_learned(learn));
        Made { samples: if all { samples.into() } else { Vec::new() }, unit: 2, truncated }
    }

    /// A prompt and its completion. Nothing is learned of an empty one.
    fn answer(&self, prompt: &str, completion: &str) -> Result<Tokens, TrainError> {
        let mut tokens = match self.options.prompt_format {
            PromptFormat::Plain => self.plain(prompt, completion)?,
            PromptFormat::Chat => {
                let messages = [message("user", prompt), message("assistant", completion)];
                self.conversation(Conversation::new(&messages), 1)?
            }
        };
        if completion.trim().is_empty() {
            tokens.learn.fill(false);
        }
        Ok(tokens)
    }

    fn plain(&self, prompt: &str, completion: &str) -> Result<Tokens, TrainError> {
        let apart =
            prompt.ends_with(char::is_whitespace) || completion.starts_with(char::is_whitespace);
        let between = if apart { "" } else { "\n" };
        // Each for itself, so that the prompt's tokens are those that generation will begin with.
        let mut ids = self.tokenizer.encode(&format!("{prompt}{between}"))?;
        let n_prompt = ids.len();
        ids.extend(self.with_eos(self.tokenizer.encode_continuation(completion)?));
        let mut learn = vec![false; n_prompt];
        learn.resize(ids.len(), true);
        let answer = n_prompt..ids.len();
        Ok(Tokens::new(ids, learn, answer, self.tokenizer))
    }

    /// A conversation with what the options say is learned.
    fn chat(&self, conversation: Conversation) -> Result<Tokens, TrainError> {
        let messages = conversation.messages;
        match self.options.loss_on {
            Some(LossOn::Assistant) | None => self.conversation(conversation, 0),
            Some(LossOn::Completion) => self.conversation(conversation, last_answer(messages)),
            Some(LossOn::All) => {
                // Nobody needs to know whose words are whose.
                let mut tokens = self.conversation(conversation, messages.len())?;
                tokens.learn.fill(true);
                tokens.answer = 0..tokens.ids.len();
                Ok(tokens)
            }
        }
    }

    fn conversation(
        &self,
        conversation: Conversation,
        learn_from: usize,
    ) -> Result<Tokens, TrainError> {
        let tokens = self.tokenizer.encode_chat(conversation, learn_from)?;
        let learn = tokens.from_assistant;
        let begin = learn.iter().position(|&learn| learn).unwrap_or(learn.len());
        let n = learn[begin..].iter().take_while(|&&learn| learn).count();
        Ok(Tokens::new(tokens.ids, learn, begin..begin + n, self.tokenizer))
    }

    /// One side of a preference pair: only the answer is learned, whatever the options say.
    fn preferred(&self, prompt: &Content, answer: &Content) -> Result<Tokens, TrainError> {
        if let (Content::Text(prompt), Content::Text(answer)) = (prompt, answer) {
            return self.answer(prompt, answer);
        }
        let as_messages = |content: &Content, role| match content {
            Content::Text(text) => vec![message(role, text)],
            Content::Messages(messages) => messages.clone(),
        };
        let mut messages = as_messages(prompt, "user");
        let learn_from = messages.len();
        messages.extend(as_messages(answer, "assistant"));
        self.conversation(Conversation::new(&messages), learn_from)
    }

    fn with_eos(&self, mut ids: Vec<u32>) -> Vec<u32> {
        if let Some(eos) = self.tokenizer.eos_id().filter(|eos| ids.last() != Some(eos)) {
            ids.push(eos);
        }
        ids
    }
}

/// The first token of a sample is never predicted.
fn is_learned(learn: &[bool]) -> bool {
    learn.iter().skip(1).any(|&learn| learn)
}

fn message(role: &str, content: &str) -> Value {
    json!({ "role": role, "content": content })
}

/// The index of the assistant's last message.
fn last_answer(messages: &[Value]) -> usize {
    messages.iter().rposition(|message| message["role"] == "assistant").unwrap_or_default()
}
