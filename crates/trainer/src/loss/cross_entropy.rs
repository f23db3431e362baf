use super::{Loss, LossInput, LossSum, LossValue};
use crate::data::Batch;
use offshoot_model::LogitsChunk;

/// Causal language modelling: the cross-entropy of each predicted token, in nats.
///
/// Evaluation is always without smoothing, so that its exponential is the perplexity.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct CrossEntropy {
    /// Share of each target that goes to all tokens alike, as in PyTorch's
    /// `cross_entropy(label_smoothing=...)`.
    pub label_smoothing: f64,
}

impl Loss for CrossEntropy {
    fn name(&self) -> &str {
        "cross-entropy"
    }

    /// Predicted tokens.
    fn weight(&self, batch: &Batch) -> f64 {
        batch.n_predicted() as f64
    }

    fn loss(&self, input: &LossInput, scale: f64) -> LossValue {
        let of_chunk = |chunk: LogitsChunk| chunk.cross_entropy(self.label_smoothing, true);
        let output = input.top.loss_by_chunks(input.hidden, input.labels, scale, of_chunk);
        LossValue { value: LossSum { sum: output.loss_sum, scalars: vec![] }, grad: output.grad }
    }

    fn evaluate(&self, input: &LossInput) -> LossSum {
        let (sum, _) = input.top.loss_eval(input.hidden, input.labels);
        LossSum { sum, scalars: vec![] }
    }
}
