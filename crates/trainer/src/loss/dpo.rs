use super::{Loss, LossInput, LossSum, LossValue};
use crate::data::Batch;
use offshoot_model::{ChunkLoss, LogitsChunk};
use std::sync::OnceLock;
use tch::{Kind, Tensor};

/// How preferences are learned.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DpoOptions {
    /// How dear it is to go far from the reference: small ones let the model go further.
    pub beta: f64,
    /// Share of the pairs whose labels are taken to be swapped.
    pub label_smoothing: f64,
}

impl Default for DpoOptions {
    fn default() -> Self {
        DpoOptions { beta: 0.1, label_smoothing: 0.0 }
    }
}

/// Direct preference optimisation (arXiv 2305.18290) of pairs of a chosen and a rejected answer, with
/// the conservative form for labels that may be wrong (`label_smoothing`):
///
/// `-(1 - e) log sigmoid(z) - e log sigmoid(-z)`, `z = beta ((p_c - q_c) - (p_r - q_r))`
///
/// where p is the log-probability of an answer, summed over its tokens, and q the reference's.
///
/// Samples 2i and 2i + 1 of the data are a pair, and stand side by side in a batch.
#[derive(Debug)]
pub struct Dpo {
    options: DpoOptions,
    /// Of every sample.
    references: OnceLock<Vec<f64>>,
}

/// What a pair comes to.
struct Pair {
    loss: f64,
    /// By the log-probability of the chosen answer; by the rejected one's it is the opposite.
    slope: f64,
    /// `beta (p - q)` of the chosen and of the rejected answer.
    rewards: [f64; 2],
}

impl Dpo {
    /// Without references yet.
    pub fn new(options: DpoOptions) -> Self {
        Dpo { options, references: OnceLock::new() }
    }

    /// With what the reference model gives for each sample of the data: the log-probability of its
    /// predicted tokens, summed. The first ones stay.
    pub fn set_references(&self, log_probs: Vec<f64>) {
        let _ = self.references.set(log_probs);
    }

    /// Whether it can be computed.
    pub fn has_references(&self) -> bool {
        self.references.get().is_some()
    }

    fn pairs(&self, batch: &Batch, log_probs: &[f64]) -> Vec<Pair> {
        let references = self.references.get().expect("a run sets them before its first step");
        assert_eq!(batch.samples.len(), batch.seq_lens.len(), "each sequence is a known sample");
        let pairs = batch.samples.chunks(2).zip(log_probs.chunks(2));
        let pairs = pairs.map(|(samples, log_probs)| match (samples, log_probs) {
            (&[chosen, rejected], &[p_chosen, p_rejected])
                if chosen % 2 == 0 && rejected == chosen + 1 =>
            {
                let gains = [p_chosen - references[chosen], p_rejected - references[rejected]];
                self.options.pair(gains)
            }
            _ => panic!("pairs stay side by side when samples are packed: {samples:?}"),
        });
        pairs.collect()
    }
}

impl DpoOptions {
    /// From how much likelier than in the reference the chosen and the rejected answer are.
    fn pair(&self, gains: [f64; 2]) -> Pair {
        let DpoOptions { beta, label_smoothing: e } = *self;
        let rewards = gains.map(|gain| beta * gain);
        let z = rewards[0] - rewards[1];
        Pair {
            loss: (1.0 - e) * softplus(-z) + e * softplus(z),
            slope: beta * (sigmoid(z) - (1.0 - e)),
            rewards,
        }
    }
}

impl Loss for Dpo {
    fn name(&self) -> &str {
        "dpo"
    }

    /// Pairs.
    fn weight(&self, batch: &Batch) -> f64 {
        batch.seq_lens.len() as f64 / 2.0
    }

