use crate::accelerator;
use anyhow::Context;
use offshoot_model::ModelConfig;
use offshoot_model::weights::Checkpoint;
use offshoot_server::{RunningServer, Server, ServerConfig, Standby};
use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;
use tokio::signal::unix::{Signal, SignalKind, signal};

pub use crate::serve_config::ServeArgs;

/// Some sessions could not be saved.
const NOT_SAVED: u8 = 3;

/// Runs the subcommand until a signal ends it.
pub fn run(args: ServeArgs) -> anyhow::Result<ExitCode> {
    for note in args.legacy.notes() {
        tracing::warn!("{note}");
    }
    let mut config = args.config()?;
    config.build = crate::version::BUILD;
    config.validate()?;
    accelerator::device(&config.model.device)?;
    check_model_type(args.model_type(), &config)?;
    let timeout = config.drain.timeout();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start threads")?;
    let ended = runtime.block_on(serve(config));
    // Whatever is left does not hold the process.
    runtime.shutdown_background();
    match ended? {
        Ended::Saved => tracing::info!("every session is saved"),
        Ended::NeverServed => tracing::info!("ended before it served"),
        Ended::Lost(n_sessions) => {
            eprintln!(
                "error: {n_sessions} sessions could not be saved within drain.timeout_seconds = {}; they \
                 are at their last snapshot",
                timeout.as_secs_f64()
            );
            return Ok(ExitCode::from(NOT_SAVED));
        }
    }
    Ok(ExitCode::SUCCESS)
}

enum Ended {
    Saved,
    /// A signal came while it started.
    NeverServed,
    /// So many sessions could not be saved.
    Lost(usize),
}

/// The signals that end a server.
struct Ends {
    terminate: Signal,
    interrupt: Signal,
}

impl Ends {
    /// The next one's name.
    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

async fn serve(config: ServerConfig) -> anyhow::Result<Ended> {
    // Before the server starts, so that no signal finds the default handler.
    let mut ends = Ends {
        terminate: signal(SignalKind::terminate())?,
        interrupt: signal(SignalKind::interrupt())?,
    };
    let mut hangup = signal(SignalKind::hangup())?;
    let timeout = config.drain.timeout();
    let mut server = tokio::select! {
        server = Server::start_told(config, say_standby) => server?,
        signal = ends.next() => {
            tracing::info!(signal, "ends before it serves");
            return Ok(Ended::NeverServed);
        }
    };
    match server.http_addr() {
        Some(http) => println!("ready grpc={} http={http}", server.local_addr()),
        None => println!("ready grpc={}", server.local_addr()),
    }
    std::io::stdout().flush()?;
    let signal = loop {
        tokio::select! {
            signal = ends.next() => break signal,
            _ = hangup.recv() => tokio::task::block_in_place(|| server.reload()),
            error = server.failed() => {
                drain(server, timeout, &mut ends).await;
                return Err(error.into());
            }
        }
    };
    tracing::info!(signal, "draining");
    Ok(match drain(server, timeout, &mut ends).await {
        0 => Ended::Saved,
        n_sessions => Ended::Lost(n_sessions),
    })
}

/// For whoever starts the next server before the one that serves is ended.
fn say_standby(standby: Standby) {
    println!("standby store={}", standby.store.display());
    // Nobody may be reading.
    let _ = std::io::stdout().flush();
}

/// Until every session is saved; how many are not.
async fn drain(server: RunningServer, timeout: Duration, ends: &mut Ends) -> usize {
    let hurry = server.hurry();
    let mut draining = std::pin::pin!(server.drain(timeout));
    for n_signals in 2.. {
        let signal = tokio::select! {
            biased;
            n_lost = &mut draining => return n_lost,
            signal = ends.next() => signal,
        };
        if n_signals > 2 {
            tracing::error!(signal, "ends at once; sessions go back to their last snapshots");
            std::process::exit(NOT_SAVED.into());
        }
        tracing::warn!(
            signal,
            "open microbatches are not waited for any more; once more ends at once"
        );
        hurry.now();
    }
    unreachable!("signals are not counted so far")
}

fn check_model_type(wanted: Option<&str>, config: &ServerConfig) -> anyhow::Result<()> {
    let Some(wanted) = wanted else { return Ok(()) };
    let checkpoint = Checkpoint::find(&config.model.name)?;
    let found = ModelConfig::from_json(checkpoint.config())?.family.name();
    anyhow::ensure!(
        found == wanted,
        "--model-type is {wanted}, but {} is of type {found}; leave the option out, or name another model",
        config.model.name
    );
    Ok(())
}
