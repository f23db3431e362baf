use super::connections::Connections;
use super::guard::GuardLayer;
use super::health::Health;
use super::incoming::incoming;
use crate::access::Keeper;
use crate::error::Error;
use crate::grpc::TrunkGrpc;
use crate::operations::{MAX_ANSWER_BYTES, MAX_REQUEST_BYTES, OperationsGrpc};
use crate::tls::Tls;
use offshoot_proto::outgoing::ServerTransport;
use offshoot_proto::v1::operations_service_server::OperationsServiceServer;
use offshoot_proto::v1::trunk_service_server::TrunkServiceServer;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tonic_health::pb::health_server::HealthServer;

/// A peer that does not answer a ping for so long is gone.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(20);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// What a peer may send of one frame before it is told that it was read: a whole one, so that large
/// frames wait for no round trip, within these bounds.
const WINDOW_BYTES: std::ops::RangeInclusive<usize> = 1 << 20..=64 << 20;
/// Of one HTTP/2 frame. A message of 16 MiB is 1024 of the usual 16 KiB, each with a call of the
/// system at both ends; larger ones than this gain nothing and leave the processor's cache.
const HTTP2_FRAME_BYTES: u32 = 128 << 10;
/// Streams and calls of one connection at a time; whoever has more sessions connects again. The
/// library's own bound would be 200.
const CONNECTION_STREAMS: u32 = 1024;
/// Metadata of one call: a token and a trace are some hundred bytes.
const HEADER_BYTES: u32 = 16 << 10;
/// Streams that a peer began and reset before anybody has looked at them, and those that were reset
/// for its mistakes: with more it is up to no good, and its connection ends.
const RESET_UNSEEN: usize = 64;
const RESET_FOR_MISTAKES: usize = 256;
/// Without a call for so long a connection is closed. gRPC's clients connect again by themselves.
const IDLE: Duration = Duration::from_secs(1800);
/// For open connections to notice that the server ends, and for those that did not to be closed.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// What is served, and to whom.
pub struct Serving {
    pub listener: TcpListener,
    /// None: not encrypted.
    pub tls: Option<Tls>,
    /// Who gets in.
    pub keeper: Keeper,
    pub trunk: TrunkGrpc,
    pub operations: OperationsGrpc,
    pub health: Health,
    pub max_connections: usize,
}

/// A server's connections and their end.
pub struct Served {
    pub health: Health,
    connections: Connections,
    /// None: it has stopped.
    stop: Option<oneshot::Sender<()>>,
    serving: JoinHandle<Result<(), tonic::transport::Error>>,
}

impl Served {
    /// Clients can connect when it returns.
    pub async fn start(serving: Serving) -> Result<Served, Error> {
        let Serving { listener, tls, keeper, trunk, operations, health, max_connections } = serving;
        let (bytes, frame_bytes) = (trunk.max_message_bytes(), trunk.max_frame_bytes());
        let trunk = TrunkServiceServer::new(trunk)
            .max_decoding_message_size(bytes)
            // An export may bring its gradients.
            .max_encoding_message_size(2 * bytes);
        let operations = OperationsServiceServer::new(operations)
            .max_decoding_message_size(MAX_REQUEST_BYTES)
            .max_encoding_message_size(MAX_ANSWER_BYTES);
        let reflection = || {
            tonic_reflection::server::Builder::configure()
                .register_encoded_file_descriptor_set(offshoot_proto::FILE_DESCRIPTOR_SET)
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        };
        let window = frame_bytes.clamp(*WINDOW_BYTES.start(), *WINDOW_BYTES.end()) as u32;
        let connections = Connections::start(max_connections, IDLE);
        let router = tonic::transport::Server::builder()
            .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
            .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
            .max_concurrent_streams(CONNECTION_STREAMS)
            .http2_max_header_list_size(HEADER_BYTES)
            .http2_max_pending_accept_reset_streams(Some(RESET_UNSEEN))
            .http2_max_local_error_reset_streams(Some(RESET_FOR_MISTAKES))
            .initial_stream_window_size(window)
            // Several sessions share a connection; one that is not read must not hold up the others.
            .initial_connection_window_size(4 * window)
            .max_frame_size(HTTP2_FRAME_BYTES)
            .layer(GuardLayer::new(bytes, keeper.refusals.clone()))
            .add_service(HealthServer::new(health.service()))
            // Health is for everybody: probes have no tokens.
            .add_service(keeper.guard(reflection().build_v1()?))
            .add_service(keeper.guard(reflection().build_v1alpha()?))
            .add_service(keeper.guard(operations))
            .add_service(keeper.guard(ServerTransport(trunk)));
        let incoming = incoming(listener, tls, connections.clone());
        let (stop, stopped) = oneshot::channel();
        let stopped = async move { drop(stopped.await) };
        let serving = tokio::spawn(router.serve_with_incoming_shutdown(incoming, stopped));
        Ok(Served { health, connections, stop: Some(stop), serving })
    }

    /// Until nothing listens any more, without [`Served::end`]; why. Not to be called again after that.
    pub async fn lost(&mut self) -> Error {
        let cause = match (&mut self.serving).await {
            Ok(Ok(())) => "it ended".into(),
            Ok(Err(error)) => error.to_string(),
            Err(error) => error.to_string(),
        };
        Error::Deaf { cause }
    }

    /// All that there are.
    pub fn connections(&self) -> Connections {
        self.connections.clone()
    }

    /// Does not listen any more, and lets connections end when their calls have.
    pub fn stop(&mut self) {
        if let Some(stop) = self.stop.take() {
            // It may have ended by itself.
            let _ = stop.send(());
        }
    }

    /// Lets calls under way end for a moment, then closes all connections.
    pub async fn end(mut self) {
        self.stop();
        let Served { connections, mut serving, .. } = self;
        if serving.is_finished() {
            return;
        }
        if tokio::time::timeout(CLOSE_TIMEOUT, &mut serving).await.is_ok() {
            return;
        }
        // A peer that does not read cannot notice.
        connections.close_all();
        if tokio::time::timeout(CLOSE_TIMEOUT, &mut serving).await.is_err() {
            tracing::warn!(connections = connections.len(), "connections did not end");
            serving.abort();
            let _ = serving.await;
        }
    }
}
