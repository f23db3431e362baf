use crate::data::Place;
use crate::loss::LossOptions;
use crate::schedule::Scheduler;
use offshoot_adapters::LoraSpec;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

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
    /// All evaluations so far, oldest first: what an early stop is decided by.
    #[serde(default)]
    pub evaluations: Vec<Best>,
    /// When it was written, in UTC as RFC 3339 has it.
    #[serde(default)]
    pub saved_at: Option<String>,
    /// The server's session. None: an imported adapter, of which no server knows.
    #[serde(default, deserialize_with = "none_if_empty")]
    pub session_id: Option<String>,
    /// The server's snapshot at this step. None without a session.
    #[serde(default, deserialize_with = "none_if_empty")]
    pub snapshot_id: Option<String>,
    /// What a resumed run must have in common, or should.
    pub settings: RunSettings,
}

/// An evaluation.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// Optimizer steps taken before it.
    pub step: u64,
    /// Mean loss. NaN if it was not finite; JSON has null for it.
    #[serde(deserialize_with = "nan_if_null")]
    pub loss: f64,
}

fn nan_if_null<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

fn none_if_empty<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    Ok(Option::<String>::deserialize(deserializer)?.filter(|text| !text.is_empty()))
}

/// What makes a run the run it is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
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
    /// Samples in a microbatch; 0 is no limit.
    pub batch_size: usize,
    /// Tokens of a microbatch, if they are what limits it.
    #[serde(default)]
    pub max_tokens_per_batch: Option<usize>,
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
    /// What is minimised.
    #[serde(default = "plain_loss")]
    pub loss: String,
    /// Norm to which hidden states were clipped before they were sent.
    #[serde(default)]
    pub hidden_clip_norm: Option<f64>,
    /// Length of the noise on them, in clip norms.
    #[serde(default)]
    pub hidden_noise: f64,
    /// The same of gradients, for one token's loss.
    #[serde(default)]
    pub gradient_clip_norm: Option<f64>,
    /// Length of the noise on them, in clip norms.
    #[serde(default)]
    pub gradient_noise: f64,
}

/// What checkpoints that do not say it were made with.
fn one_in_flight() -> usize {
    1
}

fn plain_loss() -> String {
    LossOptions::default().to_string()
}

/// To the second.
pub(super) fn rfc3339(time: OffsetDateTime) -> Option<String> {
    time.replace_nanosecond(0).ok()?.format(&Rfc3339).ok()
}

impl RunSettings {
    /// Refuses to go on with another model, cut or adapter; gives what else differs, as
    /// "--option was A, is B": with such a difference the run goes on, but not as it would have.
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
                match was.as_object() {
                    Some(parts) => list.extend(
                        parts.iter().filter(|(part, was)| **was != is[part.as_str()]).map(
                            |(part, was)| {
                                format!("{field}.{part} was {was}, is {}", is[part.as_str()])
                            },
                        ),
                    ),
                    None if MUST_AGREE.contains(&&*field) => {
                        list.push(format!("{field} was {was}, is {is}"));
                    }
                    None => {
                        list.push(format!("{} was {}, is {}", name(&field), text(&was), text(is)))
                    }
                }
            }
        }
        if hard.is_empty() { Ok(soft) } else { Err(hard) }
    }

    /// Whether less is done to what is sent than in the run so far.
    pub fn sends_more_than(&self, was: &RunSettings) -> bool {
        self.hidden_noise < was.hidden_noise || self.gradient_noise < was.gradient_noise
    }
}

/// What people call a setting.
fn name(field: &str) -> String {
    match field {
        "n_steps" => "the number of steps (--max-steps, --num-epochs)".into(),
        "data_fingerprint" => "the data's fingerprint".into(),
        "loss" => "the loss (--loss and its options)".into(),
        option => format!("--{}", option.replace('_', "-")),
    }
}

fn text(value: &Value) -> String {
    match value {
        Value::Null => "none".into(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

impl TrainingState {
    /// The state after `step` steps, with what the server calls its session and its snapshot.
    pub fn new(step: u64, place: Place, server: (String, String), settings: RunSettings) -> Self {
        let (session_id, snapshot_id) = server;
        TrainingState {
            step,
            epoch: place.epoch,
            sample: place.sample,
            session_id: Some(session_id),
            snapshot_id: Some(snapshot_id),
            ..TrainingState::without_session(settings)
        }
    }

    /// The state before the first step of a run that begins with an existing adapter, and that no
    /// server knows yet. Of the settings only the model, the split points and LoRA count.
    pub fn without_session(settings: RunSettings) -> Self {
        TrainingState {
            format: FORMAT,
            step: 0,
            epoch: 0,
            sample: 0,
            eval_loss: None,
            best: None,
            evaluations: Vec::new(),
            saved_at: rfc3339(OffsetDateTime::now_utc()),
            session_id: None,
            snapshot_id: None,
            settings,
        }
    }

    /// The ids of the server's session and snapshot, if there is a session.
    pub fn snapshot(&self) -> Option<(&str, &str)> {
        Some((self.session_id.as_deref()?, self.snapshot_id.as_deref()?))
    }
}
