//! A short name for a model's numbers, cheap enough to compute at every start.

use super::{Entry, Mapped};
use blake3::Hasher;
use serde_json::{Map, Value};
use std::collections::BTreeMap;

/// Bytes taken from the beginning, the middle and the end of each tensor.
const SAMPLE_BYTES: usize = 256;

/// The fields of a configuration that change a model's numbers, under all families' names.
/// What a new version of Transformers writes beside them (`dtype`, `use_cache`, its own version)
/// does not make another model.
const CONFIG_FIELDS: &[&str] = &[
    "activation_function",
    "attention_bias",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "head_dim",
    "hidden_act",
    "hidden_activation",
    "hidden_size",
    "intermediate_size",
    "layer_norm_epsilon",
    "layer_types",
    "max_window_layers",
    "mlp_bias",
    "model_type",
    "n_embd",
    "n_head",
    "n_inner",
    "n_layer",
    "n_positions",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "partial_rotary_factor",
    "query_pre_attn_scalar",
    "rms_norm_eps",
    "scale_attn_by_inverse_layer_idx",
    "scale_attn_weights",
    "sliding_window",
    "tie_word_embeddings",
    "use_sliding_window",
    "vocab_size",
];

/// Hex blake3 over the configuration and, for each tensor by name, its shape, type and samples.
pub(super) fn fingerprint(
    config: &Value,
    files: &[Mapped],
    entries: &BTreeMap<String, Entry>,
) -> String {
    let mut hasher = Hasher::new();
    update(&mut hasher, b"offshoot fingerprint 1");
    let mut relevant = relevant(config);
    // However the file orders them.
    relevant.sort_all_objects();
    update(&mut hasher, relevant.to_string().as_bytes());
    for (name, entry) in entries {
        let bytes = &files[entry.file].bytes()[entry.bytes.clone()];
        update(&mut hasher, name.as_bytes());
        update(&mut hasher, format!("{} {:?}", entry.stored, entry.shape).as_bytes());
        let last = bytes.len().saturating_sub(SAMPLE_BYTES);
        for start in [0, last / 2, last] {
            update(&mut hasher, &bytes[start..bytes.len().min(start + SAMPLE_BYTES)]);
        }
    }
    for file in files {
        file.release(0..file.bytes().len());
    }
    hasher.finalize().to_hex().to_string()
}

/// Length first, so that no two sequences of fields give the same stream.
fn update(hasher: &mut Hasher, bytes: &[u8]) {
    hasher.update(&(bytes.len() as u64).to_le_bytes());
    hasher.update(bytes);
}

/// The fields that count, in one spelling: null is the same as absent, 10000 the same as 10000.0,
/// and the rope fields are the same whether a version of Transformers before or after 5 wrote them.
fn relevant(config: &Value) -> Value {
    let mut out = Map::new();
    let mut put = |key: &str, value: &Value| {
        if !value.is_null() {
            out.insert(key.to_string(), as_floats(value));
        }
    };
    for &key in CONFIG_FIELDS {
        put(key, &config[key]);
    }
    let parameters = &config["rope_parameters"];
    put("rope_theta", &config["rope_theta"]);
    put("rope_theta", &parameters["rope_theta"]);
    let scaling =
        if config["rope_scaling"].is_object() { &config["rope_scaling"] } else { parameters };
    if let Some(fields) = scaling.as_object() {
        let kind = fields.get("rope_type").or_else(|| fields.get("type"));
        if kind.is_some_and(|kind| kind != "default") {
            let mut fields = fields.clone();
            fields.remove("rope_theta");
            if let Some(kind) = fields.remove("type") {
                fields.insert("rope_type".into(), kind);
            }
            put("rope_scaling", &Value::Object(fields));
        }
    }
    Value::Object(out)
}

fn as_floats(value: &Value) -> Value {
    match value {
        Value::Number(n) => Value::from(n.as_f64()),
        Value::Array(items) => items.iter().map(as_floats).collect(),
        Value::Object(fields) => {
            Value::Object(fields.iter().map(|(k, v)| (k.clone(), as_floats(v))).collect())
        }
        other => other.clone(),
    }
}
