//! Whether a disturbed run ended as the one that nobody disturbed, bit by bit.

use anyhow::{Context, ensure};
use offshoot_adapters::AdapterState;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// What a run left, comparable.
pub struct Outcome {
    /// The exported adapter and the last checkpoint of the client's parts, by path in the run's folder.
    files: BTreeMap<String, Vec<u8>>,
    /// The trunk's adapter with its optimizer, as the store has it after the last step.
    trunk: Vec<u8>,
    /// Loss and gradient norm of each step, and each evaluation, as `metrics.jsonl` has them.
    steps: Vec<(u64, String)>,
    evaluations: Vec<(u64, String)>,
}

impl Outcome {
    /// Reads a run that is over, and its server's store, which nobody has open.
    pub fn read(output: &Path, store: &Path, n_steps: u64) -> anyhow::Result<Outcome> {
        let mut files = BTreeMap::new();
        for folder in ["adapter".to_string(), format!("checkpoint_step_{n_steps}")] {
            tensors(output, &folder, &mut files)?;
        }
        ensure!(files.keys().any(|name| name.starts_with("adapter/")), "no adapter was exported");
        let optimizers = files.keys().filter(|name| name.ends_with("optimizer.safetensors"));
        ensure!(optimizers.count() > 0, "the last checkpoint has no optimizer");
        let (mut steps, mut evaluations) = (Vec::new(), Vec::new());
        let metrics = output.join("metrics.jsonl");
        for line in fs::read_to_string(&metrics).context("the run has no metrics.jsonl")?.lines() {
            let event: serde_json::Value = serde_json::from_str(line)?;
            let step = event["step"].as_u64().unwrap_or_default();
            match event["event"].as_str() {
                Some("step") => {
                    steps.push((step, format!("{} {}", event["loss"], event["grad_norm"])));
                }
                Some("eval") => evaluations.push((step, event["loss"].to_string())),
                _ => {}
            }
        }
        Ok(Outcome { files, trunk: trunk(store, n_steps)?, steps, evaluations })
    }

    /// Steps that are not there, and steps that are there twice.
    pub fn lost_and_doubled(&self, n_steps: u64) -> (u64, u64) {
        let mut counts = BTreeMap::new();
        self.steps.iter().for_each(|(step, _)| *counts.entry(*step).or_insert(0u64) += 1);
        let lost = (1..=n_steps).filter(|step| !counts.contains_key(step)).count() as u64;
        (lost, counts.values().map(|count| count - 1).sum())
    }

    /// Says what differs first.
    pub fn equals(&self, expected: &Outcome) -> anyhow::Result<()> {
        for (found, expected) in self.steps.iter().zip(&expected.steps) {
            ensure!(
                found == expected,
                "loss and gradient norm of a step: {found:?}, not {expected:?}"
            );
        }
        ensure!(self.steps.len() == expected.steps.len(), "another number of steps");
        ensure!(self.evaluations == expected.evaluations, "an evaluation differs");
        let names = |of: &Outcome| of.files.keys().cloned().collect::<Vec<_>>();
        ensure!(names(self) == names(expected), "other files: {:?}", names(self));
        for (name, bytes) in &self.files {
            ensure!(*bytes == expected.files[name], "{name} differs");
        }
        ensure!(self.trunk == expected.trunk, "the trunk's optimizer differs");
        Ok(())
    }

    /// Of all files that are compared.
    pub fn n_bytes(&self) -> usize {
        self.files.values().map(Vec::len).sum::<usize>() + self.trunk.len()
    }
}

/// All tensor files below a folder.
fn tensors(
    output: &Path,
    folder: &str,
    files: &mut BTreeMap<String, Vec<u8>>,
) -> anyhow::Result<()> {
    let path = output.join(folder);
    for entry in fs::read_dir(&path).with_context(|| format!("{} is missing", path.display()))? {
        let entry = entry?;
        let name = format!("{folder}/{}", entry.file_name().to_string_lossy());
        if entry.file_type()?.is_dir() {
            tensors(output, &name, files)?;
        } else if name.ends_with(".safetensors") {
            files.insert(name, fs::read(entry.path())?);
        }
    }
    Ok(())
}

/// The states of the last step in the store: all of them must be the same.
fn trunk(store: &Path, n_steps: u64) -> anyhow::Result<Vec<u8>> {
    let mut found: Vec<Vec<u8>> = Vec::new();
    for entry in fs::read_dir(store.join("blobs")).context("the store has no blobs")? {
        let bytes = fs::read(entry?.path())?;
        // Others are recorded answers.
        let state = AdapterState::from_safetensors(&bytes).ok();
        if state.is_some_and(|state| state.n_steps == n_steps) {
            found.push(bytes);
        }
    }
    ensure!(found.len() == 1, "{} different states of the last step in the store", found.len());
    found.pop().context("there is one")
}
