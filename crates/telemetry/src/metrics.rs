use crate::background::Background;
use crate::otlp::Otlp;
use crate::reach::Reach;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::metrics::Temporality;
use opentelemetry_sdk::metrics::data::ResourceMetrics;
use opentelemetry_sdk::metrics::exporter::PushMetricExporter;
use std::time::Duration;

/// Sends metrics to a collector; made by [`Otlp::metric_exporter`].
#[derive(Debug)]
pub struct MetricExporter {
    inner: opentelemetry_otlp::MetricExporter,
    reach: Reach,
    /// Its connection lives there.
    _background: Background,
}

impl MetricExporter {
    pub(crate) fn new(
        inner: opentelemetry_otlp::MetricExporter,
        otlp: &Otlp,
        background: Background,
    ) -> Self {
        let reach = Reach::new(otlp.signal(), otlp.endpoint());
        MetricExporter { inner, reach, _background: background }
    }
}

impl PushMetricExporter for MetricExporter {
    async fn export(&self, metrics: &ResourceMetrics) -> OTelSdkResult {
        let delivered = self.inner.export(metrics).await;
        self.reach.note(&delivered);
        delivered
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.inner.force_flush()
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }

    fn temporality(&self) -> Temporality {
        self.inner.temporality()
    }
}
