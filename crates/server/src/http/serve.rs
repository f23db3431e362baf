use super::refusal::Refusal;
use super::routes::routes;
use crate::access::{Caller, Keeper};
use crate::error::Error;
use crate::metrics::Metrics;
use crate::operations::Operations;
use crate::tls::Tls;
use crate::transport::{Connections, Health, Io, incoming};
use axum::Router;
use axum::body::Body;
use http::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, oneshot};
use tokio::task::JoinHandle;
use tokio_stream::StreamExt;
use tonic::transport::server::Connected;
use tower::ServiceExt;

/// People who look and programs that scrape: a browser takes up to six connections.
const MAX_CONNECTIONS: usize = 256;
/// Of one request: a token, and what browsers send along.
const HEADER_BYTES: usize = 16 << 10;
const HEADERS: usize = 64;
/// For a request's headers to come.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// Without a request, or with an answer that nobody reads, a connection is closed after so long.
const IDLE: Duration = Duration::from_secs(90);
/// Overviews that are made at a time; more wait.
const LOOKS: usize = 2;
/// For answers under way to be read when the server ends, and again for connections to close.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// What is served, and to whom.
pub struct HttpParts {
    pub listener: TcpListener,
    /// None: not encrypted.
    pub tls: Option<Tls>,
    pub keeper: Keeper,
    pub health: Health,
    pub operations: Arc<Operations>,
    pub metrics: Arc<Metrics>,
    pub open_metrics: bool,
}

/// What handlers share.
#[derive(Clone)]
pub struct Shown {
    pub keeper: Keeper,
    pub health: Health,
    pub operations: Arc<Operations>,
    pub metrics: Arc<Metrics>,
    pub open_metrics: bool,
    /// Whether only this machine can connect.
    pub is_local: bool,
    pub looks: Arc<Semaphore>,
}

impl Shown {
    /// Who asks, if it is somebody.
    pub fn caller<B>(&self, request: &Request<B>) -> Result<Caller, Refusal> {
        let refusals = &self.keeper.refusals;
        self.keeper.admit(request).map_err(|error| Refusal::noted(refusals, "", None, error))
    }
}

/// The connections by HTTP and their end.
pub struct Http {
    local_addr: SocketAddr,
    connections: Connections,
    stop: oneshot::Sender<()>,
    serving: JoinHandle<()>,
}

impl Http {
    /// Answers from now on.
    pub fn start(parts: HttpParts) -> Result<Http, Error> {
        let HttpParts { listener, tls, keeper, health, operations, metrics, open_metrics } = parts;
        let local_addr = listener
            .local_addr()
            .map_err(|source| Error::Bind { address: "http".into(), source })?;
        let is_local = local_addr.ip().is_loopback();
        let looks = Arc::new(Semaphore::new(LOOKS));
        let app =
            routes(Shown { keeper, health, operations, metrics, open_metrics, is_local, looks });
        let connections = Connections::start(MAX_CONNECTIONS, IDLE);
        let incoming = incoming(listener, tls.map(|tls| tls.for_http()), connections.clone());
        let (stop, mut stopped) = oneshot::channel();
        let serving = tokio::spawn(async move {
            let (mut incoming, graceful) = (incoming, GracefulShutdown::new());
            loop {
                let next = tokio::select! {
                    next = incoming.next() => next,
                    _ = &mut stopped => None,
                };
                match next {
                    Some(Ok(io)) => {
                        tokio::spawn(connection(io, app.clone(), graceful.watcher()));
                    }
                    Some(Err(error)) => tracing::debug!(%error, "a connection by HTTP failed"),
                    None => break,
                }
            }
            drop(incoming);
            graceful.shutdown().await;
        });
        Ok(Http { local_addr, connections, stop, serving })
    }

    /// Where browsers, scrapers and probes connect.
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// Lets answers under way be read for a moment, then closes all connections.
    pub async fn end(self) {
        let Http { connections, stop, mut serving, .. } = self;
        let _ = stop.send(());
        if tokio::time::timeout(CLOSE_TIMEOUT, &mut serving).await.is_ok() {
            return;
        }
        connections.close_all();
        if tokio::time::timeout(CLOSE_TIMEOUT, &mut serving).await.is_err() {
            tracing::warn!(connections = connections.len(), "connections by HTTP did not end");
            serving.abort();
        }
    }
}

/// One connection to its end. HTTP/1 only: browsers and scrapers speak it, and a request at a time
/// bounds what one connection can ask for.
async fn connection(io: Io, app: Router, watcher: Watcher) {
    let peer = io.connect_info();
    let service = service_fn(move |request: Request<Incoming>| {
        // Nobody new makes room of a connection that waits for its answer.
        let call = peer.state.call();
        let mut request = request.map(Body::new);
        request.extensions_mut().insert(peer.tcp.clone());
        let answer = app.clone().oneshot(request);
        async move {
            let answer = answer.await;
            drop(call);
            answer
        }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_header_size(HEADER_BYTES)
        .max_headers(HEADERS)
        .serve_connection(TokioIo::new(io), service);
    if let Err(error) = watcher.watch(connection).await {
        tracing::debug!(%error, "a connection by HTTP ended");
    }
}
