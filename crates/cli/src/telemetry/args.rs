use super::TraceSettings;
use clap::{Args, ValueEnum};
use offshoot_telemetry::Protocol;

#[derive(Args, Debug)]
#[command(next_help_heading = "Traces")]
pub struct TelemetryArgs {
    /// Send a trace of each step to this OpenTelemetry collector, such as http://localhost:4317; the
    /// server's part of it goes where the server is told to. One that is away keeps nobody waiting
    /// [default: OTEL_EXPORTER_OTLP_ENDPOINT, or none].
    #[arg(long, value_name = "URL")]
    otlp_endpoint: Option<String>,
    /// How traces travel [default: OTEL_EXPORTER_OTLP_PROTOCOL, or grpc].
    #[arg(long, value_enum)]
    otlp_protocol: Option<OtlpProtocol>,
    /// Share of the steps that are traced, from 0 to 1; the server follows
    /// [default: OTEL_TRACES_SAMPLER, or 1].
    #[arg(long, value_name = "SHARE", value_parser = share)]
    trace_ratio: Option<f64>,
}

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
enum OtlpProtocol {
    /// gRPC, usually port 4317
    Grpc,
    /// protobuf in HTTP, usually port 4318
    Http,
}

fn share(text: &str) -> Result<f64, String> {
    let share = text.parse().ok().filter(|share| (0.0..=1.0).contains(share));
    share.ok_or_else(|| "expected a share from 0 to 1, such as 0.1".to_string())
}

impl TelemetryArgs {
    /// The traces of a command, under this name.
    pub fn settings(&self, service: &str) -> TraceSettings {
        TraceSettings {
            service: service.into(),
            endpoint: self.otlp_endpoint.clone(),
            protocol: self.otlp_protocol.map(|protocol| match protocol {
                OtlpProtocol::Grpc => Protocol::Grpc,
                OtlpProtocol::Http => Protocol::Http,
            }),
            ratio: self.trace_ratio,
        }
    }
}
