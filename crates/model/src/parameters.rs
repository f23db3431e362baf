//! Which tensors a model has, without its weights.

use crate::layout::{Layout, Modules};
use crate::{Family, ModelConfig, PartSpec, compute_kind};
use tch::{Device, Kind};

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
            if self.has_bias(names, module) {
                add(all, format!("{}.bias", at(module)), &[d_out]);
            }
        }
        if self.family == Family::Qwen3 {
            self.add_norm(all, &at("self_attn.q_norm"), self.head_dim);
            self.add_norm(all, &at("self_attn.k_norm"), self.head_dim);
        }
        self.add_norm(all, &at(names.post_attention_norm), self.hidden_size);
    }

    fn has_bias(&self, names: &Modules, module: &str) -> bool {
        if names.qkv.contains(&module) {
            self.qkv_bias
        } else if module == names.o {
            self.o_bias
        } else {
            self.mlp_bias
        }
    }

    /// Bytes of a part's weights in `kind` there, as [`Part::weights_bytes`](crate::Part::weights_bytes)
    /// counts them once they are loaded.
    pub fn weights_bytes(&self, spec: &PartSpec, kind: Kind, device: Device) -> u64 {
        let layout = Layout::of(self.family);
        let size = |kind: Kind| kind.elt_size_in_bytes() as u64;
        let of_linear = |module: &str| {
            let (d_in, d_out) = self.linear_size(&layout.modules, module);
            let bias = if self.has_bias(&layout.modules, module) { d_out as u64 } else { 0 };
            (d_in * d_out) as u64 * size(kind) + bias * size(compute_kind(kind, device))
        };
        let of_layer: u64 = layout.linears().into_iter().map(of_linear).sum();
        let rows = |n: i64| (n * self.hidden_size) as u64 * size(kind);
        let positions = layout.position_embedding.map_or(0, |_| self.max_positions as i64);
        let embed = if spec.embed { rows(self.vocab_size) + rows(positions) } else { 0 };
        let head = if spec.head { rows(self.vocab_size) } else { 0 };
        spec.layers.len() as u64 * of_layer + embed + head
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
    use crate::Part;
    use crate::weights::Checkpoint;
    use std::path::Path;

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
            for kind in [Kind::Float, Kind::BFloat16, Kind::Half] {
                for (layers, ends) in
                    [(1..config.n_layers, false), (0..config.n_layers, true), (0..0, true)]
                {
                    let spec = PartSpec { layers, embed: ends, head: ends };
                    let predicted = config.weights_bytes(&spec, kind, Device::Cpu);
                    let part = Part::load(&checkpoint, &config, spec, kind, Device::Cpu).unwrap();
                    assert_eq!(predicted, part.weights_bytes(), "{family} {kind:?}");
                }
            }
        }
    }
}
