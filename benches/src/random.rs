use anyhow::Context;
use half::bf16;
use offshoot_proto::{HostTensor, WireDType};
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};
use safetensors::{Dtype, View};
use serde_json::json;
use std::borrow::Cow;
use std::path::Path;
use tempfile::TempDir;

/// The shape of a llama.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ModelSize {
    /// H.
    pub hidden: usize,
    /// F.
    pub mlp: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    /// Small ones save disk and time: the trunk has no embeddings.
    pub vocab: usize,
}

impl ModelSize {
    /// SmolLM2-135M, without its vocabulary.
    pub const SMOLLM2_135M: ModelSize =
        ModelSize { hidden: 576, mlp: 1536, layers: 30, heads: 9, kv_heads: 3, vocab: 64 };
    /// Qwen2-0.5B's shape, without its vocabulary and its biases.
    pub const QWEN2_05B: ModelSize =
        ModelSize { hidden: 896, mlp: 4864, layers: 24, heads: 14, kv_heads: 2, vocab: 64 };
    /// Llama-2-7B's shape, without its vocabulary.
    pub const LLAMA_7B: ModelSize =
        ModelSize { hidden: 4096, mlp: 11008, layers: 32, heads: 32, kv_heads: 32, vocab: 64 };

    /// Width of q's output, and of k's and v's.
    fn attention(&self) -> (usize, usize) {
        let head = self.hidden / self.heads;
        (self.heads * head, self.kv_heads * head)
    }

    /// Hugging Face's names and shapes.
    fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let (h, f, (q, kv)) = (self.hidden, self.mlp, self.attention());
        let mut all = vec![
            ("model.embed_tokens.weight".to_string(), vec![self.vocab, h]),
            ("model.norm.weight".to_string(), vec![h]),
        ];
        for i in 0..self.layers {
            let of_layer = [
                ("input_layernorm", vec![h]),
                ("self_attn.q_proj", vec![q, h]),
                ("self_attn.k_proj", vec![kv, h]),
                ("self_attn.v_proj", vec![kv, h]),
                ("self_attn.o_proj", vec![h, q]),
                ("post_attention_layernorm", vec![h]),
                ("mlp.gate_proj", vec![f, h]),
                ("mlp.up_proj", vec![f, h]),
                ("mlp.down_proj", vec![h, f]),
            ];
            let named = |(name, shape)| (format!("model.layers.{i}.{name}.weight"), shape);
            all.extend(of_layer.into_iter().map(named));
        }
        all
    }
}

/// A model's directory that goes away with it.
#[derive(Debug)]
pub struct RandomModel {
    dir: TempDir,
}

impl RandomModel {
    /// What `--model` and its like take.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }
}

/// Writes `config.json` and `model.safetensors` (bf16) into a temporary directory. One tensor at a
/// time is in memory.
pub fn random_model(size: ModelSize, seed: u64) -> anyhow::Result<RandomModel> {
    let dir = tempfile::tempdir().context("a folder for the random model")?;
    let config = json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": size.hidden,
        "intermediate_size": size.mlp,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "vocab_size": size.vocab,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "hidden_act": "silu",
        "tie_word_embeddings": true,
        "torch_dtype": "bfloat16",
    });
    std::fs::write(dir.path().join("config.json"), config.to_string())?;
    let tensors = size.tensors().into_iter().enumerate().map(|(i, (name, shape))| {
        let ones = name.contains("norm");
        (name, RandomTensor { shape, ones, seed: seed.wrapping_add(i as u64) })
    });
    safetensors::serialize_to_file(tensors, None, &dir.path().join("model.safetensors"))
        .context("the random model's weights")?;
    Ok(RandomModel { dir })
}

/// Made when it is written.
struct RandomTensor {
    shape: Vec<usize>,
    ones: bool,
    seed: u64,
}

impl RandomTensor {
    fn n_values(&self) -> usize {
        self.shape.iter().product()
    }
}

impl View for RandomTensor {
    fn dtype(&self) -> Dtype {
        Dtype::BF16
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        if self.ones {
            return bf16::ONE.to_le_bytes().repeat(self.n_values()).into();
        }
        let mut bytes = vec![0; self.data_len()];
        StdRng::seed_from_u64(self.seed).fill_bytes(&mut bytes);
        // Random sign and mantissa, one exponent: magnitudes between 2^-6 and 2^-5, about as large
        // as weights are after initialisation.
        const EXPONENT: u16 = (127 - 6) << 7;
        for value in bytes.as_chunks_mut::<2>().0 {
            let random = u16::from_le_bytes(*value);
            *value = ((random & 0x807f) | EXPONENT).to_le_bytes();
        }
        bytes.into()
    }

    fn data_len(&self) -> usize {
        2 * self.n_values()
    }
}

/// `[n, width]`, normal with mean 0 and variance 1.
pub fn normal(n: usize, width: usize, dtype: WireDType, seed: u64) -> HostTensor {
    let mut rng = StdRng::seed_from_u64(seed);
    let values: Vec<f32> = (0..n * width)
        .map(|_| {
            // Box and Muller 1958.
            let radius = (-2.0 * (1.0 - rng.random::<f32>()).ln()).sqrt();
            radius * (std::f32::consts::TAU * rng.random::<f32>()).cos()
        })
        .collect();
    HostTensor::from_f32(&values, vec![n, width], dtype)
}
