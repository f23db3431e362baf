//! The context of a client's trace in its frames: what goes on in it, and what it must not change.

use offshoot_client::{Client, ClientError};
use offshoot_proto::v1::{self, ErrorCode, client_frame, server_frame};
use offshoot_tests::TestServer;
use offshoot_tests::raw::{self, RawStream, forward, frame};
use offshoot_tests::run::{input, open_request, train};
use opentelemetry::Context;
use opentelemetry::trace::{
    SpanContext, SpanId, Status, TraceContextExt, TraceFlags, TraceId, TraceState, TracerProvider,
};
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{SdkTracerProvider, SpanData, SpanExporter};
use std::sync::{Arc, LazyLock, Mutex};
use std::time::Duration;
use tokio::time::Instant;
use tracing::Instrument;
use tracing_opentelemetry::OpenTelemetrySpanExt;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// Every span of this process that has ended.
#[derive(Debug, Clone, Default)]
struct Ended(Arc<Mutex<Vec<SpanData>>>);

impl SpanExporter for Ended {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        self.0.lock().expect("nobody panics with the lock").extend(batch);
        Ok(())
    }
}

/// Collected from the first test on; tests tell theirs apart by their traces.
static ENDED: LazyLock<Ended> = LazyLock::new(|| {
    let ended = Ended::default();
    let provider = SdkTracerProvider::builder()
        .with_simple_exporter(ended.clone())
        .with_sampler(offshoot_telemetry::sampler(0.0))
        .build();
    opentelemetry::global::set_text_map_propagator(TraceContextPropagator::new());
    let layer = offshoot_telemetry::layer(provider.tracer("tests"));
    tracing_subscriber::registry().with(layer).init();
    ended
});

/// The spans of a trace, once they are what is waited for.
async fn of_trace(
    trace: impl Into<TraceId>,
    is_there: impl Fn(&[SpanData]) -> bool,
) -> Vec<SpanData> {
    let (trace, began) = (trace.into(), Instant::now());
    loop {
        let all = ENDED.0.lock().expect("nobody panics with the lock").clone();
        let is_of = |span: &SpanData| span.span_context.trace_id() == trace;
        let spans: Vec<SpanData> = all.into_iter().filter(is_of).collect();
        if is_there(&spans) {
            return spans;
        }
        let names: Vec<&str> = spans.iter().map(|span| &*span.name).collect();
        assert!(began.elapsed() < Duration::from_secs(60), "only {names:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn traceparent(trace: u128, sampled: bool) -> String {
    format!("00-{trace:032x}-00f067aa0ba902b7-0{}", u8::from(sampled))
}

fn attribute(span: &SpanData, name: &str) -> String {
    let found = span.attributes.iter().find(|pair| pair.key.as_str() == name);
    found.map(|pair| pair.value.to_string()).unwrap_or_default()
}

fn named<'a>(spans: &'a [SpanData], name: &str) -> Vec<&'a SpanData> {
    spans.iter().filter(|span| span.name == name).collect()
}

