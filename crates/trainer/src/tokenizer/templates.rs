//! Which chat templates a model's files have.

use super::chat::ChatTemplate;
use crate::TrainError;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

const DEFAULT: &str = "default";
/// Transformers takes this one, if there is one, for conversations with tools.
const WITH_TOOLS: &str = "tool_use";

/// The chat templates of a model by name, not yet parsed: mostly one is used.
#[derive(Debug, Default)]
pub(super) struct Templates {
    sources: BTreeMap<String, String>,
    bos_token: String,
    eos_token: String,
}

/// The templates that are used.
#[derive(Debug, Default)]
pub(super) struct Chosen {
    /// For all conversations, or for those without tools.
    pub plain: Option<ChatTemplate>,
    /// For those with tools, if the model has another one for them.
    pub with_tools: Option<ChatTemplate>,
}

impl Templates {
    /// A single one.
    pub fn one(source: Option<String>, bos_token: String, eos_token: String) -> Self {
        let sources = source.map(|source| (DEFAULT.to_string(), source)).into_iter().collect();
        Templates { sources, bos_token, eos_token }
    }

    /// `chat_template` of `tokenizer_config.json` is the text, or a list of named ones;
    /// `chat_template.jinja` and `additional_chat_templates/NAME.jinja` go before it.
    pub fn of_dir(
        dir: &Path,
        settings: &Value,
        bos_token: String,
        eos_token: String,
    ) -> Result<Self, TrainError> {
        let field = &settings["chat_template"];
        let mut templates = Templates::one(field.as_str().map(String::from), bos_token, eos_token);
        for named in field.as_array().into_iter().flatten() {
            if let (Some(name), Some(source)) = (named["name"].as_str(), named["template"].as_str())
            {
                templates.sources.insert(name.into(), source.into());
            }
        }
        templates.add_file(DEFAULT, &dir.join("chat_template.jinja"))?;
        let more = dir.join("additional_chat_templates");
        if more.is_dir() {
            for entry in fs::read_dir(&more).map_err(TrainError::io(&more))? {
                let path = entry.map_err(TrainError::io(&more))?.path();
                if path.extension().is_some_and(|extension| extension == "jinja") {
                    let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
                    templates.add_file(&name, &path)?;
                }
            }
        }
        Ok(templates)
    }

    fn add_file(&mut self, name: &str, path: &Path) -> Result<(), TrainError> {
        if path.is_file() {
            let source = fs::read_to_string(path).map_err(TrainError::io(path))?;
            self.sources.insert(name.into(), source);
        }
        Ok(())
    }

    /// The one of a name, or of a file; without a choice the model's default.
    pub fn choose(&self, choice: Option<&str>) -> Result<Chosen, TrainError> {
        let parse = |source: &String| {
            ChatTemplate::new(source.clone(), self.bos_token.clone(), self.eos_token.clone())
        };
        let Some(choice) = choice else {
            let plain = self.sources.get(DEFAULT).map(parse).transpose()?;
            let with_tools = self.sources.get(WITH_TOOLS).map(parse).transpose()?;
            return Ok(Chosen { plain, with_tools });
        };
        let path = Path::new(choice);
        let plain = match self.sources.get(choice) {
            Some(source) => parse(source)?,
            None if path.is_file() => {
                parse(&fs::read_to_string(path).map_err(TrainError::io(path))?)?
            }
            None => {
                let known: Vec<&str> = self.sources.keys().map(String::as_str).collect();
                let known = if known.is_empty() { "none".into() } else { known.join(", ") };
                return Err(TrainError::Option {
                    option: "chat-template",
                    value: choice.into(),
                    problem: format!(
                        "neither a file nor a chat template of this model, which has {known}"
                    ),
                });
            }
        };
        Ok(Chosen { plain: Some(plain), with_tools: None })
    }

    /// Of all: for an error about a model that has several and none by default.
    pub fn names(&self) -> Vec<&str> {
        self.sources.keys().map(String::as_str).collect()
    }
}
