use anyhow::{Context, ensure};
use std::os::unix::process::CommandExt;
use std::process::Command;

/// As `offshoot` itself: keeps freed memory, and starts this program again with `GOMP_SPINCOUNT` set
/// unless the user said how OpenMP's threads wait. Call it first.
pub fn share_cores() -> anyhow::Result<()> {
    offshoot_model::allocator::keep_freed_memory();
    if ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY"].iter().any(|name| std::env::var_os(name).is_some()) {
        return Ok(());
    }
    let program = std::env::current_exe().context("cannot find this program's own file")?;
    let again =
        Command::new(program).args(std::env::args_os().skip(1)).env(SPIN_COUNT, SPINS).exec();
    Err(again).context("cannot start again with GOMP_SPINCOUNT")
}

const SPIN_COUNT: &str = "GOMP_SPINCOUNT";
const SPINS: &str = "20000";

/// What `run` takes of resident memory at its peak, above what is resident before, in bytes.
pub fn peak_above<T>(run: impl FnOnce() -> T) -> anyhow::Result<(T, u64)> {
    offshoot_model::allocator::return_freed_memory();
    // Sets the process's peak to what is resident now.
    std::fs::write("/proc/self/clear_refs", "5").context("cannot reset the resident peak")?;
    let before = status("VmRSS")?;
    let result = run();
    let peak = status("VmHWM")?;
    ensure!(peak >= before, "the resident peak is below what was resident: it was not reset");
    Ok((result, peak - before))
}

/// The most that was ever resident of this process, in bytes.
pub fn peak_resident() -> anyhow::Result<u64> {
    status("VmHWM")
}

/// A field of /proc/self/status in bytes.
fn status(field: &str) -> anyhow::Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status").context("/proc is needed")?;
    let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    let number = line.and_then(|text| text.trim().trim_end_matches(" kB").parse::<u64>().ok());
    Ok(number.with_context(|| format!("/proc/self/status has no {field}"))? * 1024)
}
