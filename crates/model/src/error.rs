use crate::weights::WeightsError;

/// Why a model, or a part of it, cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    #[error("model_type \"{found}\" is not supported; known are {known}")]
    UnknownFamily { found: String, known: String },
    #[error("config.json: {field} is {found}, expected {expected}")]
    Config { field: String, found: String, expected: String },
    #[error(
        "split points {s1} and {s2} do not fit: expected 0 <= split-point-1 < split-point-2 <= {n_layers}, the model's number of layers"
    )]
    SplitPoints { s1: usize, s2: usize, n_layers: usize },
    #[error(
        "target module \"{target}\" is no linear layer of a {family} block; known are {known} (or \"all-linear\")"
    )]
    UnknownTarget { target: String, family: &'static str, known: String },
    #[error(
        "a sequence of {n_tokens} tokens is longer than the {max_positions} positions that this model was made for; shorten it"
    )]
    TooLong { n_tokens: usize, max_positions: usize },
    #[error("tensor \"{name}\" has shape {found:?}, but config.json asks for {expected:?}")]
    Shape { name: String, found: Vec<i64>, expected: Vec<i64> },
    #[error(transparent)]
    Weights(#[from] WeightsError),
}
