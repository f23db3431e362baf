//! `adapter_config.json`: which adapters are plain LoRA, and what their settings are.

use super::{PeftConfig, file_error};
use crate::{AdapterError, LoraSpec};
use serde_json::{Value, json};
use std::path::Path;

/// What PEFT 0.21 writes for plain LoRA. Fields that are not named have PEFT's defaults.
pub(super) fn to_json(config: &PeftConfig<'_>) -> Value {
    let spec = config.spec;
    json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "auto_mapping": null,
        "base_model_name_or_path": config.base_model,
        "revision": null,
        "r": spec.r,
        "lora_alpha": number(spec.lora_alpha),
        "lora_dropout": spec.lora_dropout,
        "use_rslora": spec.use_rslora,
        "use_dora": false,
        "target_modules": spec.target_modules,
        "exclude_modules": null,
        "layers_to_transform": null,
        "layers_pattern": null,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": null,
        "fan_in_fan_out": config.fan_in_fan_out,
        "bias": "none",
        "lora_bias": false,
        "init_lora_weights": true,
        "inference_mode": true,
    })
}

/// PEFT writes whole alphas as integers.
fn number(value: f64) -> Value {
    if value.fract() == 0.0 { json!(value as i64) } else { json!(value) }
}

/// Fields of LoRA variants, the value at which each is off (absent and null are off as well), and
/// why it cannot be trained here.
fn variants() -> [(&'static str, Value, &'static str); 15] {
    let shape = "its forward is another one than plain LoRA's";
    let base = "it trains tensors of the base model, which is frozen and shared here";
    let ranks = "one rank and one alpha hold for all modules here";
    [
        ("use_dora", json!(false), shape),
        ("use_qalora", json!(false), shape),
        ("use_bdlora", json!(false), shape),
        ("alora_invocation_tokens", json!([]), shape),
        ("arrow_config", json!({}), shape),
        ("velora_config", json!({}), shape),
        ("kasa_config", json!({}), shape),
        ("monteclora_config", json!({}), shape),
        ("layer_replication", json!([]), "the model would have other layers than the server's"),
        ("bias", json!("none"), base),
        ("lora_bias", json!(false), "B would have a bias, and only A and B are trained here"),
        ("modules_to_save", json!([]), base),
        ("trainable_token_indices", json!([]), base),
        ("rank_pattern", json!({}), ranks),
        ("alpha_pattern", json!({}), ranks),
    ]
}

/// Initialisations that change the base weights as well: the adapter alone does not say by how
/// much. (PEFT converts them: `save_pretrained(..., path_initial_model_for_weight_conversion=...)`.)
const CHANGE_THE_BASE: [&str; 5] = ["pissa", "olora", "corda", "loftq", "lora_ga"];

/// Kinds of adapter that cannot be trained exactly are refused, by the name of the setting.
pub(super) fn refuse_unsupported(path: &Path, config: &Value) -> Result<(), AdapterError> {
    if config["peft_type"] != "LORA" {
        let found = &config["peft_type"];
        return Err(file_error(
            path,
            format!(
                "peft_type is {found}, expected \"LORA\": other kinds of adapter are not known"
            ),
        ));
    }
    for (field, off, reason) in variants() {
        let value = &config[field];
        if !value.is_null() && *value != off && *value != json!(false) {
            let problem = format!("{field} is {value}, expected {off} or null: {reason}");
            return Err(file_error(path, problem));
        }
    }
    if config["target_parameters"].as_array().is_some_and(|names| !names.is_empty()) {
        let found = &config["target_parameters"];
        let problem = format!(
            "target_parameters is {found}, expected null: only linear layers carry LoRA here"
        );
        return Err(file_error(path, problem));
    }
    let initial = config["init_lora_weights"].as_str().unwrap_or_default().to_lowercase();
    if CHANGE_THE_BASE.iter().any(|name| initial.starts_with(name)) {
        return Err(file_error(
            path,
            format!(
                "init_lora_weights is \"{initial}\", which changes the base model too; save it as plain LoRA with PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...)"
            ),
        ));
    }
    Ok(())
}

/// The settings. `paths` are the modules that have tensors, such as
/// `model.layers.3.self_attn.q_proj`: they say what a pattern or a choice of layers meant.
pub(super) fn spec(
    path: &Path,
    config: &Value,
    paths: Vec<String>,
) -> Result<LoraSpec, AdapterError> {
    let missing = |field: &str, kind: &str| {
        let found = &config[field];
        file_error(path, format!("{field} is {found}, expected {kind}"))
    };
    let chosen = ["layers_to_transform", "layers_pattern", "exclude_modules"];
    let everywhere = chosen.iter().all(|field| is_empty(&config[*field]));
    let target_modules = match &config["target_modules"] {
        Value::Array(names) if everywhere => {
            let names: Option<Vec<_>> =
                names.iter().map(|name| name.as_str().map(str::to_owned)).collect();
            names.ok_or_else(|| missing("target_modules", "a list of names"))?
        }
        _ => paths,
    };
    let spec = LoraSpec {
        r: config["r"].as_u64().ok_or_else(|| missing("r", "a whole number"))? as usize,
        lora_alpha: config["lora_alpha"]
            .as_f64()
            .ok_or_else(|| missing("lora_alpha", "a number"))?,
        lora_dropout: config["lora_dropout"].as_f64().unwrap_or(0.0),
        use_rslora: config["use_rslora"].as_bool().unwrap_or(false),
        target_modules,
    };
    spec.validate()?;
    Ok(spec)
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Array(items) => items.is_empty(),
        Value::String(text) => text.is_empty(),
        _ => false,
    }
}
