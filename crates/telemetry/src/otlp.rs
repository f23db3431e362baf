//! Where telemetry goes: what was asked for, or else what OpenTelemetry's variables say.

use crate::TelemetryError;
use crate::background::Background;
use crate::metrics::MetricExporter;
use crate::post::Post;
use opentelemetry_otlp::{WithExportConfig, WithHttpConfig, WithTonicConfig};
use std::path::PathBuf;
use std::time::Duration;
use tonic::transport::{Certificate, ClientTlsConfig};

/// One delivery takes at most so long.
pub const DELIVERY_LIMIT: Duration = Duration::from_secs(5);
/// The issuer of the collector's certificate, as a PEM file.
pub const CERTIFICATE: &str = "OTEL_EXPORTER_OTLP_CERTIFICATE";
const EXPECTED_URL: &str = "a URL such as http://localhost:4317, or https://...";

/// How OTLP travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Protocol {
    #[default]
    Grpc,
    /// Protobuf in HTTP.
    Http,
}

/// What is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    Traces,
    Metrics,
}

impl Signal {
    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Signal::Traces => "traces",
            Signal::Metrics => "metrics",
        }
    }

    /// Within the names of variables.
    fn variable(self) -> &'static str {
        match self {
            Signal::Traces => "TRACES",
            Signal::Metrics => "METRICS",
        }
    }
}

/// What was asked for.
#[derive(Debug, Clone, Copy, Default)]
pub struct OtlpSettings<'a> {
    pub endpoint: Option<&'a str>,
    pub protocol: Option<Protocol>,
}

/// A way to a collector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Otlp {
    signal: Signal,
    endpoint: String,
    protocol: Protocol,
    roots: Option<Roots>,
}

/// Whom to trust beside the system's own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Roots {
    pub path: PathBuf,
    pub pem: Vec<u8>,
}

type Lookup<'a> = &'a dyn Fn(&str) -> Option<String>;

