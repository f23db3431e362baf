use crate::ModelError;
use crate::rope::Rope;
use serde_json::Value;

/// A model family that the decoder can be configured as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    Gpt2,
    Llama,
    Qwen2,
    Qwen3,
    Gemma,
}

impl Family {
    pub const ALL: [Family; 5] =
        [Family::Gpt2, Family::Llama, Family::Qwen2, Family::Qwen3, Family::Gemma];

    /// `model_type` in config.json.
    pub fn name(self) -> &'static str {
        match self {
            Family::Gpt2 => "gpt2",
            Family::Llama => "llama",
            Family::Qwen2 => "qwen2",
            Family::Qwen3 => "qwen3",
            Family::Gemma => "gemma",
        }
    }

    /// True if linear layers are stored `[in, out]` (GPT-2's Conv1D).
    pub fn fan_in_fan_out(self) -> bool {
        self == Family::Gpt2
    }
}

/// Activation of the MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    Silu,
    /// `0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`: gelu_new, gelu_pytorch_tanh.
    GeluTanh,
    Gelu,
}

/// What a decoder of any known family is made of. Fields have Hugging Face's names where those
/// agree between families.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    pub family: Family,
    /// L.
    pub n_layers: usize,
    /// H.
    pub hidden_size: i64,
    /// F.
    pub intermediate_size: i64,
    /// A.
    pub n_heads: i64,
    /// K; equal to A without grouped queries.
    pub n_kv_heads: i64,
    /// D; not always H / A.
    pub head_dim: i64,
    /// V.
    pub vocab_size: i64,
    /// Longest sequence that the model was made for; the hard limit of learned positions.
    pub max_positions: usize,
    pub norm_eps: f64,
    pub activation: Activation,
    /// None: learned positions, added to the embeddings.
    pub rope: Option<Rope>,
    pub tie_word_embeddings: bool,
    /// Biases on q, k and v, on the attention output, and in the MLP.
    pub qkv_bias: bool,
    pub o_bias: bool,
    pub mlp_bias: bool,
}

impl ModelConfig {
    /// Reads the content of a Hugging Face `config.json`.
    pub fn from_json(json: &Value) -> Result<Self, ModelError> {
        let found = json["model_type"].as_str().unwrap_or("(none)");
        let family = Family::ALL.into_iter().find(|f| f.name() == found).ok_or_else(|| {
            ModelError::UnknownFamily {
                found: found.into(),
                known: Family::ALL.map(Family::name).join(", "),
            }
        })?;
        refuse_unsupported(json)?;
        match family {
            Family::Gpt2 => Self::gpt2(&Fields(json)),
            _ => Self::llama_like(family, &Fields(json)),
        }
    }

    fn gpt2(fields: &Fields) -> Result<Self, ModelError> {
        let hidden_size = fields.size("n_embd")?;
        let n_heads = fields.size("n_head")?;
        Ok(ModelConfig {
            family: Family::Gpt2,
            n_layers: fields.size("n_layer")? as usize,
            hidden_size,
            intermediate_size: fields.optional_size("n_inner")?.unwrap_or(4 * hidden_size),
            n_heads,
            n_kv_heads: n_heads,
            head_dim: hidden_size / n_heads,
            vocab_size: fields.size("vocab_size")?,
            max_positions: fields.size("n_positions")? as usize,
            norm_eps: fields.number("layer_norm_epsilon", 1e-5)?,
            activation: fields.activation("activation_function", "gelu_new")?,
            rope: None,
            tie_word_embeddings: fields.flag("tie_word_embeddings", true)?,
            qkv_bias: true,
            o_bias: true,
            mlp_bias: true,
        })
    }

    fn llama_like(family: Family, fields: &Fields) -> Result<Self, ModelError> {
        let hidden_size = fields.size("hidden_size")?;
        let n_heads = fields.size("num_attention_heads")?;
        let attention_bias = fields.flag("attention_bias", false)?;
        let default_head_dim = match family {
            Family::Gemma => 256,
            Family::Qwen3 => 128,
            _ => hidden_size / n_heads,
        };
        let head_dim = fields.optional_size("head_dim")?.unwrap_or(default_head_dim);
        let max_positions = fields.optional_size("max_position_embeddings")?.unwrap_or(2048);
        let activation = match family {
            // Its old config.json files say "gelu" and mean the tanh form.
            Family::Gemma => Activation::GeluTanh,
            _ => fields.activation("hidden_act", "silu")?,
        };
        Ok(ModelConfig {
            family,
            n_layers: fields.size("num_hidden_layers")? as usize,
            hidden_size,
            intermediate_size: fields.size("intermediate_size")?,
            n_heads,
            n_kv_heads: fields.optional_size("num_key_value_heads")?.unwrap_or(n_heads),
            head_dim,
            vocab_size: fields.size("vocab_size")?,
            max_positions: max_positions as usize,
            norm_eps: fields.number("rms_norm_eps", 1e-6)?,
            activation,
            rope: Some(Rope::from_json(fields.0, head_dim)?),
            tie_word_embeddings: fields.flag("tie_word_embeddings", family == Family::Gemma)?,
            qkv_bias: attention_bias || family == Family::Qwen2,
            o_bias: attention_bias && family != Family::Qwen2,
            mlp_bias: fields.flag("mlp_bias", false)?,
        })
    }

    /// Whether the model has positions for a sequence of so many tokens.
    pub fn check_length(&self, n_tokens: usize) -> Result<(), ModelError> {
        let max_positions = self.max_positions;
        match n_tokens {
            n_tokens if n_tokens > max_positions => {
                Err(ModelError::TooLong { n_tokens, max_positions })
            }
            _ => Ok(()),
        }
    }

