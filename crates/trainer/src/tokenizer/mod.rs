//! Text to token ids and back, and conversations to text: from a Hugging Face directory, or from
//! the metadata of a GGUF file.

mod chat;
mod gguf;

pub use chat::ChatTemplate;

use crate::TrainError;
use offshoot_model::weights::{Checkpoint, GgufTokenizer};
use serde_json::Value;
use std::fs;
use std::path::Path;
use tokenizers::Encoding;

/// A model's tokenizer, its end token and its chat template.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// For errors: the file that it came from.
    origin: String,
    eos_id: Option<u32>,
    chat: Option<ChatTemplate>,
}

/// Rendered conversation as tokens, each with whether the assistant said it.
pub struct ChatTokens {
    /// Token ids.
    pub ids: Vec<u32>,
    /// For each token, whether it belongs to an assistant's turn.
    pub from_assistant: Vec<bool>,
}

impl Tokenizer {
    /// The tokenizer that belongs to a model.
    pub fn load(checkpoint: &Checkpoint) -> Result<Self, TrainError> {
        let origin = checkpoint.path().display().to_string();
        match checkpoint.gguf_tokenizer() {
            Some(metadata) => Self::from_gguf(metadata, &origin),
            None => Self::from_dir(checkpoint.path(), checkpoint.config()),
        }
    }

    /// From `tokenizer.json`, with what `tokenizer_config.json` and `chat_template.jinja` add.
    /// `config` is the model's `config.json`.
    pub fn from_dir(dir: &Path, config: &Value) -> Result<Self, TrainError> {
        let path = dir.join("tokenizer.json");
        let origin = path.display().to_string();
        let wrong = |problem| TrainError::Tokenizer { origin: origin.clone(), problem };
        if !path.is_file() {
            return Err(wrong(
                "no such file; a model directory needs one. Transformers writes it: AutoTokenizer.from_pretrained(...).save_pretrained(...)".into(),
            ));
        }
        let mut inner =
            tokenizers::Tokenizer::from_file(&path).map_err(|e| wrong(e.to_string()))?;
        // Lengths are the trainer's business: a file saved after padded training would pad here.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| wrong(e.to_string()))?;

        let settings = read_json(&dir.join("tokenizer_config.json"))?;
        let eos = special_token(&settings["eos_token"]);
        let bos = special_token(&settings["bos_token"]);
        let eos_id = match &eos {
            Some(token) => Some(inner.token_to_id(token).ok_or_else(|| {
                wrong(format!("eos_token \"{token}\" of tokenizer_config.json is not in it"))
            })?),
            None => eos_of_model(config),
        };
        let chat = match chat_source(dir, &settings)? {
            None => None,
            Some(source) => {
                Some(ChatTemplate::new(source, bos.unwrap_or_default(), eos.unwrap_or_default())?)
            }
        };
        Ok(Tokenizer { inner, origin, eos_id, chat })
    }

    /// From the metadata of a GGUF file. `origin` names the file in errors.
    pub fn from_gguf(metadata: &GgufTokenizer, origin: &str) -> Result<Self, TrainError> {
        let inner = gguf::build(metadata, origin)?;
        let token = |id: Option<u32>| id.and_then(|id| inner.id_to_token(id)).unwrap_or_default();
        let chat = match &metadata.chat_template {
            None => None,
            Some(source) => Some(ChatTemplate::new(
                source.clone(),
                token(metadata.bos_token_id),
                token(metadata.eos_token_id),
            )?),
        };
        let eos_id = metadata.eos_token_id;
        Ok(Tokenizer { inner, origin: origin.into(), eos_id, chat })
    }

    /// Ends a text, and ends generation.
    pub fn eos_id(&self) -> Option<u32> {
        self.eos_id
    }