/// Variables that are empty count as not set.
fn environment(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

impl Otlp {
    /// Where this signal goes. None: nobody has asked for it, or OTEL_SDK_DISABLED or
    /// OTEL_TRACES_EXPORTER=none (and its like for metrics) says no.
    ///
    /// # Errors
    /// If an endpoint, a protocol or a certificate cannot be used.
    pub fn resolve(
        signal: Signal,
        settings: OtlpSettings<'_>,
    ) -> Result<Option<Otlp>, TelemetryError> {
        resolve(signal, settings, &environment)
    }

    /// Where it goes, for people.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// Of which signal it is.
    pub fn signal(&self) -> Signal {
        self.signal
    }

    /// Sends metrics, within some seconds each time, and says once if nobody is there.
    pub fn metric_exporter(&self) -> Result<MetricExporter, TelemetryError> {
        let background = Background::start()?;
        let _runtime = background.handle().enter();
        let builder = opentelemetry_otlp::MetricExporter::builder();
        let exporter = match self.protocol {
            Protocol::Grpc => self.grpc(builder.with_tonic())?.build(),
            Protocol::Http => self.http(builder.with_http(), &background)?.build(),
        };
        let exporter = exporter.map_err(|error| self.failed(&error))?;
        Ok(MetricExporter::new(exporter, self, background.clone()))
    }

    pub(crate) fn span_exporter(
        &self,
        background: &Background,
    ) -> Result<opentelemetry_otlp::SpanExporter, TelemetryError> {
        let _runtime = background.handle().enter();
        let builder = opentelemetry_otlp::SpanExporter::builder();
        let exporter = match self.protocol {
            Protocol::Grpc => self.grpc(builder.with_tonic())?.build(),
            Protocol::Http => self.http(builder.with_http(), background)?.build(),
        };
        exporter.map_err(|error| self.failed(&error))
    }

    fn grpc<B: WithExportConfig + WithTonicConfig>(&self, builder: B) -> Result<B, TelemetryError> {
        let builder = builder.with_endpoint(&self.endpoint).with_timeout(DELIVERY_LIMIT);
        if !self.endpoint.starts_with("https://") {
            return Ok(builder);
        }
        let mut tls = ClientTlsConfig::new().with_native_roots();
        if let Some(Roots { pem, .. }) = &self.roots {
            tls = tls.ca_certificate(Certificate::from_pem(pem));
        }
        Ok(builder.with_tls_config(tls))
    }

    fn http<B: WithExportConfig + WithHttpConfig>(
        &self,
        builder: B,
        background: &Background,
    ) -> Result<B, TelemetryError> {
        let post = Post::new(self.roots.as_ref(), DELIVERY_LIMIT, background.clone())?;
        let builder = builder.with_endpoint(&self.endpoint).with_timeout(DELIVERY_LIMIT);
        Ok(builder.with_http_client(post))
    }

    fn failed(&self, error: &dyn std::error::Error) -> TelemetryError {
        TelemetryError::Exporter { endpoint: self.endpoint.clone(), cause: error.to_string() }
    }
}

/// The share of the traces that begin here, if OTEL_TRACES_SAMPLER says one. Who begins a trace decides in
/// any case, so that its kinds with and without a parent are the same here.
///
/// # Errors
/// For a sampler that is not known here, or a share that is none.
pub fn env_ratio() -> Result<Option<f64>, TelemetryError> {
    ratio(&environment)
}

fn ratio(environment: Lookup<'_>) -> Result<Option<f64>, TelemetryError> {
    const NAME: &str = "OTEL_TRACES_SAMPLER";
    let Some(sampler) = environment(NAME) else { return Ok(None) };
    match sampler.trim_start_matches("parentbased_") {
        "always_on" => Ok(Some(1.0)),
        "always_off" => Ok(Some(0.0)),
        "traceidratio" => {
            let found = environment("OTEL_TRACES_SAMPLER_ARG").unwrap_or_else(|| "1".into());
            let share = found.parse().ok().filter(|share| (0.0..=1.0).contains(share));
            let (name, expected) = ("OTEL_TRACES_SAMPLER_ARG".to_string(), "a share from 0 to 1");
            share.map(Some).ok_or(TelemetryError::Setting { name, found, expected })
        }
        _ => Err(TelemetryError::Setting {
            name: NAME.into(),
            found: sampler,
            expected: "always_on, always_off, traceidratio, or one of them behind parentbased_",
        }),
    }
}

fn resolve(
    signal: Signal,
    settings: OtlpSettings<'_>,
    environment: Lookup<'_>,
) -> Result<Option<Otlp>, TelemetryError> {
    let is = |name: &str, value: &str| {
        environment(name).is_some_and(|found| found.eq_ignore_ascii_case(value))
    };
    let variable = signal.variable();
    let off = is("OTEL_SDK_DISABLED", "true") || is(&format!("OTEL_{variable}_EXPORTER"), "none");
    let of_signal = |what: &str| format!("OTEL_EXPORTER_OTLP_{variable}_{what}");
    let of_all = |what: &str| format!("OTEL_EXPORTER_OTLP_{what}");
    let said = |what: &str| {
        let names = [of_signal(what), of_all(what)];
        names.into_iter().find_map(|name| environment(&name).map(|value| (name, value)))
    };
    let said_protocol = match said("PROTOCOL") {
        Some((name, value)) => Some(protocol(name, value)?),
        None => None,
    };
    // An endpoint that the environment names has the protocol that it names.
    let (name, endpoint, protocol, is_whole) = match (settings.endpoint, said("ENDPOINT")) {
        (Some(endpoint), _) => {
            let protocol = settings.protocol.or(said_protocol);
            ("the OTLP endpoint".to_string(), endpoint.to_string(), protocol, false)
        }
        (None, Some((name, endpoint))) => {
            let is_whole = name == of_signal("ENDPOINT");
            (name, endpoint, said_protocol.or(settings.protocol), is_whole)
        }
        (None, None) => return Ok(None),
    };
    if off {
        return Ok(None);
    }
    if !(endpoint.starts_with("http://") || endpoint.starts_with("https://")) {
        return Err(TelemetryError::Setting { name, found: endpoint, expected: EXPECTED_URL });
    }
    let protocol = protocol.unwrap_or_default();
    let endpoint = match protocol {
        Protocol::Http if !is_whole => with_path(&endpoint, signal),
        Protocol::Http | Protocol::Grpc => endpoint,
    };
    let roots = said("CERTIFICATE").map(|(_, path)| roots(path.into())).transpose()?;
    Ok(Some(Otlp { signal, endpoint, protocol, roots }))
}

/// As OpenTelemetry's rule for base URLs has it.
fn with_path(base: &str, signal: Signal) -> String {
    let path = format!("/v1/{}", signal.name());
    match base.ends_with(&path) {
        true => base.to_string(),
        false => format!("{}{path}", base.trim_end_matches('/')),
    }
}

fn protocol(name: String, found: String) -> Result<Protocol, TelemetryError> {
    match found.as_str() {
        "grpc" => Ok(Protocol::Grpc),
        "http/protobuf" | "http" => Ok(Protocol::Http),
        _ => Err(TelemetryError::Setting { name, found, expected: "grpc or http/protobuf" }),
    }
}

fn roots(path: PathBuf) -> Result<Roots, TelemetryError> {
    match std::fs::read(&path) {
        Ok(pem) => Ok(Roots { path, pem }),
        Err(error) => {
            let cause = error.to_string();
            Err(TelemetryError::Certificate { name: CERTIFICATE, path, cause })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(
        variables: &[(&str, &str)],
        endpoint: Option<&str>,
        protocol: Option<Protocol>,
    ) -> Result<Option<(String, Protocol)>, TelemetryError> {
        let find = |name: &str| {
            let found = variables.iter().find(|(known, _)| *known == name);
            found.map(|(_, value)| value.to_string())
        };
        let settings = OtlpSettings { endpoint, protocol };
        let resolved = resolve(Signal::Traces, settings, &find)?;
        Ok(resolved.map(|otlp| (otlp.endpoint, otlp.protocol)))
    }

    const BASE: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";

    #[test]
    fn settings_count_before_the_environment_and_the_signals_own_before_that_of_all() {
        fn found(variables: &[(&str, &str)], endpoint: Option<&str>) -> String {
            with(variables, endpoint, None).unwrap().unwrap().0
        }
        let own = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT";
        assert_eq!(with(&[], None, None).unwrap(), None);
        assert_eq!(found(&[(BASE, "http://a:1")], None), "http://a:1");
        assert_eq!(found(&[(BASE, "http://a:1"), (own, "http://b:1")], None), "http://b:1");
        assert_eq!(found(&[(own, "http://b:1")], Some("http://c:1")), "http://c:1");
        let other = [("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "http://m:1")];
        assert_eq!(with(&other, None, None).unwrap(), None);
    }

    #[test]
    fn http_gets_the_signals_path_unless_the_url_is_the_signals_own() {
        let http = Some(Protocol::Http);
        let found = |variables, endpoint| with(variables, endpoint, http).unwrap().unwrap().0;
        assert_eq!(found(&[], Some("http://c:4318")), "http://c:4318/v1/traces");
        assert_eq!(found(&[], Some("http://c:4318/")), "http://c:4318/v1/traces");
        assert_eq!(found(&[], Some("http://c/x/v1/traces")), "http://c/x/v1/traces");
        assert_eq!(found(&[(BASE, "http://c/x")], None), "http://c/x/v1/traces");
        let own = [("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://c/spans")];
        assert_eq!(found(&own, None), "http://c/spans");
    }

    #[test]
    fn an_endpoint_of_the_environment_has_its_protocol() {
        let variables = [(BASE, "http://a:1"), ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")];
        let grpc = Some(Protocol::Grpc);
        let found = with(&variables, None, grpc).unwrap().unwrap();
        assert_eq!(found, ("http://a:1/v1/traces".to_string(), Protocol::Http));
        let found = with(&variables, Some("http://b:1"), grpc).unwrap().unwrap();
        assert_eq!(found, ("http://b:1".to_string(), Protocol::Grpc));
    }

    #[test]
    fn what_turns_telemetry_off_does() {
        for (name, value) in [("OTEL_SDK_DISABLED", "true"), ("OTEL_TRACES_EXPORTER", "none")] {
            assert_eq!(with(&[(name, value)], Some("http://c:1"), None).unwrap(), None, "{name}");
        }
        let on = [("OTEL_METRICS_EXPORTER", "none")];
        assert!(with(&on, Some("http://c:1"), None).unwrap().is_some());
    }

    #[test]
    fn what_cannot_be_used_is_an_error_that_names_its_source() {
        let text = |variables, endpoint| with(variables, endpoint, None).unwrap_err().to_string();
        let error = text(&[], Some("localhost:4317"));
        assert!(error.contains("\"localhost:4317\": expected a URL such as"), "{error}");
        let error = text(&[(BASE, "collector")], None);
        assert!(error.contains(BASE) && error.contains("collector"), "{error}");
        let json = [(BASE, "http://a:1"), ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json")];
        let error = text(&json, None);
        assert!(error.contains("OTEL_EXPORTER_OTLP_PROTOCOL is \"http/json\""), "{error}");
        let error = text(&[(CERTIFICATE, "/no/such.pem")], Some("https://c:1"));
        assert!(error.contains("/no/such.pem") && error.contains(CERTIFICATE), "{error}");
    }

    #[test]
    fn the_samplers_of_opentelemetry_are_shares() {
        let of = |sampler: &'static str, argument: Option<&'static str>| {
            ratio(&move |name| match name {
                "OTEL_TRACES_SAMPLER" => Some(sampler.to_string()),
                "OTEL_TRACES_SAMPLER_ARG" => argument.map(str::to_string),
                _ => None,
            })
        };
        assert_eq!(of("always_off", None).unwrap(), Some(0.0));
        assert_eq!(of("parentbased_always_on", None).unwrap(), Some(1.0));
        assert_eq!(of("parentbased_traceidratio", Some("0.25")).unwrap(), Some(0.25));
        assert_eq!(ratio(&|_| None).unwrap(), None);
        assert!(of("traceidratio", Some("2")).unwrap_err().to_string().contains("\"2\""));
        assert!(of("jaeger_remote", None).unwrap_err().to_string().contains("jaeger_remote"));
    }
}
