use crate::access::{Access, Audit, Keeper};
use crate::config::{LimitsConfig, ServerConfig, StoreConfig};
use crate::engine::{Engine, EngineClient, TrunkInfo};
use crate::error::Error;
use crate::grpc::TrunkGrpc;
use crate::host_memory;
use crate::http::{Http, HttpParts};
use crate::meter::{Meters, tell_hourly};
use crate::metrics::{Metrics, Sources};
use crate::operations::{Operations, OperationsGrpc, OperationsParts};
use crate::pool::{ActorPool, PoolThreads};
use crate::refusals::{Refusals, Refused};
use crate::registry::{Hurry, Owners, Parts, Registry, Slots};
use crate::residency::{Ages, Residency, ResidencyParts};
use crate::store::{Kept, Store, StoreLock, peek};
use crate::supervisor::Supervisor;
use crate::tls::Tls;
use crate::transport::{Health, Served, Serving, State};
use offshoot_proto::v1;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::time::Instant;

/// For what is being written to the store to be done, when the server ends.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);
/// For the server before this one to leave the address, when it has left the store.
const BIND_TIMEOUT: Duration = Duration::from_secs(10);
const BIND_PAUSE: Duration = Duration::from_millis(20);
/// The memory of the server before comes free a while after its store.
const FREED_EVERY: Duration = Duration::from_millis(500);
const FREED_TIMES: u32 = 20;

/// Starts servers.
pub struct Server;

/// A server that serves. To end it, [`RunningServer::drain`] it.
pub struct RunningServer {
    local_addr: SocketAddr,
    supervisor: Supervisor,
    client: EngineClient,
    registry: Arc<Registry>,
    threads: PoolThreads,
    served: Served,
    http: Option<Http>,
    audit: Audit,
    store: Arc<Store>,
    store_closed: oneshot::Receiver<()>,
    metrics: Arc<Metrics>,
    meters: Arc<Meters>,
    hurry: Hurry,
}

/// The trunk is loaded and another process has the store: this one waits for it to end.
#[derive(Debug, Clone, PartialEq)]
pub struct Standby {
    pub store: PathBuf,
    /// How long it waits.
    pub patience: Duration,
}

impl Server {
    /// Checks the configuration, opens the store, loads the trunk and listens. Clients can connect
    /// when it returns.
    pub async fn start(config: ServerConfig) -> Result<RunningServer, Error> {
        Server::start_told(config, |_| ()).await
    }

