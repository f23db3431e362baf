//! How much memory this process has, and may still take: what the system has available, within the limit
//! of its container.

use sysinfo::{MemoryRefreshKind, ProcessRefreshKind, ProcessesToUpdate, System};

/// None where the system does not tell.
pub fn available_bytes() -> Option<u64> {
    let mut system = System::new().ok()?;
    system.refresh_memory_specifics(MemoryRefreshKind::nothing().with_ram());
    let of_system = system.available_memory();
    // Cached files count as used in a container, but give way: only what programs hold is taken.
    let of_container = container(&mut system).map(|l| l.total_memory.saturating_sub(l.rss));
    let available = of_container.map_or(of_system, |bytes| bytes.min(of_system));
    (available > 0).then_some(available)
}

/// Resident set of this process; 0 where /proc is not there.
pub fn resident_bytes() -> u64 {
    // Not statm: that counts pages, and their size cannot be asked for without unsafe code.
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let kilobytes = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let number = kilobytes.and_then(|text| text.trim().trim_end_matches(" kB").parse::<u64>().ok());
    number.unwrap_or(0) * 1024
}

/// The limits of this process's own control group, or of the one that is the root of its view.
fn container(system: &mut System) -> Option<sysinfo::CGroupLimits> {
    let of_process = sysinfo::get_current_pid().ok().and_then(|pid| {
        let (only, nothing) = (ProcessesToUpdate::Some(&[pid]), ProcessRefreshKind::nothing());
        system.refresh_processes_specifics(only, false, nothing);
        system.process(pid)?.cgroup_limits()
    });
    of_process.or_else(|| system.cgroup_limits())
}

#[cfg(test)]
mod tests {
    #[test]
    fn this_machine_tells() {
        let available = super::available_bytes().expect("a test runs on a system that tells");
        assert!(available > 1 << 20, "{available}");
        assert!(available < 1 << 50, "{available}");
    }
}
