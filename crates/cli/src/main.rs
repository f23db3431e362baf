//! `offshoot`: the trunk server and the trainer on the command line.

mod accelerator;
mod base;
mod bench;
mod checkpoints;
mod connection_args;
mod eval;
mod export;
mod generate;
mod import;
mod leak;
mod legacy;
mod merge;
mod noise_args;
mod openmp;
mod own_server;
mod plot;
mod run_config;
mod serve;
mod serve_config;
mod server_args;
mod tenant;
mod train;
mod verify;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use run_config::Resolved;
use std::ffi::OsString;
use std::io::IsTerminal;
use std::process::ExitCode;
use tracing_subscriber::EnvFilter;

/// Split LoRA training: many teams fine-tune one language model through one shared trunk.
///
/// `offshoot serve` holds the middle layers of a model, frozen. `offshoot train` holds the first and
/// last layers, the text and the loss, and grows its own LoRA adapter, the part inside the trunk
/// included. The result is one PEFT adapter for the whole model.
#[derive(Parser)]
#[command(name = "offshoot", version, max_term_width = 100)]
struct Cli {
    /// What is logged to stderr: error, warn, info, debug, trace, or filters as in RUST_LOG, which
    /// applies without this option.
    #[arg(long, global = true, value_name = "FILTER", help_heading = "Logs")]
    log: Option<String>,

    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Serve(serve::ServeArgs),
    Tenant(tenant::TenantArgs),
    Train(Box<train::TrainArgs>),
    Checkpoints(checkpoints::CheckpointsArgs),
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
    fn default_log(&self) -> &'static str {
        match self {
            Command::Serve(_) => "info",
            // Also that a server that was away is there again.
            _ => "warn,offshoot_client::outage=info",
        }
    }

    fn run(self) -> anyhow::Result<ExitCode> {
        match self {
            Command::Serve(args) => serve::run(args),
            Command::Tenant(args) => tenant::run(args),
            Command::Train(args) => train::run(*args),
            Command::Checkpoints(args) => checkpoints::run(args),
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
    let error = match openmp::share_cores().and_then(|()| {
        let asked = match &cli.log {
            Some(filter) => Some(EnvFilter::try_new(filter)?),
            None => EnvFilter::try_from_default_env().ok(),
        };
        // Between the other lines of a command its warnings need no time and no place.
        let bare = asked.is_none() && !matches!(cli.command, Command::Serve(_));
        let log = tracing_subscriber::fmt()
            .with_env_filter(asked.unwrap_or_else(|| EnvFilter::new(cli.command.default_log())))
            .with_ansi(std::io::stderr().is_terminal())
            .with_writer(std::io::stderr);
        match bare {
            true => log.without_time().with_level(false).with_target(false).init(),
            false => log.init(),
        }
        cli.command.run()
    }) {
        Ok(code) => return code,
        Err(error) => error,
    };
    eprintln!("error: {}", said(&error));
    ExitCode::FAILURE
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
