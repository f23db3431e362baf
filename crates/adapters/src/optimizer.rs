use crate::AdapterError;
use serde::{Deserialize, Serialize};
use tch::Tensor;

/// AdamW with decoupled weight decay (arXiv 1711.05101), as `torch.optim.AdamW` computes it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdamW {
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    pub weight_decay: f64,
}

impl Default for AdamW {
    /// PyTorch's defaults.
    fn default() -> Self {
        AdamW { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 }
    }
}

/// The flat buffers that an optimizer step reads, all `[P]` float32.
pub(crate) struct Buffers<'a> {
    pub parameters: &'a Tensor,
    pub gradients: &'a Tensor,
    pub first_moments: &'a Tensor,
    pub second_moments: &'a Tensor,
}

/// What it makes of them; see [`AdapterSet::take_over`](crate::AdapterSet::take_over).
pub struct Stepped {
    pub(crate) parameters: Tensor,
    pub(crate) first_moments: Tensor,
    pub(crate) second_moments: Tensor,
}

impl AdamW {
    pub fn validate(&self) -> Result<(), AdapterError> {
        let wrong = |field, value: f64, expected| {
            Err(AdapterError::Setting { field, value: value.to_string(), expected })
        };
        for (field, beta) in [("beta1", self.beta1), ("beta2", self.beta2)] {
            if !(0.0..1.0).contains(&beta) {
                return wrong(field, beta, "at least 0, below 1");
            }
        }
        // In float32, in which it is added: what vanishes there divides zero by zero.
        if !(self.eps as f32).is_normal() || self.eps < 0.0 {
            return wrong("eps", self.eps, "a positive number, at least 1.2e-38");
        }
        if !(self.weight_decay.is_finite() && self.weight_decay >= 0.0) {
            return wrong("weight_decay", self.weight_decay, "zero or a positive number");
        }
        Ok(())
    }

    /// What step number `n` (the first is 1) makes of these buffers, on gradients times `clip_factor`.
    /// Nothing is changed.
    pub(crate) fn next(
        &self,
        now: Buffers<'_>,
        n: u64,
        learning_rate: f64,
        clip_factor: f64,
    ) -> Stepped {
        let correction1 = 1.0 - self.beta1.powf(n as f64);
        let correction2 = 1.0 - self.beta2.powf(n as f64);
        let gradients = match clip_factor {
            1.0 => now.gradients.shallow_clone(),
            factor => now.gradients.g_mul_scalar(factor),
        };
        let first_moments = now.first_moments.lerp(&gradients, 1.0 - self.beta1);
        let second_moments = now.second_moments.lerp(&gradients.square(), 1.0 - self.beta2);
        drop(gradients);
        let mut update = second_moments.sqrt();
        let _ = update.g_div_scalar_(correction2.sqrt());
        let _ = update.g_add_scalar_(self.eps);
        let _ = update.reciprocal_();
        let _ = update.g_mul_(&first_moments);
        let _ = update.g_mul_scalar_(learning_rate / correction1);
        let mut parameters = now.parameters.g_mul_scalar(1.0 - learning_rate * self.weight_decay);
        let _ = parameters.g_sub_(&update);
        Stepped { parameters, first_moments, second_moments }
    }
}
