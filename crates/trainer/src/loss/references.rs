//! What the model gave before training, which DPO compares with: computed once, through the same
//! split, and kept beside the checkpoints, so that a run that goes on has them.

use crate::TrainError;
use crate::data::DataSet;
use crate::setup::Prepared;
use crate::train::Run;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use std::collections::HashMap;
use std::fs;
use std::path::Path;

/// In the output directory.
const FILE: &str = "dpo_reference.safetensors";
const TENSORS: [&str; 2] = ["train", "eval"];

/// Log-probabilities of the predicted tokens of each sample, summed.
#[derive(Clone, Debug, PartialEq)]
struct References {
    /// Of the training data and of the evaluation data, which may be empty.
    values: [Vec<f64>; 2],
    /// What they belong to: names and fingerprints.
    of: HashMap<String, String>,
}

impl Run {
    /// Lets a loss that compares with the model as the run began know what that gave. Does nothing
    /// for other losses, or if it was done.
    pub(crate) async fn set_references(&mut self) -> Result<(), TrainError> {
        let Some(dpo) = &self.prepared.losses.dpo else { return Ok(()) };
        if dpo.iter().all(|loss| loss.has_references()) {
            return Ok(());
        }
        let dir = &self.options.output.dir;
        let references = if self.step == 0 {
            self.compute_references().await?
        } else {
            // Trained weights cannot give them any more.
            let of_run = self.resumed.as_ref().and_then(|saved| saved.path.parent());
            let path = of_run.unwrap_or(dir).join(FILE);
            let references = References::read(&path)?;
            references.check(&path, &self.belongs_to())?;
            references
        };
        references.write(&dir.join(FILE))?;
        for (loss, values) in dpo.iter().zip(references.values) {
            loss.set_references(values);
        }
        Ok(())
    }

    async fn compute_references(&self) -> Result<References, TrainError> {
        let data = [Some(&self.prepared.data), self.prepared.eval.as_ref()];
        let mut values = [Vec::new(), Vec::new()];
        for (data, values) in data.into_iter().zip(&mut values) {
            if let Some(data) = data {
                *values = self.log_probs(data).await?;
            }
        }
        let n_pairs = values.iter().map(Vec::len).sum::<usize>() / 2;
        self.report.line(&format!("dpo: {n_pairs} pairs compared with the model as it is now"));
        Ok(References { values, of: self.belongs_to() })
    }

    /// In evaluation mode, of each sample.
    async fn log_probs(&self, data: &DataSet) -> Result<Vec<f64>, TrainError> {
        let max_tokens = self.prepared.server.limits.max_tokens_per_microbatch as usize;
        let batches = data.in_order(self.options.steps.microbatch_size(), max_tokens)?;
        let mut values = vec![0.0; data.len()];
        let Prepared { split, .. } = &self.prepared;
        let log_probs = split.log_probs(&self.session, &batches, self.n_in_flight()).await?;
        for (batch, log_probs) in batches.iter().zip(log_probs) {
            for (&sample, log_prob) in batch.samples.iter().zip(log_probs) {
                values[sample] = log_prob;
            }
        }
        Ok(values)
    }

    fn belongs_to(&self) -> HashMap<String, String> {
        let settings = &self.prepared.settings;
        let eval = self.prepared.eval.as_ref().map(DataSet::fingerprint).unwrap_or_default();
        let of = [
            ("model", settings.fingerprint.clone()),
            ("training data", settings.data_fingerprint.clone()),
            ("evaluation data", eval),
        ];
        of.map(|(name, fingerprint)| (name.to_string(), fingerprint)).into()
    }
}

impl References {
    /// Written under another name, synced and renamed.
    fn write(&self, path: &Path) -> Result<(), TrainError> {
        let bytes = self
            .values
            .each_ref()
            .map(|values| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>());
        let views = TENSORS.iter().zip(&bytes).map(|(name, bytes)| {
            let view = TensorView::new(Dtype::F64, vec![bytes.len() / 8], bytes);
            (*name, view.expect("eight bytes for each value"))
        });
        let file = safetensors::serialize(views, Some(self.of.clone()))
            .expect("two flat tensors can be serialised");
        let fresh = path.with_extension("new");
        fs::write(&fresh, file).map_err(TrainError::io(&fresh))?;
        let written = fs::File::open(&fresh).and_then(|file| file.sync_all());
        written.map_err(TrainError::io(&fresh))?;
        fs::rename(&fresh, path).map_err(TrainError::io(path))
    }

    fn read(path: &Path) -> Result<Self, TrainError> {
        let wrong = |problem: String| TrainError::Checkpoint { path: path.into(), problem };
        let bytes = fs::read(path).map_err(|error| {
            wrong(format!(
                "the log-probabilities that DPO compares with cannot be read ({error}); a run writes them before its first step and needs them to go on: put the file back, or begin a new run"
            ))
        })?;
        let broken = |error| wrong(format!("not a safetensors file ({error}); was it cut off?"));
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(broken)?;
        let file = SafeTensors::deserialize(&bytes).map_err(broken)?;
        let mut values = [Vec::new(), Vec::new()];
        for (name, values) in TENSORS.iter().zip(&mut values) {
            let view = file.tensor(name).map_err(broken)?;
            if view.dtype() != Dtype::F64 {
                return Err(wrong(format!("{name} is {:?}, expected F64", view.dtype())));
            }
            *values =
                view.data().as_chunks::<8>().0.iter().map(|v| f64::from_le_bytes(*v)).collect();
        }
        Ok(References { values, of: header.metadata().clone().unwrap_or_default() })
    }

    fn check(&self, path: &Path, wanted: &HashMap<String, String>) -> Result<(), TrainError> {
        for (name, wanted) in wanted {
            let found = self.of.get(name).cloned().unwrap_or_default();
            if found != *wanted {
                return Err(TrainError::Checkpoint {
                    path: path.into(),
                    problem: format!(
                        "what DPO compares with is of another {name} (fingerprint {found:?}, here it is {wanted:?}); go on with the {name} that the run began with, or begin a new run"
                    ),
                });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_survive_their_file_and_are_of_one_data_set() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        let of = |data: &str| HashMap::from([("training data".to_string(), data.to_string())]);
        let references = References { values: [vec![-1.5, -2.0 / 3.0], vec![]], of: of("a") };
        references.write(&path).unwrap();
        let read = References::read(&path).unwrap();
        assert_eq!(read, references);
        read.check(&path, &of("a")).unwrap();
        let error = read.check(&path, &of("b")).unwrap_err().to_string();
        assert!(error.contains("another training data"), "{error}");
        fs::write(&path, &fs::read(&path).unwrap()[..20]).unwrap();
        let error = References::read(&path).unwrap_err().to_string();
        assert!(error.contains("was it cut off?"), "{error}");
        fs::remove_file(&path).unwrap();
        let error = References::read(&path).unwrap_err().to_string();
        assert!(error.contains("put the file back"), "{error}");
    }
}
