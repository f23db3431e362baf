//! What the benches share: models with random weights, tensors with random values, engines with
//! sessions that train in lockstep, and measurements of two things in turn.
//!
//! A bench of the engine or the wire needs shapes, not sense. [`random_model`] writes a Hugging Face
//! directory of any llama-like size, which everything that takes a model takes.

mod alternate;
mod group;
mod process;
mod random;

pub use alternate::{Effort, InTurn, in_turn};
pub use group::{Group, Inputs, Round, Setting, Shape, Trunk};
pub use process::{peak_above, peak_resident, share_cores};
pub use random::{ModelSize, RandomModel, normal, random_model};
