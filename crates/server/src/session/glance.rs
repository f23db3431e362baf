//! A live session as lists and overviews show it: written by its actor, read by anyone without asking
//! the actor, so that looking at a thousand sessions holds up none.

use super::actor::SessionActor;
use super::state::Resume;
use crate::residency::{Home, Tier};
use offshoot_proto::v1;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering::Relaxed};

/// See the module's text. Each value is right by itself; two of them may be of neighbouring moments.
#[derive(Debug, Default)]
pub struct Glance {
    is_attached: AtomicBool,
    tier: AtomicU8,
    step: AtomicU64,
    applied: AtomicU64,
    adapter_bytes: AtomicU64,
    n_microbatches: AtomicU32,
    n_caches: AtomicU32,
    tape_bytes: AtomicU64,
    cache_bytes: AtomicU64,
    /// Bits of an f64, as the next one.
    hidden_error: AtomicU64,
    gradients_error: AtomicU64,
}

/// A live session at a glance.
#[derive(Debug, Clone, Copy)]
pub struct SessionView {
    pub is_attached: bool,
    pub step: u64,
    pub applied: u64,
    pub tier: Tier,
    /// Of the adapter, in the memory where it is; 0 on disk.
    pub adapter_bytes: u64,
    pub n_microbatches: u32,
    pub tape_bytes: u64,
    pub n_caches: u32,
    pub cache_bytes: u64,
    pub wire_error: v1::WireError,
}

impl Glance {
    /// Of a session that becomes live, before it has an actor.
    pub fn begin(&self, home: &Home, resume: &Resume) {
        self.put(&SessionView {
            is_attached: false,
            step: resume.step,
            applied: resume.applied,
            tier: home.tier(),
            adapter_bytes: home.adapter_bytes(),
            n_microbatches: 0,
            tape_bytes: 0,
            n_caches: 0,
            cache_bytes: 0,
            wire_error: v1::WireError::default(),
        });
    }

    /// What was written last.
    pub fn view(&self) -> SessionView {
        SessionView {
            is_attached: self.is_attached.load(Relaxed),
            step: self.step.load(Relaxed),
            applied: self.applied.load(Relaxed),
            tier: match self.tier.load(Relaxed) {
                DEVICE => Tier::Device,
                HOST => Tier::Host,
                _ => Tier::Disk,
            },
            adapter_bytes: self.adapter_bytes.load(Relaxed),
            n_microbatches: self.n_microbatches.load(Relaxed),
            tape_bytes: self.tape_bytes.load(Relaxed),
            n_caches: self.n_caches.load(Relaxed),
            cache_bytes: self.cache_bytes.load(Relaxed),
            wire_error: v1::WireError {
                hidden: f64::from_bits(self.hidden_error.load(Relaxed)),
                gradients: f64::from_bits(self.gradients_error.load(Relaxed)),
            },
        }
    }

    fn put(&self, view: &SessionView) {
        self.is_attached.store(view.is_attached, Relaxed);
        self.step.store(view.step, Relaxed);
        self.applied.store(view.applied, Relaxed);
        let tier = match view.tier {
            Tier::Device => DEVICE,
            Tier::Host => HOST,
            Tier::Disk => DISK,
        };
        self.tier.store(tier, Relaxed);
        self.adapter_bytes.store(view.adapter_bytes, Relaxed);
        self.n_microbatches.store(view.n_microbatches, Relaxed);
        self.n_caches.store(view.n_caches, Relaxed);
        self.tape_bytes.store(view.tape_bytes, Relaxed);
        self.cache_bytes.store(view.cache_bytes, Relaxed);
        self.hidden_error.store(view.wire_error.hidden.to_bits(), Relaxed);
        self.gradients_error.store(view.wire_error.gradients.to_bits(), Relaxed);
    }
}

const DISK: u8 = 0;
const HOST: u8 = 1;
const DEVICE: u8 = 2;

impl SessionActor {
    /// Shows the session as it is. Before an answer leaves, so that whoever has it finds this.
    pub(super) fn show(&self) {
        let on_device = self.place.on_device().map_or(0, |on| on.admitted.bytes);
        if on_device > 0 {
            let open = self.state.open().values().sum::<u64>() + self.state.cache_bytes();
            self.profile.meter.holds(on_device + open);
        }
        self.profile.glance.put(&SessionView {
            is_attached: self.stream.is_some(),
            step: self.state.step(),
            applied: self.state.applied(),
            tier: self.place.tier(),
            adapter_bytes: self.place.adapter_bytes(),
            n_microbatches: self.state.open().len() as u32,
            n_caches: self.state.n_caches() as u32,
            tape_bytes: self.state.open().values().sum(),
            cache_bytes: self.state.cache_bytes(),
            wire_error: self.wire_loss.to_proto(),
        });
    }
}
