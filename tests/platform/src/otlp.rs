//! The far end of OTLP: takes spans by gRPC and by HTTP, and shows what came.

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::routing::post;
use flate2::read::GzDecoder;
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::{KeyValue, any_value};
use opentelemetry_proto::tonic::trace::v1::ResourceSpans;
use prost::Message;
use std::collections::BTreeMap;
use std::io::Read;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tonic::{Request, Response, Status};

/// A span as it came.
#[derive(Debug, Clone, PartialEq)]
pub struct Seen {
    pub trace: String,
    pub id: String,
    /// Empty: a root.
    pub parent: String,
    pub name: String,
    /// 2: server, 3: client.
    pub kind: i32,
    /// 2: error.
    pub status: i32,
    pub nanos: u64,
    pub attributes: BTreeMap<String, String>,
    /// Trace and span.
    pub links: Vec<(String, String)>,
    /// Of what sent it.
    pub resource: Arc<BTreeMap<String, String>>,
}

impl Seen {
    /// An attribute, or nothing.
    pub fn attribute(&self, name: &str) -> &str {
        self.attributes.get(name).map_or("", String::as_str)
    }

    /// Whose span it is.
    pub fn service(&self) -> &str {
        self.resource.get("service.name").map_or("", String::as_str)
    }
}

#[derive(Clone, Default)]
struct Spans(Arc<Mutex<Vec<Seen>>>);

impl Spans {
    fn lock(&self) -> MutexGuard<'_, Vec<Seen>> {
        self.0.lock().expect("nobody panics with the lock")
    }

    fn take_in(&self, request: ExportTraceServiceRequest) {
        let mut seen = Vec::new();
        for ResourceSpans { resource, scope_spans, .. } in request.resource_spans {
            let resource = Arc::new(texts(resource.unwrap_or_default().attributes));
            for span in scope_spans.into_iter().flat_map(|scope| scope.spans) {
                seen.push(Seen {
                    trace: hex(&span.trace_id),
                    id: hex(&span.span_id),
                    parent: hex(&span.parent_span_id),
                    name: span.name,
                    kind: span.kind,
                    status: span.status.map_or(0, |status| status.code),
                    nanos: span.end_time_unix_nano.saturating_sub(span.start_time_unix_nano),
                    attributes: texts(span.attributes),
                    links: span.links.iter().map(|l| (hex(&l.trace_id), hex(&l.span_id))).collect(),
                    resource: resource.clone(),
                });
            }
        }
        self.lock().extend(seen);
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn texts(attributes: Vec<KeyValue>) -> BTreeMap<String, String> {
    let text = |value: any_value::Value| match value {
        any_value::Value::StringValue(text) => text,
        any_value::Value::IntValue(number) => number.to_string(),
        any_value::Value::DoubleValue(number) => number.to_string(),
        any_value::Value::BoolValue(flag) => flag.to_string(),
        other => format!("{other:?}"),
    };
    let pair = |KeyValue { key, value, .. }| {
        let value = value.and_then(|value| value.value).map(text);
        (key, value.unwrap_or_default())
    };
    attributes.into_iter().map(pair).collect()
}

#[tonic::async_trait]
impl TraceService for Spans {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        self.take_in(request.into_inner());
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

/// What a body is, unless it is not that.
pub(crate) fn decoded<M: Message + Default>(headers: &HeaderMap, body: &[u8]) -> Option<M> {
    // Collectors compress.
    let is_packed = headers.get("content-encoding").is_some_and(|encoding| encoding == "gzip");
    let mut unpacked = Vec::new();
    if is_packed {
        GzDecoder::new(body).read_to_end(&mut unpacked).ok()?;
    }
    M::decode(if is_packed { unpacked.as_slice() } else { body }).ok()
}

async fn take_http(
    State(spans): State<Spans>,
    headers: HeaderMap,
    body: Bytes,
) -> (StatusCode, Vec<u8>) {
    let Some(request) = decoded(&headers, &body) else {
        return (StatusCode::BAD_REQUEST, Vec::new());
    };
    spans.take_in(request);
    (StatusCode::OK, ExportTraceServiceResponse::default().encode_to_vec())
}

/// Listens on two free ports until it is dropped.
pub struct Sink {
    grpc: SocketAddr,
    http: SocketAddr,
    spans: Spans,
    _runtime: Runtime,
}

impl Default for Sink {
    fn default() -> Self {
        Sink::start()
    }
}

impl Sink {
    /// Takes whatever comes.
    pub fn start() -> Sink {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime");
        let spans = Spans::default();
        let listener = || runtime.block_on(TcpListener::bind("127.0.0.1:0")).expect("a free port");
        let (grpc, http) = (listener(), listener());
        let address = |listener: &TcpListener| listener.local_addr().expect("it is bound");
        let (grpc_address, http_address) = (address(&grpc), address(&http));
        let service = TraceServiceServer::new(spans.clone()).max_decoding_message_size(64 << 20);
        let incoming = tokio_stream::wrappers::TcpListenerStream::new(grpc);
        let server = tonic::transport::Server::builder().add_service(service);
        runtime.spawn(server.serve_with_incoming(incoming));
        let router = Router::new()
            .route("/v1/traces", post(take_http))
            .layer(axum::extract::DefaultBodyLimit::max(64 << 20))
            .with_state(spans.clone());
        runtime.spawn(async move { axum::serve(http, router).await });
        Sink { grpc: grpc_address, http: http_address, spans, _runtime: runtime }
    }

    /// Where it takes gRPC.
    pub fn grpc(&self) -> String {
        format!("http://{}", self.grpc)
    }

    /// Where it takes HTTP.
    pub fn http(&self) -> String {
        format!("http://{}", self.http)
    }

    /// Everything so far.
    pub fn spans(&self) -> Vec<Seen> {
        self.spans.lock().clone()
    }

    /// Forgets what came.
    pub fn clear(&self) {
        self.spans.lock().clear();
    }

    /// Everything so far, once it is what is waited for.
    pub fn wait_for(&self, what: &str, is_there: impl Fn(&[Seen]) -> bool) -> Vec<Seen> {
        let began = Instant::now();
        loop {
            let spans = self.spans();
            if is_there(&spans) {
                return spans;
            }
            let waited = began.elapsed();
            assert!(waited < Duration::from_secs(60), "{what}: {} spans came", spans.len());
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}
