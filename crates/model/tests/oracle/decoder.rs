//! A decoder in plain tch operators whose backward is libtorch's autograd: the oracle of the written
//! out backward, and the opponent in `examples/explicit_vs_autograd.rs`.
//!
//! It shares nothing with the crate's own blocks but the checkpoint's tensors, the sizes in
//! `ModelConfig` and the dropout masks, which are data. It runs one tenant at a time.

use offshoot_adapters::{AdapterSet, LoraSpec};
use offshoot_model::weights::Checkpoint;
use offshoot_model::{Activation, DropoutKey, Family, ModelConfig};
use serde_json::Value;
use std::collections::HashMap;
use std::f64::consts::PI;
use std::ops::Range;
use tch::{Device, Kind, Tensor};

/// How the layers compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    /// Every formula as papers write it, attention by the score matrix of each sequence.
    Formulas,
    /// The operators that a good user of libtorch takes for speed, such as fused attention.
    Operators,
}

/// A range of a model's layers. Weights have no gradient.
pub struct Decoder {
    config: ModelConfig,
    /// `[D/2]`, none for learned positions.
    inverse_frequencies: Option<Tensor>,
    layers: Vec<HashMap<String, Tensor>>,
    prefixes: Vec<String>,
    kind: Kind,
    style: Style,
}

/// In which dtypes and how a [`Decoder`] runs.
#[derive(Debug, Clone, Copy)]
pub struct Precision {
    /// Matrices are rounded to this first.
    pub weights: Kind,
    /// Then everything is computed in this.
    pub compute: Kind,
}

/// One tenant's rows.
pub struct Microbatch<'a> {
    /// `[N, H]`.
    pub x: &'a Tensor,
    pub seq_lens: &'a [usize],
    pub position_ids: Option<&'a [i64]>,
    pub dropout: Option<DropoutKey>,
}

/// An adapter's matrices as leaves of autograd, in the order of the adapter's flat buffers.
pub struct Leaves {
    spec: LoraSpec,
    index: HashMap<String, usize>,
    pairs: Vec<(Tensor, Tensor)>,
}

impl Leaves {
    pub fn new(set: &AdapterSet, kind: Kind) -> Leaves {
        let leaf = |t: Tensor| t.to_kind(kind).copy().set_requires_grad(true);
        let pair = |i| {
            let (a, b) = set.matrices(i);
            (leaf(a), leaf(b))
        };
        let sites = set.sites();
        Leaves {
            spec: set.spec().clone(),
            index: sites.iter().enumerate().map(|(i, site)| (site.path.clone(), i)).collect(),
            pairs: (0..sites.len()).map(pair).collect(),
        }
    }

    /// A and B of every site, one after the other.
    pub fn tensors(&self) -> Vec<Tensor> {
        self.pairs.iter().flat_map(|(a, b)| [a.shallow_clone(), b.shallow_clone()]).collect()
    }
}

