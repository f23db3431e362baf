use crate::{Family, ModelConfig, ModelError};
use offshoot_adapters::Site;
use std::ops::Range;

/// What a family calls its modules in checkpoints and in PEFT adapters.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Layout {
    family: Family,
    pub token_embedding: &'static str,
    pub position_embedding: Option<&'static str>,
    layers: &'static str,
    pub final_norm: &'static str,
    pub modules: Modules,
}

/// Names within a layer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Modules {
    pub input_norm: &'static str,
    /// One fused module, or q, k and v.
    pub qkv: &'static [&'static str],
    pub o: &'static str,
    pub post_attention_norm: &'static str,
    pub gate: Option<&'static str>,
    pub up: &'static str,
    pub down: &'static str,
}

impl Layout {
    pub fn of(family: Family) -> Self {
        match family {
            Family::Gpt2 => Layout {
                family,
                token_embedding: "transformer.wte",
                position_embedding: Some("transformer.wpe"),
                layers: "transformer.h",
                final_norm: "transformer.ln_f",
                modules: Modules {
                    input_norm: "ln_1",
                    qkv: &["attn.c_attn"],
                    o: "attn.c_proj",
                    post_attention_norm: "ln_2",
                    gate: None,
                    up: "mlp.c_fc",
                    down: "mlp.c_proj",
                },
            },
            Family::Llama | Family::Qwen2 | Family::Qwen3 | Family::Gemma => Layout {
                family,
                token_embedding: "model.embed_tokens",
                position_embedding: None,
                layers: "model.layers",
                final_norm: "model.norm",
                modules: Modules {
                    input_norm: "input_layernorm",
                    qkv: &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
                    o: "self_attn.o_proj",
                    post_attention_norm: "post_attention_layernorm",
                    gate: Some("mlp.gate_proj"),
                    up: "mlp.up_proj",
                    down: "mlp.down_proj",
                },
            },
        }
    }

    /// Path of a layer, such as `model.layers.3`.
    pub fn layer(&self, layer: usize) -> String {
        format!("{}.{layer}", self.layers)
    }

    /// Every linear layer of a block, such as `self_attn.q_proj`.
    pub fn linears(&self) -> Vec<&'static str> {
        let m = self.modules;
        m.qkv.iter().copied().chain([m.o]).chain(m.gate).chain([m.up, m.down]).collect()
    }

    /// See [`is_target`].
    pub fn is_target(&self, path: &str, target: &str) -> bool {
        is_target(path, target)
    }

    pub fn check_targets(&self, targets: &[String]) -> Result<(), ModelError> {
        for target in targets {
            // A target may name one layer by its path: the module behind the number must be known.
            let known = target == "all-linear"
                || self
                    .linears()
                    .iter()
                    .any(|linear| ends_with_name(linear, target) || ends_with_name(target, linear));
            if !known {
                return Err(ModelError::UnknownTarget {
                    target: target.clone(),
                    family: self.family.name(),
                    known: self.linears().join(", "),
                });
            }
        }
        Ok(())
    }
}

/// PEFT's rule for one entry of `target_modules`: whether it means the linear layer at this path.
pub fn is_target(path: &str, target: &str) -> bool {
    target == "all-linear" || ends_with_name(path, target)
}

/// True if `path` is `name` or ends with a dot and `name`.
fn ends_with_name(path: &str, name: &str) -> bool {
    path.strip_suffix(name).is_some_and(|before| before.is_empty() || before.ends_with('.'))
}

impl ModelConfig {
    /// The linear layers of a block that can carry LoRA, such as `self_attn.q_proj`.
    pub fn lora_modules(&self) -> Vec<&'static str> {
        Layout::of(self.family).linears()
    }

    /// Path of a layer, such as `model.layers.3`.
    pub fn layer_path(&self, layer: usize) -> String {
        Layout::of(self.family).layer(layer)
    }

    /// Where LoRA goes in a range of layers, for PEFT's `target_modules`; the same as
    /// [`Part::sites`](crate::Part::sites), without a checkpoint.
    pub fn sites(&self, layers: Range<usize>, targets: &[String]) -> Result<Vec<Site>, ModelError> {
        let layout = Layout::of(self.family);
        layout.check_targets(targets)?;
        let of_layer = |layer: usize| {
            layout.linears().into_iter().filter_map(move |module| {
                let path = format!("{}.{module}", layout.layer(layer));
                let meant = targets.iter().any(|target| layout.is_target(&path, target));
                let (d_in, d_out) = self.linear_size(&layout.modules, module);
                meant.then(|| Site::new(layer, module, &path, d_in, d_out))
            })
        };
        Ok(layers.flat_map(of_layer).collect())
    }

    pub(crate) fn linear_size(&self, names: &Modules, module: &str) -> (i64, i64) {
        let (h, f) = (self.hidden_size, self.intermediate_size);
        let (a, k) = (self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim);
        match names.qkv.iter().position(|name| *name == module) {
            Some(_) if names.qkv.len() == 1 => (h, a + 2 * k),
            Some(0) => (h, a),
            Some(_) => (h, k),
            None if module == names.o => (a, h),
            None if module == names.down => (f, h),
            // up, and gate if there is one
            None => (h, f),
        }
    }

    /// `target_modules` when the user names none: every linear layer of a block, by the names that
    /// the family's users write.
    pub fn default_targets(&self) -> Vec<String> {
        let mut names: Vec<String> = self
            .lora_modules()
            .into_iter()
            .map(|module| module.rsplit('.').next().expect("a split has a part").to_owned())
            .collect();
        names.sort();
        names.dedup();
        names
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_end_at_a_dot() {
        let gpt2 = Layout::of(Family::Gpt2);
        for target in ["c_proj", "attn.c_proj", "transformer.h.1.attn.c_proj", "all-linear"] {
            assert!(gpt2.is_target("transformer.h.1.attn.c_proj", target), "{target}");
            gpt2.check_targets(&[target.into()]).unwrap();
        }
        assert!(!gpt2.is_target("transformer.h.1.attn.c_proj", "proj"));
        assert!(!gpt2.is_target("transformer.h.1.attn.c_proj", "mlp.c_proj"));
    }

    #[test]
    fn an_unknown_target_names_the_known_ones() {
        let layout = Layout::of(Family::Gpt2);
        let text = layout.check_targets(&["c_fc".into(), "q_proj".into()]).unwrap_err().to_string();
        assert_eq!(
            text,
            "target module \"q_proj\" is no linear layer of a gpt2 block; known are attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj (or \"all-linear\")"
        );
    }
}
