use crate::accelerator;
use anyhow::Context;
use offshoot_model::ModelConfig;
use offshoot_model::weights::Checkpoint;
use offshoot_server::{Server, ServerConfig};
use std::io::Write;
use std::process::ExitCode;
use tokio::signal::unix::{SignalKind, signal};

pub use crate::serve_config::ServeArgs;

/// Runs the subcommand until a signal ends it.
pub fn run(args: ServeArgs) -> anyhow::Result<ExitCode> {
    for note in args.legacy.notes() {
        tracing::warn!("{note}");
    }
    let config = args.config()?;
    config.validate()?;
    accelerator::device(&config.model.device)?;
    check_model_type(args.model_type(), &config)?;
    let timeout = config.drain.timeout();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start threads")?;
    let lost = runtime.block_on(async {
        // Before the server starts, so that no signal finds the default handler.
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut hangup = signal(SignalKind::hangup())?;
        let mut server = Server::start(config).await?;
        println!("ready grpc={}", server.local_addr());
        std::io::stdout().flush()?;
        let name = loop {
            tokio::select! {
                _ = terminate.recv() => break "SIGTERM",
                _ = interrupt.recv() => break "SIGINT",
                _ = hangup.recv() => tokio::task::block_in_place(|| server.reload()),
                error = server.failed() => {
                    server.drain(timeout).await;
                    return Err(error.into());
                }
            }
        };
        tracing::info!(signal = name, "draining");
        anyhow::Ok(server.drain(timeout).await)
    })?;
    // Whatever is left does not hold the process.
    runtime.shutdown_background();
    anyhow::ensure!(
        lost == 0,
        "{lost} sessions could not be saved within drain.timeout_seconds = {}; they are at their last snapshot",
        timeout.as_secs_f64()
    );
    tracing::info!("every session is saved");
    Ok(ExitCode::SUCCESS)
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
