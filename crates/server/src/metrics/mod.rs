//! What a server tells of itself in numbers: recorded through OpenTelemetry's metrics, once, and read in two
//! ways, as the page that Prometheus scrapes and by OTLP.
//!
//! `definition` says which there are. What happens is recorded by [`Series`], one for each tenant, and by
//! [`Instruments`], without locks of ours; what is, is looked at in `observed` when somebody asks. Each
//! server has its own; there is nothing global.

mod definition;
mod gpu;
mod instruments;
mod observed;
mod series;

use definition::ALL;
pub use instruments::Instruments;
pub use observed::Sources;
pub use series::{CountedStream, Direction, JobKind, Phases, Ran, Series};

use crate::build_info::Build;
use crate::config::{OtlpProtocol, TelemetryConfig};
use crate::error::Error;
use dashmap::DashMap;
use observed::Watched;
use offshoot_proto::v1;
use offshoot_telemetry::{
    MetricExporter, Otlp, OtlpSettings, Protocol, Service, Signal, TelemetryError,
};
use opentelemetry::metrics::MeterProvider;
use opentelemetry_sdk::metrics::{Instrument, PeriodicReader, SdkMeterProvider, Stream};
use prometheus::{Registry, TextEncoder};
use std::sync::Arc;
use std::time::Duration;

/// Combinations of labels of a metric with tenants: these are counted in hundreds, and each has some. More
/// share one series. Room for so many is taken at the start.
const SERIES_OF_TENANTS: usize = 4096;
/// Of any other.
const SERIES: usize = 64;

/// A server's metrics.
pub struct Metrics {
    provider: SdkMeterProvider,
    page: Registry,
    instruments: Arc<Instruments>,
    tenants: DashMap<Arc<str>, Arc<Series>>,
    watched: Arc<Watched>,
}

impl Metrics {
    /// Nothing is looked at before [`Metrics::watch`].
    pub fn start(config: &TelemetryConfig, build: Build) -> Result<Metrics, Error> {
        let page = Registry::new();
        let exporter = opentelemetry_prometheus::exporter()
            .with_registry(page.clone())
            // What runs is in offshoot_build_info.
            .scope_info_enabled(false)
            .without_target_info()
            .build()
            .map_err(|error| Error::Telemetry { cause: error.to_string() })?;
        let service = Service { name: &config.service_name, version: build.version };
        let mut provider = SdkMeterProvider::builder()
            .with_resource(service.resource())
            .with_reader(exporter)
            .with_view(bounded);
        if let Some(exporter) = otlp(config)? {
            let every = Duration::from_secs_f64(config.metrics_interval_seconds);
            let reader = PeriodicReader::builder(exporter).with_interval(every).build();
            provider = provider.with_reader(reader);
        }
        let provider = provider.build();
        let meter = provider.meter("offshoot");
        let instruments = Arc::new(Instruments::new(&meter));
        let watched = Arc::new(Watched::default());
        observed::register(&meter, &watched);
        Ok(Metrics { provider, page, instruments, tenants: DashMap::new(), watched })
    }

    /// What is looked at from now on, until [`Metrics::end`].
    pub fn watch(&self, sources: Sources) {
        self.watched.set(sources);
    }

    /// What Prometheus scrapes: its text format.
    pub fn page(&self) -> String {
        let families = self.page.gather();
        TextEncoder::new().encode_to_string(&families).unwrap_or_else(|error| {
            tracing::error!(%error, "the metrics page could not be written");
            String::new()
        })
    }

    /// A tenant's metrics; those of an open server have no name.
    pub fn tenant(&self, name: &Arc<str>) -> Arc<Series> {
        if let Some(known) = self.tenants.get(name) {
            return known.value().clone();
        }
        let make = || Arc::new(Series::new(self.instruments.clone(), name));
        self.tenants.entry(name.clone()).or_insert_with(make).clone()
    }

    /// A call or a frame was refused; the tenant is empty before somebody is known.
    pub fn refused(&self, tenant: &str, label: &'static str) {
        match self.tenants.get(tenant) {
            Some(series) => series.refused(label),
            None => self.tenant(&tenant.into()).refused(label),
        }
    }

    /// What belongs to no tenant.
    pub fn instruments(&self) -> &Arc<Instruments> {
        &self.instruments
    }

    /// The GPU that the trunk is on, as NVML sees it.
    pub fn device(&self) -> Option<v1::DeviceView> {
        self.watched.gpu()?.view()
    }

    /// The last values go out, and nothing is looked at any more. Blocks.
    pub fn end(&self) {
        // Whoever listens may be gone; the server ends all the same.
        if let Err(error) = self.provider.shutdown() {
            tracing::warn!(%error, "the last metrics were not delivered");
        }
        self.watched.clear();
    }
}

/// Whoever takes metrics by OTLP, if anybody does.
fn otlp(config: &TelemetryConfig) -> Result<Option<MetricExporter>, Error> {
    let protocol = match config.otlp_protocol {
        OtlpProtocol::Grpc => Protocol::Grpc,
        OtlpProtocol::Http => Protocol::Http,
    };
    let endpoint = config.otlp_endpoint.as_deref();
    let settings = OtlpSettings { endpoint, protocol: Some(protocol) };
    let failed = |error: TelemetryError| Error::Telemetry { cause: error.to_string() };
    let otlp = Otlp::resolve(Signal::Metrics, settings).map_err(failed)?;
    otlp.map(|otlp| otlp.metric_exporter().map_err(failed)).transpose()
}

fn bounded(instrument: &Instrument) -> Option<Stream> {
    let metric = ALL.iter().find(|metric| metric.name == instrument.name())?;
    let of_tenants = metric.labels.contains(&"tenant");
    let limit = if of_tenants { SERIES_OF_TENANTS } else { SERIES };
    Stream::builder().with_cardinality_limit(limit).build().ok()
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
