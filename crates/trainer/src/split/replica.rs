//! Bottom and top on one device, and what is computed there for one microbatch.

use super::{Checkpointing, SplitOptions};
use crate::TrainError;
use crate::data::Batch;
use crate::loss::{Loss, LossInput, LossSum};
use crate::noise::{Message, MessageKind, Outgoing};
use crate::wire::{self, to_wire};
use offshoot_adapters::{AdapterSet, AdapterState};
use offshoot_client::{HostTensor, WireDType};
use offshoot_model::weights::Checkpoint;
use offshoot_model::{DropoutKey, ModelConfig, Part, Rows, Segment, Tape, TapeSize};
use std::sync::Arc;
use tch::{Device, Tensor};

/// Bottom and top on one device. Nothing here changes an adapter's gradients: they are returned, so
/// that those of all devices can be added in one place and order.
pub(super) struct Replica {
    pub bottom: Side,
    pub top: Side,
    /// Of dropout.
    pub seed: u64,
    /// What is done to tensors before they are sent.
    pub outgoing: Outgoing,
}

/// Bottom or top, with an adapter if LoRA has a place in its layers.
pub(super) struct Side {
    pub part: Part,
    pub adapter: Option<AdapterSet>,
    pub checkpointing: Checkpointing,
}

/// A batch on a replica's device.
pub(super) struct Run {
    pub ids: Tensor,
    pub labels: Tensor,
    pub rows: Rows,
    pub dropout: Option<DropoutKey>,
}

/// What the bottom keeps of a microbatch.
pub(super) struct Below {
    pub batch: Batch,
    pub run: Run,
    tape: Tape,
    /// `[N, H]` out of the bottom, if what was sent may have been clipped and the bottom learns.
    unclipped: Option<Tensor>,
}

/// What the top made of the trunk's output.
pub(super) struct Above {
    pub below: Below,
    pub value: LossSum,
    /// By the trunk's output, for the wire.
    pub grad: HostTensor,
    /// Flat, by the top's adapter, if it has one.
    pub lora: Option<Tensor>,
}

/// Where a microbatch is to lead.
pub(super) struct Goal {
    pub loss: Arc<dyn Loss>,
    /// Gradients are those of this times the summed loss.
    pub scale: f64,
    /// Of what goes to the trunk.
    pub dtype: WireDType,
}

impl Below {
    /// What names the dropout masks.
    pub fn number(&self) -> u64 {
        self.run.dropout.map_or(0, |key| key.microbatch)
    }
}

impl Replica {
    /// Loads both parts and gives them fresh adapters.
    pub fn load(
        checkpoint: &Checkpoint,
        config: &ModelConfig,
        options: &SplitOptions,
        device: Device,
    ) -> Result<Self, TrainError> {
        let SplitOptions { split, lora, seed, kind, checkpointing, .. } = options.clone();
        let (bottom, top) = Part::load_bottom_and_top(checkpoint, config, split, kind, device)?;
        let side = |part: Part| -> Result<Side, TrainError> {
            let sites = part.sites(&lora.target_modules)?;
            let adapter = if sites.is_empty() {
                None
            } else {
                Some(AdapterSet::init(lora.clone(), sites, seed, device)?)
            };
            Ok(Side { part, adapter, checkpointing })
        };
        let outgoing = Outgoing::unchanged();
        Ok(Replica { bottom: side(bottom)?, top: side(top)?, seed, outgoing })
    }

    pub fn adapters(&self) -> [Option<&AdapterSet>; 2] {
        [self.bottom.adapter.as_ref(), self.top.adapter.as_ref()]
    }

    pub fn device(&self) -> Device {
        self.bottom.part.device()
    }

    /// Through the bottom in training mode: `[N, H]` for the wire, and what is kept here.
    pub fn below(&self, batch: Batch, number: u64, dtype: WireDType) -> (HostTensor, Below) {
        let _guard = tch::no_grad_guard();
        let dropout = DropoutKey { seed: self.seed, microbatch: number };
        let run = Run::new(self, &batch, Some(dropout));
        debug_assert_eq!(run.ids.size(), [batch.n_tokens() as i64]);
        let hidden = self.bottom.part.embed(&run.ids, &run.rows);
        let (hidden, tape) = self.bottom.forward(&hidden, &run);
        let sent = to_wire(&self.perturb_hidden(&hidden, &batch.seq_lens, 0), dtype);
        let clips = self.outgoing.hidden.clip_norm.is_some() && self.bottom.adapter.is_some();
        let unclipped = clips.then_some(hidden);
        (sent, Below { batch, run, tape, unclipped })
    }

    /// Through the top to the loss and back.
    pub fn above(
        &self,
        below: Below,
        output: &HostTensor,
        goal: &Goal,
    ) -> Result<Above, TrainError> {
        let _guard = tch::no_grad_guard();
        let Below { batch, run, .. } = &below;
        let output = self.receive(output, batch)?;
        let top = &self.top.part;
        let (hidden, tape) = self.top.forward(&output, run);
        let input = LossInput { top, hidden: &hidden, labels: &run.labels, batch };
        let loss = goal.loss.loss(&input, goal.scale);
        if !loss.value.sum.is_finite() {
            return Err(TrainError::Diverged { what: "loss", value: loss.value.sum });
        }
        let (grad, lora) = self.top.backward(tape, &loss.grad, run, true);
        let grad = self.outgoing.perturb(&Message {
            rows: &grad.expect("it was wanted"),
            seq_lens: &batch.seq_lens,
            start: 0,
            kind: MessageKind::Gradients { scale: goal.scale },
        });
        let grad = to_wire(&grad, goal.dtype);
        Ok(Above { value: loss.value, grad, lora, below })
    }

