use crate::{AdapterError, checked};
use safetensors::tensor::{Dtype, TensorView};
use std::collections::HashMap;

/// What changes in an [`crate::AdapterSet`] while it trains, on the host: four vectors of P values.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterState {
    pub parameters: Vec<f32>,
    /// Accumulated and not yet used by a step.
    pub gradients: Vec<f32>,
    pub first_moments: Vec<f32>,
    pub second_moments: Vec<f32>,
    pub n_steps: u64,
}

const STATE_TENSORS: [&str; 4] = ["parameters", "gradients", "first_moments", "second_moments"];

impl AdapterState {
    /// One safetensors file.
    pub fn to_safetensors(&self) -> Vec<u8> {
        let buffers =
            [&self.parameters, &self.gradients, &self.first_moments, &self.second_moments]
                .map(|values| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>());
        let views = STATE_TENSORS.iter().zip(&buffers).map(|(name, bytes)| {
            let view = TensorView::new(Dtype::F32, vec![bytes.len() / 4], bytes)
                .expect("four bytes for each value");
            (*name, view)
        });
        let metadata = HashMap::from([("n_steps".to_string(), self.n_steps.to_string())]);
        safetensors::serialize(views, Some(metadata)).expect("four flat tensors can be serialised")
    }

    pub fn from_safetensors(bytes: &[u8]) -> Result<Self, AdapterError> {
        let wrong = |problem: String| AdapterError::File { path: "adapter state".into(), problem };
        let (file, header) = checked::safetensors(bytes).map_err(wrong)?;
        let n_steps = header
            .metadata()
            .as_ref()
            .and_then(|m| m.get("n_steps")?.parse().ok())
            .ok_or_else(|| wrong("its metadata has no number n_steps".into()))?;
        let [parameters, gradients, first_moments, second_moments] =
            STATE_TENSORS.map(|name| match file.tensor(name) {
                Ok(view) if view.dtype() == Dtype::F32 => Ok(f32_values(view.data())),
                Ok(view) => Err(wrong(format!("{name} is {:?}, expected F32", view.dtype()))),
                Err(_) => Err(wrong(format!("tensor \"{name}\" is missing"))),
            });
        Ok(AdapterState {
            parameters: parameters?,
            gradients: gradients?,
            first_moments: first_moments?,
            second_moments: second_moments?,
            n_steps,
        })
    }
}

fn f32_values(bytes: &[u8]) -> Vec<f32> {
    let (values, _) = bytes.as_chunks::<4>();
    values.iter().map(|v| f32::from_le_bytes(*v)).collect()
}
