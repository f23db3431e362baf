use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// What the server tells of itself, and to whom.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TelemetryConfig {
    /// Where traces and metrics go by OTLP, such as `http://collector:4317`. None: what the environment
    /// says (OTEL_EXPORTER_OTLP_ENDPOINT), or nowhere.
    pub otlp_endpoint: Option<String>,
    pub otlp_protocol: OtlpProtocol,
    /// Share of the traces that begin here; of one that a client began the client has decided.
    pub trace_ratio: f64,
    /// The resource's `service.name`.
    pub service_name: String,
    /// How often metrics go out by OTLP.
    pub metrics_interval_seconds: f64,
    /// What each session used, as JSON lines. None: nothing is written down.
    pub metering_log: Option<PathBuf>,
}

/// How OTLP travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OtlpProtocol {
    #[default]
    Grpc,
    /// Protobuf in HTTP.
    Http,
}

impl TelemetryConfig {
    /// Says of each value whether it can be.
    pub(super) fn check(&self, check: &mut impl FnMut(&'static str, bool, String, &'static str)) {
        let endpoint = self.otlp_endpoint.as_deref().unwrap_or("http://");
        check(
            "telemetry.otlp_endpoint",
            endpoint.starts_with("http://") || endpoint.starts_with("https://"),
            endpoint.to_string(),
            "a URL that begins with http:// or https://, such as http://localhost:4317",
        );
        check(
            "telemetry.trace_ratio",
            (0.0..=1.0).contains(&self.trace_ratio),
            self.trace_ratio.to_string(),
            "0 to 1: the share of traces that are kept",
        );
        check(
            "telemetry.service_name",
            !self.service_name.is_empty(),
            self.service_name.clone(),
            "a name, such as offshoot-server",
        );
        let interval = self.metrics_interval_seconds;
        check(
            "telemetry.metrics_interval_seconds",
            (0.1..=86_400.0).contains(&interval),
            interval.to_string(),
            "0.1 to 86400 seconds",
        );
    }
}

impl Default for TelemetryConfig {
    fn default() -> Self {
        TelemetryConfig {
            otlp_endpoint: None,
            otlp_protocol: OtlpProtocol::Grpc,
            trace_ratio: 1.0,
            service_name: "offshoot-server".into(),
            metrics_interval_seconds: 15.0,
            metering_log: None,
        }
    }
}
