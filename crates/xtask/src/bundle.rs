//! The release binary for handing out: one file for CPU and CUDA.
//!
//! It is linked against the CPU half of libtorch only; with a CUDA build of libtorch on the
//! library path it loads the other half itself when it starts.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::command::{self, cargo, in_root, output};
use crate::{demo, setup};

pub fn run() -> Result<()> {
    setup::libtorch()?;
    command::run(cargo().args(["build", "--release", "--package", "offshoot"]))?;
    let folder = in_root("target/bundle");
    fs::create_dir_all(&folder)?;
    let binary = folder.join("offshoot");
    // A fresh file: the old one may be running.
    let _ = fs::remove_file(&binary);
    fs::copy(demo::binary(), &binary).context("cannot copy the release binary")?;
    command::run(Command::new("strip").arg(&binary))?;

    // Only DT_RUNPATH lets LD_LIBRARY_PATH go first; DT_RPATH would pin the build's own libtorch.
    let dynamic = output(Command::new("readelf").arg("--dynamic").arg(&binary))?;
    ensure!(
        !dynamic.contains("(RPATH)"),
        "the linker wrote DT_RPATH, which goes before LD_LIBRARY_PATH: link with \
         -Wl,--enable-new-dtags"
    );
    let size = fs::metadata(&binary)?.len();
    println!(
        "\ntarget/bundle/offshoot, {:.1} MB

Here it finds .libtorch by itself. Elsewhere, put a libtorch {version} on the library path; with
the torch wheel (CUDA or not) that is
    pip install torch=={version}
    export LD_LIBRARY_PATH=$(python3 -c 'import os, torch; print(os.path.join(torch.__path__[0], \"lib\"))')
    ./offshoot serve --device cuda --model-name MODEL --split-point-1 A --split-point-2 B",
        size as f64 / 1e6,
        version = setup::VERSION,
    );
    Ok(())
}
