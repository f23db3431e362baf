use crate::config::{LimitsConfig, ServerConfig};
use crate::engine::{Engine, EngineClient, TrunkInfo};
use crate::error::Error;
use crate::grpc::TrunkGrpc;
use crate::host_memory;
use crate::pool::{ActorPool, PoolThreads};
use crate::registry::{Parts, Registry, Slots};
use crate::residency::{Ages, Residency, ResidencyParts};
use crate::store::Store;
use offshoot_proto::outgoing::ServerTransport;
use offshoot_proto::v1::{self, trunk_service_server::TrunkServiceServer};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tonic::transport::server::TcpIncoming;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

/// A peer that does not answer a ping for so long is gone.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(20);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// What a peer may send of one message before it is told that it was read: a whole one, so that
/// large frames wait for no round trip, within these bounds.
const WINDOW_BYTES: std::ops::RangeInclusive<usize> = 1 << 20..=64 << 20;
/// Of one HTTP/2 frame. A message of 16 MiB is 1024 of the usual 16 KiB, each with a call of the
/// system at both ends; larger ones than this gain nothing and leave the processor's cache.
const HTTP2_FRAME_BYTES: u32 = 128 << 10;
/// Calls of one connection at a time, beside its sessions' streams.
const CONTROL_CALLS: u32 = 1024;
/// For open connections to notice that the server ends.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// Starts servers.
pub struct Server;

/// A server that serves. To end it, [`RunningServer::drain`] it.
pub struct RunningServer {
    local_addr: SocketAddr,
    engine: Engine,
    client: EngineClient,
    registry: Arc<Registry>,
    threads: PoolThreads,
    health: HealthReporter,
    shutdown: oneshot::Sender<()>,
    served: JoinHandle<Result<(), tonic::transport::Error>>,
    store_closed: oneshot::Receiver<()>,
}

impl Server {
    /// Checks the configuration, opens the store, loads the trunk and listens. Clients can connect
    /// when it returns.
    pub async fn start(config: ServerConfig) -> Result<RunningServer, Error> {
        config.validate()?;
        let ServerConfig { listen, model, limits, session, store, .. } = config;
        // First what fails quickly.
        let address = format!("{}:{}", bracketed(&listen.host), listen.port);
        let bound = TcpListener::bind(&address).await;
        let listener = bound.map_err(|source| Error::Bind { address, source })?;
        let opening = tokio::task::spawn_blocking(move || {
            Store::open(&store.dir, store.snapshots_kept).map(Arc::new)
        });
        let store = opening.await.map_err(|_| Error::Gone { part: "store" })??;
        let store_closed = store.closed();
        let engine = Engine::start(model, &limits).await?;
        let (pool, threads) = ActorPool::start(session.n_actor_threads).await?;
        let client = engine.client();
        let slots = Arc::<Slots>::default();
        let residency = Residency::start(ResidencyParts {
            engine: client.clone(),
            store: store.clone(),
            slots: slots.clone(),
            host_bytes: host_bytes(&limits, client.trunk()),
            wait: limits.admission_wait(),
            ages: Ages { idle: session.idle(), turn: session.turn() },
        });
        let registry = Registry::start(Parts {
            engine: client.clone(),
            store,
            slots,
            residency,
            pool,
            limits: limits_of(&limits, session.lease(), client.trunk()),
            lease: session.lease(),
            max_live_sessions: limits.max_live_sessions,
        });
        let local_addr = listener
            .local_addr()
            .map_err(|source| Error::Bind { address: listen.host.clone(), source })?;
        let (shutdown, stop) = oneshot::channel();
        let (health, served) = serve(listener, &registry, &client, stop).await?;
        let trunk = client.trunk();
        tracing::info!(
            address = %local_addr, model = trunk.model_name, layers = ?trunk.layers,
            device = trunk.device, dtype = trunk.compute_dtype.name(), "ready"
        );
        Ok(RunningServer {
            local_addr,
            engine,
            client,
            registry,
            threads,
            health,
            shutdown,
            served,
            store_closed,
        })
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

type Served = JoinHandle<Result<(), tonic::transport::Error>>;

async fn serve(
    listener: TcpListener,
    registry: &Arc<Registry>,
    engine: &EngineClient,
    stop: oneshot::Receiver<()>,
) -> Result<(HealthReporter, Served), Error> {
    let trunk = TrunkGrpc::new(registry.clone(), engine.clone());
    let bytes = trunk.max_message_bytes();
    let trunk = TrunkServiceServer::new(trunk)
        .max_decoding_message_size(bytes)
        // An export may bring its gradients.
        .max_encoding_message_size(2 * bytes);
    let window = bytes.clamp(*WINDOW_BYTES.start(), *WINDOW_BYTES.end()) as u32;
    let (health, health_service) = tonic_health::server::health_reporter();
    set_health(&health, ServingStatus::Serving).await;
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(offshoot_proto::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
    let router = tonic::transport::Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        // A session has one; the library's own bound would be 200.
        .max_concurrent_streams(registry.max_live_sessions() as u32 + CONTROL_CALLS)
        .initial_stream_window_size(window)
        // Several sessions share a connection; one that is not read must not hold up the others.
        .initial_connection_window_size(4 * window)
        .max_frame_size(HTTP2_FRAME_BYTES)
        .add_service(health_service)
        .add_service(reflection().build_v1()?)
        .add_service(reflection().build_v1alpha()?)
        .add_service(ServerTransport(trunk));
    let stopped = async move { drop(stop.await) };
    let served = tokio::spawn(router.serve_with_incoming_shutdown(incoming, stopped));
    Ok((health, served))
}

/// Of the server as a whole and of its one service.
async fn set_health(health: &HealthReporter, status: ServingStatus) {
    let service = <TrunkServiceServer<TrunkGrpc> as tonic::server::NamedService>::NAME;
    for name in ["", service] {
        health.set_service_status(name, status).await;
    }
}

impl RunningServer {
    /// Where clients connect.
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// What the server holds.
    pub fn trunk(&self) -> &TrunkInfo {
        self.client.trunk()
    }

    /// Lets open microbatches finish, makes every session durable, and ends, all within some
    /// seconds more than `timeout`. What is still open then is dropped. Returns how many sessions
    /// could not be made durable.
    pub async fn drain(self, timeout: Duration) -> usize {
        let begun = Instant::now();
        tracing::info!(timeout_seconds = timeout.as_secs_f64(), "draining");
        self.registry.begin_drain();
        set_health(&self.health, ServingStatus::NotServing).await;
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
        self.end().await;
        let seconds = begun.elapsed().as_secs_f64();
        tracing::info!(seconds, sessions_lost = n_lost, "drained");
        n_lost
    }

    /// Ends at once, as a crash would: sessions fall back to their last snapshots. The store is
    /// closed and all threads are joined when it returns.
    pub async fn stop_now(self) {
        self.client.abort();
        self.end().await;
    }

    async fn end(self) {
        let RunningServer { engine, registry, threads, shutdown, mut served, .. } = self;
        let store_closed = self.store_closed;
        registry.begin_drain();
        // Actors first: their streams end with them, so that connections can close.
        join_blocking(move || threads.join()).await;
        let _ = shutdown.send(());
        if tokio::time::timeout(CLOSE_TIMEOUT, &mut served).await.is_err() {
            served.abort();
            let _ = served.await;
        }
        self.client.abort();
        join_blocking(move || engine.join()).await;
        drop(registry);
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
