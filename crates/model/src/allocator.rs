//! What the C library does with the memory of dropped tensors.
//!
//! By default glibc maps each large block anew and gives it back when it is freed, so that every
//! tensor of every step begins with page faults: a training step cost 1.2 times the CPU time
//! (SmolLM2, 4 x 128 tokens), and 2.1 times with the small mapping threshold that gives memory back at
//! once. Here freed memory is kept for the next tensors, and given back when someone says so.

/// Sets the policy for this process. Call it first in `main`. Does nothing without glibc.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    for (option, value) in [
        // Threads with arenas of their own cannot use each other's freed memory.
        (libc::M_ARENA_MAX, 1),
        (libc::M_MMAP_THRESHOLD, 1 << 30),
        (libc::M_TRIM_THRESHOLD, i32::MAX),
    ] {
        if !crate::host::set_allocator(option, value) {
            tracing::warn!(option, "the allocator kept its own setting");
        }
    }
}

/// Gives freed memory back to the system, as after something large is gone for good.
pub fn return_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    crate::host::trim_allocator();
}

/// What is handed out and not given back, tensors and all else of this process. 0 without glibc.
pub fn allocated_bytes() -> u64 {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    return crate::host::allocated_bytes() as u64;
    #[cfg(not(all(target_os = "linux", target_env = "gnu")))]
    0
}
