//! Which tensors a model has, without its weights.

use crate::layout::Layout;
use crate::{Family, ModelConfig};

/// A frozen tensor of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parameter {
    /// Its Hugging Face name in the whole model, such as `model.layers.3.mlp.up_proj.weight`.
    pub name: String,
    pub shape: Vec<i64>,
}

impl ModelConfig {
    /// Every tensor of the whole model, from the embeddings to the head. A head that is tied to the
    /// embeddings is none of its own; masks and other constants that old files hold are left out.
    pub fn parameters(&self) -> Vec<Parameter> {
        let layout = Layout::of(self.family);
        let mut all = Vec::new();
        let embedding = [self.vocab_size, self.hidden_size];
        add(&mut all, format!("{}.weight", layout.token_embedding), &embedding);
        if let Some(path) = layout.position_embedding {
            let shape = [self.max_positions as i64, self.hidden_size];
            add(&mut all, format!("{path}.weight"), &shape);
        }
        for layer in 0..self.n_layers {
            self.add_layer(&mut all, &layout, layer);
        }
        self.add_norm(&mut all, layout.final_norm, self.hidden_size);
        if !self.tie_word_embeddings {
            add(&mut all, "lm_head.weight".into(), &embedding);
        }
        all
    }

    fn add_layer(&self, all: &mut Vec<Parameter>, layout: &Layout, layer: usize) {
        let at = |name: &str| format!("{}.{name}", layout.layer(layer));
        let names = &layout.modules;
        self.add_norm(all, &at(names.input_norm), self.hidden_size);
        for module in layout.linears() {
            let (d_in, d_out) = self.linear_size(names, module);
            let weight = if self.family.fan_in_fan_out() { [d_in, d_out] } else { [d_out, d_in] };
            add(all, format!("{}.weight", at(module)), &weight);
            let has_bias = if names.qkv.contains(&module) {
                self.qkv_bias
            } else if module == names.o {
                self.o_bias
            } else {
                self.mlp_bias
            };
            if has_bias {
                add(all, format!("{}.bias", at(module)), &[d_out]);
            }
        }
        if self.family == Family::Qwen3 {
            self.add_norm(all, &at("self_attn.q_norm"), self.head_dim);
            self.add_norm(all, &at("self_attn.k_norm"), self.head_dim);
        }
        self.add_norm(all, &at(names.post_attention_norm), self.hidden_size);
    }

    fn add_norm(&self, all: &mut Vec<Parameter>, path: &str, size: i64) {
        add(all, format!("{path}.weight"), &[size]);
        if self.family == Family::Gpt2 {
            add(all, format!("{path}.bias"), &[size]);
        }
    }
}

fn add(all: &mut Vec<Parameter>, name: String, shape: &[i64]) {
    all.push(Parameter { name, shape: shape.to_vec() });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::Checkpoint;
    use crate::{Part, PartSpec};
    use std::path::Path;
    use tch::{Device, Kind};

    /// Against what Transformers saved.
    #[test]
    fn parameters_and_sites_are_those_of_the_files() {
        for family in ["gpt2", "llama", "qwen2", "qwen3", "gemma", "gguf/llama.gguf"] {
            let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures");
            let checkpoint = Checkpoint::open(&root.join(family)).unwrap();
            let config = ModelConfig::from_json(checkpoint.config()).unwrap();
            let parameters = config.parameters();
            for Parameter { name, shape } in &parameters {
                let tensor = checkpoint.tensor(name, Kind::Float, Device::Cpu).unwrap();
                assert_eq!(tensor.size(), *shape, "{family} {name}");
            }
            let mut names: Vec<&str> = parameters.iter().map(|p| p.name.as_str()).collect();
            names.sort();
            let mut stored: Vec<&str> = checkpoint.names().collect();
            stored.sort();
            assert_eq!(names, stored, "{family}");

            let whole = PartSpec::whole(&config);
            let part = Part::load(&checkpoint, &config, whole, Kind::Float, Device::Cpu).unwrap();
            for targets in [config.default_targets(), vec![config.lora_modules()[1].to_string()]] {
                let sites = config.sites(0..config.n_layers, &targets).unwrap();
                assert_eq!(sites, part.sites(&targets).unwrap(), "{family}");
            }
        }
    }
}
