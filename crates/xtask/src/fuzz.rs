//! Fuzz targets of `tests/fuzz`: builds them with cargo-fuzz, begins with small corpora and keeps
//! what was found in `target/fuzz`.
//!
//! cargo-fuzz passes flags that only a nightly compiler takes; `RUSTC_BOOTSTRAP` lets the stable one
//! take them. Nothing of the product is built so.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::command::{cargo, in_root, run, target_dir};
use crate::setup;

const VERSION: &str = "0.13.2";

/// A target, and whether it needs libtorch, which is not built for a sanitizer: those that do run
/// without one.
const TARGETS: [(&str, bool); 11] = [
    ("host_tensor", false),
    ("server_frame", false),
    ("window", false),
    ("client_frame", true),
    ("session", true),
    ("stored", true),
    ("tenants", true),
    ("peft", true),
    ("checkpoint", true),
    ("weights", true),
    ("gguf", true),
];

#[derive(Args)]
pub struct Options {
    /// One of the targets in tests/fuzz/fuzz_targets; all of them, one after the other, if none is
    /// named
    target: Option<String>,
    /// How long each target runs
    #[arg(long, value_name = "N", default_value_t = 620)]
    seconds: u64,
}

/// Runs one target or all. A finding ends it, with the path of its input.
pub fn run_targets(options: &Options) -> Result<()> {
    setup::libtorch()?;
    let chosen: Vec<_> = TARGETS
        .into_iter()
        .filter(|(name, _)| options.target.as_deref().is_none_or(|target| target == *name))
        .collect();
    if chosen.is_empty() {
        bail!("there is no such target; there are {}", TARGETS.map(|(name, _)| name).join(", "));
    }
    let dir = target_dir().join("fuzz");
    let tools = cargo_fuzz(&dir)?;
    let corpora = seeds(&dir)?;
    for (target, with_libtorch) in chosen {
        fuzz(&Run { target, with_libtorch, dir: &dir, tools: &tools, corpora: &corpora }, options)?;
    }
    Ok(())
}

/// Installs cargo-fuzz beside what it builds; gives the folder that it is in.
fn cargo_fuzz(dir: &Path) -> Result<PathBuf> {
    let tools = dir.join("tools");
    if !tools.join("bin/cargo-fuzz").exists() {
        let (root, build) = (tools.as_os_str(), dir.join("tools-build"));
        run(cargo()
            .args(["install", "cargo-fuzz", "--locked", "--version", VERSION, "--root"])
            .arg(root)
            .arg("--target-dir")
            .arg(build))?;
    }
    Ok(tools.join("bin"))
}

/// Small inputs of every kind, made anew each time: they follow the formats.
fn seeds(dir: &Path) -> Result<PathBuf> {
    let corpora = dir.join("corpora");
    run(cargo()
        .args(["run", "--quiet", "--bin", "seeds", "--manifest-path"])
        .arg(in_root("tests/fuzz/Cargo.toml"))
        .arg("--target-dir")
        .arg(dir.join("seeds"))
        .arg(&corpora))?;
    Ok(corpora)
}

struct Run<'a> {
    target: &'a str,
    with_libtorch: bool,
    dir: &'a Path,
    tools: &'a Path,
    corpora: &'a Path,
}

fn fuzz(this: &Run<'_>, options: &Options) -> Result<()> {
    let (features, sanitizer) =
        if this.with_libtorch { ("client,server,files", "none") } else { ("client", "address") };
    let path = std::env::var_os("PATH").unwrap_or_default();
    let path = std::env::join_paths(
        std::iter::once(this.tools.to_path_buf()).chain(std::env::split_paths(&path)),
    )?;
    let artifacts = this.dir.join("findings").join(this.target);
    // A target that reads files writes them there; a fuzzer's end leaves them.
    let scratch = this.dir.join("scratch");
    for dir in [&artifacts, &scratch] {
        std::fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
    }
    let mut command = Command::new(this.tools.join("cargo-fuzz"));
    command
        .current_dir(in_root("tests/fuzz"))
        .env("PATH", path)
        .env("RUSTC_BOOTSTRAP", "1")
        .env("TMPDIR", &scratch)
        .env("OMP_NUM_THREADS", "1")
        .args(["run", "--fuzz-dir", ".", "--strip-dead-code", "--sanitizer", sanitizer])
        .args(["--features", features, "--target-dir"])
        .arg(this.dir.join(sanitizer))
        .arg(this.target)
        .arg(this.corpora.join(this.target))
        .arg("--")
        .arg(format!("-max_total_time={}", options.seconds))
        .arg(format!("-artifact_prefix={}/", artifacts.display()))
        .args(["-max_len=4096", "-len_control=20", "-timeout=10", "-rss_limit_mb=2048"])
        .args(["-malloc_limit_mb=1024", "-print_final_stats=1"]);
    let done = run(&mut command);
    let _ = std::fs::remove_dir_all(&scratch);
    done.with_context(|| {
        format!(
            "{} found something: its input is in {}; it belongs into an ordinary test",
            this.target,
            artifacts.display()
        )
    })
}
