//! Spans of frames and calls, as parts of whatever span the caller is in, and how the server hears of
//! them: W3C's context in the frame, or in the metadata of a call.
//!
//! They are made with `tracing` and cost nothing unless somebody collects them. The context comes from
//! OpenTelemetry's global propagator, with the feature `opentelemetry`; without it, frames carry none,
//! and the crate has no part of OpenTelemetry in its tree.

use crate::ClientError;
use crate::entry::Request;
use crate::types::SessionId;
use offshoot_proto::v1;
use tracing::Span;
use tracing::field::Empty;

/// Of all spans, so that those who filter know them. They are at level DEBUG.
const TARGET: &str = "offshoot::span";

/// What is sent of a span.
#[derive(Debug, Clone, Default)]
struct Context {
    traceparent: String,
    tracestate: String,
}

/// A frame from the call that sends it to its answer. Dropped, it ends.
#[derive(Debug)]
pub(crate) struct FrameSpan {
    span: Span,
    context: Context,
}

impl FrameSpan {
    /// Begins now, in the caller's span.
    pub(crate) fn begin(request: &Request) -> FrameSpan {
        let span = tracing::debug_span!(
            target: TARGET, "frame",
            otel.name = name(request),
            otel.kind = "client",
            otel.status_code = Empty,
            offshoot.session = Empty,
            offshoot.bytes = request.size(),
            offshoot.retries = Empty,
            offshoot.error = Empty,
            offshoot.request = Empty,
        );
        let context = Context::of(&span);
        FrameSpan { span, context }
    }

    /// Of a frame that nobody asked for.
    pub(crate) fn none() -> FrameSpan {
        FrameSpan { span: Span::none(), context: Context::default() }
    }

    /// Notes whose it is.
    pub(crate) fn of(&self, session: &SessionId) {
        self.span.record("offshoot.session", tracing::field::display(session));
    }

    /// Puts its context into the frame that goes out.
    pub(crate) fn mark(&self, frame: &mut v1::ClientFrame) {
        frame.traceparent.clone_from(&self.context.traceparent);
        frame.tracestate.clone_from(&self.context.tracestate);
    }

    /// Notes how often the server asked for it again later.
    pub(crate) fn answered(&self, retries: u32) {
        if retries > 0 {
            self.span.record("offshoot.retries", retries);
        }
    }

    /// Notes that nothing came of it.
    pub(crate) fn failed(&self, error: &ClientError) {
        self.span.record("otel.status_code", "ERROR");
        self.span.record("offshoot.error", error.kind());
        if let Some(id) = error.request_id() {
            self.span.record("offshoot.request", id);
        }
    }
}

fn name(request: &Request) -> &'static str {
    match request {
        Request::Forward { forward, .. } if forward.mode() == v1::Mode::Eval => "frame.evaluate",
        Request::Forward { .. } => "frame.forward",
        Request::Backward { .. } => "frame.backward",
        Request::Step(_) => "frame.step",
        Request::Discard(_) => "frame.discard",
        Request::Extend(_) => "frame.extend",
        Request::DropCache(_) => "frame.drop_cache",
    }
}

/// A call with one answer, in the caller's span; without one it is not worth a trace of its own.
pub(crate) fn call(name: &'static str) -> Span {
    if Span::current().is_disabled() {
        return Span::none();
    }
    tracing::debug_span!(target: TARGET, "rpc", otel.name = name, otel.kind = "client")
}

/// Puts the context of the span that there is now into a request's metadata.
pub(crate) fn mark_request<T>(request: &mut tonic::Request<T>) {
    let Context { traceparent, tracestate } = Context::of(&Span::current());
    for (key, value) in [("traceparent", traceparent), ("tracestate", tracestate)] {
        // What does not fit into a header is no context.
        if !value.is_empty()
            && let Ok(value) = value.parse()
        {
            request.metadata_mut().insert(key, value);
        }
    }
}

#[cfg(not(feature = "opentelemetry"))]
impl Context {
    fn of(_: &Span) -> Context {
        Context::default()
    }
}

#[cfg(feature = "opentelemetry")]
impl Context {
    fn of(span: &Span) -> Context {
        use tracing_opentelemetry::OpenTelemetrySpanExt;
        let mut context = Context::default();
        if !span.is_disabled() {
            let of = span.context();
            opentelemetry::global::get_text_map_propagator(|propagator| {
                propagator.inject_context(&of, &mut context);
            });
        }
        context
    }
}

#[cfg(feature = "opentelemetry")]
impl opentelemetry::propagation::Injector for Context {
    fn set(&mut self, key: &str, value: String) {
        match key {
            "traceparent" => self.traceparent = value,
            "tracestate" => self.tracestate = value,
            _ => {}
        }
    }
}
