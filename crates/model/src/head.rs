use crate::Norm;
use std::ops::Range;
use tch::{Kind, Tensor};

/// Final norm and LM head, frozen: `[N, H] -> [N, V]`.
pub(crate) struct Head {
    pub norm: Norm,
    /// `[V, H]`; the embedding itself in tied models.
    pub weight: Tensor,
}

/// Loss over packed rows and its gradient.
pub struct LossOutput {
    /// Sum of the loss over all predicted tokens; of the cross-entropy in nats.
    pub loss_sum: f64,
    /// Rows whose label was not negative.
    pub n_predicted: i64,
    /// `[N, H]`: gradient of `scale * loss_sum` by the hidden states.
    pub grad: Tensor,
}

/// Some of the rows in which something is predicted, with their logits.
pub struct LogitsChunk {
    /// int64 `[c]`: which of the packed rows.
    pub rows: Tensor,
    /// int64 `[c]`: the token that follows each, none negative.
    pub labels: Tensor,
    /// Float32 `[c, V]`, to be changed at will.
    pub logits: Tensor,
}

/// What a loss says of a chunk.
pub struct ChunkLoss {
    /// Summed over its rows.
    pub sum: f64,
    /// Float32 `[c, V]`, the gradient of `sum` by the logits. None: no gradient is wanted.
    pub by_logits: Option<Tensor>,
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

    /// The gradients of the cross-entropy of one row of hidden states `[1, H]` by that row, one for each
    /// of some labels that it could have: `[n, H]`.
    pub fn label_gradients(&self, hidden: &Tensor, labels: Range<i64>) -> Tensor {
        let weight = self.weight.to_kind(hidden.kind());
        let p = self.logits_by(&weight, hidden).softmax(-1, Kind::Float).to_kind(hidden.kind());
        let n = labels.end - labels.start;
        let by_normed = p.matmul(&weight) - weight.narrow(0, labels.start, n); // [n, H]
        self.norm.backward(&hidden.expand(by_normed.size(), false), &by_normed)
    }

    /// The rows with a label go through `of_chunk`, a chunk at a time, so that the logits of all
    /// rows never exist at once; `labels` int64 `[N]`, negative where nothing is predicted.
    ///
    /// The gradient is that of `scale` times the sum; it is zero where `of_chunk` gives none.
    pub fn loss_by_chunks(
        &self,
        hidden: &Tensor,
        labels: &Tensor,
        scale: f64,
        of_chunk: &mut dyn FnMut(LogitsChunk) -> ChunkLoss,
    ) -> LossOutput {
        let predicted = labels.ge(0).nonzero().squeeze_dim(1); // [P]
        let n_predicted = predicted.size()[0];
        let mut grad = hidden.zeros_like();
        let weight = self.weight.to_kind(hidden.kind());
        let rows_per_chunk = (CHUNK_ELEMENTS / self.weight.size()[0]).max(1);
        let mut loss_sum = 0.0;
        for start in (0..n_predicted).step_by(rows_per_chunk as usize) {
            let rows = predicted.narrow(0, start, rows_per_chunk.min(n_predicted - start));
            let x = hidden.index_select(0, &rows); // [c, H]
            let chunk = LogitsChunk {
                labels: labels.index_select(0, &rows),
                logits: self.logits_by(&weight, &x),
                rows: rows.shallow_clone(),
            };
            let ChunkLoss { sum, by_logits } = of_chunk(chunk);
            loss_sum += sum;
            if let Some(by_logits) = by_logits {
                let by_normed = by_logits.to_kind(x.kind()).matmul(&weight) * scale;
                let _ = grad.index_copy_(0, &rows, &self.norm.backward(&x, &by_normed));
            }
        }
        LossOutput { loss_sum, n_predicted, grad }
    }
}

impl LogitsChunk {
    /// Cross-entropy summed over the rows, with its gradient if `want_grad`.
    ///
    /// With smoothing e each target is 1 - e at the label plus e / V everywhere, as in PyTorch's
    /// `cross_entropy(label_smoothing=e)` (arXiv 1512.00567).
    pub fn cross_entropy(self, label_smoothing: f64, want_grad: bool) -> ChunkLoss {
        let (labels, vocabulary) = (self.labels.unsqueeze(1), self.logits.size()[1] as f64);
        let mut log_p = self.logits.log_softmax(-1, Kind::Float); // [c, V]
        drop(self.logits);
        let mut sum = -log_p.gather(1, &labels, false).sum(Kind::Double).double_value(&[]);
        if label_smoothing > 0.0 {
            let uniform = -log_p.sum(Kind::Double).double_value(&[]) / vocabulary;
            sum = (1.0 - label_smoothing) * sum + label_smoothing * uniform;
        }
        let by_logits = want_grad.then(|| {
            // Cross-entropy by logits is softmax minus the target.
            let mut by_logits = log_p.exp_();
            let options = (Kind::Float, labels.device());
            let minus = Tensor::full(labels.size(), label_smoothing - 1.0, options);
            let _ = by_logits.scatter_add_(1, &labels, &minus);
            if label_smoothing > 0.0 {
                let _ = by_logits.g_sub_scalar_(label_smoothing / vocabulary);
            }
            by_logits
        });
        ChunkLoss { sum, by_logits }
    }

    /// Float32 `[c]`: the log-probability of each label.
    pub fn label_log_probs(&self) -> Tensor {
        let log_p = self.logits.log_softmax(-1, Kind::Float);
        log_p.gather(1, &self.labels.unsqueeze(1), false).squeeze_dim(1)
    }
}
