//! What the commands for a running server have in common: where it is, which session is meant, and how
//! answers are printed.

mod amounts;
mod columns;
mod confirm;
pub mod named;
mod place;

pub use amounts::{age, bytes, count, of_quota, seconds, share};
pub use columns::{Column, table};
pub use confirm::confirm;
pub use place::PlaceArgs;

use serde::Serialize;
use std::io::Write;

/// Prints what a program reads.
pub fn print_json(value: &impl Serialize) -> anyhow::Result<()> {
    print(&(serde_json::to_string_pretty(value)? + "\n"));
    Ok(())
}

/// Prints what people read.
pub fn print(text: &str) {
    // Whoever reads it may have seen enough.
    let _ = std::io::stdout().write_all(text.as_bytes());
}

/// Runs what speaks to a server.
pub fn run<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(work)
}
