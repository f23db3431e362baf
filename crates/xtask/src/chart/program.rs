//! Where the tools are.

use std::env;
use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::command::target_dir;

/// A program that `cargo xtask tools` has fetched, or that is on PATH.
pub fn program(name: &str) -> Result<PathBuf> {
    let ours = target_dir().join("tools").join(name).join("bin").join(name);
    if ours.is_file() {
        return Ok(ours);
    }
    let path = env::var_os("PATH").unwrap_or_default();
    let on_path = env::split_paths(&path).map(|folder| folder.join(name)).find(|file| file.is_file());
    on_path.with_context(|| {
        format!("{name} is not there, neither as {} nor on PATH: run `cargo xtask tools`", ours.display())
    })
}
