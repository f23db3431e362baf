//! The device: one thread that owns the trunk, every session's adapter set, every tape and every
//! key/value cache, and the only place of the server that computes with tensors.
//!
//! ```text
//! SessionActor --submit--> Scheduler --take--> Worker (this thread) --reply--> SessionActor
//! ```
//!
//! [`Command`] is everything that can happen to it. Each job runs under its own `catch_unwind`: a
//! failure is that job's answer and nobody else's. A panic between jobs, or a device that answers
//! nothing any more, ends the thread with all that it had; `supervisor` then starts another one.

mod backward;
mod caches;
mod clock;
mod command;
mod company;
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
pub(crate) use start::{adapter_bytes, kind_of, n_parameters, work_room};
pub(crate) use tapes::{LoraShape, Need};

use crate::config::{LimitsConfig, TrunkConfig};
use crate::error::Error;
use crate::faults::{Fault, Faults};
use crate::ledger::Ledger;
use crate::metrics::Instruments;
use crate::quota::{Account, Accounts};
use crate::scheduler::{Budget, Kind, LaneId, OwnerId, QueueView, Scheduler, Share};
use crate::trace::JobSpans;
use caches::CacheLimits;
use offshoot_adapters::AdapterState;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tokio::sync::oneshot;
use worker::{Worker, WorkerLimits};

/// After so long a cache may make room for others: as a session keeps its place on the device for a
/// while (`session.turn_seconds`), so that two who decode in turn do not take it from each other with
/// each token.
const IDLE_CACHE: Duration = Duration::from_secs(1);

/// The engine as its one owner, the server, sees it.
pub struct Engine {
    client: EngineClient,
    config: TrunkConfig,
    limits: LimitsConfig,
    running: Running,
    _end: AbortOnDrop,
}

/// The engine's thread.
struct Running {
    /// None: it has died.
    thread: Option<JoinHandle<()>>,
    /// Closed by the thread, after all that it had is dropped.
    ended: oneshot::Receiver<()>,
}

/// What the rest of the server holds of the engine. Cloning is cheap. It stays the same when the
/// thread dies and another one begins.
#[derive(Clone)]
pub struct EngineClient {
    scheduler: Arc<Scheduler<Job>>,
    trunk: Arc<TrunkInfo>,
    ledger: Ledger,
    stats: Arc<Stats>,
    next_lane: Arc<AtomicU64>,
    accounts: Arc<Accounts>,
}

/// Bytes and counts, kept by the engine thread, read by anyone.
#[derive(Debug, Default)]
pub struct Stats {
    pub n_sessions: AtomicU64,
    pub n_tapes: AtomicU64,
    pub n_caches: AtomicU64,
    /// Batches that have run, and their tokens.
    pub n_batches: AtomicU64,
    pub n_batch_tokens: AtomicU64,
    /// Time in which the engine worked, without what runs now.
    pub busy_nanos: AtomicU64,
    /// What runs, and since when.
    turn: Mutex<Option<(Kind, Instant)>>,
    /// None: nobody looks.
    instruments: OnceLock<Arc<Instruments>>,
    pub faults: Faults,
}

/// A session's place on the device. Dropping it gives the place back.
pub struct EngineSession {
    lane: LaneId,
    client: EngineClient,
    account: Arc<Account>,
    left: bool,
}

