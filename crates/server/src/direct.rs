//! The engine by itself, without network, session actors and store: what benches measure, so that
//! the numbers are those of scheduler, hand-over and device.
//!
//! Jobs are submitted and answered later, as sessions do it. Those of one session run in their
//! order; those of several sessions that wait at the same time share batches.
//!
//! ```no_run
//! use offshoot_server::direct::{Adapter, DirectEngine, Input};
//! use offshoot_server::{LimitsConfig, TrunkConfig};
//! # async fn run(hidden: offshoot_proto::HostTensor) -> Result<(), offshoot_server::Error> {
//! let trunk = TrunkConfig { name: "path/to/model".into(), split_point_2: 20, ..Default::default() };
//! let engine = DirectEngine::start(trunk, &LimitsConfig::default()).await?;
//! let mut a = engine.open(Adapter::default()).await?;
//! let mut b = engine.open(Adapter::default()).await?;
//! let input = Input { hidden, seq_lens: vec![128; 4], train: true, want_input_grad: true };
//! let (of_a, of_b) = (a.forward(input.clone())?, b.forward(input)?);
//! let output = of_a.done().await?;
//! println!("{} jobs in its batch, {:?}", output.times.n_jobs, output.times.execute);
//! let gradients = a.backward(output.hidden)?;
//! gradients.done().await?;
//! # drop(of_b); Ok(())
//! # }
//! ```

pub use crate::engine::{StepResult, Times};
pub use crate::ledger::{ByKind, Usage};

use crate::config::StoreConfig;
use crate::config::{LimitsConfig, TrunkConfig};
use crate::engine::{
    BackwardResult, Engine, EngineClient, EngineSession, ForwardResult, FrameWork, Plan, Settings,
    Start, TrunkInfo,
};
use crate::error::Error;
use crate::ledger::BytesKind;
use crate::session::{BackwardWork, ExtendWork, ForwardWork, Mode, StepWork};
use crate::store::{Kept, Store};
use offshoot_adapters::{AdamW, LoraSpec};
use offshoot_proto::{HostTensor, WireDType};
use std::collections::VecDeque;
use std::time::{Duration, Instant};
use tokio::sync::oneshot;

/// An engine with one trunk. Dropping it drops what waits, and returns when the thread has ended.
pub struct DirectEngine {
    client: EngineClient,
    /// Until it is dropped.
    engine: Option<Engine>,
}

impl Drop for DirectEngine {
    fn drop(&mut self) {
        self.client.abort();
        if let Some(engine) = self.engine.take() {
            engine.join();
        }
    }
}

/// What opening a server's store found, and how long it took. The store is closed again.
#[derive(Debug, Clone, Copy)]
pub struct OpenedStore {
    pub n_sessions: usize,
    pub n_snapshots: usize,
    pub time: Duration,
}

/// Opens the store of a server that does not run, as a server does when it starts.
pub fn open_store(config: &StoreConfig) -> Result<OpenedStore, Error> {
    let kept = Kept { of_client: config.snapshots_kept, of_server: config.server_snapshots_kept };
    let begun = Instant::now();
    let store = Store::open(&config.dir, kept)?;
    let time = begun.elapsed();
    let records = store.records();
    let n_snapshots = records.iter().map(|(_, record)| record.snapshots.len()).sum();
    Ok(OpenedStore { n_sessions: records.len(), n_snapshots, time })
}

/// What a session's adapter is; its optimizer is AdamW with PyTorch's defaults.
#[derive(Debug, Clone)]
pub struct Adapter {
    /// Without targets it gets the model's default ones.
    pub lora: LoraSpec,
    /// Of initial values and dropout.
    pub seed: u64,
    /// Of what comes back.
    pub wire_dtype: WireDType,
}

impl Default for Adapter {
    fn default() -> Self {
        Adapter { lora: LoraSpec::default(), seed: 0, wire_dtype: WireDType::F32 }
    }
}

/// One session on the device. Dropping it gives its place back.
pub struct DirectSession {
    session: EngineSession,
    sequence: u64,
    microbatch: u64,
    /// Forwards in training mode without a backward, in their order.
    open: VecDeque<u64>,
}

/// What a forward takes. Unlike at the edge of a server nothing is checked.
#[derive(Debug, Clone)]
pub struct Input {
    /// `[N, H]`, finite.
    pub hidden: HostTensor,
    /// None zero; they sum to N.
    pub seq_lens: Vec<usize>,
    /// Whether a backward will follow.
    pub train: bool,
    /// Whether that backward gives the gradient by `hidden`.
    pub want_input_grad: bool,
}

/// What a forward gives.
#[derive(Debug)]
pub struct Output {
    /// `[N, H]`.
    pub hidden: HostTensor,
    /// 0 in evaluation mode.
    pub tape_bytes: u64,
    /// 0 unless a cache was extended.
    pub cache_bytes: u64,
    /// Where the time went, and the batch that the job was in.
    pub times: Times,
}

/// What a backward gives.
#[derive(Debug)]
pub struct Gradients {
    /// `[N, H]`, if the forward wanted it.
    pub input: Option<HostTensor>,
    /// Of the accumulated LoRA gradients.
    pub norm_squared: f64,
    /// Where the time went, and the batch that the job was in.
    pub times: Times,
}

