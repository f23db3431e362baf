//! Spans on their way out.

use crate::TelemetryError;
use crate::background::Background;
use crate::otlp::{DELIVERY_LIMIT, Otlp};
use crate::reach::Reach;
use crate::sampler::sampler;
use opentelemetry::global;
use opentelemetry::trace::TracerProvider;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::{OTelSdkError, OTelSdkResult};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{
    BatchConfigBuilder, BatchSpanProcessor, SdkTracer, SdkTracerProvider, SpanData, SpanExporter,
};
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;
use tracing::Subscriber;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::Layer;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::registry::LookupSpan;

/// The target of all spans of Offshoot. Nothing else is collected: no log line, and no span of a library.
pub const SPAN_TARGET: &str = "offshoot::span";
/// Spans that wait to be sent: some ten steps of many microbatches a second, for a while. More are dropped.
const MAX_WAITING: usize = 1 << 15;
/// Sent at once.
const BATCH_SPANS: usize = 1024;
/// Links of one span: a batch has one for each of its jobs.
const MAX_LINKS: u32 = 1024;
/// For what is left at the end.
const END_LIMIT: Duration = Duration::from_secs(5);

/// Sends the spans of this process, until it is told to end.
#[derive(Debug)]
pub struct Traces {
    provider: SdkTracerProvider,
    /// Its connection lives there.
    _background: Background,
}

impl Traces {
    /// From now on W3C's context is read and written in this process. `ratio` is the share that is kept of
    /// the traces that begin here.
    ///
    /// # Errors
    /// If the exporter cannot be set up; that nobody listens is none.
    pub fn start(
        otlp: &Otlp,
        resource: &Resource,
        ratio: f64,
    ) -> Result<(Traces, SdkTracer), TelemetryError> {
        let background = Background::start()?;
        let exporter = Exporter {
            inner: Arc::new(otlp.span_exporter(&background)?),
            reach: Arc::new(Reach::new(otlp.signal(), otlp.endpoint())),
            background: background.clone(),
        };
        let processor =
            BatchSpanProcessor::builder(exporter).with_batch_config(batches().build()).build();
        let provider = SdkTracerProvider::builder()
            .with_span_processor(processor)
            .with_resource(resource.clone())
            .with_sampler(sampler(ratio))
            .with_max_links_per_span(MAX_LINKS)
            .build();
        global::set_text_map_propagator(TraceContextPropagator::new());
        let tracer = provider.tracer("offshoot");
        Ok((Traces { provider, _background: background }, tracer))
    }

    /// Sends what is left, for some seconds at most. Blocks, and may be called anywhere.
    pub fn end(self) {
        let (done, ended) = mpsc::channel();
        let Traces { provider, _background } = self;
        // The library may wait for longer than it was told to.
        let end = move || {
            let _ = provider.shutdown_with_timeout(END_LIMIT);
            let _ = done.send(());
        };
        if std::thread::Builder::new().name("otlp-end".into()).spawn(end).is_ok() {
            let _ = ended.recv_timeout(END_LIMIT + Duration::from_secs(1));
        }
    }
}

/// OpenTelemetry's variables (OTEL_BSP_*) count where they are set.
fn batches() -> BatchConfigBuilder {
    let is_said = |name| std::env::var_os(name).is_some();
    let mut batches = BatchConfigBuilder::default();
    if !is_said("OTEL_BSP_MAX_QUEUE_SIZE") {
        batches = batches.with_max_queue_size(MAX_WAITING);
    }
    if !is_said("OTEL_BSP_MAX_EXPORT_BATCH_SIZE") {
        batches = batches.with_max_export_batch_size(BATCH_SPANS);
    }
    if !is_said("OTEL_BSP_SCHEDULE_DELAY") {
        batches = batches.with_scheduled_delay(Duration::from_secs(1));
    }
    batches
}

/// What a subscriber needs to collect Offshoot's spans.
pub fn layer<S>(tracer: SdkTracer) -> impl Layer<S>
where
    S: Subscriber + for<'span> LookupSpan<'span>,
{
    tracing_opentelemetry::layer()
        .with_tracer(tracer)
        // Names, numbers and ids are enough; each of these costs time with every span.
        .with_location(false)
        .with_threads(false)
        .with_level(false)
        .with_target(false)
        .with_tracked_inactivity(false)
        .with_context_activation(false)
        .with_filter(Targets::new().with_target(SPAN_TARGET, LevelFilter::DEBUG))
}

/// Sends on threads of its own, in bounded time, and says once that nobody is there.
#[derive(Debug)]
struct Exporter {
    inner: Arc<opentelemetry_otlp::SpanExporter>,
    reach: Arc<Reach>,
    background: Background,
}

impl SpanExporter for Exporter {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let (inner, reach) = (self.inner.clone(), self.reach.clone());
        let send = async move {
            let sent = tokio::time::timeout(DELIVERY_LIMIT, inner.export(batch)).await;
            let delivered = sent.unwrap_or(Err(OTelSdkError::Timeout(DELIVERY_LIMIT)));
            reach.note(&delivered);
            delivered
        };
        let sent = self.background.handle().spawn(send).await;
        sent.unwrap_or_else(|gone| Err(OTelSdkError::InternalFailure(gone.to_string())))
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        if let Some(inner) = Arc::get_mut(&mut self.inner) {
            inner.set_resource(resource);
        }
    }
}
