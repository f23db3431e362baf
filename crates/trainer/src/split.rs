//! The client's half of a model: bottom and top around a session that stands for the trunk.

mod decode;
mod devices;
mod evaluate;
mod flight;
mod replica;

pub use decode::Traffic;
pub(crate) use decode::{Next, SplitCaches, embed, go_on};
pub use flight::{Accumulated, MicrobatchResult, Microbatches};

use crate::TrainError;
use crate::noise::{NoiseKey, Outgoing, PrivacyOptions};
use crate::trace;
use devices::Elsewhere;
use offshoot_adapters::{AdamW, AdapterSet, AdapterState, LoraSpec};
use offshoot_client::{PendingStep, Session};
use offshoot_model::weights::Checkpoint;
use offshoot_model::{ModelConfig, SplitPoints};
use replica::Replica;
use tch::{Device, Kind, Tensor};

/// What [`SplitModel::load`] needs beside the checkpoint.
#[derive(Clone, Debug)]
pub struct SplitOptions {
    /// Where the model is cut.
    pub split: SplitPoints,
    /// LoRA of all parts; `target_modules` are not empty.
    pub lora: LoraSpec,
    /// Optimizer of all parts.
    pub adamw: AdamW,
    /// Seeds initial values and dropout, the same as the session's.
    pub seed: u64,
    /// dtype of the client's layers.
    pub kind: Kind,
    /// Whether layers are computed again in the backward.
    pub checkpointing: Checkpointing,
    /// Where the client's layers are: a copy on each, and the microbatches of a step are dealt to
    /// them. The first one leads: it has the optimizer, and evaluates. Not empty.
    pub devices: Vec<Device>,
}

/// Whether the client's layers keep everything that their backward needs, or their inputs only and
/// are computed again. It changes no number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Checkpointing {
    /// Where bottom or top would keep more than [`Checkpointing::MANY_BYTES`] of one microbatch on a
    /// CPU.
    #[default]
    Auto,
    /// Computed again: slower, in less memory.
    On,
    /// Everything is kept.
    Off,
}

impl Checkpointing {
    /// Measured (benches/README.md, "client memory"): with it a client of a small model with a large
    /// vocabulary stays below two full tensors of logits. Microbatches of some hundred tokens of
    /// such models keep everything.
    pub const MANY_BYTES: u64 = 128 << 20;
}

/// The client's half of a model: bottom and top around a session that stands for the trunk, each
/// with an adapter if LoRA has a place in its layers.
///
/// It computes on the calling thread, between the awaits, and answers arrive meanwhile; devices
/// beside the first have threads of their own. Run it where that blocks nobody, such as in
/// `block_on` of a multi-thread runtime.
pub struct SplitModel {
    leader: Replica,
    others: Vec<Elsewhere>,
    /// Whether the others have the leader's parameters.
    in_step: bool,
    adamw: AdamW,
}

/// Host copies of what trains on the client, for checkpoints.
#[derive(Clone, Debug, PartialEq)]
pub struct ClientState {
    /// None: no layer of the bottom carries LoRA.
    pub bottom: Option<AdapterState>,
    /// None: no layer of the top carries LoRA.
    pub top: Option<AdapterState>,
}

impl SplitModel {
    /// Loads bottom and top onto each device and gives them fresh adapters.
    pub fn load(
        checkpoint: &Checkpoint,
        config: &ModelConfig,
        options: &SplitOptions,
    ) -> Result<Self, TrainError> {
        let [first, others @ ..] = options.devices.as_slice() else {
            return Err(TrainError::Option {
                option: "devices",
                value: "(none)".into(),
                problem: "expected at least one, such as cpu or cuda:0".into(),
            });
        };
        let leader = Replica::load(checkpoint, config, options, *first)?;
        let others = others.iter().zip(1..).map(|(&device, number)| {
            Elsewhere::start(Replica::load(checkpoint, config, options, device)?, number)
        });
        let others = others.collect::<Result<_, _>>()?;
        Ok(SplitModel { leader, others, in_step: true, adamw: options.adamw.clone() })
    }

    /// Clips what is sent from now on, and adds noise to it, as the options say. Without a key in
    /// them one is drawn.
    ///
    /// # Errors
    /// For options that mean nothing.
    pub fn perturb(&mut self, privacy: &PrivacyOptions) -> Result<(), TrainError> {
        privacy.validate()?;
        let outgoing = Outgoing {
            hidden: privacy.hidden,
            gradients: privacy.gradients,
            key: privacy.noise_key.clone().unwrap_or_else(NoiseKey::draw),
        };
        self.others.iter().for_each(|other| other.set_outgoing(outgoing.clone()));
        self.leader.outgoing = outgoing;
        Ok(())
    }