/// A job that was submitted.
#[must_use = "a job whose answer nobody waits for may be left out"]
pub struct Pending<T> {
    answer: oneshot::Receiver<Result<T, Error>>,
}

/// A [`Pending`] forward.
pub struct PendingForward(Pending<ForwardResult>);

/// A [`Pending`] backward.
pub struct PendingBackward(Pending<BackwardResult>);

impl DirectEngine {
    /// Loads the trunk and starts the thread.
    pub async fn start(trunk: TrunkConfig, limits: &LimitsConfig) -> Result<Self, Error> {
        let engine = Engine::start(trunk, limits).await?;
        Ok(DirectEngine { client: engine.client(), engine: Some(engine) })
    }

    /// What is loaded.
    pub fn trunk(&self) -> TrunkInfo {
        (**self.client.trunk()).clone()
    }

    /// The ledger's bytes.
    pub fn usage(&self) -> Usage {
        self.client.ledger().usage()
    }

    /// Makes a session's adapter.
    pub async fn open(&self, adapter: Adapter) -> Result<DirectSession, Error> {
        let Adapter { mut lora, seed, wire_dtype } = adapter;
        let client = &self.client;
        if lora.target_modules.is_empty() {
            lora.target_modules.clone_from(&client.trunk().default_targets);
        }
        let bytes = client.trunk().adapter_bytes(&lora);
        let no_room = |shortage| Error::NoRoom { shortage, retry_after: None };
        let reserved = client.ledger().reserve(BytesKind::Adapters, bytes).map_err(no_room)?;
        let settings = Settings {
            tenant: Default::default(),
            lora,
            adamw: AdamW::default(),
            seed,
            wire_dtype,
        };
        let plan = Plan { settings, start: Start::Fresh, reserved, meter: Default::default() };
        let (session, _) = client.admit(plan).await?;
        Ok(DirectSession { session, sequence: 0, microbatch: 0, open: VecDeque::new() })
    }
}

impl DirectSession {
    /// Submits a forward.
    pub fn forward(&mut self, input: Input) -> Result<PendingForward, Error> {
        let Input { hidden, seq_lens, train, want_input_grad } = input;
        self.microbatch += 1;
        let work = ForwardWork {
            microbatch: self.microbatch,
            hidden,
            seq_lens,
            position_ids: None,
            mode: if train { Mode::Train } else { Mode::Eval },
            want_input_grad,
            dropout_key: self.microbatch,
        };
        let (reply, answer) = oneshot::channel();
        self.submit(FrameWork::Forward { work: Box::new(work), reply })?;
        if train {
            self.open.push_back(self.microbatch);
        }
        Ok(PendingForward(Pending { answer }))
    }

    /// Submits the next tokens of a sequence, `[n, H]`, behind the first `start` ones that its cache
    /// holds; 0 begins it anew. A session may have `limits.max_open_caches`.
    pub fn extend(
        &mut self,
        cache: u64,
        start: usize,
        hidden: HostTensor,
    ) -> Result<PendingForward, Error> {
        let work = ExtendWork { cache, start: start as u64, hidden };
        let (reply, answer) = oneshot::channel();
        self.submit(FrameWork::Extend { work: Box::new(work), reply })?;
        Ok(PendingForward(Pending { answer }))
    }

    /// Submits the backward of the oldest forward in training mode that has none yet. `grad` is
    /// `[N, H]`.
    pub fn backward(&mut self, grad: HostTensor) -> Result<PendingBackward, Error> {
        let microbatch = self.open.pop_front().ok_or(Error::NoTape { microbatch: 0 })?;
        let work = BackwardWork { microbatch, grad };
        let (reply, answer) = oneshot::channel();
        self.submit(FrameWork::Backward { work: Box::new(work), reply })?;
        Ok(PendingBackward(Pending { answer }))
    }

    /// Submits an optimizer step.
    pub fn step(&mut self, learning_rate: f64) -> Result<Pending<StepResult>, Error> {
        let work = StepWork { learning_rate, clip_factor: 1.0, shared_loss: None };
        let (reply, answer) = oneshot::channel();
        self.submit(FrameWork::Step { work, reply })?;
        Ok(Pending { answer })
    }

    fn submit(&mut self, work: FrameWork) -> Result<(), Error> {
        self.sequence += 1;
        self.session.submit(self.sequence, work)
    }
}

impl<T> Pending<T> {
    /// Its answer.
    pub async fn done(self) -> Result<T, Error> {
        self.answer.await.map_err(|_| Error::engine_down())?
    }
}

impl PendingForward {
    /// Its answer.
    pub async fn done(self) -> Result<Output, Error> {
        let ForwardResult { hidden, tape_bytes, cache_bytes, times } = self.0.done().await?;
        Ok(Output { hidden, tape_bytes, cache_bytes, times })
    }
}

impl PendingBackward {
    /// Its answer.
    pub async fn done(self) -> Result<Gradients, Error> {
        match self.0.done().await? {
            BackwardResult::Done { grad, grad_norm_squared, times } => {
                Ok(Gradients { input: grad, norm_squared: grad_norm_squared, times })
            }
            BackwardResult::Lost(error) => Err(error),
        }
    }
}