impl Decoder {
    pub fn load(
        checkpoint: &Checkpoint,
        layers: Range<usize>,
        precision: Precision,
        style: Style,
    ) -> Decoder {
        let config = ModelConfig::from_json(checkpoint.config()).unwrap();
        let gpt2 = config.family == Family::Gpt2;
        let prefixes: Vec<String> = layers
            .map(|i| if gpt2 { format!("transformer.h.{i}") } else { format!("model.layers.{i}") })
            .collect();
        let linears = config.lora_modules();
        let names = |path: &str| {
            let tensors = linears.iter().flat_map(|m| {
                let biased = checkpoint.contains(&format!("{path}.{m}.bias"));
                [Some(format!("{m}.weight")), biased.then(|| format!("{m}.bias"))]
            });
            let norms = norms(config.family).iter().map(|n| Some((*n).to_string()));
            tensors.chain(norms).flatten().collect::<Vec<_>>()
        };
        let tensor = |path: &str, name: String| {
            let full = format!("{path}.{name}");
            let value = checkpoint.tensor(&full, Kind::Float, Device::Cpu).unwrap();
            // Only matrices are held narrow.
            let matrix = value.dim() == 2;
            let rounded = if matrix { value.to_kind(precision.weights) } else { value };
            let value = rounded.to_kind(precision.compute);
            // GPT-2 stores its matrices [in, out].
            (name, if gpt2 && matrix { value.tr() } else { value })
        };
        let layers = prefixes
            .iter()
            .map(|path| names(path).into_iter().map(|name| tensor(path, name)).collect())
            .collect();
        let inverse_frequencies = (!gpt2).then(|| {
            let frequencies = inverse_frequencies(checkpoint.config(), config.head_dim);
            Tensor::from_slice(&frequencies).to_kind(Kind::Float)
        });
        Decoder { config, inverse_frequencies, layers, prefixes, kind: precision.compute, style }
    }

    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// `[N, H] -> [N, H]`, in the decoder's dtype, tied to `input.x` and `lora` by autograd's graph.
    pub fn forward(&self, input: &Microbatch, lora: Option<&Leaves>) -> Tensor {
        let tables = self.inverse_frequencies.as_ref().map(|f| self.rope_tables(input, f));
        let mut x = input.x.shallow_clone();
        for (weights, prefix) in self.layers.iter().zip(&self.prefixes) {
            let layer = Layer { decoder: self, weights, prefix, input, lora };
            x = layer.forward(&x, tables.as_ref());
        }
        x
    }

    /// Cosines and sines `[N, 1, D]`, each frequency twice, as Hugging Face lays them out.
    fn rope_tables(&self, input: &Microbatch, frequencies: &Tensor) -> (Tensor, Tensor) {
        let positions: Vec<i64> = match input.position_ids {
            Some(ids) => ids.to_vec(),
            None => input.seq_lens.iter().flat_map(|&n| 0..n as i64).collect(),
        };
        // Angles are float32 in Transformers, whatever the model is.
        let positions = Tensor::from_slice(&positions).to_kind(Kind::Float).unsqueeze(1);
        let angles = positions * frequencies.unsqueeze(0); // [N, D/2]
        let angles = Tensor::cat(&[&angles, &angles], 1).unsqueeze(1);
        let angles = if self.kind == Kind::Double { angles.to_kind(Kind::Double) } else { angles };
        (angles.cos().to_kind(self.kind), angles.sin().to_kind(self.kind))
    }
}

/// One layer, with what stands around it in this pass.
struct Layer<'a> {
    decoder: &'a Decoder,
    weights: &'a HashMap<String, Tensor>,
    prefix: &'a str,
    input: &'a Microbatch<'a>,
    lora: Option<&'a Leaves>,
}

