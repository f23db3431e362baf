//! GGUF metadata as a Hugging Face configuration and a tokenizer.

use super::{Entries, GgufTokenizer, WeightsError};
use candle_core::quantized::gguf_file::Value as Field;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// A GGUF file's metadata, asked for by key. The large arrays are taken out, not copied.
pub(super) struct Metadata {
    file: PathBuf,
    fields: HashMap<String, Field>,
}

impl Metadata {
    pub(super) fn new(file: &Path, fields: HashMap<String, Field>) -> Self {
        Metadata { file: file.to_path_buf(), fields }
    }

    /// `general.architecture`.
    pub(super) fn architecture(&self) -> Result<String, WeightsError> {
        let key = "general.architecture";
        self.text(key)?.ok_or_else(|| self.bad(key, "a name", None))
    }

    /// Files that these architectures' names would open and that would compute something else.
    pub(super) fn refuse_unsupported(&self) -> Result<(), WeightsError> {
        if self.whole("split.count")?.is_some_and(|parts| parts > 1) {
            let expected = "one file; merge the parts with llama-gguf-split --merge";
            return Err(self.bad("split.count", expected, self.fields.get("split.count")));
        }
        let experts = self.own("expert_count")?;
        if self.whole(&experts)?.is_some_and(|experts| experts > 0) {
            let expected = "a model without experts";
            return Err(self.bad(&experts, expected, self.fields.get(&experts)));
        }
        let dimension = self.own("rope.dimension_count")?;
        if self.whole(&dimension)?.is_some_and(|n| Some(n) != self.head_dim().ok()) {
            let expected = "rotary positions over the whole head";
            return Err(self.bad(&dimension, expected, self.fields.get(&dimension)));
        }
        Ok(())
    }

    pub(super) fn n_heads(&self) -> Result<u64, WeightsError> {
        self.required("attention.head_count")
    }

    pub(super) fn n_kv_heads(&self) -> Result<u64, WeightsError> {
        match self.whole(&self.own("attention.head_count_kv")?)? {
            Some(0) | None => self.n_heads(),
            Some(n) => Ok(n),
        }
    }

    fn head_dim(&self) -> Result<u64, WeightsError> {
        match self.whole(&self.own("attention.key_length")?)? {
            Some(n) => Ok(n),
            None => Ok(self.required("embedding_length")? / self.n_heads()?),
        }
    }

    /// The configuration that Transformers would have. `factors` are llama.cpp's frequency
    /// factors, `[D/2]`; `vocab_size` is the embedding's number of rows.
    pub(super) fn config(
        &self,
        entries: &Entries,
        vocab_size: u64,
        factors: Option<Vec<f64>>,
    ) -> Result<Value, WeightsError> {
        let architecture = self.architecture()?;
        let class = if architecture == "qwen2" { "Qwen2ForCausalLM" } else { "LlamaForCausalLM" };
        let mut config = json!({
            "architectures": [class],
            "model_type": architecture,
            "hidden_size": self.required("embedding_length")?,
            "num_hidden_layers": self.required("block_count")?,
            "num_attention_heads": self.n_heads()?,
            "num_key_value_heads": self.n_kv_heads()?,
            "head_dim": self.head_dim()?,
            "intermediate_size": self.required("feed_forward_length")?,
            "vocab_size": vocab_size,
            "max_position_embeddings": self.required("context_length")?,
            "rms_norm_eps": self.required_float("attention.layer_norm_rms_epsilon")?,
            "rope_theta": self.float(&self.own("rope.freq_base")?)?.unwrap_or(10000.0),
            "rope_scaling": self.rope_scaling(factors)?,
            "tie_word_embeddings": !entries.contains_key("lm_head.weight"),
            "hidden_act": "silu",
            "bos_token_id": self.whole("tokenizer.ggml.bos_token_id")?,
            "eos_token_id": self.whole("tokenizer.ggml.eos_token_id")?,
        });
        // Qwen2's configuration has no such fields: its biases on q, k and v are always there.
        if architecture == "llama" {
            let has = |name: &str| entries.contains_key(name);
            config["attention_bias"] = has("layers.0.self_attn.q_proj.bias").into();
            config["mlp_bias"] = has("layers.0.mlp.gate_proj.bias").into();
        }
        Ok(config)
    }

    /// Linear scaling, frequency factors (both: their product, as llama.cpp applies both), or the
    /// named kind for the decoder to know or to refuse.
    fn rope_scaling(&self, factors: Option<Vec<f64>>) -> Result<Value, WeightsError> {
        let kind_key = self.own("rope.scaling.type")?;
        let kind = self.text(&kind_key)?.unwrap_or_else(|| "linear".into());
        let factor = match self.float(&self.own("rope.scaling.factor")?)? {
            Some(factor) => Some(factor),
            None => self.float(&self.own("rope.scale_linear")?)?,
        };
        let original = self.whole(&self.own("rope.scaling.original_context_length")?)?;
        let factor = factor.filter(|&factor| factor > 0.0);
        Ok(match (kind.as_str(), factors) {
            ("linear" | "none", Some(factors)) => {
                let linear = factor.filter(|_| kind == "linear").unwrap_or(1.0);
                let factors: Vec<f64> = factors.iter().map(|f| f * linear).collect();
                json!({ "rope_type": "factors", "factors": factors })
            }
            ("none", None) => Value::Null,
            ("linear", None) => match factor {
                Some(factor) if factor != 1.0 => json!({ "rope_type": "linear", "factor": factor }),
                _ => Value::Null,
            },
            (kind, _) => json!({
                "rope_type": kind,
                "factor": factor,
                "original_max_position_embeddings": original,
            }),
        })
    }

