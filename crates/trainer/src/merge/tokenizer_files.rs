//! What a model needs beside its weights: tokenizer, chat template, generation settings.

use super::write_json;
use crate::TrainError;
use crate::tokenizer::Tokenizer;
use offshoot_model::weights::{Checkpoint, GgufTokenizer};
use serde_json::{Value, json};
use std::fs;
use std::path::Path;

/// Copied where the model has them.
const COPIED: [&str; 13] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
    "LICENSE.txt",
];
/// More templates, by name.
const TEMPLATES: &str = "additional_chat_templates";

pub(super) fn write(dir: &Path, checkpoint: &Checkpoint) -> Result<(), TrainError> {
    if checkpoint.path().is_file() {
        return match checkpoint.gguf_tokenizer() {
            Some(metadata) => from_gguf(dir, checkpoint, metadata),
            None => Ok(()),
        };
    }
    for name in COPIED {
        copy(&checkpoint.path().join(name), &dir.join(name))?;
    }
    let templates = checkpoint.path().join(TEMPLATES);
    if templates.is_dir() {
        let to = dir.join(TEMPLATES);
        fs::create_dir_all(&to).map_err(TrainError::io(&to))?;
        for entry in fs::read_dir(&templates).map_err(TrainError::io(&templates))? {
            let entry = entry.map_err(TrainError::io(&templates))?;
            copy(&entry.path(), &to.join(entry.file_name()))?;
        }
    }
    Ok(())
}

/// The content only: files in the hub's cache are links.
fn copy(from: &Path, to: &Path) -> Result<(), TrainError> {
    if !from.is_file() {
        return Ok(());
    }
    let content = fs::read(from).map_err(TrainError::io(from))?;
    fs::write(to, content).map_err(TrainError::io(to))
}

fn from_gguf(
    dir: &Path,
    checkpoint: &Checkpoint,
    metadata: &GgufTokenizer,
) -> Result<(), TrainError> {
    Tokenizer::load(checkpoint)?.save(&dir.join("tokenizer.json"))?;
    let token = |id: Option<u32>| -> Value {
        id.and_then(|id| metadata.tokens.get(id as usize)).map_or(Value::Null, |t| json!(t))
    };
    let mut config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": token(metadata.bos_token_id),
        "eos_token": token(metadata.eos_token_id),
        "clean_up_tokenization_spaces": false,
        "model_max_length": checkpoint.config()["max_position_embeddings"],
    });
    if let Some(template) = &metadata.chat_template {
        config["chat_template"] = template.as_str().into();
    }
    write_json(&dir.join("tokenizer_config.json"), &config)?;
    let ids = ["bos_token_id", "eos_token_id"];
    let known = ids.into_iter().filter(|field| !checkpoint.config()[*field].is_null());
    let mut generation = json!({});
    for field in known {
        generation[field] = checkpoint.config()[field].clone();
    }
    write_json(&dir.join("generation_config.json"), &generation)
}
