use crate::error::Error;
use crate::ledger::Reservation;
use crate::meter::Meter;
use crate::metrics::JobKind;
use crate::quota::Account;
use crate::scheduler::Kind;
use crate::session::{BackwardWork, ExtendWork, ForwardWork, Mode, StepWork};
use crate::trace::JobSpans;
use offshoot_adapters::{AdamW, AdapterState, LoraSpec};
use offshoot_proto::{HostTensor, WireDType};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;

/// The way home of a result.
pub type Reply<T> = oneshot::Sender<Result<T, Error>>;

/// One thing for the engine to do, with what its answer needs.
pub struct Job {
    pub command: Command,
    pub spans: JobSpans,
}

/// Everything that can happen to the device.
pub enum Command {
    /// Makes an adapter set.
    Admit { plan: Box<Plan>, account: Arc<Account>, reply: Reply<Admitted> },
    /// Drops a session's adapter set and tapes, and then the sender.
    Release { gone: oneshot::Sender<()> },
    /// A frame of a session's stream.
    Frame { sequence: u64, work: FrameWork },
    /// Copies the adapter set to the host.
    ToState { reply: Reply<AdapterState> },
    /// Copies the adapter's matrices to the host, under PEFT's names.
    Export { gradients: bool, reply: Reply<Exported> },
}

/// A frame's work with its reply.
pub enum FrameWork {
    Forward { work: Box<ForwardWork>, reply: Reply<ForwardResult> },
    Backward { work: Box<BackwardWork>, reply: Reply<BackwardResult> },
    Step { work: StepWork, reply: Reply<StepResult> },
    Discard { microbatch: u64, reply: Reply<DiscardResult> },
    Extend { work: Box<ExtendWork>, reply: Reply<ForwardResult> },
    DropCache { cache: u64, reply: Reply<DropCacheResult> },
}

/// What a session's adapter is, all its life.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Whose session it is; empty without a tenants file.
    pub tenant: Arc<str>,
    pub lora: LoraSpec,
    pub adamw: AdamW,
    /// Of the initial values and of dropout.
    pub seed: u64,
    pub wire_dtype: WireDType,
}

/// How to make an adapter set.
#[derive(Debug)]
pub struct Plan {
    pub settings: Settings,
    pub start: Start,
    /// The set's bytes, given back when the engine drops the set.
    pub reserved: Reservation,
    /// Where its use of the device is counted.
    pub meter: Arc<Meter>,
}

/// From which values an adapter set begins.
#[derive(Debug)]
pub enum Start {
    /// PEFT's initialisation.
    Fresh,
    /// Given ones, float32 under PEFT's names, with a fresh optimizer.
    Given(Vec<(String, HostTensor)>),
    /// Where a snapshot left it. The frames up to `applied` are in it.
    State { state: Arc<AdapterState>, applied: u64 },
}

/// An adapter set that is on the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Admitted {
    pub n_parameters: u64,
    pub bytes: u64,
    pub step: u64,
}

/// Where a frame's time went.
#[derive(Debug, Clone, Copy)]
pub struct Times {
    pub queue: Duration,
    /// Of the whole batch.
    pub execute: Duration,
    /// Of the batch, this one included.
    pub n_jobs: usize,
    /// Packed tokens of the batch.
    pub n_tokens: usize,
}

/// What a Forward or an Extend gives.
#[derive(Debug)]
pub struct ForwardResult {
    /// `[N, H]`.
    pub hidden: HostTensor,
    /// 0 in evaluation mode.
    pub tape_bytes: u64,
    /// Of the cache that was extended.
    pub cache_bytes: u64,
    pub times: Times,
}

/// What a Backward gives. It used up the tape in any case, so a refusal is in here.
#[derive(Debug)]
pub enum BackwardResult {
    Done {
        /// `[N, H]`, if the Forward wanted it.
        grad: Option<HostTensor>,
        /// Of the accumulated gradients.
        grad_norm_squared: f64,
        times: Times,
    },
    /// Nothing was accumulated, but the tape is gone.
    Lost(Error),
}

/// What a Step gives.
#[derive(Debug)]
pub struct StepResult {
    /// Steps taken so far.
    pub step: u64,
}

/// The tape is gone, if there was one.
#[derive(Debug)]
pub struct DiscardResult;

/// The cache is gone, if there was one.
#[derive(Debug)]
pub struct DropCacheResult;

/// An adapter as PEFT names it.
#[derive(Debug)]
pub struct Exported {
    pub tensors: Vec<(String, HostTensor)>,
    /// Under the same names, or none.
    pub gradients: Vec<(String, HostTensor)>,
    pub step: u64,
}

impl Command {
    /// What it can share a batch with.
    pub fn kind(&self) -> Kind {
        match self {
            Command::Frame { work: FrameWork::Forward { .. }, .. } => Kind::Forward,
            Command::Frame { work: FrameWork::Extend { .. }, .. } => Kind::Forward,
            Command::Frame { work: FrameWork::Backward { .. }, .. } => Kind::Backward,
            Command::Frame { work: FrameWork::Step { .. }, .. } => Kind::Control,
            Command::Frame { work: FrameWork::Discard { .. }, .. } => Kind::Control,
            Command::Frame { work: FrameWork::DropCache { .. }, .. } => Kind::Control,
            Command::Admit { .. } | Command::Release { .. } => Kind::Control,
            Command::ToState { .. } | Command::Export { .. } => Kind::Control,
        }
    }

    /// What it is in the metrics.
    pub fn job_kind(&self) -> JobKind {
        let Command::Frame { work, .. } = self else { return JobKind::Control };
        match work {
            FrameWork::Forward { work, .. } if work.mode == Mode::Eval => JobKind::Evaluate,
            FrameWork::Forward { .. } => JobKind::Forward,
            FrameWork::Backward { .. } => JobKind::Backward,
            FrameWork::Extend { .. } => JobKind::Extend,
            FrameWork::Step { .. } => JobKind::Step,
            FrameWork::Discard { .. } | FrameWork::DropCache { .. } => JobKind::Control,
        }
    }

    /// Name of the span in which it runs.
    pub fn span_name(&self) -> &'static str {
        match self {
            Command::Admit { .. } => "engine.admit",
            Command::Release { .. } => "engine.release",
            Command::ToState { .. } => "engine.copy",
            Command::Export { .. } => "engine.export",
            Command::Frame { work, .. } => match work {
                FrameWork::Forward { .. } => "engine.forward",
                FrameWork::Backward { .. } => "engine.backward",
                FrameWork::Step { .. } => "engine.step",
                FrameWork::Discard { .. } => "engine.discard",
                FrameWork::Extend { .. } => "engine.extend",
                FrameWork::DropCache { .. } => "engine.drop_cache",
            },
        }
    }

    /// Packed tokens of a forward or backward.
    pub fn n_tokens(&self) -> usize {
        match self {
            Command::Frame { work: FrameWork::Forward { work, .. }, .. } => work.hidden.shape()[0],
            Command::Frame { work: FrameWork::Extend { work, .. }, .. } => work.hidden.shape()[0],
            Command::Frame { work: FrameWork::Backward { work, .. }, .. } => work.grad.shape()[0],
            _ => 0,
        }
    }
}
