use tch::{Kind, Tensor};

/// A frozen norm over the last dimension. Weights stay in float32 and so does the computation; the
/// result has the dtype of the input.
pub(crate) enum Norm {
    /// `x / sqrt(mean(x^2) + eps) * weight` (arXiv 1910.07467). Gemma's 1 + weight is added at loading.
    Rms { weight: Tensor, eps: f64 },
    /// LayerNorm with weight and bias (arXiv 1607.06450).
    Layer { weight: Tensor, bias: Tensor, eps: f64 },
}

impl Norm {
    /// `[..., H] -> [..., H]`.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        match self {
            Norm::Rms { weight, eps } => {
                let wide = x.to_kind(Kind::Float);
                let mut y = &wide * rms_scale(&wide, *eps);
                y.g_mul_(weight).to_kind(x.kind())
            }
            Norm::Layer { weight, bias, eps } => {
                let size = weight.size();
                x.to_kind(Kind::Float)
                    .layer_norm(&size, Some(weight), Some(bias), *eps, false)
                    .to_kind(x.kind())
            }
        }
    }

    /// The gradient by `x`; statistics are computed again from `x`.
    pub fn backward(&self, x: &Tensor, grad: &Tensor) -> Tensor {
        let wide = x.to_kind(Kind::Float);
        let (normed, scale, mut by_normed) = match self {
            Norm::Rms { weight, eps } => {
                let scale = rms_scale(&wide, *eps);
                (&wide * &scale, scale, grad * weight)
            }
            Norm::Layer { weight, eps, .. } => {
                let centred = &wide - mean(&wide);
                let scale = rms_scale(&centred, *eps);
                let mut by_normed = grad * weight;
                let average = mean(&by_normed);
                let _ = by_normed.g_sub_(&average);
                (centred * &scale, scale, by_normed)
            }
        };
        // d/dx of x / |x|: what points along x drops out.
        let along = mean(&(&by_normed * &normed));
        let _ = by_normed.g_sub_(&(normed * along)).g_mul_(&scale);
        by_normed.to_kind(x.kind())
    }
}

fn mean(x: &Tensor) -> Tensor {
    x.mean_dim(-1, true, Kind::Float)
}

/// `1 / sqrt(mean(x^2) + eps)`, `[..., 1]`.
fn rms_scale(x: &Tensor, eps: f64) -> Tensor {
    mean(&x.square()).g_add_scalar_(eps).rsqrt()
}
