use crate::Segment;
use crate::lora::{LoraGradients, LoraLayer, LoraPass, LoraTape};
use tch::Tensor;

/// A frozen linear layer that may carry one LoRA pair for each segment:
/// `y = x W^T + b + s B A dropout(x)` (arXiv 2106.09685).
///
/// W and b never get gradients. A and B are float32 in the adapter and are rounded to the dtype of
/// `x` for the products.
pub(crate) struct Linear {
    /// Full module path, such as `model.layers.3.self_attn.q_proj`.
    pub path: String,
    /// `[out, in]`, a transposed view for weights stored `[in, out]`. Widened to the dtype of the
    /// rows for each product where that is another (see [`crate::compute_kind`]).
    pub weight: Tensor,
    /// `[out]`, in the dtype of the rows.
    pub bias: Option<Tensor>,
}

/// What the backward of one linear layer begins with.
pub(crate) struct Incoming<'a> {
    /// `[N, in]`, as the forward saw it.
    pub x: &'a Tensor,
    /// `[N, out]`, by the forward's result.
    pub grad: &'a Tensor,
    pub tape: &'a LoraTape,
}

/// The segments of a pass and where their LoRA gradients go.
pub(crate) struct Sink<'a> {
    pub segments: &'a [Segment<'a>],
    pub lora: &'a LoraPass,
    pub gradients: &'a LoraGradients,
}

impl Linear {
    pub fn d_in(&self) -> i64 {
        self.weight.size()[1]
    }

    pub fn d_out(&self) -> i64 {
        self.weight.size()[0]
    }

    fn layer<'a>(&'a self, segments: &'a [Segment<'a>], pass: &'a LoraPass) -> LoraLayer<'a> {
        LoraLayer { path: &self.path, d_in: self.d_in(), segments, pass }
    }

    /// `[N, in] -> [N, out]`.
    pub fn forward(&self, x: &Tensor, segments: &[Segment], lora: &LoraPass) -> (Tensor, LoraTape) {
        let mut y = x.linear(&self.weight.to_kind(x.kind()), self.bias.as_ref());
        let tape = self.layer(segments, lora).forward(x, &mut y);
        (y, tape)
    }

    /// Writes the LoRA gradients of every segment and returns the gradient `[N, in]` by `x`.
    pub fn backward(&self, incoming: &Incoming, sink: &Sink) -> Tensor {
        let mut grad_x = incoming.grad.matmul(&self.weight.to_kind(incoming.grad.kind()));
        self.backward_lora(incoming, sink, Some(&mut grad_x));
        grad_x
    }

    /// The same, adding the gradient by `x` to `grad_x`.
    pub fn backward_into(&self, incoming: &Incoming, sink: &Sink, grad_x: &mut Tensor) {
        let grad = incoming.grad;
        let _ = grad_x.addmm_(grad, &self.weight.to_kind(grad.kind()));
        self.backward_lora(incoming, sink, Some(grad_x));
    }

    /// LoRA gradients, and LoRA's share of the gradient by `x` if there is a place for it.
    pub fn backward_lora(&self, incoming: &Incoming, sink: &Sink, grad_x: Option<&mut Tensor>) {
        let Incoming { x, grad, tape } = incoming;
        let layer = self.layer(sink.segments, sink.lora);
        layer.backward(x, grad, tape, sink.gradients, grad_x);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DropoutKey, LoraMode};
    use offshoot_adapters::{AdapterSet, LoraSpec, Site};
    use tch::{Device, Kind};

    /// Two segments with other ranks, one with dropout, against autograd on the formula.
    #[test]
    fn backward_equals_autograd_with_dropout_on() {
        for mode in [LoraMode::Loop, LoraMode::Stacked] {
            check_against_autograd(mode);
        }
    }

    fn check_against_autograd(mode: LoraMode) {
        tch::manual_seed(1);
        let random = |shape: [i64; 2]| Tensor::randn(shape, (Kind::Float, Device::Cpu));
        let linear = Linear {
            path: "layer".into(),
            weight: random([5, 7]),
            bias: Some(random([1, 5]).squeeze()),
        };
        let adapter = |r, lora_dropout| {
            let spec = LoraSpec { r, lora_dropout, ..LoraSpec::default() };
            let site = Site::new(0, "layer", "layer", 7, 5);
            let set = AdapterSet::init(spec, vec![site], 3, Device::Cpu).unwrap();
            let (_, mut b) = set.matrices(0);
            b.copy_(&random([5, r as i64]));
            set
        };
        let (first, second) = (adapter(2, 0.0), adapter(3, 0.4));
        let key = DropoutKey { seed: 1, microbatch: 2 };
        let segments = [
            Segment { rows: 0..4, adapter: Some(&first), dropout: Some(key) },
            Segment { rows: 4..10, adapter: Some(&second), dropout: Some(key) },
        ];
        let (x, grad) = (random([10, 7]), random([10, 5]));
        let pass = LoraPass::new(mode);
        let (y, tape) = linear.forward(&x, &segments, &pass);
        let gradients: LoraGradients =
            segments.iter().map(|s| s.adapter.map(AdapterSet::new_gradient)).collect();
        let incoming = Incoming { x: &x, grad: &grad, tape: &tape };
        let sink = Sink { segments: &segments, lora: &pass, gradients: &gradients };
        let by_x = linear.backward(&incoming, &sink);

        let x = x.set_requires_grad(true);
        let mut leaves = vec![x.shallow_clone()];
        let outputs = segments.iter().map(|segment| {
            let set = segment.adapter.unwrap();
            let (a, b) = set.matrices(0);
            let (a, b) = (a.copy().set_requires_grad(true), b.copy().set_requires_grad(true));
            leaves.extend([a.shallow_clone(), b.shallow_clone()]);
            let rows = segment.of(&x);
            let dropped = match linear.layer(&segments, &pass).mask(segment, &rows) {
                Some(mask) => &rows * mask,
                None => rows.shallow_clone(),
            };
            let base = rows.matmul(&linear.weight.tr()) + linear.bias.as_ref().unwrap();
            base + dropped.matmul(&a.tr()).matmul(&b.tr()) * set.spec().scaling()
        });
        let expected = Tensor::cat(&outputs.collect::<Vec<_>>(), 0);
        (&expected * &grad).sum(Kind::Float).backward();
        let close = |a: &Tensor, b: &Tensor| assert!(a.allclose(b, 1e-5, 1e-5, false), "{a} {b}");
        close(&y, &expected);
        close(&by_x, &leaves[0].grad());
        for (i, segment) in segments.iter().enumerate() {
            let (a, b) = segment.adapter.unwrap().views(gradients[i].as_ref().unwrap(), 0);
            close(&a, &leaves[1 + 2 * i].grad());
            close(&b, &leaves[2 + 2 * i].grad());
        }
        let layer = linear.layer(&segments, &pass);
        assert!(layer.mask(&segments[1], &leaves[0]).is_some());
        assert!(layer.mask(&segments[0], &leaves[0]).is_none());
    }
}
