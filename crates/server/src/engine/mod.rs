//! The device: one thread that owns the trunk, every session's adapter set, every tape and every
//! key/value cache, and the only place of the server that computes with tensors.
//!
//! ```text
//! SessionActor --submit--> Scheduler --take--> Worker (this thread) --reply--> SessionActor
//! ```
//!
//! [`Command`] is everything that can happen to it. Each job runs under its own `catch_unwind`: a
//! failure is that job's answer and nobody else's.

mod backward;
mod caches;
mod command;
mod export;
mod forward;
mod outcome;
mod slot;
mod start;
mod tapes;
mod wire;
mod worker;

pub use command::{
    Admitted, BackwardResult, Command, DiscardResult, DropCacheResult, Exported, ForwardResult,
    FrameWork, Job, Plan, Reply, Settings, Start, StepResult, Times,
};
pub use export::export_state;
pub use start::{TrunkInfo, parse_device};

use crate::config::{LimitsConfig, TrunkConfig};
use crate::error::Error;
use crate::ledger::Ledger;
use crate::scheduler::{Budget, LaneId, OwnerId, Scheduler, Share};
use caches::CacheLimits;
use offshoot_adapters::AdapterState;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::sync::oneshot;
use worker::{Worker, WorkerLimits};

/// After so long a cache may make room for others: as a session keeps its place on the device for a
/// while (`session.turn_seconds`), so that two who decode in turn do not take it from each other with
/// each token.
const IDLE_CACHE: Duration = Duration::from_secs(1);

/// The engine as its one owner, the server, sees it.
pub struct Engine {
    client: EngineClient,
    thread: JoinHandle<()>,
    _end: AbortOnDrop,
}

/// What the rest of the server holds of the engine. Cloning is cheap.
#[derive(Clone)]
pub struct EngineClient {
    scheduler: Arc<Scheduler<Job>>,
    trunk: Arc<TrunkInfo>,
    ledger: Ledger,
    stats: Arc<Stats>,
    next_lane: Arc<AtomicU64>,
}

/// Bytes and counts, kept by the engine thread, read by anyone.
#[derive(Debug, Default)]
pub struct Stats {
    pub n_sessions: AtomicU64,
    pub n_tapes: AtomicU64,
    pub n_caches: AtomicU64,
}

/// A session's place on the device. Dropping it gives the place back.
pub struct EngineSession {
    lane: LaneId,
    client: EngineClient,
    left: bool,
}

