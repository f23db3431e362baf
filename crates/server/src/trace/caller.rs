//! Where a trace comes from: W3C's context in a frame, or in the metadata of a call.

use super::TARGET;
use http::HeaderMap;
use offshoot_proto::v1;
use opentelemetry::global;
use opentelemetry::propagation::Extractor;
use opentelemetry::trace::TraceContextExt;
use tracing::Span;
use tracing::field::Empty;
use tracing_opentelemetry::OpenTelemetrySpanExt;

const TRACEPARENT: &str = "traceparent";
const TRACESTATE: &str = "tracestate";
/// As W3C has it: a version to come may have longer ones than the 55 bytes of today.
const MAX_TRACEPARENT_BYTES: usize = 256;
const MAX_TRACESTATE_BYTES: usize = 512;

/// What a client says of its own span, as it came. What is malformed counts as nothing.
#[derive(Debug, Clone, Copy)]
pub struct Origin<'a> {
    traceparent: &'a str,
    tracestate: &'a str,
}

impl<'a> Origin<'a> {
    pub fn of_frame(frame: &'a v1::ClientFrame) -> Origin<'a> {
        Origin { traceparent: &frame.traceparent, tracestate: &frame.tracestate }
    }

    fn of_call(headers: &'a HeaderMap) -> Origin<'a> {
        let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
        Origin {
            traceparent: text(TRACEPARENT).unwrap_or_default(),
            tracestate: text(TRACESTATE).unwrap_or_default(),
        }
    }

    /// Makes a span that has not begun part of the client's trace; the client's decision whether it is
    /// sampled counts. Without a context it begins a trace of its own.
    pub fn continue_in(self, span: &Span) {
        if self.traceparent.is_empty() || self.traceparent.len() > MAX_TRACEPARENT_BYTES {
            return;
        }
        let context = global::get_text_map_propagator(|propagator| propagator.extract(&self));
        if context.span().span_context().is_valid() {
            // An error means that nobody collects spans.
            let _ = span.set_parent(context);
        }
    }
}

impl Extractor for Origin<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        match key {
            TRACEPARENT => Some(self.traceparent),
            TRACESTATE if self.tracestate.len() <= MAX_TRACESTATE_BYTES => Some(self.tracestate),
            _ => None,
        }
    }

    fn keys(&self) -> Vec<&str> {
        vec![TRACEPARENT, TRACESTATE]
    }
}

/// A unary call of a client that traces it; none: it does not, and then nothing is worth a trace of its
/// own.
pub fn called(path: &str, headers: &HeaderMap, tenant: &str) -> Span {
    if !headers.contains_key(TRACEPARENT) {
        return Span::none();
    }
    let name = path.trim_start_matches('/');
    let span = tracing::debug_span!(
        target: TARGET, parent: None, "rpc",
        otel.name = name,
        otel.kind = "server",
        otel.status_code = Empty,
        rpc.system = "grpc",
        rpc.method = name.rsplit('/').next().unwrap_or_default(),
        offshoot.tenant = tenant,
        offshoot.error = Empty,
        offshoot.request = Empty,
    );
    if !span.is_disabled() {
        Origin::of_call(headers).continue_in(&span);
    }
    span
}
