//! What is minimised: a function from the hidden states that come out of the top's last block, and
//! from the labels, to a number and its gradient.
//!
//! [`CrossEntropy`] is the usual one and [`Dpo`] the one for preference pairs. A loss of one's own
//! is a [`Loss`], or, where it is written with logits, a closure in [`FromLogits`].

mod cross_entropy;
mod dpo;
mod from_logits;
mod options;
mod references;

pub use cross_entropy::CrossEntropy;
pub(crate) use dpo::sequence_log_probs;
pub use dpo::{Dpo, DpoOptions};
pub use from_logits::FromLogits;
pub use options::LossOptions;
pub(crate) use options::Losses;

use crate::data::Batch;
use offshoot_model::Part;
use std::collections::BTreeMap;
use tch::Tensor;

/// A loss of packed sequences. It is computed on the client; the server sees only its gradient by
/// what the trunk gave.
///
/// One value is shared by all of a client's devices, each of which calls it on a thread of its own.
pub trait Loss: Send + Sync {
    /// What a checkpoint notes: a run that goes on with another loss is not the run that it was.
    fn name(&self) -> &str;

    /// What the loss summed over a step is divided by: the batch's share of it, such as its
    /// predicted tokens. Batches of one step may have unequal shares.
    fn weight(&self, batch: &Batch) -> f64;

    /// The loss of training, with its gradient. No gradients are recorded by autograd while it runs;
    /// one that wants autograd asks for it with `tch::with_grad`.
    fn loss(&self, input: &LossInput, scale: f64) -> LossValue;

    /// The loss of evaluation.
    fn evaluate(&self, input: &LossInput) -> LossSum;
}

/// What a loss is made from.
pub struct LossInput<'a> {
    /// Norm and head: [`Part::logits`] and [`Part::loss_by_chunks`].
    pub top: &'a Part,
    /// `[N, H]` in the part's dtype, out of the last block, before the final norm.
    pub hidden: &'a Tensor,
    /// int64 `[N]` on the part's device: the token after each position, negative where nothing is
    /// predicted.
    pub labels: &'a Tensor,
    /// Where each sequence begins and which sample of the data it is.
    pub batch: &'a Batch,
}

/// A loss summed over a batch.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LossSum {
    /// Divided by the batches' [`Loss::weight`] it is the mean.
    pub sum: f64,
    /// More to report beside the loss: names, and sums that are divided by the same weight.
    pub scalars: Vec<(&'static str, f64)>,
}

/// A loss summed over a batch, and where it leads.
pub struct LossValue {
    /// Without the scale.
    pub value: LossSum,
    /// `[N, H]`: the gradient of `scale` times the sum by the hidden states.
    pub grad: Tensor,
}

impl LossSum {
    /// Times one over the weight: the loss, and what is reported beside it.
    pub fn mean(&self, scale: f64) -> (f64, BTreeMap<String, f64>) {
        let scalars = self.scalars.iter().map(|(name, sum)| (name.to_string(), sum * scale));
        (self.sum * scale, scalars.collect())
    }

    /// Adds what another batch of the same loss gave.
    pub fn add(&mut self, other: &LossSum) {
        self.sum += other.sum;
        for (name, value) in &other.scalars {
            match self.scalars.iter_mut().find(|(known, _)| known == name) {
                Some((_, sum)) => *sum += value,
                None => self.scalars.push((name, *value)),
            }
        }
    }
}