/// Ends the thread, and whoever waits for it.
struct AbortOnDrop(Arc<Scheduler<Job>>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// What a thread begins with.
struct Launch {
    config: TrunkConfig,
    limits: LimitsConfig,
    scheduler: Arc<Scheduler<Job>>,
    stats: Arc<Stats>,
    /// Of the thread before.
    ledger: Option<Ledger>,
}

/// A thread that has loaded the trunk and waits.
struct Launched {
    running: Running,
    trunk: TrunkInfo,
    ledger: Ledger,
    /// Lets it run. Dropped: the thread ends.
    go: oneshot::Sender<()>,
}

impl Launch {
    /// Starts a thread and waits until the trunk is loaded.
    async fn start(self) -> Result<Launched, Error> {
        let (ready, loaded) = oneshot::channel();
        let (go, may_go) = oneshot::channel();
        let (alive, ended) = oneshot::channel();
        let name = "engine";
        let body = move || {
            // Dropped last.
            let _alive: oneshot::Sender<()> = alive;
            self.run(ready, may_go);
        };
        let spawned = std::thread::Builder::new().name(name.into()).spawn(body);
        let thread = spawned.map_err(|source| Error::Thread { name, source })?;
        let (trunk, ledger) = loaded.await.map_err(|_| Error::Gone { part: name })??;
        let running = Running { thread: Some(thread), ended };
        Ok(Launched { running, trunk, ledger, go })
    }

    fn run(
        self,
        ready: oneshot::Sender<Result<(TrunkInfo, Ledger), Error>>,
        may_go: oneshot::Receiver<()>,
    ) {
        let Launch { config, limits, scheduler, stats, ledger } = self;
        // Whatever ends this thread, nobody waits for it in vain.
        let _end = AbortOnDrop(scheduler.clone());
        stats.faults.pass(Fault::Load);
        let start::Loaded { part, trunk, ledger, weights: _weights } =
            match start::load(&config, &limits, ledger) {
                Ok(loaded) => loaded,
                Err(error) => return drop(ready.send(Err(error))),
            };
        // Whoever started it may have given up.
        if ready.send(Ok((trunk, ledger.clone()))).is_err() || may_go.blocking_recv().is_err() {
            return;
        }
        let caches = CacheLimits {
            max_open: limits.max_open_caches,
            max_tokens: limits.max_cache_tokens,
            idle: IDLE_CACHE,
        };
        let budget = Budget { n_tokens: limits.max_tokens_per_batch, wait: limits.batch_wait() };
        let limits = WorkerLimits { admission_wait: limits.admission_wait(), caches };
        Worker::new(part, ledger, stats, limits).run(&scheduler, budget);
    }
}

impl Engine {
    /// Starts the thread and waits until the trunk is loaded.
    pub async fn start(config: TrunkConfig, limits: &LimitsConfig) -> Result<Engine, Error> {
        let scheduler = Arc::new(Scheduler::new(limits.max_queued_jobs));
        let stats = Arc::new(Stats::default());
        let launch = Launch {
            config: config.clone(),
            limits: limits.clone(),
            scheduler: scheduler.clone(),
            stats: stats.clone(),
            ledger: None,
        };
        let Launched { running, trunk, ledger, go } = launch.start().await?;
        // A thread that died meanwhile is noticed as any other.
        let _ = go.send(());
        let (next_lane, end) = (Arc::default(), AbortOnDrop(scheduler.clone()));
        let (trunk, accounts) = (Arc::new(trunk), Arc::default());
        let client = EngineClient { scheduler, trunk, ledger, stats, next_lane, accounts };
        Ok(Engine { client, config, limits: limits.clone(), running, _end: end })
    }

    /// To be handed around.
    pub fn client(&self) -> EngineClient {
        self.client.clone()
    }

    /// Until the thread has ended, as it does if it dies or is told to; why. All that it had on the
    /// device is given back. Not to be called again before [`Engine::restart`] has succeeded.
    pub async fn ended(&mut self) -> String {
        let _ = (&mut self.running.ended).await;
        // It has nothing left to do.
        match self.running.thread.take().map(JoinHandle::join) {
            Some(Err(panic)) => outcome::panic_text(&*panic).into(),
            Some(Ok(())) | None => "it was told to end".into(),
        }
    }

    /// Loads the trunk again, in another thread, after [`Engine::ended`]. Nobody is on the device
    /// then; jobs enter again.
    pub async fn restart(&mut self) -> Result<(), Error> {
        let launch = Launch {
            config: self.config.clone(),
            limits: self.limits.clone(),
            scheduler: self.client.scheduler.clone(),
            stats: self.client.stats.clone(),
            ledger: Some(self.client.ledger.clone()),
        };
        let Launched { running, trunk, go, .. } = launch.start().await?;
        // Adapters were trained on what was there, and clients were told what it is.
        if trunk != *self.client.trunk {
            let (was, found) = (self.client.trunk.fingerprint.clone(), trunk.fingerprint);
            return Err(Error::TrunkChanged { was, found });
        }
        self.running = running;
        self.client.scheduler.reopen();
        let _ = go.send(());
        Ok(())
    }

    /// Runs what waits, then ends the thread. Blocks.
    pub fn join(mut self) {
        self.client.scheduler.close();
        if self.running.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the engine thread had panicked");
        }
    }
}

impl EngineClient {
    /// What is loaded.
    pub fn trunk(&self) -> &Arc<TrunkInfo> {
        &self.trunk
    }

    /// What each tenant has.
    pub fn accounts(&self) -> &Arc<Accounts> {
        &self.accounts
    }

