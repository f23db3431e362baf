use crate::Norm;
use tch::{Kind, Tensor};

/// Final norm and LM head, frozen: `[N, H] -> [N, V]`.
pub(crate) struct Head {
    pub norm: Norm,
    /// `[V, H]`; the embedding itself in tied models.
    pub weight: Tensor,
}

/// Loss over packed rows and its gradient.
pub struct LossOutput {
    /// Sum of the cross-entropy over all predicted tokens, in nats.
    pub loss_sum: f64,
    /// Rows whose label was not negative.
    pub n_predicted: i64,
    /// `[N, H]`: gradient of `scale * loss_sum` by the hidden states.
    pub grad: Tensor,
}

/// Logits that exist at one time: rows of a chunk times V, in elements (32 MiB of float32).
const CHUNK_ELEMENTS: i64 = 8 << 20;

impl Head {
    /// Float32 logits `[n, V]` of hidden states `[n, H]`.
    pub fn logits(&self, hidden: &Tensor) -> Tensor {
        self.logits_by(&self.weight.to_kind(hidden.kind()), hidden)
    }

    fn logits_by(&self, weight: &Tensor, hidden: &Tensor) -> Tensor {
        self.norm.forward(hidden).matmul(&weight.tr()).to_kind(Kind::Float)
    }

    /// Cross-entropy of the rows with a label; `labels` int64 `[N]`, negative where nothing is
    /// predicted. With `scale`, also the gradient of `scale * loss_sum` by `hidden`.
    ///
    /// Rows are taken in chunks, so that the logits of all rows never exist at once.
    pub fn loss(&self, hidden: &Tensor, labels: &Tensor, scale: Option<f64>) -> LossOutput {
        let predicted = labels.ge(0).nonzero().squeeze_dim(1); // [P]
        let n_predicted = predicted.size()[0];
        let mut grad = hidden.zeros_like();
        let weight = self.weight.to_kind(hidden.kind());
        let rows_per_chunk = (CHUNK_ELEMENTS / self.weight.size()[0]).max(1);
        let mut loss_sum = 0.0;
        for start in (0..n_predicted).step_by(rows_per_chunk as usize) {
            let chosen = predicted.narrow(0, start, rows_per_chunk.min(n_predicted - start));
            let (x, y) = (hidden.index_select(0, &chosen), labels.index_select(0, &chosen));
            let (loss, by_x) = self.loss_of_chunk(&weight, &x, &y.unsqueeze(1), scale);
            loss_sum += loss;
            if let Some(by_x) = by_x {
                let _ = grad.index_copy_(0, &chosen, &by_x);
            }
        }
        LossOutput { loss_sum, n_predicted, grad }
    }

    /// `x` `[c, H]`, `labels` `[c, 1]`.
    fn loss_of_chunk(
        &self,
        weight: &Tensor,
        x: &Tensor,
        labels: &Tensor,
        scale: Option<f64>,
    ) -> (f64, Option<Tensor>) {
        let mut log_p = self.logits_by(weight, x).log_softmax(-1, Kind::Float); // [c, V]
        let loss = -log_p.gather(1, labels, false).sum(Kind::Double).double_value(&[]);
        let by_x = scale.map(|scale| {
            // Cross-entropy by logits is softmax minus one-hot.
            let mut by_logits = log_p.exp_();
            let minus_one = Tensor::full_like(labels, -1.0).to_kind(Kind::Float);
            let _ = by_logits.scatter_add_(1, labels, &minus_one);
            let by_normed = by_logits.to_kind(x.kind()).matmul(weight) * scale;
            self.norm.backward(x, &by_normed)
        });
        (loss, by_x)
    }
}