    /// Back through the bottom: the flat gradient by its adapter, if it has one.
    pub fn back(&self, below: Below, grad: &HostTensor) -> Result<Option<Tensor>, TrainError> {
        let Below { batch, run, tape, unclipped } = below;
        let mut grad = self.receive(grad, &batch)?;
        if let Some(rows) = unclipped {
            grad = self.outgoing.hidden.backward(&rows, &grad);
        }
        Ok(self.bottom.backward(tape, &grad, &run, false).1)
    }

    /// Through the bottom without dropout, `[N, H]`, as it is to be sent.
    pub fn evaluate_below(&self, run: &Run, batch: &Batch) -> Tensor {
        let _guard = tch::no_grad_guard();
        let hidden = self.bottom.part.embed(&run.ids, &run.rows);
        let hidden =
            self.bottom.part.forward_eval(&hidden, &run.rows, &[run.segment(&self.bottom)]);
        self.perturb_hidden(&hidden, &batch.seq_lens, 0)
    }

    /// `[N, H]` out of the bottom as they are to be sent; `start`: position of the first row.
    pub fn perturb_hidden(&self, rows: &Tensor, seq_lens: &[usize], start: usize) -> Tensor {
        self.outgoing.perturb(&Message { rows, seq_lens, start, kind: MessageKind::Hidden })
    }

    /// Through the top without dropout, `[N, H]`.
    pub fn evaluate_above(
        &self,
        output: &HostTensor,
        batch: &Batch,
        run: &Run,
    ) -> Result<Tensor, TrainError> {
        let _guard = tch::no_grad_guard();
        let output = self.receive(output, batch)?;
        Ok(self.top.part.forward_eval(&output, &run.rows, &[run.segment(&self.top)]))
    }

    /// Checked to be `[N, H]`, on the replica's device in its dtype.
    fn receive(&self, tensor: &HostTensor, batch: &Batch) -> Result<Tensor, TrainError> {
        let _guard = tch::no_grad_guard();
        let part = &self.top.part;
        let expected = [batch.n_tokens(), part.config().hidden_size as usize];
        let tensor = wire::receive(tensor, expected)?;
        Ok(tensor.to_device(part.device()).to_kind(part.kind()))
    }
}

impl Side {
    pub fn set_state(&mut self, state: Option<AdapterState>) -> Result<(), TrainError> {
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

    pub fn reset(&mut self, seed: u64) -> Result<(), TrainError> {
        if let Some(old) = &self.adapter {
            let (spec, sites) = (old.spec().clone(), old.sites().to_vec());
            self.adapter = Some(AdapterSet::init(spec, sites, seed, old.device())?);
        }
        Ok(())
    }

    /// In training mode.
    fn forward(&self, x: &Tensor, run: &Run) -> (Tensor, Tape) {
        let keep = [Some(self.tape_size(run.rows.n_tokens() as u64))];
        let (y, mut tapes) = self.part.forward(x, &run.rows, &[run.segment(self)], &keep);
        (y, tapes.pop().flatten().expect("one tape was asked for"))
    }

    fn tape_size(&self, n_tokens: u64) -> TapeSize {
        let full = self.part.tape_bytes(n_tokens, TapeSize::Full, self.adapter.as_ref());
        let many = full > Checkpointing::MANY_BYTES && self.part.device() == Device::Cpu;
        match self.checkpointing {
            Checkpointing::Auto if many => TapeSize::Blocks,
            Checkpointing::Auto | Checkpointing::Off => TapeSize::Full,
            Checkpointing::On => TapeSize::Blocks,
        }
    }

    /// The gradients by the input, if wanted, and by the adapter, flat, if there is one.
    fn backward(
        &self,
        tape: Tape,
        grad: &Tensor,
        run: &Run,
        want_input: bool,
    ) -> (Option<Tensor>, Option<Tensor>) {
        let _guard = tch::no_grad_guard();
        let segments = [run.segment(self)];
        let mut back = self.part.backward(&[&tape], grad, &run.rows, &segments, want_input);
        (back.input, self.adapter.as_ref().and(back.lora.pop()))
    }
}

impl Run {
    pub fn new(replica: &Replica, batch: &Batch, dropout: Option<DropoutKey>) -> Self {
        let device = replica.device();
        Run {
            ids: Tensor::from_slice(&batch.ids).to_device(device),
            labels: Tensor::from_slice(&batch.labels).to_device(device),
            rows: Rows::new(&batch.seq_lens, None, device),
            dropout,
        }
    }

    pub fn segment<'a>(&self, side: &'a Side) -> Segment<'a> {
        Segment {
            rows: 0..self.rows.n_tokens(),
            adapter: side.adapter.as_ref(),
            dropout: self.dropout,
        }
    }
}