/// A session's stream, and a Forward for it.
async fn stream(server: &TestServer) -> (RawStream, client_frame::Body) {
    LazyLock::force(&ENDED);
    let client = Client::connect(&server.endpoint()).await.unwrap();
    let hidden_size = client.describe().await.unwrap().hidden_size;
    let session = client.open(open_request(&client).await.unwrap()).await.unwrap();
    let mut rpc = raw::rpc(&server.endpoint()).await;
    let stream = RawStream::attach(&mut rpc, session.id().as_str()).await.unwrap();
    let forward = forward(input(1, &[3, 2], hidden_size), 1, v1::Mode::Train);
    (stream, client_frame::Body::Forward(forward))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repeated_frame_may_have_another_context_and_is_the_same_frame() {
    let server = TestServer::start().await;
    let (mut stream, body) = stream(&server).await;
    let (first, second) = (0xa1_u128, 0xa2_u128);
    let with = |traceparent: String, tracestate: &str| v1::ClientFrame {
        traceparent,
        tracestate: tracestate.into(),
        ..frame(1, body.clone())
    };
    let answer = stream.ask(with(traceparent(first, true), "vendor=1")).await;
    assert!(matches!(answer.body, Some(server_frame::Body::Forward(_))), "{answer:?}");
    assert_eq!(stream.ask(with(traceparent(second, true), "")).await, answer);
    assert_eq!(stream.ask(with(String::new(), "")).await, answer);
    // What is no context is ignored, whatever it is.
    for wrong in ["00-xyz-1-01", "\u{0}\u{7f}", &"9".repeat(100_000), "00-0-0-00"] {
        assert_eq!(stream.ask(with(wrong.into(), wrong)).await, answer, "{:.20}", wrong);
    }
    let spans = of_trace(first, |spans| !named(spans, "session.forward").is_empty()).await;
    for name in ["queue.wait", "engine.forward", "session.forward"] {
        assert_eq!(named(&spans, name).len(), 1, "{name}");
    }
    assert_eq!(attribute(&spans[0], "offshoot.error"), "");
    let spans = of_trace(second, |spans| !spans.is_empty()).await;
    let [span] = spans.as_slice() else { panic!("nothing ran again: {spans:?}") };
    assert_eq!(attribute(span, "offshoot.repeated"), "answered");
    server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_clients_decision_wins_and_a_batch_is_kept_with_its_jobs() {
    let server = TestServer::start().await;
    let (mut stream, body) = stream(&server).await;
    let with =
        |sequence, traceparent| v1::ClientFrame { traceparent, ..frame(sequence, body.clone()) };
    let mut other = with(2, traceparent(0xb2, true));
    if let Some(client_frame::Body::Forward(forward)) = &mut other.body {
        forward.microbatch = 2;
    }
    stream.ask(with(1, traceparent(0xb1, false))).await;
    stream.ask(other).await;
    // The share of what begins here is none, so that a batch is kept for its job alone.
    let spans = of_trace(0xb2_u128, |spans| !named(spans, "session.forward").is_empty()).await;
    let job = named(&spans, "engine.forward")[0];
    let batch = job.links.iter().next().expect("its batch").span_context.clone();
    let has_batch = |spans: &[SpanData]| !named(spans, "engine.batch").is_empty();
    let of_batch = of_trace(batch.trace_id(), has_batch).await;
    let asked = named(&spans, "session.forward")[0].span_context.clone();
    let links: Vec<_> = named(&of_batch, "engine.batch")[0].links.iter().collect();
    assert_eq!(links.len(), 1);
    assert_eq!(links[0].span_context.span_id(), asked.span_id());
    let unsampled = ENDED.0.lock().unwrap().clone();
    let is_of = |span: &SpanData| span.span_context.trace_id() == TraceId::from(0xb1_u128);
    assert!(!unsampled.iter().any(is_of), "the client said no");
    server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_has_an_id_that_its_span_and_its_users_have() {
    let server = TestServer::start().await;
    let (mut stream, body) = stream(&server).await;
    let early = v1::ClientFrame { traceparent: traceparent(0xc1, true), ..frame(7, body) };
    let refusal = stream.refused(early).await;
    assert_eq!(refusal.code(), ErrorCode::Sequence);
    assert!(refusal.request_id.len() == 8, "{refusal:?}");
    let spans = of_trace(0xc1_u128, |spans| !spans.is_empty()).await;
    assert_eq!(attribute(&spans[0], "offshoot.error"), "gap");
    assert_eq!(attribute(&spans[0], "offshoot.request"), refusal.request_id);
    assert!(matches!(spans[0].status, Status::Error { .. }));

    let client = Client::connect(&server.endpoint()).await.unwrap();
    let wrong = client.restore(&"0b8c8d274a9c4f5e9d0e2f6f7f0f8a11".to_string().into(), None).await;
    let error = wrong.map(drop).unwrap_err();
    let id = error.request_id().unwrap_or_else(|| panic!("{error}")).to_string();
    assert!(matches!(error, ClientError::Refused { code: ErrorCode::NotFound, .. }), "{error}");
    assert!(error.to_string().ends_with(&format!(" (request {id})")), "{error}");
    assert_ne!(id, refusal.request_id);
    server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_sdk_puts_a_callers_span_into_frames_and_calls() {
    let server = TestServer::start().await;
    LazyLock::force(&ENDED);
    let client = Client::connect(&server.endpoint()).await.unwrap();
    let hidden_size = client.describe().await.unwrap().hidden_size;
    let session = client.open(open_request(&client).await.unwrap()).await.unwrap();
    let root = tracing::debug_span!(target: "offshoot::span", parent: None, "mine");
    let (trace, parent) = (TraceId::from(0xd1_u128), SpanId::from(7_u64));
    let context = SpanContext::new(trace, parent, TraceFlags::SAMPLED, true, TraceState::NONE);
    root.set_parent(Context::new().with_remote_span_context(context)).unwrap();
    async {
        train(&session, hidden_size, 0..1).await.unwrap();
        session.snapshot().await.unwrap();
    }
    .instrument(root)
    .await;
    let expected = [
        ("mine", 1),
        ("frame.forward", 2),
        ("frame.backward", 2),
        ("frame.evaluate", 1),
        ("frame.step", 1),
        ("session.forward", 2),
        ("session.backward", 2),
        ("session.evaluate", 1),
        ("session.step", 1),
        ("engine.step", 1),
        ("Snapshot", 1),
        ("offshoot.v1.TrunkService/Snapshot", 1),
        ("snapshot.write", 1),
    ];
    // Some end a moment after the client has its answer.
    let has_all =
        |spans: &[SpanData]| expected.iter().all(|(name, n)| named(spans, name).len() >= *n);
    let spans = of_trace(0xd1_u128, has_all).await;
    for (name, n) in expected {
        assert_eq!(named(&spans, name).len(), n, "{name}");
    }
    let ids: Vec<_> = spans.iter().map(|span| span.span_context.span_id()).collect();
    let whole = spans.iter().filter(|span| span.name != "mine");
    assert!(whole.into_iter().all(|span| ids.contains(&span.parent_span_id)));
    server.drain().await;
}
