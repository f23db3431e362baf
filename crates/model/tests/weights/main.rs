//! Weights: directories, GGUF files, the hub, and every error on the way.

mod directory;
mod errors;
mod fingerprint;
mod gguf;
mod hub;

use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor};

/// One tensor of a test model: its name, shape and f32 values.
type Named = (String, Vec<usize>, Vec<f32>);

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/gguf").join(name)
}

/// Tensors of a model too small to run, names without prefix: enough for whoever only reads files.
fn tiny_tensors() -> Vec<Named> {
    let mut tensors = vec![named("embed_tokens.weight", &[7, 4]), named("norm.weight", &[4])];
    for layer in 0..2 {
        tensors.push(named(&format!("layers.{layer}.self_attn.q_proj.weight"), &[4, 4]));
        tensors.push(named(&format!("layers.{layer}.mlp.down_proj.weight"), &[4, 300]));
    }
    tensors
}

fn named(name: &str, shape: &[usize]) -> Named {
    let n = shape.iter().product::<usize>();
    let values = (0..n).map(|i| (i as f32 + name.len() as f32).sin()).collect();
    (name.to_string(), shape.to_vec(), values)
}

fn prefixed(prefix: &str, tensors: &[Named]) -> Vec<Named> {
    tensors.iter().map(|(n, shape, v)| (format!("{prefix}{n}"), shape.clone(), v.clone())).collect()
}

fn tiny_config() -> Value {
    json!({ "model_type": "llama", "hidden_size": 4, "num_hidden_layers": 2, "rope_theta": 10000.0 })
}

fn write_safetensors(path: &Path, tensors: &[Named]) {
    let bytes: Vec<Vec<u8>> = tensors
        .iter()
        .map(|(_, _, values)| values.iter().flat_map(|v| v.to_le_bytes()).collect())
        .collect();
    let views = tensors.iter().zip(&bytes).map(|((name, shape, _), bytes)| {
        (name.clone(), TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap())
    });
    safetensors::serialize_to_file(views, None, path).unwrap();
}

/// A directory with config.json and model.safetensors.
fn write_model(dir: &Path, config: &Value, tensors: &[Named]) {
    std::fs::create_dir_all(dir).unwrap();
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    write_safetensors(&dir.join("model.safetensors"), tensors);
}

/// The same in `n_shards` files with an index.
fn write_sharded(dir: &Path, config: &Value, tensors: &[Named], n_shards: usize) {
    std::fs::create_dir_all(dir).unwrap();
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let mut weight_map = BTreeMap::new();
    for (i, part) in tensors.chunks(tensors.len().div_ceil(n_shards)).enumerate() {
        let file = format!("model-{:05}-of-{n_shards:05}.safetensors", i + 1);
        write_safetensors(&dir.join(&file), part);
        weight_map.extend(part.iter().map(|(name, ..)| (name.clone(), file.clone())));
    }
    let index = json!({ "metadata": {}, "weight_map": weight_map });
    std::fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

fn floats(tensor: &Tensor) -> Vec<f32> {
    let flat = tensor.to_kind(Kind::Float).to_device(Device::Cpu).contiguous().view(-1);
    Vec::try_from(flat).unwrap()
}
