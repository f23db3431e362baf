//! Spans of what a run does: a step is the root of a trace that goes on in the server. They are made
//! with `tracing` and cost nothing unless somebody collects them. No loss, no token, no tensor.

use offshoot_client::Session;
use tracing::Span;
use tracing::field::Empty;

/// Of all spans, so that those who filter know them. They are at level DEBUG.
const TARGET: &str = "offshoot::span";

/// The step that will be the run's `step`-th.
pub fn step(session: &Session, step: u64) -> Span {
    tracing::debug_span!(
        target: TARGET, parent: None, "train.step",
        offshoot.session = %session.id(),
        offshoot.step = step,
        offshoot.microbatches = Empty,
        offshoot.tokens = Empty,
    )
}

/// Notes what the step that this runs in has.
pub fn step_has(n_microbatches: usize, n_tokens: usize) {
    let span = Span::current();
    span.record("offshoot.microbatches", n_microbatches);
    span.record("offshoot.tokens", n_tokens);
}

/// What is done between steps, after so many of them: `train.checkpoint` and the like.
pub fn between(name: &'static str, session: &Session, step: u64) -> Span {
    tracing::debug_span!(
        target: TARGET, parent: None, "train.between",
        otel.name = name,
        offshoot.session = %session.id(),
        offshoot.step = step,
    )
}

/// One of a step's parts that are computed here, of this microbatch among the step's.
pub fn part(name: &'static str, microbatch: u64) -> Span {
    tracing::debug_span!(target: TARGET, "part", otel.name = name, offshoot.microbatch = microbatch)
}

/// The optimizer of what trains here.
pub fn optimizer() -> Span {
    tracing::debug_span!(target: TARGET, "optimizer.step")
}

/// One token that a split model is asked for.
pub fn token() -> Span {
    tracing::debug_span!(target: TARGET, "generate.token")
}

/// Evaluation of batches through a session.
pub fn evaluation(n_batches: usize) -> Span {
    tracing::debug_span!(target: TARGET, "evaluate", offshoot.batches = n_batches)
}
