use crate::attention;
use crate::linear::{Incoming, Linear, LoraGradients, LoraTape, Sink};
use crate::norm::Norm;
use crate::rope::RopeTables;
use crate::tape::bytes_of;
use crate::{Activation, Rows, Segment};
use tch::Tensor;

/// One decoder layer of any family: attention, then MLP, each behind a norm and beside a residual.
///
/// Forward and backward are written out. The backward needs the gradient by the input and by LoRA
/// only, since everything else is frozen; what is cheap (norms, activations, rope) is computed again
/// rather than kept.
pub(crate) struct Block {
    pub input_norm: Norm,
    pub qkv: Qkv,
    /// Norms of each query and key head (Qwen3).
    pub head_norms: Option<(Norm, Norm)>,
    pub o: Linear,
    pub post_attention_norm: Norm,
    pub mlp: Mlp,
    pub head_dim: i64,
}

pub(crate) enum Qkv {
    Separate {
        q: Linear,
        k: Linear,
        v: Linear,
    },
    /// GPT-2: rows of q, k and v one after the other.
    Fused(Linear),
}

pub(crate) enum Mlp {
    /// `down(act(gate x) * up x)`.
    Gated { gate: Linear, up: Linear, down: Linear, activation: Activation },
    /// `down(act(up x))`.
    Plain { up: Linear, down: Linear, activation: Activation },
}

/// What a block's forward saves, by name of the value in [`Block::forward`].
pub(crate) struct BlockTape {
    x: Tensor,
    /// Queries and keys before the head norms, where there are any.
    raw: Option<(Tensor, Tensor)>,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attended: Tensor,
    log_sums: Vec<Tensor>,
    x_mid: Tensor,
    /// Inputs of the activation product: gate and up, or up alone.
    mlp: Vec<Tensor>,
    /// In the order of [`Block::linears`].
    lora: Vec<LoraTape>,
}

impl BlockTape {
    pub fn bytes(&self) -> u64 {
        let raw = self.raw.iter().flat_map(|(q, k)| [q, k]);
        let tensors = [&self.x, &self.q, &self.k, &self.v, &self.attended, &self.x_mid];
        let saved: u64 = tensors
            .into_iter()
            .chain(raw)
            .chain(&self.log_sums)
            .chain(&self.mlp)
            .map(bytes_of)
            .sum();
        saved + self.lora.iter().map(LoraTape::bytes).sum::<u64>()
    }
}

/// What is the same for every block of one pass.
pub(crate) struct Pass<'a> {
    pub rows: &'a Rows,
    pub segments: &'a [Segment<'a>],
    /// None: positions are in the embeddings.
    pub rope: Option<&'a RopeTables>,
}

impl Block {
    /// Every linear layer, in the order of the forward.
    pub fn linears(&self) -> Vec<&Linear> {
        let mut linears = match &self.qkv {
            Qkv::Separate { q, k, v } => vec![q, k, v],
            Qkv::Fused(qkv) => vec![qkv],
        };
        linears.push(&self.o);
        match &self.mlp {
            Mlp::Gated { gate, up, down, .. } => linears.extend([gate, up, down]),
            Mlp::Plain { up, down, .. } => linears.extend([up, down]),
        }
        linears
    }

    /// `x` `[N, H]` to `[N, H]`.
    pub fn forward(&self, x: &Tensor, pass: &Pass) -> (Tensor, BlockTape) {
        let mut lora = Vec::with_capacity(7);
        let mut run = |linear: &Linear, x: &Tensor| {
            let (y, tape) = linear.forward(x, pass.segments);
            lora.push(tape);
            y
        };
        let normed = self.input_norm.forward(x);
        let [mut q, mut k, v] = match &self.qkv {
            Qkv::Separate { q, k, v } => [q, k, v].map(|linear| self.heads(&run(linear, &normed))),
            Qkv::Fused(qkv) => {
                let parts = run(qkv, &normed).chunk(3, -1);
                [0, 1, 2].map(|i| self.heads(&parts[i]))
            }
        };
        let raw = self.head_norms.as_ref().map(|(q_norm, k_norm)| {
            let normed = (q_norm.forward(&q), k_norm.forward(&k));
            (std::mem::replace(&mut q, normed.0), std::mem::replace(&mut k, normed.1))
        });
        if let Some(rope) = pass.rope {
            (q, k) = (rope.rotate(&q), rope.rotate(&k));
        }
        let (attended, log_sums) = attention::forward(&q, &k, &v, pass.rows); // [N, A, D]
        let mut x_mid = run(&self.o, &attended.flatten(1, 2)); // [N, H]
        let _ = x_mid.g_add_(x);

        let normed = self.post_attention_norm.forward(&x_mid);
        let (mlp, mut y) = match &self.mlp {
            Mlp::Gated { gate, up, down, activation } => {
                let (g, u) = (run(gate, &normed), run(up, &normed)); // [N, F] each
                let y = run(down, &(activation.forward(&g) * &u));
                (vec![g, u], y)
            }
            Mlp::Plain { up, down, activation } => {
                let u = run(up, &normed); // [N, F]
                let y = run(down, &activation.forward(&u));
                (vec![u], y)
            }
        };
        let _ = y.g_add_(&x_mid);
        let x = x.shallow_clone();
        (y, BlockTape { x, raw, q, k, v, attended, log_sums, x_mid, mlp, lora })
    }

