//! OpenTelemetry for whoever runs something: where spans and metrics go (OTLP by gRPC or HTTP), what
//! they are of (the resource), which traces are kept, and that a collector that is away costs nothing
//! but its data. Libraries do not need it: they make spans with `tracing` and read W3C's context by the
//! global propagator, which is set here.
//!
//! ```no_run
//! use offshoot_telemetry::{Otlp, OtlpSettings, Service, Signal, Traces};
//! use tracing_subscriber::layer::SubscriberExt;
//! use tracing_subscriber::util::SubscriberInitExt;
//!
//! let settings = OtlpSettings { endpoint: Some("http://localhost:4317"), protocol: None };
//! if let Some(otlp) = Otlp::resolve(Signal::Traces, settings)? {
//!     let service = Service { name: "my-program", version: "1.0" };
//!     let (traces, tracer) = Traces::start(&otlp, &service.resource(), 1.0)?;
//!     tracing_subscriber::registry().with(offshoot_telemetry::layer(tracer)).init();
//!     // ... and at the end, what is left is sent, within some seconds:
//!     traces.end();
//! }
//! # Ok::<(), offshoot_telemetry::TelemetryError>(())
//! ```

mod background;
mod error;
mod metrics;
mod otlp;
mod post;
mod reach;
mod resource;
mod sampler;
mod spans;

pub use error::TelemetryError;
pub use metrics::MetricExporter;
pub use opentelemetry_sdk::trace::SdkTracer as Tracer;
pub use otlp::{Otlp, OtlpSettings, Protocol, Signal, env_ratio};
pub use resource::Service;
pub use sampler::sampler;
pub use spans::{SPAN_TARGET, Traces, layer};
