mod flight;

pub use flight::{Accumulated, MicrobatchResult, Microbatches};

use crate::TrainError;
use crate::data::Batch;
use crate::wire::{self, to_wire};
use offshoot_adapters::{AdamW, AdapterSet, AdapterState, LoraSpec};
use offshoot_client::{ForwardInput, HostTensor, Session};
use offshoot_model::weights::Checkpoint;
use offshoot_model::{DropoutKey, LossOutput, ModelConfig, Part, Rows, Segment, SplitPoints, Tape};
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
    /// Where the client's layers are.
    pub device: Device,
}

/// The client's half of a model: bottom and top around a session that stands for the trunk, each
/// with an adapter if LoRA has a place in its layers.
///
/// It computes on the calling thread, between the awaits, and answers arrive meanwhile. Run it where
/// that blocks nobody, such as in `block_on` of a multi-thread runtime.
pub struct SplitModel {
    bottom: Side,
    top: Side,
    adamw: AdamW,
    seed: u64,
}

struct Side {
    part: Part,
    adapter: Option<AdapterSet>,
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
    /// Loads bottom and top and gives them fresh adapters.
    pub fn load(
        checkpoint: &Checkpoint,
        config: &ModelConfig,
        options: &SplitOptions,
    ) -> Result<Self, TrainError> {
        let SplitOptions { split, lora, adamw, seed, kind, device } = options;
        let (bottom, top) = Part::load_bottom_and_top(checkpoint, config, *split, *kind, *device)?;
        let side = |part: Part| -> Result<Side, TrainError> {
            let sites = part.sites(&lora.target_modules)?;
            let adapter = if sites.is_empty() {
                None
            } else {
                Some(AdapterSet::init(lora.clone(), sites, *seed, *device)?)
            };
            Ok(Side { part, adapter })
        };
        let (bottom, top) = (side(bottom)?, side(top)?);
        Ok(SplitModel { bottom, top, adamw: adamw.clone(), seed: *seed })
    }

    /// Values that train on the client.
    pub fn n_parameters(&self) -> i64 {
        self.adapters().into_iter().flatten().map(AdapterSet::n_parameters).sum()
    }

    /// The adapters of bottom and top.
    pub fn adapters(&self) -> [Option<&AdapterSet>; 2] {
        [self.bottom.adapter.as_ref(), self.top.adapter.as_ref()]
    }

    /// Host copies of parameters, moments and gradients.
    pub fn to_state(&self) -> ClientState {
        let [bottom, top] = self.adapters().map(|set| set.map(AdapterSet::to_state));
        ClientState { bottom, top }
    }

    /// Goes on from a state that [`SplitModel::to_state`] gave for the same model and cut.
    pub fn set_state(&mut self, state: ClientState) -> Result<(), TrainError> {
        self.bottom.set_state(state.bottom)?;
        self.top.set_state(state.top)
    }

    /// Sets the adapters of bottom and top from PEFT's tensors for the whole model.
    pub fn load_adapter(&mut self, tensors: &[(String, Tensor)]) -> Result<(), TrainError> {
        for side in [&mut self.bottom, &mut self.top] {
            if let Some(adapter) = &mut side.adapter {
                adapter.load_named(tensors)?;
            }
        }
        Ok(())
    }

    /// Back to the values that [`SplitModel::load`] began with.
    pub fn reset(&mut self) -> Result<(), TrainError> {
        let seed = self.seed;
        self.bottom.reset(seed)?;
        self.top.reset(seed)
    }

    /// The norm of all gradients of the model, given the trunk's sum of squares.
    pub fn grad_norm(&self, trunk_norm_squared: f64) -> f64 {
        let _guard = tch::no_grad_guard();
        let own: f64 =
            self.adapters().into_iter().flatten().map(AdapterSet::grad_norm_squared).sum();
        (own + trunk_norm_squared).sqrt()
    }

    /// One AdamW step of all three parts on gradients times `clip_factor`. The trunk's is sent, not
    /// waited for.
    pub async fn step(
        &mut self,
        session: &Session,
        learning_rate: f64,
        clip_factor: f64,
    ) -> Result<(), TrainError> {
        // Sent first: if that fails, no part has moved.
        session.step(learning_rate, clip_factor).await?;
        let _guard = tch::no_grad_guard();
        for side in [&mut self.bottom, &mut self.top] {
            if let Some(adapter) = &mut side.adapter {
                adapter.step(&self.adamw, learning_rate, clip_factor);
            }
        }
        Ok(())
    }

    /// Float32 logits `[n, V]` of the last position of each sequence.
    pub async fn last_logits(
        &self,
        session: &Session,
        batch: &Batch,
    ) -> Result<Tensor, TrainError> {
        let hidden = self.top_output(session, batch).await?;
        let _guard = tch::no_grad_guard();
        let ends = batch.seq_lens.iter().scan(0, |sum, &n| {
            *sum += n as i64;
            Some(*sum - 1)
        });
        let ends = Tensor::from_slice(&ends.collect::<Vec<i64>>()).to_device(hidden.device());
        Ok(self.top.part.logits(&hidden.index_select(0, &ends)))
    }

