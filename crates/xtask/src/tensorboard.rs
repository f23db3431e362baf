//! Runs are read with TensorBoard itself: what its readers show is what `metrics.jsonl` has.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Result, ensure};

use crate::command::{in_root, run, target_dir};
use crate::pip;

/// With all that it needs, some 200 MB; no TensorFlow.
const PACKAGE: &str = "tensorboard==2.21.0";

/// Checks the event files of runs, fetching TensorBoard if it is not there.
pub fn check(runs: &[PathBuf]) -> Result<()> {
    for run in runs {
        ensure!(
            run.join("metrics.jsonl").is_file() && run.join("tensorboard").is_dir(),
            "{} has no metrics.jsonl with a tensorboard folder beside it; expected the --output-dir \
             of `offshoot train`, without --no-tensorboard",
            run.display()
        );
    }
    let environment = target_dir().join("tensorboard-python");
    let python = environment.join("bin/python");
    if !python.exists() {
        // Its dependencies have native parts, made for the Python that is going to run them.
        run(pip::python().args(["-m", "venv"]).arg(&environment))?;
    }
    let install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", PACKAGE];
    run(Command::new(&python).args(install))?;
    let script = in_root("tests/development/read_tensorboard.py");
    run(Command::new(&python).arg(script).args(runs))
}
