//! Helpers of the platform tests: where the tools are, and the built program.

pub mod browser;
pub mod collector;
pub mod metric_sink;
pub mod otlp;
pub mod process;

use std::env;
use std::path::{Path, PathBuf};

/// The repository's root.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().expect("it is there")
}

/// A program that `cargo xtask tools` has fetched, or that is on PATH. Without it the test fails: a claim
/// that nobody checked is no claim.
pub fn tool(name: &str) -> PathBuf {
    let ours = target_dir().join("tools").join(name).join("bin").join(name);
    if ours.is_file() {
        return ours;
    }
    let path = env::var_os("PATH").unwrap_or_default();
    let on_path = env::split_paths(&path).map(|folder| folder.join(name)).find(|p| p.is_file());
    on_path.unwrap_or_else(|| {
        panic!(
            "{name} is not there, neither as {} nor on PATH: run `cargo xtask tools`",
            ours.display()
        )
    })
}

/// The program under test, as it was built beside these tests.
pub fn offshoot() -> PathBuf {
    let tests = env::current_exe().expect("this program has a path");
    let deps = tests.parent().and_then(Path::parent).expect("target/PROFILE/deps/NAME");
    let program = deps.join("offshoot");
    assert!(
        program.is_file(),
        "{} is not there: run `cargo build -p offshoot` first, or `cargo xtask test`",
        program.display()
    );
    program
}

fn target_dir() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}
