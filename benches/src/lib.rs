//! What the benches share: models with random weights and tensors with random values.
//!
//! A bench of the engine or the wire needs shapes, not sense. [`random_model`] writes a Hugging Face
//! directory of any llama-like size, which everything that takes a model takes.

mod random;

pub use random::{ModelSize, RandomModel, normal, random_model};
