use crate::attention;
use crate::cache::PastOfBlock;
use crate::linear::{Incoming, Linear, Sink};
use crate::lora::{LoraGradients, LoraPass, LoraTape};
use crate::norm::Norm;
use crate::rope::RopeTables;
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

/// What a block's forward saves, by name of the value in [`Block::forward`], all `[N, ...]`: as whole
/// tensors while it runs, as the rows of one segment on its tape.
pub(crate) struct Saved<T> {
    x: T,
    x_mid: T,
    /// Queries and keys before the head norms, where there are any.
    raw: Option<(T, T)>,
    q: T,
    k: T,
    v: T,
    attended: T,
    /// Log-sum-exp of each query's scores, float32 `[N, A]`.
    log_sums: T,
    /// Inputs of the activation product: gate and up, or up alone.
    mlp: Vec<T>,
}

impl<T> Saved<T> {
    /// The block's input.
    pub fn x(&self) -> &T {
        &self.x
    }

    /// Each value in an order that is always the same.
    pub fn map<'a, U>(&'a self, mut f: impl FnMut(&'a T) -> U) -> Saved<U> {
        Saved {
            x: f(&self.x),
            x_mid: f(&self.x_mid),
            raw: self.raw.as_ref().map(|(q, k)| (f(q), f(k))),
            q: f(&self.q),
            k: f(&self.k),
            v: f(&self.v),
            attended: f(&self.attended),
            log_sums: f(&self.log_sums),
            mlp: self.mlp.iter().map(f).collect(),
        }
    }

    /// All values in the order of [`Saved::map`].
    pub fn list(&self) -> Vec<&T> {
        let mut all = Vec::new();
        self.map(|value| all.push(value));
        all
    }
}

/// What a block's forward leaves for its backward over the same rows.
pub(crate) struct BlockTape {
    pub saved: Saved<Tensor>,
    /// In the order of [`Block::linears`].
    pub lora: Vec<LoraTape>,
}

/// What is the same for every block of one pass.
pub(crate) struct Pass<'a> {
    pub rows: &'a Rows,
    pub segments: &'a [Segment<'a>],
    pub lora: LoraPass,
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

    /// `x` `[N, H]` to `[N, H]`. Sequences with a cache go on from there.
    pub fn forward(
        &self,
        x: &Tensor,
        pass: &Pass,
        past: Option<PastOfBlock>,
    ) -> (Tensor, BlockTape) {
        let mut lora = Vec::with_capacity(7);
        let mut run = |linear: &Linear, x: &Tensor| {
            let (y, tape) = linear.forward(x, pass.segments, &pass.lora);
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
        let (attended, log_sums) = match past {
            Some(past) => past.attend(&q, &k, &v),
            None => attention::forward(&q, &k, &v, pass.rows),
        }; // [N, A, D]
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
        let saved = Saved { x, x_mid, raw, q, k, v, attended, log_sums, mlp };
        (y, BlockTape { saved, lora })
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
        let sink = Sink { segments: pass.segments, lora: &pass.lora, gradients };
        let grad = self.backward_mlp(tape, grad, &sink);
        self.backward_attention(tape, grad, pass, &sink, want_input)
    }

    /// From the gradient by the block's output to that by `x_mid`.
    fn backward_mlp(&self, tape: &BlockTape, mut grad: Tensor, sink: &Sink) -> Tensor {
        let lora = &tape.lora[self.first_mlp_linear()..];
        let saved = &tape.saved;
        let normed = self.post_attention_norm.forward(&saved.x_mid);
        let by_normed = match &self.mlp {
            Mlp::Gated { gate, up, down, activation } => {
                let (g, u) = (&saved.mlp[0], &saved.mlp[1]);
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
                let u = &saved.mlp[0];
                let activated = activation.forward(u);
                let incoming = Incoming { x: &activated, grad: &grad, tape: &lora[1] };
                let by_u = activation.backward(&down.backward(&incoming, sink), u);
                up.backward(&Incoming { x: &normed, grad: &by_u, tape: &lora[0] }, sink)
            }
        };
        let _ = grad.g_add_(&self.post_attention_norm.backward(&saved.x_mid, &by_normed));
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
        let saved = &tape.saved;
        let attended = saved.attended.flatten(1, 2); // [N, A D]
        let o_tape = &tape.lora[self.first_mlp_linear() - 1];
        let by_attended =
            self.o.backward(&Incoming { x: &attended, grad: &grad, tape: o_tape }, sink);
        let Saved { q, k, v, attended: output, log_sums, .. } = saved;
        let attended = attention::Attended { q, k, v, output, log_sums };
        let [mut by_q, mut by_k, by_v] =
            attention::backward(&attended, &self.heads(&by_attended), pass.rows);
        if let Some(rope) = pass.rope {
            (by_q, by_k) = (rope.rotate_back(&by_q), rope.rotate_back(&by_k));
        }
        if let (Some((q_norm, k_norm)), Some((q_raw, k_raw))) = (&self.head_norms, &saved.raw) {
            (by_q, by_k) = (q_norm.backward(q_raw, &by_q), k_norm.backward(k_raw, &by_k));
        }

        let normed = self.input_norm.forward(&saved.x);
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
        let _ = grad.g_add_(&self.input_norm.backward(&saved.x, &by_normed));
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