/// Ends the thread, and whoever waits for it.
struct AbortOnDrop(Arc<Scheduler<Job>>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Engine {
    /// Starts the thread and waits until the trunk is loaded.
    pub async fn start(config: TrunkConfig, limits: &LimitsConfig) -> Result<Engine, Error> {
        let scheduler = Arc::new(Scheduler::new(limits.max_queued_jobs));
        let stats = Arc::new(Stats::default());
        let budget = Budget { n_tokens: limits.max_tokens_per_batch, wait: limits.batch_wait() };
        let (ready, loaded) = oneshot::channel();
        let (queue, counted, limits) = (scheduler.clone(), stats.clone(), limits.clone());
        let body = move || {
            // Whatever ends this thread, nobody waits for it in vain.
            let _end = AbortOnDrop(queue.clone());
            let start::Loaded { part, trunk, ledger, weights: _weights } =
                match start::load(&config, &limits) {
                    Ok(loaded) => loaded,
                    Err(error) => return drop(ready.send(Err(error))),
                };
            // Whoever started the server may have given up; then the queue is closed soon.
            let _ = ready.send(Ok((trunk, ledger.clone())));
            let caches = CacheLimits {
                max_open: limits.max_open_caches,
                max_tokens: limits.max_cache_tokens,
                idle: IDLE_CACHE,
            };
            let limits = WorkerLimits { admission_wait: limits.admission_wait(), caches };
            Worker::new(part, ledger, counted, limits).run(&queue, budget);
        };
        let name = "engine";
        let spawned = std::thread::Builder::new().name(name.into()).spawn(body);
        let thread = spawned.map_err(|source| Error::Thread { name, source })?;
        let (trunk, ledger) = loaded.await.map_err(|_| Error::Gone { part: name })??;
        let (next_lane, end) = (Arc::default(), AbortOnDrop(scheduler.clone()));
        let trunk = Arc::new(trunk);
        let client = EngineClient { scheduler, trunk, ledger, stats, next_lane };
        Ok(Engine { client, thread, _end: end })
    }

    /// To be handed around.
    pub fn client(&self) -> EngineClient {
        self.client.clone()
    }

    /// Runs what waits, then ends the thread. Blocks.
    pub fn join(self) {
        self.client.scheduler.close();
        let Engine { thread, _end, .. } = self;
        if thread.join().is_err() {
            tracing::error!("the engine thread had panicked");
        }
    }
}

impl EngineClient {
    /// What is loaded.
    pub fn trunk(&self) -> &Arc<TrunkInfo> {
        &self.trunk
    }

    /// The device's bytes.
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// What it takes.
    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    /// Drops what waits and ends the thread after its current job.
    pub fn abort(&self) {
        self.scheduler.abort();
    }

    /// Makes a session's adapter set.
    pub async fn admit(&self, plan: Plan) -> Result<(EngineSession, Admitted), Error> {
        let lane = LaneId(self.next_lane.fetch_add(1, Ordering::Relaxed));
        // Every session is a tenant of its own until there are tenants.
        self.scheduler.open(lane, Share { owner: OwnerId(lane.0), weight: 1 });
        // Before the job, so that the place is given back even if nobody waits for the answer.
        let session = EngineSession { lane, client: self.clone(), left: false };
        let admitted = session.call(|reply| Command::Admit { plan: Box::new(plan), reply }).await?;
        Ok((session, admitted))
    }
}

impl EngineSession {
    /// Hands a frame over; frames and calls of one session run in this order.
    pub fn submit(&self, sequence: u64, work: FrameWork) -> Result<(), Error> {
        self.push(Command::Frame { sequence, work })
    }

    /// Asks for the adapter set as it is after what was submitted so far.
    pub fn request_state(&self) -> Result<oneshot::Receiver<Result<AdapterState, Error>>, Error> {
        let (reply, state) = oneshot::channel();
        self.push(Command::ToState { reply })?;
        Ok(state)
    }

    /// The adapter as it is after what was submitted so far.
    pub fn request_export(
        &self,
        gradients: bool,
    ) -> Result<oneshot::Receiver<Result<Exported, Error>>, Error> {
        let (reply, exported) = oneshot::channel();
        self.push(Command::Export { gradients, reply })?;
        Ok(exported)
    }

    /// The adapter set as it is after what was submitted so far.
    pub async fn state(&self) -> Result<AdapterState, Error> {
        self.request_state()?.await.map_err(|_| Error::Gone { part: "engine" })?
    }

    /// Gives the place back, and waits until it is free.
    pub async fn leave(mut self) {
        self.left = true;
        let (gone, left) = oneshot::channel();
        // If the engine is gone, so is the place.
        if self.push(Command::Release { gone }).is_ok() {
            let _ = left.await;
        }
    }

    async fn call<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T, Error> {
        let (reply, result) = oneshot::channel();
        self.push(command(reply))?;
        result.await.map_err(|_| Error::Gone { part: "engine" })?
    }

    fn push(&self, command: Command) -> Result<(), Error> {
        let (kind, n_tokens) = (command.kind(), command.n_tokens());
        let job = Job { command, span: tracing::Span::current() };
        self.client.scheduler.submit(self.lane, kind, n_tokens, job)
    }
}

impl Drop for EngineSession {
    fn drop(&mut self) {
        if !self.left {
            // If the engine is gone, so is the place.
            let _ = self.push(Command::Release { gone: oneshot::channel().0 });
        }
    }
}

impl Stats {
    fn set(&self, place: &AtomicU64, value: u64) {
        place.store(value, Ordering::Relaxed);
    }
}
