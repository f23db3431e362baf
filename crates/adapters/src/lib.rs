//! What a tenant trains: the LoRA matrices of a range of layers, their gradients and their AdamW
//! moments, as flat float32 buffers, and the PEFT files they are read from and written to.
//!
//! It sits below the model: a forward borrows an [`AdapterSet`], a backward returns one flat
//! gradient for it, [`AdapterSet::accumulate`] adds it and [`AdapterSet::step`] applies it. It knows
//! nothing of layers' mathematics, of sessions or of files other than PEFT's.
//!
//! ```
//! use offshoot_adapters::{AdamW, AdapterSet, LoraSpec, Site};
//! use tch::{Device, Kind, Tensor};
//!
//! let spec = LoraSpec { r: 2, lora_alpha: 4.0, ..LoraSpec::default() };
//! let site = Site::new(0, "self_attn.q_proj", "model.layers.0.self_attn.q_proj", 8, 6);
//! let mut set = AdapterSet::init(spec, vec![site], 7, Device::Cpu)?;
//! assert_eq!(set.n_parameters(), 2 * 8 + 6 * 2);
//!
//! let gradient = Tensor::ones([set.n_parameters()], (Kind::Float, Device::Cpu));
//! set.accumulate(&gradient);
//! set.step(&AdamW::default(), 1e-3, 1.0);
//! assert_eq!(set.n_steps(), 1);
//! # Ok::<(), offshoot_adapters::AdapterError>(())
//! ```

mod checked;
mod init;
mod optimizer;
pub mod peft;
mod set;
mod spec;
mod state;

pub use optimizer::{AdamW, Stepped};
pub use set::{AdapterSet, LoraPair};
pub use spec::{LoraSpec, Site};
pub use state::AdapterState;

/// What can be wrong with an adapter that comes from outside.
#[derive(Debug, thiserror::Error)]
pub enum AdapterError {
    #[error("LoRA setting {field} = {value} is not allowed: {expected}")]
    Setting { field: &'static str, value: String, expected: &'static str },
    #[error("{origin}: tensor \"{name}\" is missing; {hint}")]
    MissingTensor { origin: String, name: String, hint: String },
    #[error(
        "{origin}: tensor \"{name}\" has shape {found:?}, expected {expected:?}; was the adapter made for another model or rank?"
    )]
    Shape { origin: String, name: String, found: Vec<i64>, expected: Vec<i64> },
    #[error("{origin}: tensor \"{name}\" is in no layer that is trained here; {hint}")]
    UnexpectedTensor { origin: String, name: String, hint: String },
    #[error("adapter {origin} does not fit the model: {problems}")]
    DoesNotFit { origin: String, problems: String },
    #[error("{path}: {problem}")]
    File { path: String, problem: String },
}
