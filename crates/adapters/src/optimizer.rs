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

/// The flat buffers of one optimizer step, all `[P]` float32 and changed in place.
pub(crate) struct Buffers<'a> {
    pub parameters: &'a mut Tensor,
    pub gradients: &'a mut Tensor,
    pub first_moments: &'a mut Tensor,
    pub second_moments: &'a mut Tensor,
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
        if !(self.eps.is_finite() && self.eps > 0.0) {
            return wrong("eps", self.eps, "a positive number");
        }
        if !(self.weight_decay.is_finite() && self.weight_decay >= 0.0) {
            return wrong("weight_decay", self.weight_decay, "zero or a positive number");
        }
        Ok(())
    }

    /// Step number `n` (the first is 1) on gradients times `clip_factor`.
    pub(crate) fn apply(&self, buffers: Buffers<'_>, n: u64, learning_rate: f64, clip_factor: f64) {
        let Buffers { parameters, gradients, first_moments, second_moments } = buffers;
        let correction1 = 1.0 - self.beta1.powf(n as f64);
        let correction2 = 1.0 - self.beta2.powf(n as f64);
        if clip_factor != 1.0 {
            let _ = gradients.g_mul_scalar_(clip_factor);
        }
        let _ = parameters.g_mul_scalar_(1.0 - learning_rate * self.weight_decay);
        let _ = first_moments.lerp_(gradients, 1.0 - self.beta1);
        let _ = second_moments.lerp_(&gradients.square(), 1.0 - self.beta2);
        let mut denominator = second_moments.sqrt();
        let _ = denominator.g_div_scalar_(correction2.sqrt());
        let _ = denominator.g_add_scalar_(self.eps);
        let _ = denominator.reciprocal_();
        let _ = denominator.g_mul_(first_moments);
        let _ = denominator.g_mul_scalar_(learning_rate / correction1);
        let _ = parameters.g_sub_(&denominator);
    }
}
