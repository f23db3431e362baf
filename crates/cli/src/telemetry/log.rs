use clap::{Args, ValueEnum};
use std::io::IsTerminal;
use tracing::Subscriber;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::{EnvFilter, Layer};

/// What every command has.
#[derive(Args, Debug)]
#[command(next_help_heading = "Logs")]
pub struct LogArgs {
    /// What is logged to stderr: error, warn, info, debug, trace, or filters as in RUST_LOG, which
    /// applies without this option.
    #[arg(long, global = true, value_name = "FILTER")]
    log: Option<String>,
    /// How it is logged. As JSON each line is an object, the error that ends a command included.
    #[arg(long, global = true, value_enum, default_value_t = LogFormat::Human)]
    log_format: LogFormat,
}

/// How lines of the log look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// text
    #[default]
    Human,
    /// one JSON object a line
    Json,
}

/// What is logged unless the user says so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Its log is what it prints.
    Service,
    /// It prints lines of its own, and warnings are between them.
    Command,
}

impl Kind {
    fn default_filter(self) -> &'static str {
        match self {
            Kind::Service => "info",
            // Also that something that was away is there again.
            Kind::Command => "warn,offshoot_client::outage=info,offshoot_telemetry=info",
        }
    }
}

type BoxedLayer<S> = Box<dyn Layer<S> + Send + Sync>;

impl LogArgs {
    /// How the last error of a command is to be printed.
    pub fn format(&self) -> LogFormat {
        self.log_format
    }

    /// What writes the log.
    pub fn layer<S>(&self, kind: Kind) -> anyhow::Result<BoxedLayer<S>>
    where
        S: Subscriber + for<'span> LookupSpan<'span>,
    {
        let asked = match &self.log {
            Some(filter) => Some(EnvFilter::try_new(filter)?),
            None => EnvFilter::try_from_default_env().ok(),
        };
        // Between the other lines of a command its warnings need no time and no place.
        let bare = asked.is_none() && kind == Kind::Command;
        let filter = asked.unwrap_or_else(|| EnvFilter::new(kind.default_filter()));
        let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
        Ok(match self.log_format {
            LogFormat::Json => {
                let lines = lines.json().flatten_event(true).with_span_list(false);
                lines.with_current_span(false).with_filter(filter).boxed()
            }
            LogFormat::Human => {
                let lines = lines.with_ansi(std::io::stderr().is_terminal());
                match bare {
                    true => {
                        let lines = lines.without_time().with_level(false).with_target(false);
                        lines.with_filter(filter).boxed()
                    }
                    false => lines.with_filter(filter).boxed(),
                }
            }
        })
    }
}
