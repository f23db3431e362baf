use crate::block::{Block, Mlp, Qkv};
use crate::head::{ChunkLoss, Head, LogitsChunk};
use crate::layout::Layout;
use crate::linear::Linear;
use crate::lora::LoraMode;
use crate::weights::Checkpoint;
use crate::{LossOutput, ModelConfig, ModelError, Norm, Rows, Shapes, SplitPoints};
use offshoot_adapters::Site;
use std::ops::Range;
use tch::{Device, Kind, Tensor};

/// Which part of a model to load.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartSpec {
    /// Of the whole model.
    pub layers: Range<usize>,
    /// With the embeddings, as the bottom has them.
    pub embed: bool,
    /// With final norm and LM head, as the top has them.
    pub head: bool,
}

impl PartSpec {
    /// The whole model.
    pub fn whole(config: &ModelConfig) -> Self {
        PartSpec { layers: 0..config.n_layers, embed: true, head: true }
    }
}

/// A range of layers of a model, frozen, on one device; with the embeddings if it is the bottom and
/// with final norm and LM head if it is the top.
///
/// Hidden states are `[N, H]` in the part's [`Part::kind`]. Nothing here uses autograd;
/// gradients by LoRA are returned, never stored.
pub struct Part {
    pub(crate) config: ModelConfig,
    layout: Layout,
    layers: Range<usize>,
    embeddings: Option<Embeddings>,
    pub(crate) blocks: Vec<Block>,
    head: Option<Head>,
    kind: Kind,
    device: Device,
    pub(crate) lora_mode: LoraMode,
    pub(crate) shapes: Shapes,
}

struct Embeddings {
    /// `[V, H]`.
    tokens: Tensor,
    /// `[max_positions, H]` of models with learned positions.
    positions: Option<Tensor>,
}

/// The dtype in which products over weights of dtype `weights` run.
///
/// Bfloat16 runs as it is on accelerators and on CPUs with matrix units for it (AMX). Other CPUs are
/// slower in bfloat16 than in float32 (measured: 150 against 240 GFLOP/s, AVX-512 without AMX), and
/// CPUs are slow in float16: there the weights stay narrow in memory and are widened for each product.
pub fn compute_kind(weights: Kind, device: Device) -> Kind {
    match (weights, device) {
        (Kind::BFloat16, Device::Cpu) if has_amx() => Kind::BFloat16,
        (_, Device::Cpu) => Kind::Float,
        (kind, _) => kind,
    }
}

fn has_amx() -> bool {
    static HAS: std::sync::LazyLock<bool> = std::sync::LazyLock::new(|| {
        std::fs::read_to_string("/proc/cpuinfo").is_ok_and(|text| text.contains("amx_bf16"))
    });
    *HAS
}

impl Part {
    /// Loads only what the part needs, with weights in `kind` (float32, bfloat16 or float16).
    pub fn load(
        checkpoint: &Checkpoint,
        config: &ModelConfig,
        spec: PartSpec,
        kind: Kind,
        device: Device,
    ) -> Result<Part, ModelError> {
        Self::load_sharing(checkpoint, config, spec, kind, device, None)
    }

    /// The client's two parts. In tied models they share one embedding matrix.
    pub fn load_bottom_and_top(
        checkpoint: &Checkpoint,
        config: &ModelConfig,
        split: SplitPoints,
        kind: Kind,
        device: Device,
    ) -> Result<(Part, Part), ModelError> {
        let spec = PartSpec { layers: 0..split.s1, embed: true, head: false };
        let bottom = Self::load(checkpoint, config, spec, kind, device)?;
        let spec = PartSpec { layers: split.s2..config.n_layers, embed: false, head: true };
        let shared = bottom.embeddings.as_ref().map(|e| &e.tokens);
        let top = Self::load_sharing(checkpoint, config, spec, kind, device, shared)?;
        Ok((bottom, top))
    }

    fn load_sharing(
        checkpoint: &Checkpoint,
        config: &ModelConfig,
        spec: PartSpec,
        kind: Kind,
        device: Device,
        loaded_embedding: Option<&Tensor>,
    ) -> Result<Part, ModelError> {
        let layout = Layout::of(config.family);
        let loader = Loader { checkpoint, config, layout, kind, device };
        let embeddings = if spec.embed { Some(loader.embeddings()?) } else { None };
        let blocks = spec.layers.clone().map(|i| loader.block(i)).collect::<Result<_, _>>()?;
        let embedding = embeddings.as_ref().map(|e| &e.tokens).or(loaded_embedding);
        let head = if spec.head { Some(loader.head(embedding)?) } else { None };
        let (config, layers) = (config.clone(), spec.layers);
        let shapes = Shapes::new(&config, layers.clone(), kind, device);
        let (kind, lora_mode) = (compute_kind(kind, device), LoraMode::Auto);
        Ok(Part {
            config,
            layout,
            layers,
            embeddings,
            blocks,
            head,
            kind,
            device,
            lora_mode,
            shapes,
        })
    }

    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    pub fn layers(&self) -> Range<usize> {
        self.layers.clone()
    }

