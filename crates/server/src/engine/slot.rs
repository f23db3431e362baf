use super::clock::StepClock;
use super::command::{Admitted, Exported, Plan, Settings, Start, StepResult};
use super::wire;
use crate::error::Error;
use crate::ledger::Reservation;
use crate::meter::Meter;
use crate::metrics::Ran;
use crate::quota::Account;
use crate::session::StepWork;
use offshoot_adapters::{AdamW, AdapterSet};
use offshoot_model::Part;
use offshoot_proto::{HostTensor, WireDType};
use std::sync::Arc;
use std::time::Instant;
use tch::{Device, Tensor};

/// What one session has on the device, its tapes apart.
pub(super) struct Slot {
    /// Whose it is.
    pub account: Arc<Account>,
    pub adapters: AdapterSet,
    adamw: AdamW,
    pub seed: u64,
    pub wire_dtype: WireDType,
    meter: Arc<Meter>,
    clock: StepClock,
    /// The last frame that ran. Only the next one may run: what stands behind a refused frame in
    /// the queue is refused here.
    pub applied: u64,
    /// The adapter set is being changed. Still true at the next job if that panicked.
    changing: bool,
    /// The adapter set's bytes. The last field: given back when the set is gone.
    _reserved: Reservation,
}

impl Slot {
    pub fn new(part: &Part, plan: Plan, account: Arc<Account>) -> Result<Slot, Error> {
        let Plan { settings, start, reserved, meter } = plan;
        let Settings { tenant: _, lora, adamw, seed, wire_dtype } = settings;
        let (sites, device) = (part.sites(&lora.target_modules)?, part.device());
        let (adapters, applied) = match start {
            Start::Fresh => (AdapterSet::init(lora, sites, seed, device)?, 0),
            Start::Given(tensors) => {
                let mut adapters = AdapterSet::init(lora, sites, seed, device)?;
                let upload = |(name, tensor): (String, HostTensor)| {
                    (name, wire::upload(&tensor, tch::Kind::Float, Device::Cpu))
                };
                adapters.load_named(&tensors.into_iter().map(upload).collect::<Vec<_>>())?;
                (adapters, 0)
            }
            Start::State { state, applied } => {
                let state = Arc::unwrap_or_clone(state);
                (AdapterSet::from_state(lora, sites, state, device)?, applied)
            }
        };
        let clock = StepClock::default();
        Ok(Slot {
            account,
            adapters,
            adamw,
            seed,
            wire_dtype,
            meter,
            clock,
            applied,
            changing: false,
            _reserved: reserved,
        })
    }

    pub fn admitted(&self) -> Admitted {
        Admitted {
            n_parameters: self.adapters.n_parameters() as u64,
            bytes: self.adapters.bytes(),
            step: self.adapters.n_steps(),
        }
    }

    /// A job of it came, began and has just ended, and counts as this.
    pub fn ran(&mut self, came: Instant, began: Instant, ran: Ran) {
        self.clock.ran(came, began, began + ran.execute);
        self.meter.ran(ran);
    }

    /// A Step was applied just now, with the loss that its client shares.
    pub fn stepped(&mut self, shared_loss: Option<f64>) {
        self.meter.stepped(self.clock.step(Instant::now()), shared_loss);
    }

    /// Whether its adapter is whole.
    pub fn check(&self) -> Result<(), Error> {
        if self.changing { Err(Error::Poisoned) } else { Ok(()) }
    }

    /// Adds a backward's gradient `[P]`; returns the sum of squares of all since the last step. A sum
    /// that is no number could neither be clipped nor taken back: it is refused.
    pub fn accumulate(&mut self, gradient: Tensor) -> Result<f64, Error> {
        let norm_squared = self.adapters.accumulate_if_finite(gradient);
        norm_squared.ok_or(Error::Overflow { what: "sum of LoRA gradients" })
    }

    /// Refused if the adapter would not be finite after it; then it is as it was.
    pub fn step(&mut self, work: &StepWork) -> Result<StepResult, Error> {
        let StepWork { learning_rate, clip_factor, shared_loss: _ } = *work;
        // Whatever fails up to here, as for want of memory, changes nothing.
        let stepped = self.adapters.next_if_finite(&self.adamw, learning_rate, clip_factor);
        let stepped = stepped.ok_or(Error::Overflow { what: "adapter after this Step" })?;
        self.changing = true;
        self.adapters.take_over(stepped);
        self.changing = false;
        Ok(StepResult { step: self.adapters.n_steps() })
    }

    pub fn export(&self, gradients: bool) -> Exported {
        let host = |named: Vec<(String, Tensor)>| {
            let f32 = |(name, tensor)| (name, wire::download(&tensor, WireDType::F32));
            named.into_iter().map(f32).collect()
        };
        Exported {
            tensors: host(self.adapters.named_tensors()),
            gradients: if gradients { host(self.adapters.named_gradients()) } else { Vec::new() },
            step: self.adapters.n_steps(),
        }
    }
}
