//! The real helm, without a cluster and without the user's own settings.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use super::CHART;
use crate::command::{in_root, output, target_dir};
use crate::tools::program;

/// The release and its namespace in all renders.
const RELEASE: [&str; 4] = ["trunk", CHART, "--namespace", "ml"];

pub struct Helm {
    program: PathBuf,
}

impl Helm {
    pub fn new() -> Result<Helm> {
        Ok(Helm { program: program("helm")? })
    }

    fn command(&self) -> Command {
        let home = target_dir().join("tools/helm-home");
        let mut command = Command::new(&self.program);
        command.current_dir(in_root(""));
        for name in ["HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME"] {
            command.env(name, &home);
        }
        command
    }

    /// `helm lint --strict` with one set of values.
    pub fn lint(&self, values: &Path) -> Result<()> {
        output(self.command().args(["lint", "--strict", CHART, "--values"]).arg(values)).map(drop)
    }

    /// All objects of one set of values.
    pub fn render(&self, values: &Path) -> Result<String> {
        output(self.command().arg("template").args(RELEASE).arg("--values").arg(values))
    }

    /// What helm says when it refuses one set of values with some changed; none if it renders.
    pub fn refusal(&self, values: &Path, changes: &[&str]) -> Result<Option<String>> {
        let mut command = self.command();
        command.arg("template").args(RELEASE).arg("--values").arg(values);
        for change in changes {
            match change.starts_with("--") {
                true => command.arg(change),
                false => command.args(["--set-json", change]),
            };
        }
        let said = command.stdin(Stdio::null()).output().context("cannot start helm")?;
        let text = || String::from_utf8_lossy(&said.stderr).into_owned();
        Ok((!said.status.success()).then(text))
    }

    /// What `helm install` tells with one set of values.
    pub fn notes(&self, values: &Path) -> Result<String> {
        let mut command = self.command();
        command.arg("install").args(RELEASE).args(["--dry-run=client", "--values"]).arg(values);
        let text = output(&mut command)?;
        let notes = text.split_once("\nNOTES:\n").map(|(_, notes)| notes.to_owned());
        notes.with_context(|| format!("helm install has no notes with {}", values.display()))
    }
}

/// The files of charts/offshoot/ci, by name.
pub fn value_sets() -> Result<Vec<PathBuf>> {
    let folder = in_root(CHART).join("ci");
    let entries = fs::read_dir(&folder).with_context(|| folder.display().to_string())?;
    let mut files = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "yaml") {
            files.push(path);
        }
    }
    ensure!(!files.is_empty(), "{} has no sets of values", folder.display());
    files.sort();
    Ok(files)
}

/// `gpu` for `ci/gpu.yaml`.
pub fn name_of(values: &Path) -> String {
    values.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}
