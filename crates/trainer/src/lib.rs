//! The client's half of a training run.
pub mod data;
mod error;
pub mod schedule;
pub mod tokenizer;
pub use error::TrainError;
