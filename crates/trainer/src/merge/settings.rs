//! `config.json` as Transformers expects it.

use crate::TrainError;
use offshoot_model::weights::Checkpoint;
use serde_json::{Value, json};
use tch::Kind;

pub(super) const CONFIG: &str = "config.json";

/// Of the factors that are read back: float32 has seven digits.
const TOLERANCE: f64 = 1e-4;
/// Those of every Llama 3; what differs between its models is the factor and the context.
const LOW: f64 = 1.0;
const HIGH: f64 = 4.0;

/// The model's own configuration with the dtype that its tensors will have.
pub(super) fn config_json(
    checkpoint: &Checkpoint,
    kind: Option<Kind>,
) -> Result<Value, TrainError> {
    let mut config = checkpoint.config().clone();
    if config["rope_scaling"]["rope_type"] == "factors" {
        config["rope_scaling"] = llama3(checkpoint, &config)?;
    }
    let from_gguf = checkpoint.gguf_tokenizer().is_some() || checkpoint.path().is_file();
    // Every tensor keeps its own dtype, so the configuration may go on saying what it says.
    let kind = kind.or_else(|| from_gguf.then(|| gguf_kind(checkpoint)));
    if let Some(kind) = kind {
        let name = dtype_name(kind);
        // Transformers 5 writes "dtype", and reads both.
        let field = if config.get("dtype").is_some() { "dtype" } else { "torch_dtype" };
        config[field] = name.into();
        if config.get("torch_dtype").is_some() {
            config["torch_dtype"] = name.into();
        }
    }
    Ok(config)
}

fn gguf_kind(checkpoint: &Checkpoint) -> Kind {
    match checkpoint.stored_kind("model.embed_tokens.weight") {
        Some(kind @ (Kind::BFloat16 | Kind::Half)) => kind,
        _ => Kind::Float,
    }
}

fn dtype_name(kind: Kind) -> &'static str {
    match kind {
        Kind::BFloat16 => "bfloat16",
        Kind::Half => "float16",
        _ => "float32",
    }
}

/// GGUF holds llama3 scaling as one divisor for each pair of a head. This finds the factor and the
/// original context that give these divisors.
///
/// For a wavelength w a divisor d with 1/d = (1 - s)/F + s, 0 < s < 1, comes from
/// s = (context / w - low) / (high - low): so does the context from any one of them.
fn llama3(checkpoint: &Checkpoint, config: &Value) -> Result<Value, TrainError> {
    let number = |field: &str| config[field].as_f64().unwrap_or_default();
    let divisors: Vec<f64> = config["rope_scaling"]["factors"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_f64)
        .collect();
    let (theta, d) = (number("rope_theta"), number("head_dim"));
    let wavelength = |i: usize| std::f64::consts::TAU * theta.powf(2.0 * i as f64 / d);
    let factor = divisors.iter().copied().fold(1.0, f64::max);
    let share = |divisor: f64| (1.0 / divisor - 1.0 / factor) / (1.0 - 1.0 / factor);
    let between = divisors
        .iter()
        .position(|divisor| (0.01..0.99).contains(&share(*divisor)))
        .map(|i| wavelength(i) * (LOW + share(divisors[i]) * (HIGH - LOW)));
    let expected = |i: usize, context: f64| {
        let s = ((context / wavelength(i) - LOW) / (HIGH - LOW)).clamp(0.0, 1.0);
        1.0 / ((1.0 - s) / factor + s)
    };
    let fits = |context: &f64| {
        let is_near = |i: usize| {
            let expected = expected(i, *context);
            (divisors[i] - expected).abs() < TOLERANCE * expected
        };
        (0..divisors.len()).all(is_near)
    };
    // Without one in between, many contexts give the same divisors: any of them will do.
    let contexts = match between {
        Some(context) => vec![context.round()],
        None => (0..24).map(|power| f64::from(1 << power)).collect(),
    };
    let Some(context) = contexts.into_iter().find(fits) else {
        return Err(TrainError::Model(offshoot_model::ModelError::Config {
            field: "rope_freqs".into(),
            found: format!("{} frequency factors in {}", divisors.len(), checkpoint.name()),
            expected: "those of llama3 scaling, which Transformers can express; merge with the model's Hugging Face directory".into(),
        }));
    };
    Ok(json!({
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": LOW,
        "high_freq_factor": HIGH,
        "original_max_position_embeddings": context as u64,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    /// Of Llama 3.2: head size 64, theta 500000, factor 32, context 8192.
    #[test]
    fn the_context_is_found_in_the_divisors() {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures");
        let any = Checkpoint::open(&fixtures.join("gguf/llama.gguf")).unwrap();
        let config = |divisors: &[f64]| {
            json!({
                "rope_theta": 500000.0,
                "head_dim": 64,
                "rope_scaling": { "rope_type": "factors", "factors": divisors },
            })
        };
        let (factor, context) = (32.0, 8192.0);
        let divisor = |i: i32| -> f64 {
            let wavelength = std::f64::consts::TAU * 500000f64.powf(f64::from(2 * i) / 64.0);
            let s: f64 = (context / wavelength - 1.0) / 3.0;
            // As float32 has it.
            let divisor = 1.0 / ((1.0 - s.clamp(0.0, 1.0)) / factor + s.clamp(0.0, 1.0));
            f64::from(divisor as f32)
        };
        let mut divisors: Vec<f64> = (0..32).map(divisor).collect();
        let found = llama3(&any, &config(&divisors)).unwrap();
        assert_eq!(found["factor"], 32.0);
        assert_eq!(found["original_max_position_embeddings"], 8192);

        divisors[3] = 1.5;
        let error = llama3(&any, &config(&divisors)).unwrap_err().to_string();
        assert!(error.contains("Hugging Face directory"), "{error}");
    }
}
