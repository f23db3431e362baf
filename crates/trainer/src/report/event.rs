use crate::checkpoint::Best;
use serde::Serialize;
use std::collections::BTreeMap;

/// One line of `metrics.jsonl`, which has beside these fields `time`, when it was written. What each
/// field means to a reader of that file stands in `docs/monitoring.md`.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// A process began, or went on with, the run.
    Start(StartEvent),
    /// An optimizer step.
    Step(StepEvent),
    /// An evaluation.
    Eval(EvalEvent),
    /// A text drawn from the model.
    Sample {
        /// Optimizer steps taken.
        step: u64,
        /// As given.
        prompt: String,
        /// What the model went on with.
        text: String,
    },
    /// A checkpoint was written.
    Checkpoint {
        /// Optimizer steps taken.
        step: u64,
        /// Its directory's name in the output directory.
        name: String,
    },
    /// The run ended, or was stopped.
    Done(DoneEvent),
}

/// What is trained.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StartEvent {
    /// Optimizer steps taken before: 0, or those of the checkpoint it goes on from.
    pub step: u64,
    /// Optimizer steps of the whole run.
    pub n_steps: u64,
    /// Path or hub name of the base model.
    pub model: String,
    /// First layer of the trunk.
    pub split_point_1: usize,
    /// First layer behind the trunk.
    pub split_point_2: usize,
    /// The name of the loss that is minimised.
    pub loss: String,
    /// LoRA rank.
    pub lora_rank: usize,
    /// Samples to train on.
    pub samples: u64,
    /// Samples to evaluate on; 0 if nothing is evaluated.
    pub eval_samples: u64,
    /// The session's id, as the server's logs and lists have it.
    pub session: String,
    /// Of this program.
    pub version: String,
}

/// One optimizer step.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct StepEvent {
    /// This step's number; the first is 1.
    pub step: u64,
    /// How often all samples have been seen after this step.
    pub epoch: f64,
    /// Mean loss of the step: over its predicted tokens, in nats, or what another loss counts.
    pub loss: f64,
    /// Of this step.
    pub learning_rate: f64,
    /// Norm of all gradients of the whole model, before clipping.
    pub grad_norm: f64,
    /// One over the duration of this step.
    pub steps_per_second: f64,
    /// Tokens over the duration of this step.
    pub tokens_per_second: f64,
    /// Part of this step's duration in which nothing was computed here, because the next answer of
    /// the server had not arrived: the trunk's time and the wire's, as far as nothing overlapped.
    pub wait_seconds: f64,
    /// Samples that this step learned from.
    pub samples: u64,
    /// Tokens that went through the model in this step.
    pub tokens: u64,
    /// Most that the trunk held for one microbatch of this step.
    pub tape_bytes: u64,
    /// What the loss tells beside itself, by a name such as `rewards/margins`.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub extra: BTreeMap<String, f64>,
}

/// An evaluation, after `step` steps.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct EvalEvent {
    /// Optimizer steps taken.
    pub step: u64,
    /// How often all training samples have been seen.
    pub epoch: f64,
    /// Mean loss over the evaluation data, as of a step.
    pub loss: f64,
    /// The lowest so far, this one included.
    pub best: f64,
    /// The step of the lowest.
    pub best_step: u64,
    /// Duration of the evaluation.
    pub seconds: f64,
    /// As of a step.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub extra: BTreeMap<String, f64>,
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DoneEvent {
    /// Optimizer steps taken.
    pub step: u64,
    /// Stopped before its last step.
    pub interrupted: bool,
    /// Wall time of this process's part.
    pub seconds: f64,
    /// Of its training steps alone.
    pub training_seconds: f64,
    /// Of those, waiting for the server.
    pub wait_seconds: f64,
    /// Tokens of this process's part.
    pub tokens: u64,
    /// The lowest evaluation loss.
    pub best: Option<Best>,
    /// What the wire dtype has cost.
    pub wire_error: WireErrors,
}

/// Relative errors by rounding to the wire dtype, of a process's part of a run: the root of summed
/// squared errors over summed squares, on a sample of the rows of every tensor. 0 where the dtype
/// loses nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct WireErrors {
    /// Hidden states into the trunk.
    pub hidden_sent: f64,
    /// Hidden states out of the trunk.
    pub hidden_received: f64,
    /// Gradients into the trunk.
    pub gradients_sent: f64,
    /// Gradients out of the trunk.
    pub gradients_received: f64,
}
