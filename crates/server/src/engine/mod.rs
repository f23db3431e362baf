//! The device: one thread that owns the trunk, every session's adapter set and every tape, and the
//! only place of the server that computes with tensors.
//!
//! ```text
//! SessionActor --submit--> Scheduler --take--> Worker (this thread) --reply--> SessionActor
//! ```
//!
//! [`Command`] is everything that can happen to it. Each job runs under its own `catch_unwind`: a
//! failure is that job's answer and nobody else's.

mod command;
mod start;
mod wire;
mod worker;

pub use command::{
    Admitted, BackwardResult, Command, Exported, ForwardResult, FrameWork, Job, Plan, Reply, Start,
    StepResult, Times,
};
pub use start::{TrunkInfo, parse_device};

use crate::config::{LimitsConfig, TrunkConfig};
use crate::error::Error;
use crate::scheduler::{Budget, LaneId, Scheduler};
use offshoot_adapters::AdapterState;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use tokio::sync::oneshot;
use worker::Worker;

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
    stats: Arc<Stats>,
    next_lane: Arc<AtomicU64>,
}

/// Bytes and counts, kept by the engine thread, read by anyone.
#[derive(Debug, Default)]
pub struct Stats {
    /// Adapters, gradients and moments of all sessions.
    pub adapter_bytes: AtomicU64,
    pub tape_bytes: AtomicU64,
    pub n_sessions: AtomicU64,
    pub n_tapes: AtomicU64,
}

/// A session's place on the device. Dropping it gives the place back.
pub struct EngineSession {
    lane: LaneId,
    client: EngineClient,
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
        let budget = Budget { n_tokens: limits.max_tokens_per_batch };
        let (ready, loaded) = oneshot::channel();
        let (queue, counted) = (scheduler.clone(), stats.clone());
        let body = move || {
            // Whatever ends this thread, nobody waits for it in vain.
            let _end = AbortOnDrop(queue.clone());
            let (part, trunk) = match start::load(&config) {
                Ok(loaded) => loaded,
                Err(error) => return drop(ready.send(Err(error))),
            };
            // Whoever started the server may have given up; then the queue is closed soon.
            let _ = ready.send(Ok(trunk));
            Worker::new(part, counted).run(&queue, budget);
        };
        let name = "engine";
        let spawned = std::thread::Builder::new().name(name.into()).spawn(body);
        let thread = spawned.map_err(|source| Error::Thread { name, source })?;
        let trunk = Arc::new(loaded.await.map_err(|_| Error::Gone { part: name })??);
        let (next_lane, end) = (Arc::default(), AbortOnDrop(scheduler.clone()));
        let client = EngineClient { scheduler, trunk, stats, next_lane };
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
        // Before the job, so that the place is given back even if nobody waits for the answer.
        let session = EngineSession { lane, client: self.clone() };
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
        // If the engine is gone, so is the place.
        let _ = self.push(Command::Release);
    }
}

impl Stats {
    fn set(&self, place: &AtomicU64, value: u64) {
        place.store(value, Ordering::Relaxed);
    }
}