impl Layer<'_> {
    fn forward(&self, x: &Tensor, tables: Option<&(Tensor, Tensor)>) -> Tensor {
        let config = &self.decoder.config;
        let gpt2 = config.family == Family::Gpt2;
        let [first, second] =
            if gpt2 { ["ln_1", "ln_2"] } else { ["input_layernorm", "post_attention_layernorm"] };
        let normed = self.norm(first, x);
        let (mut q, mut k, v) = if gpt2 {
            let parts = self.linear("attn.c_attn", &normed).chunk(3, 1);
            (self.heads(&parts[0]), self.heads(&parts[1]), self.heads(&parts[2]))
        } else {
            let head = |name: &str| self.heads(&self.linear(&format!("self_attn.{name}"), &normed));
            (head("q_proj"), head("k_proj"), head("v_proj"))
        };
        if config.family == Family::Qwen3 {
            (q, k) = (self.norm("self_attn.q_norm", &q), self.norm("self_attn.k_norm", &k));
        }
        if let Some(tables) = tables {
            (q, k) = (rotated(&q, tables), rotated(&k, tables));
        }
        let attended = self.attention(&q, &k, &v).flatten(1, 2); // [N, A D]
        let output = if gpt2 { "attn.c_proj" } else { "self_attn.o_proj" };
        let x = x + self.linear(output, &attended);

        let normed = self.norm(second, &x);
        let mlp = if gpt2 {
            self.linear("mlp.c_proj", &self.activation(&self.linear("mlp.c_fc", &normed)))
        } else {
            let gate = self.activation(&self.linear("mlp.gate_proj", &normed));
            self.linear("mlp.down_proj", &(gate * self.linear("mlp.up_proj", &normed)))
        };
        x + mlp
    }

    /// `x W^T + b + alpha / r * B A dropout(x)`.
    fn linear(&self, module: &str, x: &Tensor) -> Tensor {
        let bias = self.weights.get(&format!("{module}.bias"));
        let y = x.linear(&self.weights[&format!("{module}.weight")], bias);
        let path = format!("{}.{module}", self.prefix);
        let Some((leaves, site)) = self.lora.and_then(|l| Some((l, *l.index.get(&path)?))) else {
            return y;
        };
        let (a, b) = &leaves.pairs[site];
        let (a, b) = (a.to_kind(self.decoder.kind), b.to_kind(self.decoder.kind));
        let dropped = match self.input.dropout {
            Some(key) if leaves.spec.lora_dropout > 0.0 => {
                // As the crate rounds it: the mask is data.
                let like = Tensor::zeros([1], (Kind::Float, Device::Cpu));
                let p = leaves.spec.lora_dropout;
                let mask = key.mask(&path, [x.size()[0], x.size()[1]], p, &like);
                x * mask.to_kind(self.decoder.kind)
            }
            _ => x.shallow_clone(),
        };
        let r = leaves.spec.r as f64;
        let scaling = leaves.spec.lora_alpha / if leaves.spec.use_rslora { r.sqrt() } else { r };
        let h = dropped.matmul(&a.tr()); // [N, r]
        match self.decoder.style {
            Style::Formulas => y + h.matmul(&b.tr()) * scaling,
            Style::Operators => y.addmm(&(h * scaling), &b.tr()),
        }
    }

    /// Over the last dimension, in float32 at least.
    fn norm(&self, name: &str, x: &Tensor) -> Tensor {
        let (weight, eps) =
            (&self.weights[&format!("{name}.weight")], self.decoder.config.norm_eps);
        let wide = if x.kind() == Kind::Double { Kind::Double } else { Kind::Float };
        let y = x.to_kind(wide);
        match self.decoder.config.family {
            Family::Gpt2 if self.decoder.style == Style::Operators => {
                let bias = &self.weights[&format!("{name}.bias")];
                x.layer_norm(weight.size(), Some(weight), Some(bias), eps, false)
            }
            Family::Gemma if self.decoder.style == Style::Operators => {
                x.rms_norm(weight.size(), Some(&(weight + 1.0)), eps)
            }
            _ if self.decoder.style == Style::Operators => {
                x.rms_norm(weight.size(), Some(weight), eps)
            }
            Family::Gpt2 => {
                let centred = &y - y.mean_dim(-1, true, wide);
                let variance = (&centred * &centred).mean_dim(-1, true, wide);
                let normed = (centred / (variance + eps).sqrt()).to_kind(x.kind());
                normed * weight + &self.weights[&format!("{name}.bias")]
            }
            Family::Gemma => (rms_normed(&y, eps) * (weight + 1.0)).to_kind(x.kind()),
            _ => rms_normed(&y, eps).to_kind(x.kind()) * weight,
        }
    }

    fn activation(&self, x: &Tensor) -> Tensor {
        let fused = self.decoder.style == Style::Operators;
        match self.decoder.config.activation {
            Activation::Silu if fused => x.silu(),
            Activation::GeluTanh if fused => x.gelu("tanh"),
            Activation::Gelu if fused => x.gelu("none"),
            Activation::Silu => x * x.sigmoid(),
            Activation::GeluTanh => {
                let inner = (x + x * x * x * 0.044715) * (2.0 / PI).sqrt();
                x * (inner.tanh() + 1.0) * 0.5
            }
            Activation::Gelu => x * ((x / 2f64.sqrt()).erf() + 1.0) * 0.5,
        }
    }

    /// `[N, heads D] -> [N, heads, D]`.
    fn heads(&self, x: &Tensor) -> Tensor {
        x.reshape([x.size()[0], -1, self.decoder.config.head_dim])
    }

    /// `[N, A, D]`, causal within each sequence; query heads share key and value heads.
    fn attention(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor {
        match self.decoder.style {
            Style::Formulas => self.attention_by_scores(q, k, v),
            Style::Operators => self.attention_fused(q, k, v),
        }
    }

    fn attention_by_scores(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor {
        let group = self.decoder.config.n_heads / self.decoder.config.n_kv_heads;
        let d = self.decoder.config.head_dim as f64;
        let mut start = 0;
        let mut attended = Vec::new();
        for &length in self.input.seq_lens {
            let length = length as i64;
            let of = |x: &Tensor| x.narrow(0, start, length).transpose(0, 1); // [heads, T, D]
            let q = of(q);
            let [k, v] = [k, v].map(|x| of(x).repeat_interleave_self_int(group, 0, None));
            let ahead = Tensor::ones([length, length], (Kind::Bool, Device::Cpu)).triu(1);
            let scores = q.matmul(&k.transpose(1, 2)) / d.sqrt(); // [A, T, T]
            let weights = scores.masked_fill(&ahead, f64::NEG_INFINITY).softmax(-1, q.kind());
            attended.push(weights.matmul(&v).transpose(0, 1));
            start += length;
        }
        Tensor::cat(&attended, 0)
    }

    /// All sequences at once; they must be of one length.
    fn attention_fused(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor {
        let lengths = self.input.seq_lens;
        assert!(lengths.iter().all(|n| *n == lengths[0]), "sequences of one length: {lengths:?}");
        let shape = [lengths.len() as i64, lengths[0] as i64, -1, self.decoder.config.head_dim];
        let [q, k, v] = [q, k, v].map(|x| x.view(shape).transpose(1, 2)); // [B, heads, T, D]
        let grouped = q.size()[1] != k.size()[1];
        Tensor::scaled_dot_product_attention(&q, &k, &v, None::<&Tensor>, 0.0, true, None, grouped)
            .transpose(1, 2)
            .flatten(0, 1)
    }
}

fn norms(family: Family) -> &'static [&'static str] {
    match family {
        Family::Gpt2 => &["ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias"],
        Family::Qwen3 => &[
            "input_layernorm.weight",
            "post_attention_layernorm.weight",
            "self_attn.q_norm.weight",
            "self_attn.k_norm.weight",
        ],
        _ => &["input_layernorm.weight", "post_attention_layernorm.weight"],
    }
}

fn rms_normed(x: &Tensor, eps: f64) -> Tensor {
    x * ((x * x).mean_dim(-1, true, x.kind()) + eps).rsqrt()
}

/// `x cos + (-x2, x1) sin`, Hugging Face's `apply_rotary_pos_emb`.
fn rotated(x: &Tensor, (cos, sin): &(Tensor, Tensor)) -> Tensor {
    let halves = x.chunk(2, -1);
    let turned = Tensor::cat(&[-&halves[1], halves[0].shallow_clone()], -1);
    x * cos + turned * sin
}

/// Radians per position, `[D/2]`: default, linear and llama3 of Transformers.
fn inverse_frequencies(json: &Value, head_dim: i64) -> Vec<f64> {
    let scaling = if json["rope_parameters"].is_object() {
        &json["rope_parameters"]
    } else {
        &json["rope_scaling"]
    };
    let theta = json["rope_theta"].as_f64().or(scaling["rope_theta"].as_f64()).unwrap_or(1e4);
    let number = |name: &str| scaling[name].as_f64().unwrap();
    let scaled = |f: f64| match scaling["rope_type"].as_str().unwrap_or("default") {
        "default" => f,
        "linear" => f / number("factor"),
        "llama3" => {
            let turns = number("original_max_position_embeddings") * f / (2.0 * PI);
            let (low, high) = (number("low_freq_factor"), number("high_freq_factor"));
            let kept = ((turns - low) / (high - low)).clamp(0.0, 1.0);
            f * (kept + (1.0 - kept) / number("factor"))
        }
        other => panic!("the oracle does not know rope_type {other:?}"),
    };
    let plain = (0..head_dim / 2).map(|i| theta.powf(-2.0 * i as f64 / head_dim as f64));
    plain.map(scaled).collect()
}
