use super::{Loss, LossInput, LossSum, LossValue};
use crate::data::Batch;
use offshoot_model::{ChunkLoss, LogitsChunk};
use tch::{Kind, Tensor};

/// A loss written with tensors: a function from logits `[c, V]` (float32) and labels `[c]` (int64,
/// none negative) of some predicted tokens to the loss of each of them, `[c]`. PyTorch's autograd
/// takes its gradient by the logits.
///
/// The function sees a chunk of the tokens at a time, so that the logits of all of them never exist
/// at once: the loss of a token must not depend on other tokens. It is called on the thread of
/// whichever device has the microbatch.
///
/// ```
/// use offshoot_trainer::loss::FromLogits;
/// use tch::Kind;
///
/// // Cross-entropy plus a small pull of the normaliser towards 1.
/// let z_loss = FromLogits::new("z-loss", |logits, labels| {
///     let log_z = logits.logsumexp(&[-1i64][..], false);
///     let of_label = logits.gather(1, &labels.unsqueeze(1), false).squeeze_dim(1);
///     &log_z - of_label + 1e-4 * log_z.square()
/// });
/// # let _: &dyn offshoot_trainer::loss::Loss = &z_loss;
/// # let _ = Kind::Float;
/// ```
pub struct FromLogits<F> {
    name: String,
    of_tokens: F,
}

impl<F: Fn(&Tensor, &Tensor) -> Tensor + Send + Sync> FromLogits<F> {
    /// `name` is what a checkpoint notes.
    pub fn new(name: &str, of_tokens: F) -> Self {
        FromLogits { name: name.into(), of_tokens }
    }
}

impl<F: Fn(&Tensor, &Tensor) -> Tensor + Send + Sync> Loss for FromLogits<F> {
    fn name(&self) -> &str {
        &self.name
    }

    /// Predicted tokens.
    fn weight(&self, batch: &Batch) -> f64 {
        batch.n_predicted() as f64
    }

    fn loss(&self, input: &LossInput, scale: f64) -> LossValue {
        let output = input.top.loss_by_chunks(input.hidden, input.labels, scale, |chunk| {
            let LogitsChunk { logits, labels, .. } = chunk;
            tch::with_grad(|| {
                let logits = logits.set_requires_grad(true);
                let sum = (self.of_tokens)(&logits, &labels).sum(Kind::Float);
                let grad = Tensor::run_backward(&[&sum], &[&logits], false, false).pop();
                ChunkLoss { sum: sum.detach().double_value(&[]), by_logits: grad }
            })
        });
        LossValue { value: LossSum { sum: output.loss_sum, scalars: vec![] }, grad: output.grad }
    }

    fn evaluate(&self, input: &LossInput) -> LossSum {
        let output = input.top.loss_by_chunks(input.hidden, input.labels, 1.0, |chunk| {
            let of_tokens = (self.of_tokens)(&chunk.logits, &chunk.labels);
            ChunkLoss { sum: of_tokens.sum(Kind::Float).double_value(&[]), by_logits: None }
        });
        LossSum { sum: output.loss_sum, scalars: vec![] }
    }
}