    /// The device's bytes.
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// Looks again at the memory that is free, for a budget that is a part of it.
    pub fn raise_budget(&self) {
        if let Some(budget) = start::budget_beside(&self.trunk) {
            self.ledger.raise_budget(budget);
        }
    }

    /// What it takes.
    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    /// Who waits for the device, and who had how much of it.
    pub fn queue(&self) -> QueueView {
        self.scheduler.view()
    }

    /// An error while no engine runs.
    pub fn check(&self) -> Result<(), Error> {
        if self.scheduler.is_open() { Ok(()) } else { Err(Error::engine_down()) }
    }

    /// Drops what waits and ends the thread after its current job.
    pub fn abort(&self) {
        self.scheduler.abort();
    }

    /// Makes a session's adapter set.
    pub async fn admit(&self, plan: Plan) -> Result<(EngineSession, Admitted), Error> {
        let lane = LaneId(self.next_lane.fetch_add(1, Ordering::Relaxed));
        let account = self.accounts.of(&plan.settings.tenant);
        // Without tenants every session is on its own.
        let owner = account.owner().unwrap_or(OwnerId(lane.0));
        self.scheduler.open(lane, Share { owner, weight: account.weight() });
        // Before the job, so that the place is given back even if nobody waits for the answer.
        let (client, plan) = (self.clone(), Box::new(plan));
        let session = EngineSession { lane, client, account: account.clone(), left: false };
        let admitted = session.call(|reply| Command::Admit { plan, account, reply }).await?;
        Ok((session, admitted))
    }
}

impl EngineSession {
    /// Hands a frame over; frames and calls of one session run in this order. A forward is refused if
    /// its tenant has had his tokens of these seconds.
    pub fn submit(&self, sequence: u64, work: FrameWork) -> Result<(), Error> {
        let command = Command::Frame { sequence, work };
        let n_tokens = if command.kind() == Kind::Forward { command.n_tokens() } else { 0 };
        // The tenants file may have changed.
        if let (Some(owner), Some(weight)) = (self.account.owner(), self.account.new_weight()) {
            self.client.scheduler.set_weight(Share { owner, weight });
        }
        if n_tokens > 0 {
            self.account.take_tokens(n_tokens, Instant::now())?;
        }
        let pushed = self.push(command);
        if pushed.is_err() {
            self.account.give_tokens_back(n_tokens);
        }
        pushed
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
        self.request_state()?.await.map_err(|_| Error::engine_down())?
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
        result.await.map_err(|_| Error::engine_down())?
    }

    fn push(&self, command: Command) -> Result<(), Error> {
        let (kind, n_tokens) = (command.kind(), command.n_tokens());
        let job = Job { command, spans: JobSpans::submitted(tracing::Span::current()) };
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
    /// From now on batches are in the metrics.
    pub fn record_in(&self, instruments: Arc<Instruments>) {
        let _ = self.instruments.set(instruments);
    }

    /// The engine has died.
    pub fn count_death(&self) {
        if let Some(instruments) = self.instruments.get() {
            instruments.engine_restarts.add(1, &[]);
        }
    }

    /// The engine works from now on.
    fn begin_turn(&self, kind: Kind) {
        *self.turn.lock().unwrap_or_else(PoisonError::into_inner) = Some((kind, Instant::now()));
    }

    /// It has done what it began.
    fn end_turn(&self) {
        let turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner).take();
        let lasted = turn.map_or(Duration::ZERO, |(_, since)| since.elapsed());
        let nanos = u64::try_from(lasted.as_nanos()).unwrap_or(u64::MAX);
        self.busy_nanos.fetch_add(nanos, Ordering::Relaxed);
    }

    /// A batch of so many jobs and tokens has run.
    fn ran_batch(&self, kind: Kind, (n_jobs, n_tokens): (usize, usize)) {
        self.n_batches.fetch_add(1, Ordering::Relaxed);
        self.n_batch_tokens.fetch_add(n_tokens as u64, Ordering::Relaxed);
        if let Some(instruments) = self.instruments.get() {
            let kind = if kind == Kind::Backward { "backward" } else { "forward" };
            instruments.batch(kind, n_jobs, n_tokens);
        }
    }

    /// What runs now, and for how long.
    pub fn turn(&self) -> Option<(Kind, Duration)> {
        let turn = *self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        turn.map(|(kind, since)| (kind, since.elapsed()))
    }

    fn set(&self, place: &AtomicU64, value: u64) {
        place.store(value, Ordering::Relaxed);
    }
}
