//! Text to token ids and back, and conversations to text: from a Hugging Face directory, or from
//! the metadata of a GGUF file.

mod chat;
mod gguf;
mod templates;
mod turns;

pub use chat::{ChatTemplate, Conversation};

use crate::TrainError;
use offshoot_model::weights::{Checkpoint, GgufTokenizer};
use serde_json::Value;
use std::fs;
use std::path::Path;
use templates::{Chosen, Templates};

/// A model's tokenizer, its end token and its chat templates.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// For errors: the file that it came from.
    origin: String,
    bos_id: Option<u32>,
    eos_id: Option<u32>,
    templates: Templates,
    chosen: Chosen,
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

    /// The tokenizer that belongs to a model, with another chat template than its default one: the
    /// name of one of its own, or a file.
    pub fn load_with(
        checkpoint: &Checkpoint,
        chat_template: Option<&str>,
    ) -> Result<Self, TrainError> {
        let tokenizer = Self::load(checkpoint)?;
        match chat_template {
            Some(choice) => tokenizer.with_chat_template(choice),
            None => Ok(tokenizer),
        }
    }

    /// With another chat template: the name of one of the model's, or a file.
    pub fn with_chat_template(self, choice: &str) -> Result<Self, TrainError> {
        let chosen = self.templates.choose(Some(choice))?;
        Ok(Tokenizer { chosen, ..self })
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
        let bos_id = bos.as_ref().and_then(|token| inner.token_to_id(token));
        let (bos, eos) = (bos.unwrap_or_default(), eos.unwrap_or_default());
        let templates = Templates::of_dir(dir, &settings, bos, eos)?;
        let chosen = templates.choose(None)?;
        Ok(Tokenizer { inner, origin, bos_id, eos_id, templates, chosen })
    }

    /// From the metadata of a GGUF file. `origin` names the file in errors.
    pub fn from_gguf(metadata: &GgufTokenizer, origin: &str) -> Result<Self, TrainError> {
        let inner = gguf::build(metadata, origin)?;
        let token = |id: Option<u32>| id.and_then(|id| inner.id_to_token(id)).unwrap_or_default();
        let (bos_id, eos_id) = (metadata.bos_token_id, metadata.eos_token_id);
        let templates =
            Templates::one(metadata.chat_template.clone(), token(bos_id), token(eos_id));
        let chosen = templates.choose(None)?;
        Ok(Tokenizer { inner, origin: origin.into(), bos_id, eos_id, templates, chosen })
    }

    /// The file that it came from.
    pub fn origin(&self) -> &str {
        &self.origin
    }

    /// Begins a text, for models that have such a token.
    pub fn bos_id(&self) -> Option<u32> {
        self.bos_id
    }

    /// Writes a `tokenizer.json`.
    pub(crate) fn save(&self, path: &Path) -> Result<(), TrainError> {
        self.inner.save(path, true).map_err(|e| TrainError::Tokenizer {
            origin: self.origin.clone(),
            problem: format!("{} cannot be written: {e}", path.display()),
        })
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
        self.ids(text, true)
    }

    /// What follows a text already encoded: nothing is put in front.
    pub fn encode_continuation(&self, text: &str) -> Result<Vec<u32>, TrainError> {
        self.ids(text, false)
    }

    /// Without places in the text, which cost time.
    fn ids(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, TrainError> {
        let encoding = self.inner.encode_fast(text, add_special_tokens);
        Ok(encoding.map_err(|e| self.wrong(e.to_string()))?.get_ids().to_vec())
    }

    /// Special tokens are left out.
    pub fn decode(&self, ids: &[u32]) -> Result<String, TrainError> {
        self.inner.decode(ids, true).map_err(|e| self.wrong(e.to_string()))
    }

    /// One user message, up to where the assistant begins to speak.
    pub fn encode_prompt_as_chat(&self, prompt: &str) -> Result<Vec<u32>, TrainError> {
        let messages = [serde_json::json!({ "role": "user", "content": prompt })];
        let wanted_for = "the prompt is to be put into one (--prompt-format chat)";
        self.encode_before_answer(Conversation::new(&messages), wanted_for)
    }

    /// A conversation of `role` and `content`, up to where the assistant speaks next.
    pub fn encode_conversation(&self, messages: &[Value]) -> Result<Vec<u32>, TrainError> {
        self.encode_before_answer(
            Conversation::new(messages),
            "a conversation was asked for (--chat)",
        )
    }

    fn encode_before_answer(
        &self,
        conversation: Conversation,
        wanted_for: &'static str,
    ) -> Result<Vec<u32>, TrainError> {
        let chat = self.chat(conversation, wanted_for)?;
        self.encode_continuation(&chat.render(conversation, true)?)
    }

    /// For decoding token by token.
    pub(crate) fn inner(&self) -> &tokenizers::Tokenizer {
        &self.inner
    }

    /// A conversation through the chat template, and which of its tokens the assistant said in the
    /// messages from `learn_from` on. A token counts if any of its bytes does.
    ///
    /// If the template marks turns (`{% generation %}`), these are they. Otherwise a turn is what
    /// the template adds after its generation prompt, with the token that ends the turn, without the
    /// white space after that.
    pub fn encode_chat(
        &self,
        conversation: Conversation,
        learn_from: usize,
    ) -> Result<ChatTokens, TrainError> {
        let chat = self.chat(conversation, "the data have messages")?;
        let (text, turns) = turns::render_with_turns(chat, conversation, learn_from)?;
        let encoding = self.inner.encode(&*text, false).map_err(|e| self.wrong(e.to_string()))?;
        let said = |&(begin, end): &(usize, usize)| {
            turns.iter().any(|turn| begin < turn.end && turn.start < end)
        };
        let from_assistant = encoding.get_offsets().iter().map(said).collect();
        Ok(ChatTokens { ids: encoding.get_ids().to_vec(), from_assistant })
    }

    fn chat(
        &self,
        conversation: Conversation,
        wanted_for: &'static str,
    ) -> Result<&ChatTemplate, TrainError> {
        let Chosen { plain, with_tools } = &self.chosen;
        let for_tools = with_tools.as_ref().filter(|_| !conversation.tools.is_empty());
        if let Some(chat) = for_tools.or(plain.as_ref()) {
            return Ok(chat);
        }
        match self.templates.names()[..] {
            [] => Err(TrainError::NoChatTemplate { wanted_for }),
            ref names => Err(TrainError::ChatTemplate {
                problem: format!(
                    "it has several, none of them by default, and {wanted_for}; choose one with --chat-template: {}",
                    names.join(", ")
                ),
            }),
        }
    }

    /// Equal for tokenizers that make the same tokens of the same texts and conversations.
    pub(crate) fn fingerprint(&self) -> Result<String, TrainError> {
        let own = self.inner.to_string(false).map_err(|e| self.wrong(e.to_string()))?;
        let Chosen { plain, with_tools } = &self.chosen;
        let mut parts = vec![own, format!("{:?} {:?}", self.bos_id, self.eos_id)];
        for chat in [plain, with_tools] {
            parts.push(chat.as_ref().map(ChatTemplate::fingerprint).unwrap_or_default());
        }
        Ok(blake3::hash(parts.join("\0\0").as_bytes()).to_hex().to_string())
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
