//! What a server would hold, before there is one: the engine's bytes and the ledger's rules, asked with
//! the shapes of a model whose weights need not be there. Nothing is loaded. `offshoot plan` shows it.
//!
//! ```
//! use offshoot_model::{ModelConfig, TapeSize, weights};
//! use offshoot_server::forecast::{Demand, Forecast};
//! use offshoot_server::{LimitsConfig, TrunkConfig};
//!
//! # let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/llama");
//! let config = ModelConfig::from_json(&weights::find_config(path)?)?;
//! let trunk = TrunkConfig { split_point_1: 1, split_point_2: 3, ..TrunkConfig::default() };
//! let forecast = Forecast::new(&config, &trunk, &LimitsConfig::default())?;
//! let demand = Demand { n_tokens: 512, n_open: 2, ..Demand::default() };
//! let session = forecast.session(&demand)?;
//! let most = forecast.most_sessions(1 << 30, &session, Some(TapeSize::Full));
//! println!("{most} sessions at once, each of {} bytes", session.adapter);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub use crate::ledger::{ByKind, Shortage};

use crate::config::{LimitsConfig, TrunkConfig};
use crate::engine::{
    LoraShape, Need, adapter_bytes, kind_of, n_parameters, parse_device, work_room,
};
use crate::error::Error;
use crate::ledger::{BytesKind, Ledger};
use offshoot_adapters::LoraSpec;
use offshoot_model::{ModelConfig, PartSpec, Shapes, SplitPoints, TapeSize};
use std::ops::Range;

/// A trunk that nobody has loaded.
#[derive(Debug, Clone)]
pub struct Forecast {
    model: ModelConfig,
    layers: Range<usize>,
    shapes: Shapes,
    weights: u64,
    work_room: u64,
}

/// How a session works.
#[derive(Debug, Clone, Default)]
pub struct Demand {
    /// Without targets it gets the model's default ones.
    pub lora: LoraSpec,
    /// Of one microbatch.
    pub n_tokens: u64,
    /// Microbatches between their forward and backward at a time.
    pub n_open: u64,
}

/// What one session takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SessionBytes {
    /// P, the trained values of its adapter in the trunk.
    pub n_parameters: u64,
    /// Parameters, gradients and both moments: on the device, or in the host's memory while it is
    /// idle, and as much in each of its snapshots.
    pub adapter: u64,
    /// Microbatches that are open at a time.
    pub n_open: u64,
    /// For one of them, by [`TapeSize::ALL`].
    needs: [Need; 3],
}

impl SessionBytes {
    /// Of the tape of one open microbatch.
    pub fn tape(&self, size: TapeSize) -> u64 {
        self.need(size).tapes
    }

    /// While one microbatch runs, and so that it can have its backward.
    pub fn workspace(&self, size: TapeSize) -> u64 {
        self.need(size).workspace()
    }

    /// Beside all that the ledger counts, while one session takes its optimizer step.
    pub fn step(&self) -> u64 {
        5 * 4 * self.n_parameters
    }

    fn need(&self, size: TapeSize) -> Need {
        let place = TapeSize::ALL.iter().position(|of| *of == size);
        self.needs[place.expect("ALL has each size")]
    }
}

impl Forecast {
    /// Of the trunk that `offshoot serve` would load with these settings.
    pub fn new(
        model: &ModelConfig,
        trunk: &TrunkConfig,
        limits: &LimitsConfig,
    ) -> Result<Self, Error> {
        let split = SplitPoints::new(trunk.split_point_1, trunk.split_point_2, model.n_layers)?;
        let device = parse_device(&trunk.device)
            .ok_or_else(|| Error::Device { device: trunk.device.clone(), cause: "unknown name" })?;
        let (layers, kind) = (split.s1..split.s2, kind_of(trunk.dtype));
        let shapes = Shapes::new(model, layers.clone(), kind, device);
        let spec = PartSpec { layers: layers.clone(), embed: false, head: false };
        Ok(Forecast {
            model: model.clone(),
            layers,
            shapes,
            weights: model.weights_bytes(&spec, kind, device),
            work_room: work_room(&shapes, limits),
        })
    }

    /// The trunk's weights on the device.
    pub fn weights_bytes(&self) -> u64 {
        self.weights
    }

