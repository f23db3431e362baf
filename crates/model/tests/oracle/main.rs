//! The written out forward and backward against libtorch's autograd on an independent decoder, which
//! runs each tenant alone in float64.

mod alone;
mod batch;
mod batches;
mod bf16;
mod cached;
mod decoder;
mod nan;
mod tenant;

const FAMILIES: [&str; 5] = ["gpt2", "llama", "qwen2", "qwen3", "gemma"];

/// What float32 may differ from autograd in float64, relative to the largest value.
const F32: f64 = 1e-5;
