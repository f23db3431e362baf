//! libtorch for the build: `.libtorch`, where `.cargo/config.toml` points torch-sys to.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::command::{in_root, output};
use crate::pip;

/// The version that tch 0.24 is written for.
pub const VERSION: &str = "2.11.0";
/// The torch wheel and the two small libraries of CUDA that its CPU half is linked against.
const WHEELS: &str = include_str!("../python/libtorch.txt");

/// Each with its version, such as `torch==2.11.0`.
pub fn wheels() -> impl Iterator<Item = &'static str> {
    WHEELS.lines().filter(|line| !line.is_empty() && !line.starts_with('#'))
}

/// Puts libtorch where the build looks for it; does nothing when it is there.
pub fn libtorch() -> Result<()> {
    let ours = in_root(".libtorch");
    // Cargo sets LIBTORCH to ours, unless the user's environment has another one.
    match std::env::var_os("LIBTORCH").map(PathBuf::from) {
        Some(other) if !same(&other, &ours) => {
            ensure!(
                is_complete(&other),
                "LIBTORCH names {}, and there is no libtorch {VERSION} (lib/, include/ and \
                 build-version). Name another folder, or unset LIBTORCH to have one fetched.",
                other.display()
            );
            eprintln!("libtorch {VERSION}: yours, {}", other.display());
            return Ok(());
        }
        _ => {}
    }
    if is_complete(&ours) {
        eprintln!("libtorch {VERSION}: already in .libtorch");
        return Ok(());
    }
    ensure!(
        cfg!(all(target_os = "linux", target_arch = "x86_64")),
        "setup fetches libtorch for Linux on x86-64 only; elsewhere, set LIBTORCH to a libtorch \
         {VERSION} of your own"
    );
    // This file is what says that all is there: it goes first and comes last.
    let _ = fs::remove_file(ours.join("build-version"));
    let wheels = ours.join("wheels");
    let _ = fs::remove_dir_all(&wheels);
    let names: Vec<_> = self::wheels().collect();
    pip::download(&names, &wheels, &format!("libtorch {VERSION}: downloading"))?;
    eprintln!("libtorch {VERSION}: unpacking");
    let script = in_root("crates/xtask/python/unpack_libtorch.py");
    output(pip::python().arg(script).arg(&wheels).arg(&ours))?;
    fs::remove_dir_all(&wheels)?;
    fs::write(ours.join("build-version"), format!("{VERSION}\n"))
        .context("cannot write .libtorch/build-version")?;
    eprintln!("libtorch {VERSION}: ready in .libtorch");
    Ok(())
}

fn same(a: &Path, b: &Path) -> bool {
    a == b || matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b)
}

fn is_complete(prefix: &Path) -> bool {
    // Builds of others write a suffix, such as 2.11.0+cpu.
    fs::read_to_string(prefix.join("build-version"))
        .is_ok_and(|v| v.trim().split('+').next() == Some(VERSION))
        && ["lib/libtorch_cpu.so", "include"].iter().all(|p| prefix.join(p).exists())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wheels_are_of_the_version_that_the_build_expects() {
        let names: Vec<_> = wheels().collect();
        assert_eq!(names.len(), 3);
        assert_eq!(names[0], format!("torch=={VERSION}"));
    }
}