    /// Float32 logits `[N, V]` of every position.
    pub async fn logits(&self, session: &Session, batch: &Batch) -> Result<Tensor, TrainError> {
        let hidden = self.top_output(session, batch).await?;
        let _guard = tch::no_grad_guard();
        Ok(self.top.part.logits(&hidden))
    }

    fn below(&self, batch: &Batch, run: &Run) -> (Tensor, Tape) {
        let _guard = tch::no_grad_guard();
        debug_assert_eq!(run.ids.size(), [batch.n_tokens() as i64]);
        let hidden = self.bottom.part.embed(&run.ids, &run.rows);
        self.bottom.part.forward_train(&hidden, &run.rows, &run.segment(&self.bottom))
    }

    fn above(
        &self,
        trunk_output: &Tensor,
        batch: &Batch,
        run: &Run,
        scale: f64,
    ) -> (LossOutput, Tape) {
        let _guard = tch::no_grad_guard();
        debug_assert_eq!(run.labels.size(), [batch.n_tokens() as i64]);
        let segment = run.segment(&self.top);
        let (hidden, tape) = self.top.part.forward_train(trunk_output, &run.rows, &segment);
        (self.top.part.loss(&hidden, &run.labels, scale), tape)
    }

    /// Checked to be `[N, H]`, on the client's device in the client's dtype.
    fn receive(&self, tensor: &HostTensor, batch: &Batch) -> Result<Tensor, TrainError> {
        let expected = [batch.n_tokens(), self.top.part.config().hidden_size as usize];
        let tensor = wire::receive(tensor, expected)?;
        Ok(tensor.to_device(self.top.part.device()).to_kind(self.top.part.kind()))
    }
}

impl Side {
    fn set_state(&mut self, state: Option<AdapterState>) -> Result<(), TrainError> {
        self.adapter = match (self.adapter.take(), state) {
            (None, None) => None,
            (Some(old), Some(state)) => {
                let (spec, sites) = (old.spec().clone(), old.sites().to_vec());
                Some(AdapterSet::from_state(spec, sites, state, old.device())?)
            }
            (old, _) => {
                let (here, there) = if old.is_some() { ("has", "none") } else { ("has no", "one") };
                self.adapter = old;
                return Err(TrainError::Mismatch {
                    problem: format!(
                        "layers {:?} {here} LoRA here and the saved state has {there}; were the split points or targets other ones?",
                        self.part.layers()
                    ),
                });
            }
        };
        Ok(())
    }

    fn reset(&mut self, seed: u64) -> Result<(), TrainError> {
        if let Some(old) = &self.adapter {
            let (spec, sites) = (old.spec().clone(), old.sites().to_vec());
            self.adapter = Some(AdapterSet::init(spec, sites, seed, old.device())?);
        }
        Ok(())
    }

    /// Adds the gradients by LoRA to the adapter's; gives the one by the input, if wanted.
    fn backward(
        &mut self,
        tape: Tape,
        grad: &Tensor,
        run: &Run,
        want_input: bool,
    ) -> Option<Tensor> {
        let _guard = tch::no_grad_guard();
        let back = self.part.backward(&[&tape], grad, &run.rows, &[run.segment(self)], want_input);
        if let Some(adapter) = &mut self.adapter {
            adapter.accumulate(&back.lora[0]);
        }
        back.input
    }
}

/// A batch on the client's device.
struct Run {
    ids: Tensor,
    labels: Tensor,
    rows: Rows,
    dropout: Option<DropoutKey>,
}

impl Run {
    fn new(model: &SplitModel, batch: &Batch, dropout: Option<DropoutKey>) -> Self {
        let device = model.bottom.part.device();
        Run {
            ids: Tensor::from_slice(&batch.ids).to_device(device),
            labels: Tensor::from_slice(&batch.labels).to_device(device),
            rows: Rows::new(&batch.seq_lens, None, device),
            dropout,
        }
    }

    fn segment<'a>(&self, side: &'a Side) -> Segment<'a> {
        Segment {
            rows: 0..self.rows.n_tokens(),
            adapter: side.adapter.as_ref(),
            dropout: self.dropout,
        }
    }
}

/// The factor of PyTorch's `clip_grad_norm_`; 1 if `max_norm` is 0, which means no clipping.
pub fn clip_factor(norm: f64, max_norm: f64) -> f64 {
    if max_norm > 0.0 { (max_norm / (norm + 1e-6)).min(1.0) } else { 1.0 }
}

/// Of an evaluation.
fn forward_input(batch: &Batch, hidden: &Tensor, session: &Session) -> ForwardInput {
    ForwardInput {
        hidden: to_wire(hidden, session.wire_dtype()),
        seq_lens: batch.seq_lens.iter().map(|&n| n as u32).collect(),
        position_ids: Vec::new(),
        want_input_grad: false,
        dropout_key: 0,
    }
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
