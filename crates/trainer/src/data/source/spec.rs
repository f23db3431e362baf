use super::super::read;
use super::{Columns, DataSource};
use crate::TrainError;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// What the command line says about a run's data: files and folders, or a data set of the hub.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DataSpec {
    /// A file or folder if there is one of this name, otherwise a data set of the hub.
    pub dataset_name: Option<String>,
    /// Which part of a data set that has several, such as `wikitext-2-raw-v1`.
    pub dataset_config: Option<String>,
    /// To train on.
    pub train_split: String,
    /// To evaluate on; without it `validation` or `test`, if there is one.
    pub eval_split: Option<String>,
    /// Files and folders to train on.
    pub train_files: Vec<PathBuf>,
    /// Files and folders to evaluate on.
    pub eval_files: Vec<PathBuf>,
    /// Which columns are read.
    pub columns: Columns,
    /// Part of the training records that is evaluated on instead, 0 to below 1.
    pub eval_fraction: f64,
    /// Chooses the records of that part.
    pub seed: u64,
    /// Reading ends after so many samples to train on.
    pub max_train_samples: Option<usize>,
    /// Reading ends after so many samples to evaluate on.
    pub max_eval_samples: Option<usize>,
}

impl Default for DataSpec {
    fn default() -> Self {
        DataSpec {
            dataset_name: None,
            dataset_config: None,
            train_split: "train".into(),
            eval_split: None,
            train_files: Vec::new(),
            eval_files: Vec::new(),
            columns: Columns::default(),
            eval_fraction: 0.0,
            seed: 42,
            max_train_samples: None,
            max_eval_samples: None,
        }
    }
}

/// What a [`DataSpec`] opens.
pub struct Sources {
    /// To train on, in order.
    pub train: Vec<Box<dyn DataSource>>,
    /// To evaluate on; may be empty.
    pub eval: Vec<Box<dyn DataSource>>,
}

impl DataSpec {
    /// Files and folders to train on, and nothing to evaluate.
    pub fn files(train_files: Vec<PathBuf>) -> DataSpec {
        DataSpec { train_files, ..DataSpec::default() }
    }

    /// Finds the files, fetching those of a hub data set; records are read only when asked for.
    pub fn open(&self) -> Result<Sources, TrainError> {
        Ok(Sources {
            train: read::sources(&self.train_files)?,
            eval: read::sources(&self.eval_files)?,
        })
    }
}
