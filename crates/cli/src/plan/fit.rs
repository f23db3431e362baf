//! What fits, what does not, and what would have to change.

use offshoot_model::{ModelConfig, TapeSize};
use offshoot_server::forecast::{ByKind, Demand, Forecast, SessionBytes, most};
use offshoot_server::{ComputeDType, LimitsConfig, TrunkConfig};
use serde::Serialize;

/// A server that does not run yet, and its sessions, which are all alike.
#[derive(Clone)]
pub struct Question {
    pub model: ModelConfig,
    pub trunk: TrunkConfig,
    pub limits: LimitsConfig,
    pub demand: Demand,
    /// limits.memory_bytes.
    pub budget: u64,
}

/// How many sessions fit, from the quickest to the most.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Most {
    /// At once, every one with all its microbatches open, and nothing is computed twice.
    pub full_tapes: u64,
    /// The same with the inputs of layers kept: each layer's forward runs again in the backward.
    pub block_tapes: u64,
    /// The same with the trunk's input kept: the whole forward runs again.
    pub input_tapes: u64,
    /// Adapters on the device at a time; their microbatches wait for one another.
    pub on_device: u64,
    /// Idle ones beside them in the host's memory.
    pub in_host_memory: Option<u64>,
    /// All that are live; further ones are on disk.
    pub live: u64,
}

/// What a number of sessions that train at the same time takes of the device.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Chosen {
    pub sessions: u64,
    /// Those whose adapters are there at a time.
    pub on_device: u64,
    /// The largest with which all of those can have all their microbatches open; none: they wait for
    /// one another.
    pub tapes: Option<&'static str>,
    /// Microbatches that can be open at once.
    pub open_microbatches: u64,
    pub bytes: Bytes,
    pub free_bytes: u64,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Bytes {
    pub weights: u64,
    pub adapters: u64,
    pub tapes: u64,
    pub workspace: u64,
}

impl From<ByKind> for Bytes {
    fn from(kinds: ByKind) -> Self {
        let ByKind { weights, adapters, tapes, workspace, .. } = kinds;
        Bytes { weights, adapters, tapes, workspace }
    }
}

impl Question {
    pub fn forecast(&self) -> Result<Forecast, offshoot_server::Error> {
        Forecast::new(&self.model, &self.trunk, &self.limits)
    }

    fn asked(&self) -> Result<(Forecast, SessionBytes), offshoot_server::Error> {
        let forecast = self.forecast()?;
        let session = forecast.session(&self.demand)?;
        Ok((forecast, session))
    }

    /// Beside `host_memory`, the bytes for idle sessions.
    pub fn most(&self, host_memory: Option<u64>) -> Result<Most, offshoot_server::Error> {
        let (forecast, session) = self.asked()?;
        let live = self.limits.max_live_sessions as u64;
        let of = |tapes| forecast.most_sessions(self.budget, &session, tapes).min(live);
        let on_device = of(None);
        let in_host = |bytes: u64| (bytes / session.adapter.max(1)).min(live - on_device);
        Ok(Most {
            full_tapes: of(Some(TapeSize::Full)),
            block_tapes: of(Some(TapeSize::Blocks)),
            input_tapes: of(Some(TapeSize::Input)),
            on_device,
            in_host_memory: host_memory.map(in_host),
            live,
        })
    }

    /// So many, with the largest tapes that fit.
    pub fn choose(&self, sessions: u64) -> Result<Chosen, offshoot_server::Error> {
        let (forecast, session) = self.asked()?;
        let on_device = sessions.min(forecast.most_sessions(self.budget, &session, None));
        let fitting = TapeSize::ALL.into_iter().find_map(|size| {
            let books = forecast.books(self.budget, &session, on_device, Some(size)).ok()?;
            Some((size, books))
        });
        let smallest = || forecast.most_open(self.budget, &session, on_device, TapeSize::Input);
        let (tapes, open_microbatches, books) = match fitting {
            Some((size, books)) => (Some(name(size)), on_device * session.n_open, books),
            None => {
                let n_open = smallest();
                let mut books =
                    forecast.books(self.budget, &session, on_device, None).unwrap_or_else(|_| {
                        ByKind { weights: forecast.weights_bytes(), ..ByKind::default() }
                    });
                if n_open > 0 {
                    books.tapes = n_open * session.tape(TapeSize::Input);
                    books.workspace = session.workspace(TapeSize::Input);
                }
                (None, n_open, books)
            }
        };
        let free_bytes = self.budget.saturating_sub(books.total());
        let bytes = books.into();
        Ok(Chosen { sessions, on_device, tapes, open_microbatches, bytes, free_bytes })
    }

    /// What of the ledger is used up by one session more than fit with full tapes.
    pub fn first_limit(&self) -> Result<Option<&'static str>, offshoot_server::Error> {
        let (forecast, session) = self.asked()?;
        let full = Some(TapeSize::Full);
        let most = forecast.most_sessions(self.budget, &session, full);
        let shortage = forecast.books(self.budget, &session, most + 1, full).err();
        Ok(shortage.map(|shortage| shortage.kind.name()))
    }

    /// Each change, alone, with which so many sessions would fit at once with full tapes.
    pub fn changes(&self, sessions: u64) -> Vec<String> {
        let now = &self.demand;
        let with = |change: &dyn Fn(&mut Question)| {
            let mut other = self.clone();
            change(&mut other);
            other.fits_full(sessions)
        };
        let mut changes = Vec::new();
        if let Some(n) = highest(now.n_tokens, |n| with(&|q| q.demand.n_tokens = n)) {
            changes.push(format!("--tokens-per-microbatch {n} (clients: --max-tokens-per-batch)"));
        }
        if let Some(n) = highest(now.n_open, |n| with(&|q| q.demand.n_open = n)) {
            changes.push(format!("--microbatches-in-flight {n}"));
        }
        let rank = now.lora.r as u64;
        if let Some(r) = highest(rank, |r| with(&|q| q.demand.lora.r = r as usize)) {
            changes.push(format!("--lora-rank {r}"));
        }
        if self.trunk.dtype == ComputeDType::F32 && with(&|q| q.trunk.dtype = ComputeDType::Bf16) {
            changes.push("--dtype bf16".into());
        }
        let largest = self.limits.max_tokens_per_microbatch;
        let sent = now.n_tokens as usize;
        if sent < largest && with(&|q| q.limits.max_tokens_per_microbatch = sent) {
            changes.push(format!(
                "--max-tokens-per-microbatch {sent}: less room is left free for larger ones"
            ));
        }
        changes
    }

    /// The smallest limits.memory_bytes with which so many would fit at once with full tapes.
    pub fn needed_budget(&self, sessions: u64) -> u64 {
        let too_small = |budget| !Question { budget, ..self.clone() }.fits_full(sessions);
        most(u64::MAX >> 1, too_small) + 1
    }

    fn fits_full(&self, sessions: u64) -> bool {
        let full = Some(TapeSize::Full);
        self.asked().is_ok_and(|(forecast, session)| {
            forecast.books(self.budget, &session, sessions, full).is_ok()
        })
    }
}

/// The highest number below `now` that fits, if there is one.
fn highest(now: u64, fits: impl Fn(u64) -> bool) -> Option<u64> {
    Some(most(now.saturating_sub(1), fits)).filter(|&n| n > 0)
}

fn name(size: TapeSize) -> &'static str {
    match size {
        TapeSize::Full => "full",
        TapeSize::Blocks => "blocks",
        TapeSize::Input => "input",
    }
}