    /// dtype of products and hidden states: [`compute_kind`] of what the weights were loaded in.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    pub fn device(&self) -> Device {
        self.device
    }

    /// Where LoRA goes in these layers, for PEFT's `target_modules` (or `["all-linear"]`). A target
    /// that no linear layer of the family has is an error; a part without layers has no sites.
    pub fn sites(&self, targets: &[String]) -> Result<Vec<Site>, ModelError> {
        self.layout.check_targets(targets)?;
        let of_layer = |(block, layer): (&Block, usize)| {
            let prefix = format!("{}.", self.layout.layer(layer));
            let sites = block.linears().into_iter().filter_map(move |linear| {
                let module = linear.path.strip_prefix(&prefix)?;
                let meant =
                    targets.iter().any(|target| self.layout.is_target(&linear.path, target));
                meant.then(|| Site::new(layer, module, &linear.path, linear.d_in(), linear.d_out()))
            });
            sites.collect::<Vec<_>>()
        };
        Ok(self.blocks.iter().zip(self.layers.clone()).flat_map(of_layer).collect())
    }

    /// Bytes of the frozen weights on the device; a shared embedding counts in both parts.
    pub fn weights_bytes(&self) -> u64 {
        self.weights().map(crate::tape::bytes_of).sum()
    }

    fn weights(&self) -> impl Iterator<Item = &Tensor> {
        let embeddings = self
            .embeddings
            .iter()
            .flat_map(|e| std::iter::once(&e.tokens).chain(e.positions.as_ref()));
        let linears = self.blocks.iter().flat_map(|block| {
            block
                .linears()
                .into_iter()
                .flat_map(|linear| std::iter::once(&linear.weight).chain(linear.bias.as_ref()))
        });
        embeddings.chain(linears).chain(self.head.iter().map(|head| &head.weight))
    }

    /// Token ids int64 `[N]` to hidden states `[N, H]`. Panics if the part has no embeddings.
    pub fn embed(&self, ids: &Tensor, rows: &Rows) -> Tensor {
        let embeddings = self.embeddings.as_ref().expect("the bottom has the embeddings");
        let mut hidden = embeddings.tokens.index_select(0, ids).to_kind(self.kind);
        if let Some(scale) = self.config.embedding_scale() {
            // Rounded to the model's dtype first, as Transformers does.
            let scale = Tensor::from(scale).to_kind(self.kind).to_device(self.device);
            let _ = hidden.g_mul_(&scale);
        }
        if let Some(positions) = &embeddings.positions {
            let _ = hidden.g_add_(&positions.index_select(0, rows.positions()));
        }
        hidden
    }

    fn head(&self) -> &Head {
        self.head.as_ref().expect("the top has the head")
    }

    /// Float32 logits `[n, V]` of hidden states `[n, H]` that come out of the last block. Panics if
    /// the part has no head.
    pub fn logits(&self, hidden: &Tensor) -> Tensor {
        self.head().logits(hidden)
    }

    /// `[V, H]`: the head's weights, one row for each token. Not to be changed in place. Panics if the
    /// part has no head.
    pub fn head_rows(&self) -> Tensor {
        self.head().weight.shallow_clone()
    }

    /// The gradients of the cross-entropy of one row of hidden states `[1, H]` by that row, one for each
    /// of some labels that it could have: `[n, H]`. What a server can compute that has the public head.
    /// Panics if the part has no head.
    pub fn label_gradients(&self, hidden: &Tensor, labels: Range<i64>) -> Tensor {
        self.head().label_gradients(hidden, labels)
    }

    /// Cross-entropy and its gradient by `hidden` `[N, H]`. `labels` int64 `[N]`: the token that
    /// follows each row, negative where nothing is predicted. The gradient is that of
    /// `scale * loss_sum`. Panics if the part has no head.
    pub fn loss(&self, hidden: &Tensor, labels: &Tensor, scale: f64) -> LossOutput {
        self.loss_by_chunks(hidden, labels, scale, |chunk| chunk.cross_entropy(0.0, true))
    }

    /// Sum of the cross-entropy and number of predicted tokens, without a gradient.
    pub fn loss_eval(&self, hidden: &Tensor, labels: &Tensor) -> (f64, i64) {
        let of_chunk = |chunk: LogitsChunk| chunk.cross_entropy(0.0, false);
        let output = self.loss_by_chunks(hidden, labels, 1.0, of_chunk);
        (output.loss_sum, output.n_predicted)
    }

    /// Any loss of logits: `of_chunk` sees the rows with a label, some of them at a time, so that
    /// the logits of all rows never exist at once. The gradient `[N, H]` is that of `scale` times
    /// the sum; zero where `of_chunk` gives none. Panics if the part has no head.
    pub fn loss_by_chunks(
        &self,
        hidden: &Tensor,
        labels: &Tensor,
        scale: f64,
        mut of_chunk: impl FnMut(LogitsChunk) -> ChunkLoss,
    ) -> LossOutput {
        self.head().loss_by_chunks(hidden, labels, scale, &mut of_chunk)
    }
}