    /// What adapters leave free, so that the largest microbatch that the limits allow can have its turn;
    /// of a small budget at most half.
    pub fn work_room_bytes(&self) -> u64 {
        self.work_room
    }

    /// Keys and values of a sequence that is generated, for each of its tokens.
    pub fn cache_bytes_per_token(&self) -> u64 {
        self.shapes.cache_bytes(1)
    }

    /// What a session takes.
    pub fn session(&self, demand: &Demand) -> Result<SessionBytes, Error> {
        let Demand { lora, n_tokens, n_open } = demand;
        let sites = match lora.target_modules.as_slice() {
            [] => self.model.sites(self.layers.clone(), &self.model.default_targets())?,
            targets => self.model.sites(self.layers.clone(), targets)?,
        };
        let ranks = (sites.len() * lora.r) as u64;
        let n_parameters = n_parameters(sites.iter(), lora.r);
        let of_lora = LoraShape { ranks, gradient_bytes: 4 * n_parameters };
        let need = |size| Need::of(&self.shapes, *n_tokens, Some(size), of_lora);
        Ok(SessionBytes {
            n_parameters,
            adapter: adapter_bytes(n_parameters),
            n_open: *n_open,
            needs: TapeSize::ALL.map(need),
        })
    }

    /// What a device with this budget would hold of so many such sessions, all on it; with `tapes` each
    /// has all its microbatches open, with tapes of this size. Or what did not fit first.
    pub fn books(
        &self,
        budget: u64,
        session: &SessionBytes,
        n_sessions: u64,
        tapes: Option<TapeSize>,
    ) -> Result<ByKind, Shortage> {
        let n_open = if tapes.is_some() { session.n_open.saturating_mul(n_sessions) } else { 0 };
        let size = tapes.unwrap_or(TapeSize::Input);
        self.take(budget, &Taken { session, n_sessions, n_open, size })
    }

    /// How many such sessions are on the device at a time: with `tapes` so that all can have all their
    /// microbatches open at once, with tapes of this size.
    pub fn most_sessions(
        &self,
        budget: u64,
        session: &SessionBytes,
        tapes: Option<TapeSize>,
    ) -> u64 {
        most(budget, |n| self.books(budget, session, n, tapes).is_ok())
    }

    /// How many microbatches can be open at once beside the adapters of so many sessions, with tapes of
    /// this size.
    pub fn most_open(
        &self,
        budget: u64,
        session: &SessionBytes,
        n_sessions: u64,
        size: TapeSize,
    ) -> u64 {
        most(budget, |n_open| {
            self.take(budget, &Taken { session, n_sessions, n_open, size }).is_ok()
        })
    }

    fn take(&self, budget: u64, taken: &Taken) -> Result<ByKind, Shortage> {
        let Taken { session, n_sessions, n_open, size } = *taken;
        let ledger = Ledger::new(Some(budget));
        ledger.set_work_room(self.work_room);
        let workspace = if n_open > 0 { session.workspace(size) } else { 0 };
        let wanted = [
            (BytesKind::Weights, self.weights),
            (BytesKind::Adapters, session.adapter.saturating_mul(n_sessions)),
            (BytesKind::Workspace, workspace),
            (BytesKind::Tapes, session.tape(size).saturating_mul(n_open)),
        ];
        // Held until the books are read.
        let reserved = wanted.map(|(kind, bytes)| ledger.reserve(kind, bytes));
        match reserved.iter().find_map(|taken| taken.as_ref().err()) {
            Some(shortage) => Err(*shortage),
            None => Ok(ledger.usage().now),
        }
    }
}

struct Taken<'a> {
    session: &'a SessionBytes,
    n_sessions: u64,
    n_open: u64,
    size: TapeSize,
}

/// The highest number up to `limit` that fits, where all below one that fits do. 0: not even 1 does.
pub fn most(limit: u64, fits: impl Fn(u64) -> bool) -> u64 {
    let (mut fitting, mut not) = (0, limit.saturating_add(1));
    while not - fitting > 1 {
        let middle = fitting + (not - fitting) / 2;
        match fits(middle) {
            true => fitting = middle,
            false => not = middle,
        }
    }
    fitting
}
