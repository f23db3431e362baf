//! A model's `config.json` where its weights are not needed, and perhaps not there.

use super::safetensors::{CONFIG, read_json};
use super::{Checkpoint, HubSettings, WeightsError, hub};
use serde_json::Value;
use std::path::Path;

/// What [`Checkpoint::config`] of `name` is, or would be if its weights were there: of a Hugging Face
/// directory or its `config.json` alone, of a GGUF file, or of a hub name, of which only that file is
/// fetched.
///
/// # Errors
/// As for [`Checkpoint::find`].
pub fn find_config(name: &str) -> Result<Value, WeightsError> {
    find_config_with(name, &HubSettings::from_env())
}

/// [`find_config`] with a hub, a cache and a token of one's own.
///
/// # Errors
/// As for [`Checkpoint::find`].
pub fn find_config_with(name: &str, settings: &HubSettings) -> Result<Value, WeightsError> {
    let path = Path::new(name);
    let in_folder = path.join(CONFIG);
    if in_folder.exists() {
        return read_json(&in_folder);
    }
    if path.is_file() && path.extension().is_some_and(|ending| ending == "json") {
        return read_json(path);
    }
    if path.exists() {
        return Ok(Checkpoint::open(path)?.config().clone());
    }
    if !hub::is_hub_name(name) {
        return Err(WeightsError::NotFound { name: name.into() });
    }
    read_json(&hub::fetch_config(name, settings)?)
}
