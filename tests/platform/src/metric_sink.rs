//! The far end of OTLP for metrics: takes them by HTTP, and shows what came last.

use crate::otlp::decoded;
use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::routing::post;
use opentelemetry_proto::tonic::collector::metrics::v1::{
    ExportMetricsServiceRequest, ExportMetricsServiceResponse,
};
use opentelemetry_proto::tonic::metrics::v1::{Metric, metric::Data, number_data_point::Value};
use prost::Message;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;

/// Of each metric: the sum of the last values of all its points, or of their counts.
#[derive(Clone, Default)]
struct Last(Arc<Mutex<BTreeMap<String, f64>>>);

impl Last {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, f64>> {
        self.0.lock().expect("nobody panics with the lock")
    }
}

/// A metric's value over all its labels.
fn value(metric: Metric) -> f64 {
    let number = |value: Option<Value>| match value {
        Some(Value::AsDouble(value)) => value,
        Some(Value::AsInt(value)) => value as f64,
        None => 0.0,
    };
    match metric.data {
        Some(Data::Sum(sum)) => sum.data_points.into_iter().map(|p| number(p.value)).sum(),
        Some(Data::Gauge(gauge)) => gauge.data_points.into_iter().map(|p| number(p.value)).sum(),
        Some(Data::Histogram(all)) => all.data_points.iter().map(|p| p.count as f64).sum(),
        _ => 0.0,
    }
}

async fn take(State(last): State<Last>, headers: HeaderMap, body: Bytes) -> (StatusCode, Vec<u8>) {
    let Some(request) = decoded::<ExportMetricsServiceRequest>(&headers, &body) else {
        return (StatusCode::BAD_REQUEST, Vec::new());
    };
    let resources = request.resource_metrics.into_iter();
    let metrics = resources.flat_map(|r| r.scope_metrics).flat_map(|scope| scope.metrics);
    last.lock().extend(metrics.map(|metric| (metric.name.clone(), value(metric))));
    (StatusCode::OK, ExportMetricsServiceResponse::default().encode_to_vec())
}

/// Listens on a free port until it is dropped.
pub struct MetricSink {
    address: SocketAddr,
    last: Last,
    _runtime: Runtime,
}

impl MetricSink {
    /// Takes whatever comes.
    pub fn start() -> MetricSink {
        let runtime = Runtime::new().expect("a runtime");
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).expect("a free port");
        let address = listener.local_addr().expect("it is bound");
        let last = Last::default();
        let router = Router::new().route("/v1/metrics", post(take)).with_state(last.clone());
        runtime.spawn(async move { axum::serve(listener, router).await });
        MetricSink { address, last, _runtime: runtime }
    }

    /// Where it takes them.
    pub fn http(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The last value of each metric.
    pub fn last(&self) -> BTreeMap<String, f64> {
        self.last.lock().clone()
    }
}
