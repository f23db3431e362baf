use crate::Segment;
use tch::{Kind, Tensor};

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

/// What the backward of a [`Linear`] needs besides its input: for each segment
/// `h = A dropout(x)`, `[n, r]`, where the segment has LoRA here.
pub(crate) struct LoraTape(Vec<Option<Tensor>>);

impl LoraTape {
    pub fn bytes(&self) -> u64 {
        self.0.iter().flatten().map(crate::tape::bytes_of).sum()
    }
}

/// One flat float32 gradient `[P]` for each segment with an adapter.
pub(crate) type LoraGradients = Vec<Option<Tensor>>;

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
    pub gradients: &'a LoraGradients,
}

/// A segment's LoRA pair at one linear layer.
struct Pair {
    /// Index of the site in the adapter set.
    site: usize,
    /// `[r, in]`.
    a: Tensor,
    /// `[out, r]`, times the scaling.
    scaled_b: Tensor,
}

impl Linear {
    pub fn d_in(&self) -> i64 {
        self.weight.size()[1]
    }

    pub fn d_out(&self) -> i64 {
        self.weight.size()[0]
    }

    fn pair(&self, segment: &Segment, kind: Kind) -> Option<Pair> {
        let adapter = segment.adapter?;
        let site = adapter.site_index(&self.path)?;
        let (a, b) = adapter.matrices(site);
        let scaled_b = (b * adapter.spec().scaling()).to_kind(kind);
        Some(Pair { site, a: a.to_kind(kind), scaled_b })
    }

    /// The mask `[n, in]` of a segment's rows, if it drops anything.
    fn mask(&self, segment: &Segment, x: &Tensor) -> Option<Tensor> {
        let p = segment.adapter?.spec().lora_dropout;
        let key = segment.dropout?;
        (p > 0.0).then(|| key.mask(&self.path, [segment.n_rows(), self.d_in()], p, x))
    }

    /// `[N, in] -> [N, out]`.
    pub fn forward(&self, x: &Tensor, segments: &[Segment]) -> (Tensor, LoraTape) {
        let y = x.linear(&self.weight.to_kind(x.kind()), self.bias.as_ref());
        let lora = segments.iter().map(|segment| {
            let pair = self.pair(segment, x.kind())?;
            let x = segment.of(x);
            let x = match self.mask(segment, &x) {
                Some(mask) => x * mask,
                None => x,
            };
            let h = x.matmul(&pair.a.tr()); // [n, r]
            let _ = segment.of(&y).addmm_(&h, &pair.scaled_b.tr());
            Some(h)
        });
        let tape = LoraTape(lora.collect());
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
    pub fn backward_lora(&self, incoming: &Incoming, sink: &Sink, mut grad_x: Option<&mut Tensor>) {
        let Incoming { x, grad, tape } = incoming;
        for ((segment, h), flat) in sink.segments.iter().zip(&tape.0).zip(sink.gradients) {
            let (Some(h), Some(flat), Some(adapter)) = (h, flat, segment.adapter) else { continue };
            let Some(pair) = self.pair(segment, x.kind()) else { continue };
            let (x, grad) = (segment.of(x), segment.of(grad));
            let mask = self.mask(segment, &x);
            let (mut grad_a, mut grad_b) = adapter.views(flat, pair.site);

            let by_b = grad.tr().matmul(h); // [out, r], without the scaling
            grad_b.copy_(&(by_b.to_kind(Kind::Float) * adapter.spec().scaling()));
            let grad_h = grad.matmul(&pair.scaled_b); // [n, r]
            match &mask {
                None => grad_a.copy_(&grad_h.tr().matmul(&x)),
                Some(mask) => grad_a.copy_(&grad_h.tr().matmul(&(x * mask))),
            }
            if let Some(grad_x) = &mut grad_x {
                let mut rows = segment.of(grad_x);
                let _ = match &mask {
                    None => rows.addmm_(&grad_h, &pair.a),
                    Some(mask) => rows.g_add_(&(grad_h.matmul(&pair.a) * mask)),
                };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DropoutKey;
    use offshoot_adapters::{AdapterSet, LoraSpec, Site};
    use tch::Device;

    /// Two segments with other ranks, one with dropout, against autograd on the formula.
    #[test]
    fn backward_equals_autograd_with_dropout_on() {
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
        let (y, tape) = linear.forward(&x, &segments);
        let gradients: LoraGradients =
            segments.iter().map(|s| s.adapter.map(AdapterSet::new_gradient)).collect();
        let incoming = Incoming { x: &x, grad: &grad, tape: &tape };
        let sink = Sink { segments: &segments, gradients: &gradients };
        let by_x = linear.backward(&incoming, &sink);

        let x = x.set_requires_grad(true);
        let mut leaves = vec![x.shallow_clone()];
        let outputs = segments.iter().map(|segment| {
            let set = segment.adapter.unwrap();
            let (a, b) = set.matrices(0);
            let (a, b) = (a.copy().set_requires_grad(true), b.copy().set_requires_grad(true));
            leaves.extend([a.shallow_clone(), b.shallow_clone()]);
            let rows = segment.of(&x);
            let dropped = match linear.mask(segment, &rows) {
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
        let (dropped, undropped) = (linear.mask(&segments[1], &leaves[0]), segments[0].dropout);
        assert!(dropped.is_some() && undropped.is_some());
    }
}
