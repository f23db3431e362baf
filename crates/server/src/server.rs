use crate::access::{Access, Audit, Keeper};
use crate::config::{LimitsConfig, ServerConfig};
use crate::engine::{Engine, EngineClient, TrunkInfo};
use crate::error::Error;
use crate::grpc::TrunkGrpc;
use crate::host_memory;
use crate::pool::{ActorPool, PoolThreads};
use crate::registry::{Owners, Parts, Registry, Slots};
use crate::residency::{Ages, Residency, ResidencyParts};
use crate::store::{Kept, Store};
use crate::supervisor::Supervisor;
use crate::tls::Tls;
use crate::transport::{Served, Serving, set_health};
use offshoot_proto::v1;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::time::Instant;
use tonic_health::ServingStatus;

/// For the store to be closed by whoever still has it.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

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
    audit: Audit,
    store_closed: oneshot::Receiver<()>,
}

impl Server {
    /// Checks the configuration, opens the store, loads the trunk and listens. Clients can connect
    /// when it returns.
    pub async fn start(config: ServerConfig) -> Result<RunningServer, Error> {
        config.validate()?;
        let ServerConfig { listen, tls, access, model, limits, session, store, .. } = config;
        // First what fails quickly.
        let address = format!("{}:{}", bracketed(&listen.host), listen.port);
        let bound = TcpListener::bind(&address).await;
        let listener = bound.map_err(|source| Error::Bind { address, source })?;
        let tls = Tls::start(&tls).await?;
        let audit = Audit::start(access.audit_log.as_deref())?;
        let access = Access::start(access.tenants, audit.clone())?;
        let opening = tokio::task::spawn_blocking(move || {
            let kept =
                Kept { of_client: store.snapshots_kept, of_server: store.server_snapshots_kept };
            let store = Store::open(&store.dir, kept).map(Arc::new)?;
            Ok::<_, Error>((Owners::load(&store)?, store))
        });
        let (owners, store) = opening.await.map_err(|_| Error::Gone { part: "store" })??;
        let store_closed = store.closed();
        let engine = Engine::start(model, &limits).await?;
        let (pool, threads) = ActorPool::start(session.n_actor_threads).await?;
        let client = engine.client();
        client.accounts().follow(access.clone());
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
            store,
            slots,
            residency,
            pool,
            limits: limits_of(&limits, session.lease(), client.trunk()),
            lease: session.lease(),
            snapshots: session.snapshot_every(),
            max_live_sessions: limits.max_live_sessions,
        });
        let local_addr = listener
            .local_addr()
            .map_err(|source| Error::Bind { address: listen.host.clone(), source })?;
        warn_of_openness(&access, local_addr, tls.is_some());
        let keeper = Keeper { access, audit: audit.clone() };
        let trunk = TrunkGrpc::new(registry.clone(), client.clone(), audit.clone());
        let max_connections = limits.max_connections;
        let served =
            Served::start(Serving { listener, tls, keeper, trunk, max_connections }).await?;
        let supervisor = Supervisor::start(engine, registry.clone(), served.health.clone());
        let trunk = client.trunk();
        tracing::info!(
            address = %local_addr, model = trunk.model_name, layers = ?trunk.layers,
            device = trunk.device, dtype = trunk.compute_dtype.name(), "ready"
        );
        Ok(RunningServer {
            local_addr,
            supervisor,
            client,
            registry,
            threads,
            served,
            audit,
            store_closed,
        })
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

    /// Lets open microbatches finish, makes every session durable, and ends, all within some
    /// seconds more than `timeout`. What is still open then is dropped. Returns how many sessions
    /// could not be made durable.
    pub async fn drain(self, timeout: Duration) -> usize {
        let begun = Instant::now();
        tracing::info!(timeout_seconds = timeout.as_secs_f64(), "draining");
        self.registry.begin_drain();
        set_health(&self.served.health, ServingStatus::NotServing).await;
        // Some of the time is for writing.
        let reserve = (timeout / 4).min(Duration::from_secs(5));
        let drained = self.registry.drain(begun + (timeout - reserve));
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
        let RunningServer { supervisor, registry, threads, served, audit, .. } = self;
        let store_closed = self.store_closed;
        registry.begin_drain();
        // Before the engine ends, which would be a death.
        let engine = supervisor.stop().await;
        if at_once {
            self.client.abort();
        }
        // Actors first: their streams end with them, so that connections can close.
        join_blocking(move || threads.join()).await;
        served.end().await;
        self.client.abort();
        if let Some(engine) = engine {
            join_blocking(move || engine.join()).await;
        }
        drop(registry);
        join_blocking(move || audit.end()).await;
        // A client that came back at the last moment may still be in the registry.
        if tokio::time::timeout(CLOSE_TIMEOUT, store_closed).await.is_err() {
            tracing::warn!("the store is still in use");
        }
    }
}

async fn join_blocking(join: impl FnOnce() + Send + 'static) {
    if tokio::task::spawn_blocking(join).await.is_err() {
        tracing::error!("a thread could not be joined");
    }
}
