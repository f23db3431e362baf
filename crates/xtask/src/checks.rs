//! What has to pass before a change is ready.

use std::fs;
use std::process::{Command, Stdio};

use anyhow::{Result, ensure};

use crate::command::{cargo, in_root, output, root, run};
use crate::{demo, setup, tools};

/// All tests. The runner's closing line is the last thing that it prints.
pub fn test(args: &[String], all_tools: bool) -> Result<()> {
    setup::libtorch()?;
    // What is claimed of the real model, and of the product beside other programs, is tested with them; a
    // choice of tests may do without.
    if !args.is_empty() {
        return tests(args, &[], false);
    }
    demo::fetch()?;
    let missing = tools::fetch(all_tools || std::env::var("CI").is_ok_and(|ci| ci == "true"))?;
    if missing.is_empty() {
        return tests(&[], &[], true);
    }
    let (kept, left_out) = platform_tests(&missing)?;
    let chosen: Vec<String> =
        kept.iter().flat_map(|test| ["--test".into(), test.clone()]).collect();
    if !chosen.is_empty() {
        tests(&[&["-p".into(), PLATFORM.into()], &chosen[..]].concat(), &[], true)?;
    }
    tests(&[], &["--exclude", PLATFORM], true)?;
    eprintln!(
        "\nLEFT OUT: the tests {} of {PLATFORM}, for want of {}: see `cargo xtask tools`",
        left_out.join(", "),
        missing.join(", ")
    );
    Ok(())
}

/// The package whose tests need other programs.
const PLATFORM: &str = "offshoot-platform";

/// Its tests that run without these tools, and the others.
fn platform_tests(missing: &[&str]) -> Result<(Vec<String>, Vec<String>)> {
    let manifest = fs::read_to_string(in_root("tests/platform/Cargo.toml"))?;
    let named = manifest.split("[[test]]").skip(1).filter_map(|test| test.split('"').nth(1));
    let all: Vec<String> = named.map(String::from).collect();
    let kept = tools::tests_without(missing, &all);
    let left_out = all.into_iter().filter(|test| !kept.contains(test)).collect();
    Ok((kept, left_out))
}

fn tests(args: &[String], scope: &[&str], whole: bool) -> Result<()> {
    let names_packages = args.iter().any(|arg| arg.starts_with("-p") || arg == "--package");
    let workspace: &[&str] = if names_packages { &[] } else { &["--workspace"] };
    let tests = |verb: &[&str], args: &[String]| {
        let mut command = cargo();
        if whole {
            command.env("OFFSHOOT_REQUIRE_MODEL", "1");
        }
        command.args(verb).args(workspace).args(scope).args(args);
        // Several busy thread pools on few cores are far slower than one thread each.
        run(command.env("OMP_NUM_THREADS", "1"))
    };
    if !has_nextest() {
        return tests(&["test"], args);
    }
    // nextest leaves the examples in the docs out; a filter is for tests, not for them.
    if whole && !names_packages {
        tests(&["test", "--doc"], args)?;
    }
    tests(&["nextest", "run", "--no-fail-fast"], args)
}

fn has_nextest() -> bool {
    let quiet = cargo()
        .args(["nextest", "--version"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    quiet.is_ok_and(|status| status.success())
}

/// Formatting, lints, docs and the borders between the crates.
pub fn check() -> Result<()> {
    setup::libtorch()?;
    run(cargo().args(["fmt", "--all", "--check"]))?;
    borders()?;
    lints()?;
    // With what fuzz targets see of the server, so that it goes on compiling.
    let fuzzing = ["--features", "offshoot-server/fuzzing"];
    run(cargo()
        .args(["clippy", "--workspace", "--all-targets"])
        .args(fuzzing)
        .args(["--", "-D", "warnings"]))?;
    run(cargo().args(["doc", "--no-deps", "--workspace"]).env("RUSTDOCFLAGS", "-D warnings"))
}

/// Packages that must not be in the tree of another: the map in ARCHITECTURE.md.
const BORDERS: [(&str, &[&str]); 6] = [
    // Clients without libtorch can use the SDK.
    ("offshoot-client", &["tch", "torch-sys", "offshoot-model", "offshoot-adapters"]),
    ("offshoot-proto", &["tch", "torch-sys", "offshoot-client", "offshoot-adapters"]),
    ("offshoot-adapters", &["offshoot-model", "offshoot-proto"]),
    ("offshoot-model", &["offshoot-proto", "offshoot-client", "offshoot-server"]),
    // Whoever holds the text and whoever holds the trunk meet on the wire only.
    ("offshoot-server", &["offshoot-client", "offshoot-trainer"]),
    ("offshoot-trainer", &["offshoot-server"]),
];

fn borders() -> Result<()> {
    for (package, forbidden) in BORDERS {
        let tree = output(cargo().args([
            "tree",
            "--package",
            package,
            "--edges=normal,build",
            "--prefix=none",
            "--format={p}",
        ]))?;
        let found: Vec<_> = tree
            .lines()
            .filter_map(|line| line.split_whitespace().next())
            .filter(|name| forbidden.contains(name))
            .collect();
        ensure!(
            found.is_empty(),
            "{package} must not depend on {}, see ARCHITECTURE.md; `cargo tree -p {package} -i \
             {}` shows the way",
            found.join(", "),
            found[0]
        );
    }
    eprintln!("borders between the crates: kept");
    Ok(())
}

/// The one package with unsafe code, and the one file of it: docs/decisions/0008.
const UNSAFE: (&str, &str) = ("crates/model", "src/host.rs");

/// Every package takes the workspace's lints, which forbid unsafe code; the one that has its own allows
/// it in one file.
fn lints() -> Result<()> {
    let packages = fs::read_dir(in_root("crates"))?.map(|entry| Ok(entry?.path()));
    let packages: Vec<_> = packages.collect::<Result<_>>()?;
    for package in packages.into_iter().chain([
        in_root("tests"),
        in_root("tests/platform"),
        in_root("benches"),
    ]) {
        let manifest = package.join("Cargo.toml");
        if package == in_root(UNSAFE.0) || !manifest.exists() {
            continue;
        }
        ensure!(
            fs::read_to_string(&manifest)?.contains("[lints]\nworkspace = true\n"),
            "{} does not take the workspace's lints: add [lints] with workspace = true",
            manifest.display()
        );
    }
    let allowed = output(git().args(["grep", "-l", "allow(unsafe_code)", "--", "*.rs"]))?;
    let (expected, ours) = (format!("{}/{}", UNSAFE.0, UNSAFE.1), "crates/xtask/src/checks.rs");
    let others: Vec<_> =
        allowed.lines().filter(|file| *file != expected && *file != ours).collect();
    ensure!(
        others.is_empty(),
        "unsafe code belongs into {expected}, not into {}",
        others.join(", ")
    );
    eprintln!("unsafe code: in {expected} only");
    Ok(())
}

fn git() -> Command {
    let mut command = Command::new("git");
    command.current_dir(root());
    command
}