    /// The same; `told` hears of it if the start waits for another server to leave the store, as
    /// `store.wait_seconds` allows. Dropping the future ends the wait.
    pub async fn start_told(
        config: ServerConfig,
        told: impl FnOnce(Standby),
    ) -> Result<RunningServer, Error> {
        config.validate()?;
        let ServerConfig { listen, http, tls, access, model, limits, session, store, .. } = config;
        let (telemetry, build, store_dir) = (config.telemetry, config.build, store.dir.clone());
        let patience = store.wait();
        // First what fails quickly. Whoever waits for another server may want its address.
        let addresses = Addresses {
            grpc: (&listen.host, listen.port),
            http: http.port.map(|port| (http.host.as_str(), port)),
        };
        let listeners = match patience {
            None => Some(addresses.bind(Duration::ZERO).await?),
            Some(_) => None,
        };
        let tls = Tls::start(&tls).await?;
        let audit = Audit::start(access.audit_log.as_deref())?;
        let access = Access::start(access.tenants, audit.clone())?;
        let metrics = Arc::new(Metrics::start(&telemetry, build)?);
        let log = telemetry.metering_log.as_deref();
        let meters = Arc::new(Meters::start(Some(metrics.clone()), log)?);
        let (engine, owners, store) = match patience {
            None => {
                let lock = StoreLock::take(&store.dir)?;
                let (owners, store) = open_store(store, lock).await?;
                (Engine::start(model, &limits).await?, owners, store)
            }
            Some(patience) => {
                // What takes long, while the other one still serves.
                let engine = Engine::start(model, &limits).await?;
                let lock = wait_for_store(&store, patience, told).await?;
                if limits.memory_bytes.is_none() {
                    tokio::spawn(follow_memory(engine.client()));
                }
                let (owners, store) = open_store(store, lock).await?;
                (engine, owners, store)
            }
        };
        let (listener, http_listener) = match listeners {
            Some(listeners) => listeners,
            // The server before this one may not have left them yet.
            None => addresses.bind(BIND_TIMEOUT).await?,
        };
        let store_closed = store.closed();
        let (pool, threads) = ActorPool::start(session.n_actor_threads).await?;
        let client = engine.client();
        client.accounts().follow(access.clone());
        client.stats().record_in(metrics.instruments().clone());
        store.follow(meters.clone());
        tokio::spawn(tell_hourly(Arc::downgrade(&meters), Arc::downgrade(&store)));
        let refusals = Arc::new(counted_refusals(metrics.clone()));
        let slots = Arc::<Slots>::default();
        let residency = Residency::start(ResidencyParts {
            engine: client.clone(),
            store: store.clone(),
            slots: slots.clone(),
            host_bytes: host_bytes(&limits, client.trunk()),
            wait: limits.admission_wait(),
            max_waiting: limits.max_live_sessions,
            ages: Ages { idle: session.idle(), turn: session.turn() },
        });
        let registry = Registry::start(Parts {
            access: access.clone(),
            owners,
            engine: client.clone(),
            store: store.clone(),
            meters: meters.clone(),
            slots,
            residency,
            refusals: refusals.clone(),
            pool,
            limits: limits_of(&limits, session.lease(), client.trunk()),
            lease: session.lease(),
            snapshots: session.snapshot_every(),
            max_live_sessions: limits.max_live_sessions,
        });
        let local_addr = listener
            .local_addr()
            .map_err(|source| Error::Bind { address: listen.host.clone(), source })?;
        let http_addr = http_listener.as_ref().and_then(|listener| listener.local_addr().ok());
        // Of the one that is reached from farther away.
        let far = http_addr.filter(|address| !address.ip().is_loopback()).unwrap_or(local_addr);
        warn_of_openness(&access, far, tls.is_some());
        let keeper = Keeper { access, audit: audit.clone(), refusals };
        let trunk = TrunkGrpc::new(registry.clone(), client.clone(), audit.clone());
        let max_connections = limits.max_connections;
        let (http_tls, http_keeper) = (tls.clone(), keeper.clone());
        let health = Health::serving().await;
        let operations = Operations::start(OperationsParts {
            registry: registry.clone(),
            engine: client.clone(),
            audit: audit.clone(),
            metrics: metrics.clone(),
            health: health.clone(),
            build,
        });
        let serving = Serving {
            listener,
            tls,
            keeper,
            trunk,
            operations: OperationsGrpc::new(operations.clone()),
            health: health.clone(),
            max_connections,
        };
        let served = Served::start(serving).await?;
        let http = http_listener.map(|listener| {
            Http::start(HttpParts {
                listener,
                tls: http_tls,
                keeper: http_keeper,
                health: health.clone(),
                operations: operations.clone(),
                metrics: metrics.clone(),
                open_metrics: http.open_metrics,
            })
        });
        let http = http.transpose()?;
        let supervisor = Supervisor::start(engine, registry.clone(), served.health.clone());
        metrics.watch(Sources {
            build,
            engine: client.clone(),
            registry: Arc::downgrade(&registry),
            connections: served.connections(),
            max_connections,
            max_queued_jobs: limits.max_queued_jobs,
            max_live_sessions: limits.max_live_sessions,
            store_dir,
        });
        let trunk = client.trunk();
        tracing::info!(
            address = %local_addr, model = trunk.model_name, layers = ?trunk.layers,
            device = trunk.device, dtype = trunk.compute_dtype.name(),
            http = http.as_ref().map(|http| display(http.local_addr())), "ready"
        );
        Ok(RunningServer {
            local_addr,
            supervisor,
            client,
            registry,
            threads,
            served,
            http,
            audit,
            store,
            store_closed,
            metrics,
            meters,
            hurry: Hurry::default(),
        })
    }
}

/// Each refusal is in the metrics.
fn counted_refusals(metrics: Arc<Metrics>) -> Refusals {
    let count = move |refused: &Refused<'_>| metrics.refused(refused.tenant, refused.label);
    Refusals::new(Some(Box::new(count)))
}