    /// Devices that train.
    pub fn n_devices(&self) -> usize {
        1 + self.others.len()
    }

    /// Values that train on the client.
    pub fn n_parameters(&self) -> i64 {
        self.adapters().into_iter().flatten().map(AdapterSet::n_parameters).sum()
    }

    /// The adapters of bottom and top.
    pub fn adapters(&self) -> [Option<&AdapterSet>; 2] {
        self.leader.adapters()
    }

    /// Host copies of parameters, moments and gradients.
    pub fn to_state(&self) -> ClientState {
        let [bottom, top] = self.adapters().map(|set| set.map(AdapterSet::to_state));
        ClientState { bottom, top }
    }

    /// The same as it was right after the last step: without the gradients that have come since.
    pub(crate) fn to_state_after_step(&self) -> ClientState {
        let ClientState { mut bottom, mut top } = self.to_state();
        for state in [&mut bottom, &mut top].into_iter().flatten() {
            state.gradients.fill(0.0);
        }
        ClientState { bottom, top }
    }

    /// Goes on from a state that [`SplitModel::to_state`] gave for the same model and cut, on any
    /// devices.
    pub fn set_state(&mut self, state: ClientState) -> Result<(), TrainError> {
        self.in_step = false;
        self.leader.bottom.set_state(state.bottom)?;
        self.leader.top.set_state(state.top)
    }

    /// Sets the adapters of bottom and top from PEFT's tensors for the whole model.
    pub fn load_adapter(&mut self, tensors: &[(String, Tensor)]) -> Result<(), TrainError> {
        self.in_step = false;
        for side in [&mut self.leader.bottom, &mut self.leader.top] {
            if let Some(adapter) = &mut side.adapter {
                adapter.load_named(tensors)?;
            }
        }
        Ok(())
    }

    /// Back to the values that [`SplitModel::load`] began with.
    pub fn reset(&mut self) -> Result<(), TrainError> {
        self.in_step = false;
        let seed = self.leader.seed;
        self.leader.bottom.reset(seed)?;
        self.leader.top.reset(seed)
    }

    /// The norm of all gradients of the model, given the trunk's sum of squares.
    pub fn grad_norm(&self, trunk_norm_squared: f64) -> f64 {
        let _guard = tch::no_grad_guard();
        let own: f64 =
            self.adapters().into_iter().flatten().map(AdapterSet::grad_norm_squared).sum();
        (own + trunk_norm_squared).sqrt()
    }

    /// One AdamW step of all three parts on gradients times `clip_factor`. The trunk's is sent, not
    /// waited for; what it gives is the way to its answer.
    pub async fn step(
        &mut self,
        session: &Session,
        learning_rate: f64,
        clip_factor: f64,
    ) -> Result<PendingStep, TrainError> {
        self.step_sharing(session, (learning_rate, clip_factor), None).await
    }

    /// The same; the server is told the loss, if one is given.
    pub async fn step_sharing(
        &mut self,
        session: &Session,
        (learning_rate, clip_factor): (f64, f64),
        loss: Option<f64>,
    ) -> Result<PendingStep, TrainError> {
        // Sent first: if that fails, no part has moved.
        let pending = match loss {
            Some(loss) => session.step_sharing_loss(learning_rate, clip_factor, loss).await?,
            None => session.step(learning_rate, clip_factor).await?,
        };
        self.in_step = false;
        let _span = trace::optimizer().entered();
        let _guard = tch::no_grad_guard();
        for side in [&mut self.leader.bottom, &mut self.leader.top] {
            if let Some(adapter) = &mut side.adapter {
                adapter.step(&self.adamw, learning_rate, clip_factor);
            }
        }
        Ok(pending)
    }

    /// Gives the other devices the leader's parameters, if they have older ones.
    fn fall_in(&mut self) {
        if std::mem::replace(&mut self.in_step, true) {
            return;
        }
        let _guard = tch::no_grad_guard();
        for other in &self.others {
            other.set_parameters(self.adapters().map(|set| Some(set?.parameters().copy())));
        }
    }
}

/// The factor of PyTorch's `clip_grad_norm_`; 1 if `max_norm` is 0, which means no clipping.
pub fn clip_factor(norm: f64, max_norm: f64) -> f64 {
    if max_norm > 0.0 { (max_norm / (norm + 1e-6)).min(1.0) } else { 1.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clips_as_pytorch_does() {
        assert_eq!(clip_factor(0.5, 1.0), 1.0);
        assert_eq!(clip_factor(4.0, 1.0), 1.0 / (4.0 + 1e-6));
        assert_eq!(clip_factor(4.0, 0.0), 1.0);
        assert_eq!(clip_factor(0.0, 1.0), 1.0);
    }
}
