use crate::ModelError;
use serde_json::Value;
use tch::{Kind, Tensor};

/// Rotary positions (arXiv 2104.09864) in the layout of Hugging Face models: the element i of a
/// head is rotated together with the element i + D/2.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Radians per position of each of the D/2 pairs.
    inverse_frequencies: Vec<f64>,
}

/// Cosines and sines of the angles, float32 `[N, 1, D/2]`.
pub(crate) struct RopeTables {
    cos: Tensor,
    sin: Tensor,
}

impl Rope {
    /// From config.json: `rope_theta` and `rope_scaling`, or `rope_parameters` of Transformers 5.
    pub fn from_json(json: &Value, head_dim: i64) -> Result<Self, ModelError> {
        let parameters = if json["rope_parameters"].is_object() {
            &json["rope_parameters"]
        } else {
            &json["rope_scaling"]
        };
        let theta = [&json["rope_theta"], &parameters["rope_theta"]]
            .into_iter()
            .find_map(Value::as_f64)
            .unwrap_or(10_000.0);
        let pairs = head_dim / 2;
        let plain =
            (0..pairs).map(|i| theta.powf(-(2.0 * i as f64) / head_dim as f64)).collect::<Vec<_>>();
        let kind = [&parameters["rope_type"], &parameters["type"]]
            .into_iter()
            .find_map(Value::as_str)
            .unwrap_or("default");
        let number = |field: &str| {
            parameters[field].as_f64().ok_or_else(|| ModelError::Config {
                field: format!("rope_scaling.{field}"),
                found: parameters[field].to_string(),
                expected: format!("a number (rope_type is \"{kind}\")"),
            })
        };
        let inverse_frequencies = match kind {
            "default" => plain,
            "linear" => {
                let factor = number("factor")?;
                plain.iter().map(|f| f / factor).collect()
            }
            "llama3" => {
                let (factor, low, high) =
                    (number("factor")?, number("low_freq_factor")?, number("high_freq_factor")?);
                let context = number("original_max_position_embeddings")?;
                plain.iter().map(|&f| llama3(f, factor, low, high, context)).collect()
            }
            // How GGUF files store llama3 scaling: one divisor for each pair.
            "factors" => {
                let factors = parameters["factors"].as_array();
                let factors: Vec<f64> =
                    factors.into_iter().flatten().filter_map(Value::as_f64).collect();
                if factors.len() != plain.len() {
                    return Err(ModelError::Config {
                        field: "rope_scaling.factors".into(),
                        found: format!("{} numbers", factors.len()),
                        expected: format!("{pairs} numbers, half of head_dim"),
                    });
                }
                plain.iter().zip(factors).map(|(f, factor)| f / factor).collect()
            }
            other => {
                return Err(ModelError::Config {
                    field: "rope_scaling.rope_type".into(),
                    found: format!("\"{other}\""),
                    expected: "default, linear or llama3".into(),
                });
            }
        };
        Ok(Rope { inverse_frequencies })
    }

    /// `positions`: int64 `[N]`.
    pub(crate) fn tables(&self, positions: &Tensor) -> RopeTables {
        let frequencies: Vec<f32> = self.inverse_frequencies.iter().map(|&f| f as f32).collect();
        let frequencies = Tensor::from_slice(&frequencies).to_device(positions.device());
        let angles = positions.to_kind(Kind::Float).unsqueeze(-1) * frequencies; // [N, D/2]
        RopeTables { cos: angles.cos().unsqueeze(1), sin: angles.sin().unsqueeze(1) }
    }
}

/// Slow waves are stretched by `factor`, quick ones stay, those between are blended, as in
/// Transformers' `_compute_llama3_parameters`.
fn llama3(frequency: f64, factor: f64, low: f64, high: f64, context: f64) -> f64 {
    let wavelength = 2.0 * std::f64::consts::PI / frequency;
    if wavelength > context / low {
        frequency / factor
    } else if wavelength < context / high {
        frequency
    } else {
        let smooth = (context / wavelength - low) / (high - low);
        (1.0 - smooth) * frequency / factor + smooth * frequency
    }
}

impl RopeTables {
    /// Rotates the heads of `x` `[N, heads, D]`; the result has the dtype of `x`.
    pub fn rotate(&self, x: &Tensor) -> Tensor {
        self.apply(x, &self.sin)
    }

    /// The gradient by `x` of [`RopeTables::rotate`]: a rotation back.
    pub fn rotate_back(&self, grad: &Tensor) -> Tensor {
        self.apply(grad, &self.sin.neg())
    }

    fn apply(&self, x: &Tensor, sin: &Tensor) -> Tensor {
        let halves = x.to_kind(Kind::Float).chunk(2, -1); // 2 of [N, heads, D/2]
        let (x1, x2) = (&halves[0], &halves[1]);
        let low = (x1 * &self.cos).g_sub_(&(x2 * sin));
        let high = (x2 * &self.cos).addcmul_(x1, sin);
        Tensor::cat(&[low, high], -1).to_kind(x.kind())
    }
}