/// Hosts and ports to listen on.
#[derive(Clone, Copy)]
struct Addresses<'a> {
    grpc: (&'a str, u16),
    /// None: nothing is served by HTTP.
    http: Option<(&'a str, u16)>,
}

impl Addresses<'_> {
    /// Tries again for so long while somebody else has them.
    async fn bind(self, patience: Duration) -> Result<(TcpListener, Option<TcpListener>), Error> {
        let end = Instant::now() + patience;
        let grpc = bind(self.grpc, end).await?;
        let http = match self.http {
            Some(address) => Some(bind(address, end).await?),
            None => None,
        };
        Ok((grpc, http))
    }
}

async fn bind((host, port): (&str, u16), end: Instant) -> Result<TcpListener, Error> {
    let address = format!("{}:{port}", bracketed(host));
    loop {
        match TcpListener::bind(&address).await {
            Ok(listener) => return Ok(listener),
            Err(source) if source.kind() == io::ErrorKind::AddrInUse && Instant::now() < end => {
                tokio::time::sleep(BIND_PAUSE).await;
            }
            Err(source) => return Err(Error::Bind { address, source }),
        }
    }
}

/// Also tells whose the sessions in it are.
async fn open_store(config: StoreConfig, lock: StoreLock) -> Result<(Owners, Arc<Store>), Error> {
    let opening = tokio::task::spawn_blocking(move || {
        let kept =
            Kept { of_client: config.snapshots_kept, of_server: config.server_snapshots_kept };
        let store = Store::open_locked(lock, kept).map(Arc::new)?;
        Ok((Owners::load(&store)?, store))
    });
    opening.await.map_err(|_| Error::Gone { part: "store" })?
}

async fn wait_for_store(
    config: &StoreConfig,
    patience: Duration,
    told: impl FnOnce(Standby),
) -> Result<StoreLock, Error> {
    let (dir, begun) = (config.dir.clone(), Instant::now());
    if let Some(lock) = StoreLock::try_take(&dir)? {
        return Ok(lock);
    }
    // A store that this build cannot open is no reason for the other server to end.
    let looked_at = dir.clone();
    let looked = tokio::task::spawn_blocking(move || peek(&looked_at));
    looked.await.map_err(|_| Error::Gone { part: "store" })??;
    tracing::info!(
        store = %dir.display(), wait_seconds = patience.as_secs_f64(),
        "the trunk is loaded; waiting for the server that has the store to end"
    );
    told(Standby { store: dir.clone(), patience });
    let lock = StoreLock::wait(&dir, patience).await?;
    tracing::info!(seconds = begun.elapsed().as_secs_f64(), "the store is free");
    Ok(lock)
}

/// The usual budget is a part of the memory that was free, and the server before this one had some of
/// it then.
async fn follow_memory(engine: EngineClient) {
    for _ in 0..FREED_TIMES {
        engine.raise_budget();
        tokio::time::sleep(FREED_EVERY).await;
    }
}

fn warn_of_openness(access: &Access, address: SocketAddr, is_encrypted: bool) {
    let is_far = !address.ip().is_loopback();
    if access.is_open() {
        tracing::warn!(
            %address,
            "the server is open: whoever reaches its address can train, export and delete everything; \
             --tenants FILE lets in only who has a token"
        );
    } else if is_far && !is_encrypted {
        tracing::warn!(%address, "without TLS whoever listens to this network reads the tenants' tokens");
    }
}

/// What sessions off the device may take of the host's memory. On the CPU that is the device's own.
fn host_bytes(limits: &LimitsConfig, trunk: &TrunkInfo) -> u64 {
    match trunk.device.as_str() {
        "cpu" => 0,
        _ => {
            let usual = || host_memory::available_bytes().unwrap_or(0) / 2;
            limits.host_memory_bytes.unwrap_or_else(usual)
        }
    }
}

fn bracketed(host: &str) -> String {
    if host.contains(':') { format!("[{host}]") } else { host.into() }
}

fn limits_of(limits: &LimitsConfig, lease: Duration, trunk: &TrunkInfo) -> v1::Limits {
    // All are at most 2^30: the configuration was checked.
    v1::Limits {
        max_tokens_per_microbatch: limits.max_tokens_per_microbatch as u32,
        max_frames_in_flight: limits.max_frames_in_flight as u32,
        max_open_microbatches: limits.max_open_microbatches as u32,
        max_rank: limits.max_rank as u32,
        lease_seconds: lease.as_secs_f64().ceil() as u32,
        max_open_caches: limits.max_open_caches as u32,
        max_cache_tokens: limits.max_cache_tokens.min(trunk.max_positions) as u32,
    }
}

