use anyhow::Context;
use std::os::unix::process::CommandExt;
use std::process::Command;

const POLICY: &str = "OMP_WAIT_POLICY";

/// Starts this program again with `OMP_WAIT_POLICY=PASSIVE`, unless the variable is set.
///
/// By default OpenMP's threads spin while they wait for work. With a server and clients on the same
/// cores that costs several times the time of the work itself. libgomp reads the variable when it
/// is loaded, before `main`, so it cannot be set from here for this process.
pub fn wait_passively() -> anyhow::Result<()> {
    if std::env::var_os(POLICY).is_some() {
        return Ok(());
    }
    let program = std::env::current_exe().context("cannot find this program's own file")?;
    // The process stays the same one, so whoever waits for it or signals it notices nothing.
    let error =
        Command::new(program).args(std::env::args_os().skip(1)).env(POLICY, "PASSIVE").exec();
    tracing::debug!(%error, "could not start again with {POLICY}=PASSIVE");
    Ok(())
}