    /// What the embeddings are multiplied by.
    pub fn embedding_scale(&self) -> Option<f64> {
        (self.family == Family::Gemma).then(|| (self.hidden_size as f64).sqrt())
    }
}

/// Settings that change numbers in a way that the decoder does not know.
fn refuse_unsupported(json: &Value) -> Result<(), ModelError> {
    let fixed = [
        ("use_sliding_window", Value::Bool(false)),
        ("scale_attn_weights", Value::Bool(true)),
        ("scale_attn_by_inverse_layer_idx", Value::Bool(false)),
        ("add_cross_attention", Value::Bool(false)),
        ("quantization_config", Value::Null),
    ];
    for (field, expected) in fixed {
        let found = &json[field];
        if !found.is_null() && *found != expected {
            return Err(ModelError::Config {
                field: field.into(),
                found: found.to_string(),
                expected: format!("{expected}: other values are not supported"),
            });
        }
    }
    Ok(())
}

/// Of every size, so that products of two of them cannot overflow.
const MAX_SIZE: i64 = 1 << 31;

/// config.json with errors that name the field.
struct Fields<'a>(&'a Value);

impl Fields<'_> {
    fn wrong(&self, field: &str, expected: &str) -> ModelError {
        let (field, found) = (field.to_owned(), self.0[field].to_string());
        ModelError::Config { field, found, expected: expected.into() }
    }

    fn optional_size(&self, field: &str) -> Result<Option<i64>, ModelError> {
        match &self.0[field] {
            Value::Null => Ok(None),
            value => match value.as_i64() {
                Some(n) if n > 0 && n <= MAX_SIZE => Ok(Some(n)),
                Some(n) if n > 0 => Err(self.wrong(field, "at most 2^31, as sizes are")),
                _ => Err(self.wrong(field, "a positive whole number")),
            },
        }
    }

    fn size(&self, field: &str) -> Result<i64, ModelError> {
        self.optional_size(field)?.ok_or_else(|| self.wrong(field, "a positive whole number"))
    }

    fn number(&self, field: &str, default: f64) -> Result<f64, ModelError> {
        match &self.0[field] {
            Value::Null => Ok(default),
            value => value.as_f64().ok_or_else(|| self.wrong(field, "a number")),
        }
    }

    fn flag(&self, field: &str, default: bool) -> Result<bool, ModelError> {
        match &self.0[field] {
            Value::Null => Ok(default),
            value => value.as_bool().ok_or_else(|| self.wrong(field, "true or false")),
        }
    }

    fn activation(&self, field: &str, default: &str) -> Result<Activation, ModelError> {
        match self.0[field].as_str().unwrap_or(default) {
            "silu" | "swish" => Ok(Activation::Silu),
            "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => Ok(Activation::GeluTanh),
            "gelu" => Ok(Activation::Gelu),
            _ => Err(self.wrong(field, "silu, gelu, gelu_new or gelu_pytorch_tanh")),
        }
    }
}

/// Where the model is cut: the trunk is the layers `[s1, s2)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SplitPoints {
    pub s1: usize,
    pub s2: usize,
}

impl SplitPoints {
    pub fn new(s1: usize, s2: usize, n_layers: usize) -> Result<Self, ModelError> {
        if s1 < s2 && s2 <= n_layers {
            Ok(SplitPoints { s1, s2 })
        } else {
            Err(ModelError::SplitPoints { s1, s2, n_layers })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::path::Path;

    fn fixture(name: &str) -> Value {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures");
        serde_json::from_str(&std::fs::read_to_string(root.join(name)).unwrap()).unwrap()
    }

    fn error(json: &Value) -> String {
        ModelConfig::from_json(json).unwrap_err().to_string()
    }

    #[test]
    fn old_and_new_spellings_mean_the_same() {
        for family in ["llama", "qwen2"] {
            let new = ModelConfig::from_json(&fixture(&format!("{family}/config.json"))).unwrap();
            let old =
                ModelConfig::from_json(&fixture(&format!("{family}/config.v4.json"))).unwrap();
            assert_eq!(new, old, "{family}");
        }
    }

    #[test]
    fn unknown_architecture_names_the_known_ones() {
        let text = error(&json!({"model_type": "mamba"}));
        assert_eq!(
            text,
            "model_type \"mamba\" is not supported; known are gpt2, llama, qwen2, qwen3, gemma"
        );
        assert!(error(&json!({})).contains("\"(none)\""));
    }

    #[test]
    fn what_the_decoder_cannot_do_is_refused_by_field() {
        let with = |field: &str, value: Value| {
            let mut json = fixture("llama/config.json");
            json[field] = value;
            error(&json)
        };
        let text = with("hidden_size", json!("wide"));
        assert_eq!(text, "config.json: hidden_size is \"wide\", expected a positive whole number");
        assert!(with("quantization_config", json!({"bits": 4})).contains("quantization_config"));
        assert!(with("use_sliding_window", json!(true)).contains("use_sliding_window is true"));
        assert!(with("hidden_act", json!("relu")).contains("expected silu, gelu"));
        let text = with("rope_parameters", json!({"rope_type": "yarn", "rope_theta": 1e4}));
        assert!(text.contains("\"yarn\", expected default, linear or llama3"), "{text}");
    }

    #[test]
    fn split_points_are_in_order_and_inside_the_model() {
        assert_eq!(SplitPoints::new(0, 30, 30).unwrap(), SplitPoints { s1: 0, s2: 30 });
        for (s1, s2) in [(20, 20), (21, 20), (0, 31), (30, 31)] {
            let text = SplitPoints::new(s1, s2, 30).unwrap_err().to_string();
            assert!(text.starts_with(&format!("split points {s1} and {s2} do not fit")), "{text}");
            assert!(text.contains("<= 30"), "{text}");
        }
    }
}