impl RunningServer {
    /// Where clients connect.
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// Where browsers, scrapers and probes connect, if they may.
    pub fn http_addr(&self) -> Option<SocketAddr> {
        self.http.as_ref().map(Http::local_addr)
    }

    /// Reads the tenants file again if it has changed, and begins the audit log anew if it was moved
    /// away, both at once instead of a moment later. Blocks for as long as the disk takes.
    pub fn reload(&self) {
        self.audit.reopen();
        self.registry.access().reload_now();
    }

    /// What the server holds.
    pub fn trunk(&self) -> &TrunkInfo {
        self.client.trunk()
    }

    /// What it tells of itself in numbers.
    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.metrics
    }

    /// Until the server cannot go on: the engine has failed too often, or nothing listens any more. Then
    /// it should be ended and the process with it, so that whoever runs it can start it afresh.
    pub async fn failed(&mut self) -> Error {
        tokio::select! {
            error = self.supervisor.lost() => error,
            error = self.served.lost() => error,
        }
    }

    /// Failures that a test asks for.
    #[cfg(feature = "faults")]
    pub fn faults(&self) -> &crate::faults::Faults {
        &self.client.stats().faults
    }

    /// What a drain can be told while it goes on.
    pub fn hurry(&self) -> Hurry {
        self.hurry.clone()
    }

    /// Lets open microbatches finish, makes every session durable, and ends, all within some
    /// seconds more than `timeout`. What is still open then is dropped. Returns how many sessions
    /// could not be made durable. Another server can have the store as soon as all of it is written,
    /// a little before this returns.
    pub async fn drain(self, timeout: Duration) -> usize {
        let begun = Instant::now();
        tracing::info!(timeout_seconds = timeout.as_secs_f64(), "draining");
        self.registry.begin_drain();
        self.served.health.set(State::Draining).await;
        // Some of the time is for writing.
        let reserve = (timeout / 4).min(Duration::from_secs(5));
        let drained = self.registry.drain(begun + (timeout - reserve), &self.hurry);
        let n_lost = match tokio::time::timeout_at(begun + timeout, drained).await {
            Ok(n_lost) => n_lost,
            Err(_) => {
                tracing::error!("not every session could be made durable in time");
                self.registry.residency().n_live()
            }
        };
        self.end(false).await;
        let seconds = begun.elapsed().as_secs_f64();
        tracing::info!(seconds, sessions_lost = n_lost, "drained");
        n_lost
    }

    /// Ends at once, as a crash would: sessions fall back to their last snapshots. The store is
    /// closed and all threads are joined when it returns.
    pub async fn stop_now(self) {
        self.end(true).await;
    }

    async fn end(self, at_once: bool) {
        let RunningServer { supervisor, registry, threads, mut served, audit, .. } = self;
        let (store, store_closed) = (self.store, self.store_closed);
        registry.begin_drain();
        // Before the engine ends, which would be a death.
        let engine = supervisor.stop().await;
        if at_once {
            self.client.abort();
        }
        // Actors first: their streams end with them, so that connections can close.
        join_blocking(move || threads.join()).await;
        // Then clients look for the next server, which can have the store while the rest ends.
        served.stop();
        if !at_once {
            let (meters, store) = (self.meters, store.clone());
            join_blocking(move || meters.tell_rest(&store)).await;
        }
        let closing = tokio::task::spawn_blocking(move || store.close());
        if tokio::time::timeout(CLOSE_TIMEOUT, store_closed).await.is_err() {
            tracing::warn!("the store is still being written");
        }
        served.end().await;
        // Last, so that its drain can be watched.
        if let Some(http) = self.http {
            http.end().await;
        }
        self.client.abort();
        if let Some(engine) = engine {
            join_blocking(move || engine.join()).await;
        }
        drop(registry);
        join_blocking(move || audit.end()).await;
        let metrics = self.metrics;
        join_blocking(move || metrics.end()).await;
        if tokio::time::timeout(CLOSE_TIMEOUT, closing).await.is_err() {
            tracing::error!("the store could not be closed: its disk does not answer");
        }
    }
}

async fn join_blocking(join: impl FnOnce() + Send + 'static) {
    if tokio::task::spawn_blocking(join).await.is_err() {
        tracing::error!("a thread could not be joined");
    }
}