    /// Number of tokens, added ones included.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The beginning of a text: with the tokens that the model wants in front, such as BOS.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TrainError> {
        Ok(self.encoding(text, true)?.get_ids().to_vec())
    }

    /// What follows a text already encoded: nothing is put in front.
    pub fn encode_continuation(&self, text: &str) -> Result<Vec<u32>, TrainError> {
        Ok(self.encoding(text, false)?.get_ids().to_vec())
    }

    fn encoding(&self, text: &str, add_special_tokens: bool) -> Result<Encoding, TrainError> {
        self.inner.encode(text, add_special_tokens).map_err(|e| self.wrong(e.to_string()))
    }

    /// Special tokens are left out.
    pub fn decode(&self, ids: &[u32]) -> Result<String, TrainError> {
        self.inner.decode(ids, true).map_err(|e| self.wrong(e.to_string()))
    }

    /// One user message, up to where the assistant begins to speak.
    pub fn encode_prompt_as_chat(&self, prompt: &str) -> Result<Vec<u32>, TrainError> {
        let chat = self.chat("the prompt is to be put into one (--prompt-format chat)")?;
        let message = serde_json::json!({ "role": "user", "content": prompt });
        self.encode_continuation(&chat.render(&[message], true)?)
    }

    /// A conversation of `role` and `content`, up to where the assistant speaks next.
    pub fn encode_conversation(&self, messages: &[Value]) -> Result<Vec<u32>, TrainError> {
        let chat = self.chat("a conversation was asked for (--chat)")?;
        self.encode_continuation(&chat.render(messages, true)?)
    }

    /// For decoding token by token.
    pub(crate) fn inner(&self) -> &tokenizers::Tokenizer {
        &self.inner
    }

    /// A conversation through the chat template. A turn of the assistant is what the template adds
    /// after its generation prompt, with the token that ends the turn, without the white space
    /// after that.
    pub fn encode_chat(&self, messages: &[Value]) -> Result<ChatTokens, TrainError> {
        let chat = self.chat("the data has messages")?;
        let text = chat.render(messages, false)?;
        let mut spans = Vec::new();
        for (i, message) in messages.iter().enumerate() {
            if message["role"] != "assistant" {
                continue;
            }
            let before = chat.render(&messages[..i], true)?;
            let after = chat.render(&messages[..=i], false)?;
            if !(text.starts_with(&before) && text.starts_with(&after) && before < after) {
                return Err(TrainError::ChatTemplate {
                    problem: format!(
                        "it writes the first {i} messages otherwise when more follow, so that the assistant's words cannot be told apart; use prompt and completion instead of messages"
                    ),
                });
            }
            spans.push(before.len()..after.trim_end().len());
        }
        let encoding = self.encoding(&text, false)?;
        let from_assistant =
            encoding.get_offsets().iter().map(|o| spans.iter().any(|s| s.contains(&o.0))).collect();
        Ok(ChatTokens { ids: encoding.get_ids().to_vec(), from_assistant })
    }

    fn chat(&self, wanted_for: &'static str) -> Result<&ChatTemplate, TrainError> {
        self.chat.as_ref().ok_or(TrainError::NoChatTemplate { wanted_for })
    }

    pub(crate) fn wrong(&self, problem: String) -> TrainError {
        TrainError::Tokenizer { origin: self.origin.clone(), problem }
    }
}

/// `null` if there is no such file.
fn read_json(path: &Path) -> Result<Value, TrainError> {
    if !path.is_file() {
        return Ok(Value::Null);
    }
    let text = fs::read_to_string(path).map_err(TrainError::io(path))?;
    serde_json::from_str(&text).map_err(|e| TrainError::Tokenizer {
        origin: path.display().to_string(),
        problem: format!("not JSON: {e}"),
    })
}

/// A token is written as its text, or as an object with the text in `content`.
fn special_token(value: &Value) -> Option<String> {
    value.as_str().or_else(|| value["content"].as_str()).map(String::from)
}

/// `eos_token_id` is a number or a list of them.
fn eos_of_model(config: &Value) -> Option<u32> {
    let id = &config["eos_token_id"];
    id.as_u64().or_else(|| id[0].as_u64()).and_then(|id| id.try_into().ok())
}

/// The template is a file of its own, or a field: its text, or a list of named ones.
fn chat_source(dir: &Path, settings: &Value) -> Result<Option<String>, TrainError> {
    let path = dir.join("chat_template.jinja");
    if path.is_file() {
        return fs::read_to_string(&path).map(Some).map_err(TrainError::io(&path));
    }
    let field = &settings["chat_template"];
    let named = || {
        let list = field.as_array()?;
        list.iter().find(|t| t["name"] == "default")?["template"].as_str()
    };
    Ok(field.as_str().or_else(named).map(String::from))
}
