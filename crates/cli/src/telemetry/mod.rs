//! What a command tells of itself: its log, and its traces if somebody collects them. This is the one
//! place that sets up the subscriber.

mod args;
mod log;

pub use args::TelemetryArgs;
pub use log::{Kind, LogArgs, LogFormat};

use crate::version::BUILD;
use offshoot_server::{OtlpProtocol, TelemetryConfig};
use offshoot_telemetry::{Otlp, OtlpSettings, Protocol, Service, Signal, Traces, env_ratio};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// Whose traces go where.
#[derive(Debug, Clone, PartialEq)]
pub struct TraceSettings {
    pub service: String,
    pub endpoint: Option<String>,
    /// None: as the environment says.
    pub protocol: Option<Protocol>,
    /// None: as the environment says.
    pub ratio: Option<f64>,
}

impl From<TelemetryConfig> for TraceSettings {
    fn from(config: TelemetryConfig) -> Self {
        // The default says nothing that the environment could not say.
        let ratio = Some(config.trace_ratio);
        TraceSettings {
            service: config.service_name,
            endpoint: config.otlp_endpoint,
            protocol: Some(protocol(config.otlp_protocol)),
            ratio: ratio.filter(|&ratio| ratio != TelemetryConfig::default().trace_ratio),
        }
    }
}

/// What has been begun, and is to be ended.
pub struct Telemetry(Option<Traces>);

impl Telemetry {
    /// Logs from now on, and collects spans if there is where to send them.
    pub fn start(log: &LogArgs, kind: Kind, traces: Option<TraceSettings>) -> anyhow::Result<Self> {
        let (traces, layer) = match traces.map(begin).transpose()?.flatten() {
            Some((traces, tracer)) => (Some(traces), Some(offshoot_telemetry::layer(tracer))),
            None => (None, None),
        };
        tracing_subscriber::registry().with(log.layer(kind)?).with(layer).init();
        Ok(Telemetry(traces))
    }

    /// Sends what is left, for some seconds at most.
    pub fn end(self) {
        if let Telemetry(Some(traces)) = self {
            traces.end();
        }
    }
}

type Begun = (Traces, offshoot_telemetry::Tracer);

fn begin(settings: TraceSettings) -> anyhow::Result<Option<Begun>> {
    let TraceSettings { service, endpoint, protocol, ratio } = settings;
    let asked = OtlpSettings { endpoint: endpoint.as_deref(), protocol };
    let Some(otlp) = Otlp::resolve(Signal::Traces, asked)? else { return Ok(None) };
    let ratio = match ratio {
        Some(ratio) => ratio,
        None => env_ratio()?.unwrap_or(1.0),
    };
    let service = Service { name: &service, version: BUILD.version };
    Ok(Some(Traces::start(&otlp, &service.resource(), ratio)?))
}

/// The settings' name for what the exporters know.
fn protocol(of: OtlpProtocol) -> Protocol {
    match of {
        OtlpProtocol::Grpc => Protocol::Grpc,
        OtlpProtocol::Http => Protocol::Http,
    }
}
