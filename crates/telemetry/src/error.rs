use std::io;
use std::path::PathBuf;

/// What keeps telemetry from beginning. Nothing that comes later does.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    #[error("{name} is \"{found}\": expected {expected}")]
    Setting { name: String, found: String, expected: &'static str },
    #[error("{name} names the certificate {path}, which cannot be used: {cause}")]
    Certificate { name: &'static str, path: PathBuf, cause: String },
    #[error("OTLP to {endpoint} cannot be set up: {cause}")]
    Exporter { endpoint: String, cause: String },
    #[error("threads for OTLP cannot be started: {0}")]
    Threads(#[from] io::Error),
}