    /// The gradient `[N, H]` by the block's input, or None if none is wanted; LoRA gradients go into
    /// `gradients`. `grad` `[N, H]` is by the block's output.
    pub fn backward(
        &self,
        tape: &BlockTape,
        grad: Tensor,
        pass: &Pass,
        gradients: &LoraGradients,
        want_input: bool,
    ) -> Option<Tensor> {
        let sink = Sink { segments: pass.segments, gradients };
        let grad = self.backward_mlp(tape, grad, &sink);
        self.backward_attention(tape, grad, pass, &sink, want_input)
    }

    /// From the gradient by the block's output to that by `x_mid`.
    fn backward_mlp(&self, tape: &BlockTape, mut grad: Tensor, sink: &Sink) -> Tensor {
        let lora = &tape.lora[self.first_mlp_linear()..];
        let normed = self.post_attention_norm.forward(&tape.x_mid);
        let by_normed = match &self.mlp {
            Mlp::Gated { gate, up, down, activation } => {
                let (g, u) = (&tape.mlp[0], &tape.mlp[1]);
                let activated = activation.forward(g);
                let product = &activated * u;
                let incoming = Incoming { x: &product, grad: &grad, tape: &lora[2] };
                let by_product = down.backward(&incoming, sink);
                let by_g = activation.backward(&(&by_product * u), g);
                let by_u = by_product * activated;
                let incoming = Incoming { x: &normed, grad: &by_g, tape: &lora[0] };
                let mut by_normed = gate.backward(&incoming, sink);
                let incoming = Incoming { x: &normed, grad: &by_u, tape: &lora[1] };
                up.backward_into(&incoming, sink, &mut by_normed);
                by_normed
            }
            Mlp::Plain { up, down, activation } => {
                let u = &tape.mlp[0];
                let activated = activation.forward(u);
                let incoming = Incoming { x: &activated, grad: &grad, tape: &lora[1] };
                let by_u = activation.backward(&down.backward(&incoming, sink), u);
                up.backward(&Incoming { x: &normed, grad: &by_u, tape: &lora[0] }, sink)
            }
        };
        let _ = grad.g_add_(&self.post_attention_norm.backward(&tape.x_mid, &by_normed));
        grad
    }

    /// From the gradient by `x_mid` to that by the block's input.
    fn backward_attention(
        &self,
        tape: &BlockTape,
        mut grad: Tensor,
        pass: &Pass,
        sink: &Sink,
        want_input: bool,
    ) -> Option<Tensor> {
        let attended = tape.attended.flatten(1, 2); // [N, A D]
        let o_tape = &tape.lora[self.first_mlp_linear() - 1];
        let by_attended =
            self.o.backward(&Incoming { x: &attended, grad: &grad, tape: o_tape }, sink);
        let BlockTape { q, k, v, attended: output, log_sums, .. } = tape;
        let saved = attention::Saved { q, k, v, output, log_sums };
        let [mut by_q, mut by_k, by_v] =
            attention::backward(&saved, &self.heads(&by_attended), pass.rows);
        if let Some(rope) = pass.rope {
            (by_q, by_k) = (rope.rotate_back(&by_q), rope.rotate_back(&by_k));
        }
        if let (Some((q_norm, k_norm)), Some((q_raw, k_raw))) = (&self.head_norms, &tape.raw) {
            (by_q, by_k) = (q_norm.backward(q_raw, &by_q), k_norm.backward(k_raw, &by_k));
        }

        let normed = self.input_norm.forward(&tape.x);
        let mut by_normed: Option<Tensor> = None;
        let mut through = |linear: &Linear, grad: &Tensor, tape: &LoraTape| {
            let incoming = Incoming { x: &normed, grad, tape };
            match &mut by_normed {
                _ if !want_input => linear.backward_lora(&incoming, sink, None),
                Some(sum) => linear.backward_into(&incoming, sink, sum),
                None => by_normed = Some(linear.backward(&incoming, sink)),
            }
        };
        let flat = [by_q, by_k, by_v].map(|grad| grad.flatten(1, 2)); // [N, heads D] each
        match &self.qkv {
            Qkv::Separate { q, k, v } => {
                for ((linear, grad), lora) in [q, k, v].into_iter().zip(&flat).zip(&tape.lora) {
                    through(linear, grad, lora);
                }
            }
            Qkv::Fused(qkv) => through(qkv, &Tensor::cat(&flat, -1), &tape.lora[0]),
        }
        let by_normed = by_normed?;
        let _ = grad.g_add_(&self.input_norm.backward(&tape.x, &by_normed));
        Some(grad)
    }

    /// Index of the MLP's first layer in [`Block::linears`].
    fn first_mlp_linear(&self) -> usize {
        match &self.qkv {
            Qkv::Separate { .. } => 4,
            Qkv::Fused(_) => 2,
        }
    }

    /// `[N, heads D] -> [N, heads, D]`.
    fn heads(&self, x: &Tensor) -> Tensor {
        x.reshape([x.size()[0], -1, self.head_dim])
    }
}

impl Activation {
    fn forward(self, x: &Tensor) -> Tensor {
        match self {
            Activation::Silu => x.silu(),
            Activation::GeluTanh => x.gelu("tanh"),
            Activation::Gelu => x.gelu("none"),
        }
    }

    /// The gradient by `x` from the gradient by the activated value.
    fn backward(self, grad: &Tensor, x: &Tensor) -> Tensor {
        match self {
            Activation::Silu => x.silu_backward(grad),
            Activation::GeluTanh => x.gelu_backward(grad, "tanh"),
            Activation::Gelu => x.gelu_backward(grad, "none"),
        }
    }
}
