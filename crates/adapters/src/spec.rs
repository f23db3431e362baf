use crate::AdapterError;
use serde::{Deserialize, Serialize};

/// LoRA settings, with PEFT's names and meanings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LoraSpec {
    /// Rank.
    pub r: usize,
    pub lora_alpha: f64,
    /// Probability in `[0, 1)` that an element of a LoRA input is zeroed while training.
    pub lora_dropout: f64,
    /// Scale by `lora_alpha / sqrt(r)` (arXiv 2312.03732) instead of `lora_alpha / r`.
    pub use_rslora: bool,
    /// A linear layer is a target if its path is one of these or ends with a dot and one of these.
    pub target_modules: Vec<String>,
}

impl Default for LoraSpec {
    fn default() -> Self {
        LoraSpec {
            r: 8,
            lora_alpha: 16.0,
            lora_dropout: 0.0,
            use_rslora: false,
            target_modules: Vec::new(),
        }
    }
}

impl LoraSpec {
    /// The factor of `B A x`.
    pub fn scaling(&self) -> f64 {
        let r = self.r as f64;
        self.lora_alpha / if self.use_rslora { r.sqrt() } else { r }
    }

    pub fn validate(&self) -> Result<(), AdapterError> {
        let wrong =
            |field, value: String, expected| Err(AdapterError::Setting { field, value, expected });
        // As wide as it is on the wire: no number of values can overflow.
        if !(1..=u32::MAX as usize).contains(&self.r) {
            return wrong("r", self.r.to_string(), "a rank of at least 1, below 2^32");
        }
        // In float32, in which rows are multiplied with it.
        if !((self.lora_alpha as f32).is_finite() && self.lora_alpha > 0.0) {
            return wrong(
                "lora_alpha",
                self.lora_alpha.to_string(),
                "a positive number below 3e38",
            );
        }
        if !(0.0..1.0).contains(&self.lora_dropout) {
            return wrong("lora_dropout", self.lora_dropout.to_string(), "at least 0, below 1");
        }
        Ok(())
    }
}

/// One linear layer that carries LoRA.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Site {
    /// Index in the whole model.
    pub layer: usize,
    /// Name within the layer, such as `self_attn.q_proj`.
    pub module: String,
    /// Name within the whole model, such as `model.layers.3.self_attn.q_proj`.
    pub path: String,
    pub d_in: i64,
    pub d_out: i64,
}

impl Site {
    pub fn new(layer: usize, module: &str, path: &str, d_in: i64, d_out: i64) -> Self {
        Site { layer, module: module.into(), path: path.into(), d_in, d_out }
    }

    /// PEFT's names of A and B in a saved adapter.
    pub fn peft_names(&self) -> [String; 2] {
        ["lora_A", "lora_B"].map(|matrix| format!("base_model.model.{}.{matrix}.weight", self.path))
    }
}