    fn loss(&self, input: &LossInput, scale: f64) -> LossValue {
        let pairs = self.pairs(input.batch, &sequence_log_probs(input));
        let slopes = pairs.iter().flat_map(|pair| [pair.slope, -pair.slope]);
        let of_rows = input.batch.seq_lens.iter().zip(slopes);
        let of_rows = of_rows.flat_map(|(&n, slope)| std::iter::repeat_n(slope as f32, n));
        // The gradient of the log-probability is minus that of the cross-entropy.
        let weights = Tensor::from_slice(&of_rows.map(|slope| -slope).collect::<Vec<_>>());
        let weights = weights.to_device(input.hidden.device()).unsqueeze(1); // [N, 1]
        let of_chunk = |chunk: LogitsChunk| {
            let weights = weights.index_select(0, &chunk.rows); // [c, 1]
            let ChunkLoss { sum, by_logits } = chunk.cross_entropy(0.0, true);
            ChunkLoss { sum, by_logits: by_logits.map(|mut grad| grad.g_mul_(&weights)) }
        };
        let output = input.top.loss_by_chunks(input.hidden, input.labels, scale, of_chunk);
        LossValue { value: summed(&pairs), grad: output.grad }
    }

    fn evaluate(&self, input: &LossInput) -> LossSum {
        summed(&self.pairs(input.batch, &sequence_log_probs(input)))
    }
}

/// With the names of TRL's trainer.
fn summed(pairs: &[Pair]) -> LossSum {
    let sum = |of: fn(&Pair) -> f64| pairs.iter().map(of).sum::<f64>();
    let scalars = vec![
        ("rewards/chosen", sum(|pair| pair.rewards[0])),
        ("rewards/rejected", sum(|pair| pair.rewards[1])),
        ("rewards/margins", sum(|pair| pair.rewards[0] - pair.rewards[1])),
        ("rewards/accuracies", sum(|pair| f64::from(pair.rewards[0] > pair.rewards[1]))),
    ];
    LossSum { sum: sum(|pair| pair.loss), scalars }
}

/// The log-probability of the predicted tokens of each sequence, summed.
pub(crate) fn sequence_log_probs(input: &LossInput) -> Vec<f64> {
    let options = (Kind::Float, input.hidden.device());
    let of_rows = Tensor::zeros(input.labels.size(), options); // [N]
    input.top.loss_by_chunks(input.hidden, input.labels, 1.0, |chunk| {
        let _ = of_rows.shallow_clone().index_copy_(0, &chunk.rows, &chunk.label_log_probs());
        ChunkLoss { sum: 0.0, by_logits: None }
    });
    let lengths: Vec<i64> = input.batch.seq_lens.iter().map(|&n| n as i64).collect();
    let sums = of_rows.to_kind(Kind::Double).split_with_sizes(&lengths, 0);
    sums.iter().map(|rows| rows.sum(Kind::Double).double_value(&[])).collect()
}

/// `log(1 + e^x)` without overflow.
fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pair_is_as_the_paper_has_it() {
        // -log sigmoid(0.1 * ((-10 - -12) - (-20 - -19))) = log(1 + e^-0.3).
        let options = DpoOptions { beta: 0.1, label_smoothing: 0.0 };
        let pair = options.pair([2.0, -1.0]);
        assert!((pair.loss - (1.0 + (-0.3f64).exp()).ln()).abs() < 1e-12);
        assert!((pair.slope + 0.1 / (1.0 + 0.3f64.exp())).abs() < 1e-12);
        // Far out nothing overflows.
        assert_eq!(options.pair([1e6, -1e6]).loss, 0.0);
        assert!((options.pair([-1e6, 1e6]).loss - 2e5).abs() < 1e-6);
    }

    #[test]
    fn slopes_are_those_of_the_loss() {
        let options = DpoOptions { beta: 0.3, label_smoothing: 0.2 };
        for gain in [-4.0, -0.5, 0.0, 1.5] {
            let loss = |gain| options.pair([gain, 0.25]).loss;
            let slope = (loss(gain + 1e-5) - loss(gain - 1e-5)) / 2e-5;
            let found = options.pair([gain, 0.25]).slope;
            assert!((found - slope).abs() < 1e-8, "{found} {slope}");
        }
    }
}
