use anyhow::Context;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// How often a waiting OpenMP thread looks for work before it sleeps: some ten microseconds.
const SPINS: &str = "20000";

/// Starts this program again with `GOMP_SPINCOUNT` set, unless the user has said how OpenMP's threads
/// are to wait.
///
/// A server and clients on the same cores take turns. By default libgomp's threads spin for
/// milliseconds after each product, on cores that the other process needs; with
/// `OMP_WAIT_POLICY=PASSIVE` they sleep between any two products, which cost 1.6 times the time of a
/// training step. libgomp reads the variable when it is loaded, before `main`, so it cannot be set
/// from here for this process.
pub fn share_cores() -> anyhow::Result<()> {
    if ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY"].iter().any(|name| std::env::var_os(name).is_some()) {
        return Ok(());
    }
    let program = std::env::current_exe().context("cannot find this program's own file")?;
    // The process stays the same one, so whoever waits for it or signals it notices nothing.
    let error =
        Command::new(program).args(std::env::args_os().skip(1)).env("GOMP_SPINCOUNT", SPINS).exec();
    tracing::debug!(%error, "could not start again with GOMP_SPINCOUNT={SPINS}");
    Ok(())
}
