use crate::data::Place;
use crate::schedule::Scheduler;
use offshoot_adapters::LoraSpec;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Of `training_state.json`.
pub(super) const FORMAT: u32 = 1;

/// Where a run stands, and what it is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainingState {
    /// Of this file.
    pub format: u32,
    /// Optimizer steps taken.
    pub step: u64,
    /// Epoch of the next step, counted from 0.
    pub epoch: u64,
    /// First sample of the next step in that epoch's order.
    pub sample: usize,
    /// Evaluation loss at this step, if it was evaluated.
    pub eval_loss: Option<f64>,
    /// The lowest evaluation loss so far.
    pub best: Option<Best>,
    /// The server's session.
    pub session_id: String,
    /// The server's snapshot at this step.
    pub snapshot_id: String,
    /// What a resumed run must have in common, or should.
    pub settings: RunSettings,
}

/// An evaluation.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// Optimizer steps taken before it.
    pub step: u64,
    /// Mean cross-entropy in nats.
    pub loss: f64,
}

/// What makes a run the run it is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunSettings {
    /// Path or hub name.
    pub model_name: String,
    /// Of the base model.
    pub fingerprint: String,
    /// First layer of the trunk.
    pub split_point_1: usize,
    /// First layer behind the trunk.
    pub split_point_2: usize,
    /// LoRA of all three parts.
    pub lora: LoraSpec,
    /// Of initial values, dropout and data order.
    pub seed: u64,
    /// Of the samples.
    pub data_fingerprint: String,
    /// Sequences in a microbatch.
    pub batch_size: usize,
    /// Microbatches in a step.
    pub gradient_accumulation_steps: usize,
    /// Of those, how many could be on their way at once. Changes no number.
    #[serde(default = "one_in_flight")]
    pub microbatches_in_flight: usize,
    /// Optimizer steps of the whole run; the learning rate depends on it.
    pub n_steps: u64,
    /// Highest learning rate.
    pub learning_rate: f64,
    /// Where it ends.
    #[serde(default)]
    pub min_learning_rate: f64,
    /// How it gets there.
    #[serde(default)]
    pub lr_scheduler: Scheduler,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Steps of rising learning rate.
    pub warmup_steps: u64,
    /// Limit of the gradient's norm.
    pub max_grad_norm: f64,
    /// dtype of the client's layers.
    pub dtype: String,
    /// dtype of hidden states and gradients between the two sides.
    pub wire_dtype: String,
}

/// What checkpoints that do not say it were made with.
fn one_in_flight() -> usize {
    1
}

impl RunSettings {
    /// Refuses to go on with another model, cut or adapter; gives what else differs, as
    /// "field was A, is B": with such a difference the run goes on, but not as it would have.
    pub fn differences(&self, now: &RunSettings) -> Result<Vec<String>, Vec<String>> {
        const MUST_AGREE: [&str; 4] = ["fingerprint", "split_point_1", "split_point_2", "lora"];
        // Paths may change; the fingerprint tells whether the model did.
        const MAY_DIFFER: [&str; 2] = ["model_name", "microbatches_in_flight"];
        let as_object = |settings: &RunSettings| match serde_json::to_value(settings) {
            Ok(Value::Object(fields)) => fields,
            _ => unreachable!("a struct of plain fields is a JSON object"),
        };
        let now = as_object(now);
        let (mut hard, mut soft) = (Vec::new(), Vec::new());
        for (field, was) in as_object(self) {
            let is = &now[&field];
            if was != *is && !MAY_DIFFER.contains(&&*field) {
                let list = if MUST_AGREE.contains(&&*field) { &mut hard } else { &mut soft };
                list.push(format!("{field} was {was}, is {is}"));
            }
        }
        if hard.is_empty() { Ok(soft) } else { Err(hard) }
    }
}

impl TrainingState {
    /// The state after `step` steps, with what the server calls it.
    pub fn new(step: u64, place: Place, session: (String, String), settings: RunSettings) -> Self {
        let (session_id, snapshot_id) = session;
        TrainingState {
            format: FORMAT,
            step,
            epoch: place.epoch,
            sample: place.sample,
            eval_loss: None,
            best: None,
            session_id,
            snapshot_id,
            settings,
        }
    }
}
