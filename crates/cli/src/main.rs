//! `offshoot`: the trunk server and the trainer on the command line.

mod accelerator;
mod base;
mod bench;
#[cfg(test)]
mod chart_tests;
mod checkpoints;
mod connection_args;
mod eval;
mod export;
mod fetch;
mod generate;
mod health;
mod import;
mod leak;
mod legacy;
mod merge;
mod noise_args;
mod openmp;
mod operate;
mod own_server;
mod plan;
mod plot;
mod run_config;
mod serve;
mod serve_config;
mod server_args;
mod sessions;
mod snapshots;
mod store;
mod telemetry;
mod tenant;
mod tenants;
mod top;
mod train;
mod verify;
mod version;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use run_config::Resolved;
use std::ffi::OsString;
use std::process::ExitCode;
use telemetry::{Kind, LogArgs, LogFormat, Telemetry, TraceSettings};

/// Split LoRA training: many teams fine-tune one language model through one shared trunk.
///
/// `offshoot serve` holds the middle layers of a model, frozen. `offshoot train` holds the first and
/// last layers, the text and the loss, and grows its own LoRA adapter, the part inside the trunk
/// included. The result is one PEFT adapter for the whole model.
#[derive(Parser)]
#[command(name = "offshoot", version = version::SHORT, long_version = version::LONG, max_term_width = 100)]
struct Cli {
    #[command(flatten)]
    log: LogArgs,

    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Serve(serve::ServeArgs),
    Fetch(fetch::FetchArgs),
    Tenant(tenant::TenantArgs),
    Top(top::TopArgs),
    Sessions(sessions::SessionsArgs),
    Snapshots(snapshots::SnapshotsArgs),
    Tenants(tenants::TenantsArgs),
    Health(health::HealthArgs),
    Store(store::StoreArgs),
    Train(Box<train::TrainArgs>),
    Checkpoints(checkpoints::CheckpointsArgs),
    Plan(plan::PlanArgs),
    Plot(plot::PlotArgs),
    Generate(Box<generate::GenerateArgs>),
    Verify(verify::VerifyArgs),
    Eval(eval::EvalArgs),
    Leak(Box<leak::LeakArgs>),
    Export(export::ExportArgs),
    Import(import::ImportArgs),
    Merge(merge::MergeArgs),
    Bench(bench::BenchArgs),
}

impl Cli {
    /// A command line, and what the file of its `--config` adds to it.
    fn read(args: Vec<OsString>) -> anyhow::Result<Cli> {
        let args = run_config::expand::<Cli>(args, "train")?;
        let matches = Cli::command().try_get_matches_from(args)?;
        let mut cli = Cli::from_arg_matches(&matches)?;
        if let Command::Train(train) = &mut cli.command
            && let Some(given) = matches.subcommand_matches("train")
        {
            train.resolved = Some(Resolved::new(Cli::command(), "train", given));
        }
        Ok(cli)
    }
}

impl Command {
    fn log_kind(&self) -> Kind {
        match self {
            Command::Serve(_) | Command::Fetch(_) => Kind::Service,
            _ => Kind::Command,
        }
    }

    /// Of those whose work can be traced.
    fn traces(&self) -> anyhow::Result<Option<TraceSettings>> {
        Ok(match self {
            Command::Serve(args) => {
                let config = args.config()?;
                config.validate()?;
                Some(config.telemetry.into())
            }
            Command::Train(args) => Some(args.telemetry.settings("offshoot-train")),
            Command::Generate(args) => Some(args.telemetry.settings("offshoot-generate")),
            Command::Eval(args) => Some(args.telemetry.settings("offshoot-eval")),
            _ => None,
        })
    }

    fn run(self) -> anyhow::Result<ExitCode> {
        match self {
            Command::Serve(args) => serve::run(args),
            Command::Fetch(args) => fetch::run(args),
            Command::Tenant(args) => tenant::run(args),
            Command::Top(args) => top::run(args),
            Command::Sessions(args) => sessions::run(args),
            Command::Snapshots(args) => snapshots::run(args),
            Command::Tenants(args) => tenants::run(args),
            Command::Health(args) => health::run(args),
            Command::Store(args) => store::run(args),
            Command::Train(args) => train::run(*args),
            Command::Checkpoints(args) => checkpoints::run(args),
            Command::Plan(args) => plan::run(args),
            Command::Plot(args) => plot::run(args),
            Command::Generate(args) => generate::run(*args),
            Command::Verify(args) => verify::run(args),
            Command::Eval(args) => eval::run(args),
            Command::Leak(args) => leak::run(*args),
            Command::Export(args) => export::run(args),
            Command::Import(args) => import::run(args),
            Command::Merge(args) => merge::run(args),
            Command::Bench(args) => bench::run(args),
        }
    }
}

fn main() -> ExitCode {
    offshoot_model::allocator::keep_freed_memory();
    let cli = match Cli::read(std::env::args_os().collect()) {
        Ok(cli) => cli,
        Err(error) => match error.downcast::<clap::Error>() {
            Ok(error) => error.exit(),
            Err(error) => {
                eprintln!("error: {}", said(&error));
                return ExitCode::from(2);
            }
        },
    };
    let format = cli.log.format();
    let error = match openmp::share_cores().and_then(|()| run(cli)) {
        Ok(code) => return code,
        Err(error) => error,
    };
    match format {
        LogFormat::Json if tracing::enabled!(tracing::Level::ERROR) => {
            tracing::error!("{}", said(&error));
        }
        // Also before there is a log.
        LogFormat::Human | LogFormat::Json => eprintln!("error: {}", said(&error)),
    }
    ExitCode::FAILURE
}

fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    let Cli { log, command } = cli;
    let telemetry = Telemetry::start(&log, command.log_kind(), command.traces()?)?;
    let ended = command.run();
    telemetry.end();
    ended
}

/// An error with its causes. Many say their cause themselves; it is not said again.
fn said(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

#[cfg(test)]
mod docs_tests;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_is_said_once() {
        let cause = || std::io::Error::other("no room");
        let with_cause = anyhow::Error::new(cause()).context("cannot write: no room; make some");
        assert_eq!(said(&with_cause), "cannot write: no room; make some");
        assert_eq!(
            said(&anyhow::Error::new(cause()).context("cannot write")),
            "cannot write: no room"
        );
    }

    #[test]
    fn the_options_are_consistent() {
        Cli::command().debug_assert();
    }
}