/// Makes the parts' pieces from a checkpoint's tensors.
struct Loader<'a> {
    checkpoint: &'a Checkpoint,
    config: &'a ModelConfig,
    layout: Layout,
    kind: Kind,
    device: Device,
}

impl Loader<'_> {
    fn tensor(&self, name: &str, shape: &[i64], kind: Kind) -> Result<Tensor, ModelError> {
        let tensor = self.checkpoint.tensor(name, kind, self.device)?;
        if tensor.size() != shape {
            let (found, expected) = (tensor.size(), shape.to_vec());
            return Err(ModelError::Shape { name: name.into(), found, expected });
        }
        Ok(tensor)
    }

    fn embeddings(&self) -> Result<Embeddings, ModelError> {
        let c = self.config;
        let name = format!("{}.weight", self.layout.token_embedding);
        let tokens = self.tensor(&name, &[c.vocab_size, c.hidden_size], self.kind)?;
        let positions = match self.layout.position_embedding {
            None => None,
            Some(path) => {
                let shape = [c.max_positions as i64, c.hidden_size];
                Some(self.tensor(&format!("{path}.weight"), &shape, self.kind)?)
            }
        };
        Ok(Embeddings { tokens, positions })
    }

    fn head(&self, embedding: Option<&Tensor>) -> Result<Head, ModelError> {
        let c = self.config;
        let shape = [c.vocab_size, c.hidden_size];
        let weight = match embedding {
            Some(embedding) if c.tie_word_embeddings => embedding.shallow_clone(),
            _ if c.tie_word_embeddings => {
                self.tensor(&format!("{}.weight", self.layout.token_embedding), &shape, self.kind)?
            }
            _ => self.tensor("lm_head.weight", &shape, self.kind)?,
        };
        Ok(Head { norm: self.norm(self.layout.final_norm, c.hidden_size)?, weight })
    }

    fn norm(&self, path: &str, size: i64) -> Result<Norm, ModelError> {
        let eps = self.config.norm_eps;
        let weight = self.tensor(&format!("{path}.weight"), &[size], Kind::Float)?;
        Ok(match self.config.family {
            crate::Family::Gpt2 => {
                let bias = self.tensor(&format!("{path}.bias"), &[size], Kind::Float)?;
                Norm::Layer { weight, bias, eps }
            }
            crate::Family::Gemma => Norm::Rms { weight: weight + 1.0, eps },
            _ => Norm::Rms { weight, eps },
        })
    }

    fn linear(
        &self,
        path: String,
        d_in: i64,
        d_out: i64,
        bias: bool,
    ) -> Result<Linear, ModelError> {
        let name = format!("{path}.weight");
        let weight = if self.config.family.fan_in_fan_out() {
            self.tensor(&name, &[d_in, d_out], self.kind)?.tr()
        } else {
            self.tensor(&name, &[d_out, d_in], self.kind)?
        };
        let bias = if bias {
            let kind = compute_kind(self.kind, self.device);
            Some(self.tensor(&format!("{path}.bias"), &[d_out], kind)?)
        } else {
            None
        };
        Ok(Linear { path, weight, bias })
    }

    fn block(&self, layer: usize) -> Result<Block, ModelError> {
        let c = self.config;
        let at = |name: &str| format!("{}.{name}", self.layout.layer(layer));
        let (h, f) = (c.hidden_size, c.intermediate_size);
        let (a, k) = (c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim);
        let names = &self.layout.modules;
        let qkv = match names.qkv {
            [qkv] => Qkv::Fused(self.linear(at(qkv), h, a + 2 * k, c.qkv_bias)?),
            [q, k_name, v] => Qkv::Separate {
                q: self.linear(at(q), h, a, c.qkv_bias)?,
                k: self.linear(at(k_name), h, k, c.qkv_bias)?,
                v: self.linear(at(v), h, k, c.qkv_bias)?,
            },
            _ => unreachable!("a layout names one or three qkv modules"),
        };
        let up = self.linear(at(names.up), h, f, c.mlp_bias)?;
        let down = self.linear(at(names.down), f, h, c.mlp_bias)?;
        let activation = c.activation;
        let mlp = match names.gate {
            Some(gate) => {
                let gate = self.linear(at(gate), h, f, c.mlp_bias)?;
                Mlp::Gated { gate, up, down, activation }
            }
            None => Mlp::Plain { up, down, activation },
        };
        let head_norms = match c.family {
            crate::Family::Qwen3 => Some((
                self.norm(&at("self_attn.q_norm"), c.head_dim)?,
                self.norm(&at("self_attn.k_norm"), c.head_dim)?,
            )),
            _ => None,
        };
        Ok(Block {
            input_norm: self.norm(&at(names.input_norm), h)?,
            qkv,
            head_norms,
            o: self.linear(at(names.o), a, h, c.o_bias)?,
            post_attention_norm: self.norm(&at(names.post_attention_norm), h)?,
            mlp,
            head_dim: c.head_dim,
        })
    }
}