    /// The tokenizer, or None if the file has none. Takes its arrays out of the metadata.
    pub(super) fn tokenizer(&mut self) -> Result<Option<GgufTokenizer>, WeightsError> {
        let Some(model) = self.text("tokenizer.ggml.model")? else {
            return Ok(None);
        };
        let tokens = self.take_array("tokenizer.ggml.tokens", "texts", into_text)?;
        let token_types =
            self.take_array("tokenizer.ggml.token_type", "whole numbers", |field| {
                whole(&field).and_then(|n| i32::try_from(n).ok())
            })?;
        let merges = self.take_array("tokenizer.ggml.merges", "texts", into_text)?;
        let scores =
            self.take_array("tokenizer.ggml.scores", "numbers", |field| field.to_f32().ok())?;
        let id = |key: &str| -> Result<Option<u32>, WeightsError> {
            let id = self.whole(key)?;
            id.map(|id| u32::try_from(id).map_err(|_| self.bad(key, "a token id", None)))
                .transpose()
        };
        let add_bos_token = match self.fields.get("tokenizer.ggml.add_bos_token") {
            Some(Field::Bool(add)) => *add,
            // llama.cpp's own default.
            _ => model == "llama",
        };
        Ok(Some(GgufTokenizer {
            pre: self.text("tokenizer.ggml.pre")?.unwrap_or_else(|| "default".into()),
            bos_token_id: id("tokenizer.ggml.bos_token_id")?,
            eos_token_id: id("tokenizer.ggml.eos_token_id")?,
            chat_template: self.text("tokenizer.chat_template")?,
            model,
            tokens,
            token_types,
            merges,
            scores,
            add_bos_token,
        }))
    }

    /// The full key of one of the architecture's own fields.
    fn own(&self, field: &str) -> Result<String, WeightsError> {
        Ok(format!("{}.{field}", self.architecture()?))
    }

    fn required(&self, field: &str) -> Result<u64, WeightsError> {
        let key = self.own(field)?;
        let expected = "a whole number above 0";
        match self.whole(&key)? {
            Some(n) if n > 0 => Ok(n),
            _ => Err(self.bad(&key, expected, self.fields.get(&key))),
        }
    }

    fn required_float(&self, field: &str) -> Result<f64, WeightsError> {
        let key = self.own(field)?;
        self.float(&key)?.ok_or_else(|| self.bad(&key, "a number", None))
    }

    fn whole(&self, key: &str) -> Result<Option<u64>, WeightsError> {
        self.field(key, "a whole number", |field| whole(field).and_then(|n| u64::try_from(n).ok()))
    }

    fn float(&self, key: &str) -> Result<Option<f64>, WeightsError> {
        self.field(key, "a number", |field| match field {
            Field::F32(value) => Some(f64::from(*value)),
            Field::F64(value) => Some(*value),
            other => whole(other).map(|n| n as f64),
        })
    }

    fn text(&self, key: &str) -> Result<Option<String>, WeightsError> {
        self.field(key, "a text", |field| field.to_string().ok().cloned())
    }

    fn field<T>(
        &self,
        key: &str,
        expected: &'static str,
        read: impl Fn(&Field) -> Option<T>,
    ) -> Result<Option<T>, WeightsError> {
        let Some(field) = self.fields.get(key) else { return Ok(None) };
        read(field).map(Some).ok_or_else(|| self.bad(key, expected, Some(field)))
    }

    /// The elements of an array, which leaves the metadata; empty if there is none.
    fn take_array<T>(
        &mut self,
        key: &str,
        expected: &'static str,
        read: impl Fn(Field) -> Option<T>,
    ) -> Result<Vec<T>, WeightsError> {
        let Some(field) = self.fields.remove(key) else { return Ok(vec![]) };
        let Field::Array(items) = field else {
            return Err(self.bad(key, "an array", Some(&field)));
        };
        let items: Option<Vec<T>> = items.into_iter().map(read).collect();
        items.ok_or_else(|| self.bad(key, expected, None))
    }

    fn bad(&self, key: &str, expected: &'static str, found: Option<&Field>) -> WeightsError {
        let found = match found {
            None if self.fields.contains_key(key) => "something else".into(),
            None => "nothing usable".into(),
            Some(Field::Array(items)) => format!("an array of {}", items.len()),
            Some(Field::String(text)) => format!("{text:?}"),
            Some(other) => format!("{other:?}"),
        };
        WeightsError::BadMetadata { file: self.file.clone(), key: key.into(), expected, found }
    }
}

fn into_text(field: Field) -> Option<String> {
    match field {
        Field::String(text) => Some(text),
        _ => None,
    }
}

fn whole(field: &Field) -> Option<i64> {
    match *field {
        Field::U8(n) => Some(n.into()),
        Field::I8(n) => Some(n.into()),
        Field::U16(n) => Some(n.into()),
        Field::I16(n) => Some(n.into()),
        Field::U32(n) => Some(n.into()),
        Field::I32(n) => Some(n.into()),
        Field::U64(n) => i64::try_from(n).ok(),
        Field::I64(n) => Some(n),
        Field::F32(_) | Field::F64(_) | Field::Bool(_) | Field::String(_) | Field::Array(_) => None,
    }
}
