use super::held_out::HeldOut;
use super::{Columns, DataSource};
use crate::TrainError;
use crate::data::hub;
use crate::data::read::{self, FileSource, Folder, Splits};
use offshoot_model::weights::HubSettings;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What the command line says about a run's data: files and folders, or a data set of the hub.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
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

/// What of a data set is wanted.
#[derive(Clone, Copy, PartialEq)]
enum Parts {
    All,
    Evaluation,
}

/// What a run reads.
pub struct Sources {
    /// To train on, in order.
    pub train: Vec<Box<dyn DataSource>>,
    /// To evaluate on; may be empty.
    pub eval: Vec<Box<dyn DataSource>>,
}

impl Sources {
    /// Takes a part of the training records out of training, to evaluate on: about `fraction` of
    /// them. Which ones depends on `seed` and on what is in them, so equal records stay together.
    pub fn hold_out(self, fraction: f64, seed: u64) -> Sources {
        let (train, eval) = HeldOut::split(self.train, fraction, seed);
        Sources { train: vec![Box::new(train)], eval: vec![Box::new(eval)] }
    }
}

impl DataSpec {
    /// Files and folders to train on, and nothing to evaluate.
    pub fn files(train_files: Vec<PathBuf>) -> DataSpec {
        DataSpec { train_files, ..DataSpec::default() }
    }

    /// The first thing that no run can have; no file is looked at.
    pub fn validate(&self) -> Result<(), TrainError> {
        let wrong = |option, value: &str, problem: &str| {
            Err(TrainError::Option { option, value: value.into(), problem: problem.into() })
        };
        match (&self.dataset_name, self.train_files.is_empty()) {
            (None, true) => {
                return wrong(
                    "train-file",
                    "(none)",
                    "name what to train on: a file or folder with --train-file, or a data set of the hub with --dataset-name",
                );
            }
            (Some(name), false) => {
                return wrong(
                    "dataset-name",
                    name,
                    "leave it or --train-file out: a run trains on one of them",
                );
            }
            _ => {}
        }
        if self.dataset_name.is_none() {
            let of_dataset = [
                ("dataset-config", self.dataset_config.as_deref()),
                ("eval-split", self.eval_split.as_deref()),
                ("train-split", Some(self.train_split.as_str()).filter(|split| *split != "train")),
            ];
            if let Some((option, Some(value))) = of_dataset.into_iter().find(|(_, v)| v.is_some()) {
                return wrong(
                    option,
                    value,
                    "only a data set (--dataset-name) has configs and splits",
                );
            }
        }
        let fraction = self.eval_fraction.to_string();
        if !(0.0..1.0).contains(&self.eval_fraction) {
            return wrong("eval-fraction", &fraction, "expected 0 to below 1, such as 0.05");
        }
        if self.eval_fraction > 0.0 && (!self.eval_files.is_empty() || self.eval_split.is_some()) {
            return wrong(
                "eval-fraction",
                &fraction,
                "leave it out, or --eval-file and --eval-split: a run evaluates on one of them",
            );
        }
        if self.eval_split.is_some() && !self.eval_files.is_empty() {
            return wrong(
                "eval-split",
                self.eval_split.as_deref().unwrap_or_default(),
                "leave it or --eval-file out: a run evaluates on one of them",
            );
        }
        if let Some((option, other)) = self.columns.conflict() {
            let problem =
                format!("leave it or --{other} out: they stand for different kinds of records");
            return wrong(option, "(column)", &problem);
        }
        for (option, n) in [
            ("max-train-samples", self.max_train_samples),
            ("max-eval-samples", self.max_eval_samples),
        ] {
            if n == Some(0) {
                return wrong(option, "0", "expected at least 1");
            }
        }
        Ok(())
    }

    /// Whether there can be something to evaluate on; of a data set its splits decide, which are not
    /// known before it is opened.
    pub fn may_evaluate(&self) -> bool {
        self.dataset_name.is_some() || !self.eval_files.is_empty() || self.eval_fraction > 0.0
    }

    /// Finds the files, fetching those of a hub data set as the environment says
    /// ([`HubSettings::from_env`]); records are read only when they are asked for.
    pub fn open(&self) -> Result<Sources, TrainError> {
        self.open_with(&HubSettings::from_env())
    }

    /// Only what is evaluated on: `eval_files`, or that split of the data set, whose other splits are
    /// not even fetched.
    ///
    /// # Errors
    /// Also if there is nothing to evaluate on.
    pub fn open_evaluation(&self) -> Result<Vec<Box<dyn DataSource>>, TrainError> {
        match &self.dataset_name {
            None => self.local(&self.eval_files),
            Some(name) => Ok(self.dataset(name, &HubSettings::from_env(), Parts::Evaluation)?.eval),
        }
    }

    /// The same as [`DataSpec::open`] with a hub of your own.
    pub fn open_with(&self, hub: &HubSettings) -> Result<Sources, TrainError> {
        self.validate()?;
        let mut sources = match &self.dataset_name {
            None => Sources { train: self.local(&self.train_files)?, eval: Vec::new() },
            Some(name) => self.dataset(name, hub, Parts::All)?,
        };
        if !self.eval_files.is_empty() {
            sources.eval = self.local(&self.eval_files)?;
        }
        Ok(match self.eval_fraction > 0.0 {
            true => sources.hold_out(self.eval_fraction, self.seed),
            false => sources,
        })
    }

    /// Files as they are; a folder stands for the data files in it.
    fn local(&self, paths: &[PathBuf]) -> Result<Vec<Box<dyn DataSource>>, TrainError> {
        let mut sources = Vec::new();
        for path in paths {
            let wrong =
                |problem: String| Err(TrainError::Data { path: path.clone(), line: None, problem });
            if path.is_file() {
                sources.push(FileSource::local(path.clone(), &self.columns));
                continue;
            }
            if !path.exists() {
                return wrong("there is no such file or folder".into());
            }
            let inside = read::folder_files(path)?;
            if inside.is_empty() {
                return wrong(no_data(&read::files_below(path)?));
            }
            tell_of_splits(path, &inside);
            let below = read::folders_with_data(path)?;
            if !below.is_empty() {
                tracing::warn!(
                    folder = %path.display(),
                    files_read = inside.len(),
                    folders_not_read = below.join(", "),
                    "a folder stands for the files in it, not for those in the folders below; name those too, or the whole with --dataset-name"
                );
            }
            sources.extend(inside.into_iter().map(|file| FileSource::local(file, &self.columns)));
        }
        Ok(sources)
    }

    fn dataset(
        &self,
        name: &str,
        settings: &HubSettings,
        parts: Parts,
    ) -> Result<Sources, TrainError> {
        let path = Path::new(name);
        if path.is_file() {
            let asked = [self.dataset_config.as_deref(), self.eval_split.as_deref()];
            if asked.iter().any(Option::is_some) || self.train_split != "train" {
                let problem = "a single file has no configs and splits; leave --dataset-config, --train-split and --eval-split out";
                return Err(TrainError::Data {
                    path: path.into(),
                    line: None,
                    problem: problem.into(),
                });
            }
            let file = self.local(&[path.into()])?;
            return Ok(match parts {
                Parts::All => Sources { train: file, eval: Vec::new() },
                Parts::Evaluation => Sources { train: Vec::new(), eval: file },
            });
        }
        if !path.is_dir() {
            return self.hub(name, settings, parts);
        }
        let files = read::files_below(path)?;
        let card = std::fs::read_to_string(path.join("README.md")).ok();
        let folder = Folder { files, card, converted: false };
        let wrong = |problem| TrainError::Data { path: path.into(), line: None, problem };
        let splits = folder.splits(self.dataset_config.as_deref()).map_err(wrong)?;
        if splits.is_empty() {
            return Err(wrong(no_data(&folder.files)));
        }
        let source = |file: &String| FileSource::local(path.join(file), &self.columns);
        let (train, eval) = self.choose(&splits, parts).map_err(wrong)?;
        Ok(Sources {
            train: train.iter().map(source).collect(),
            eval: eval.iter().map(source).collect(),
        })
    }

    fn hub(&self, name: &str, settings: &HubSettings, parts: Parts) -> Result<Sources, TrainError> {
        let hub::Found { splits, snapshot } =
            hub::find(name, self.dataset_config.as_deref(), settings)?;
        let choice = |problem| hub::DataSetError::Choice { name: name.into(), problem };
        let (train, eval) = self.choose(&splits, parts).map_err(choice)?;
        let snapshot = Arc::new(snapshot);
        let sources = |files: &[String], limit: Option<usize>| {
            // With a limit of samples the first files may be enough: each is fetched when it is read.
            for file in files.iter().filter(|_| limit.is_none()) {
                snapshot.file(file)?;
            }
            let source = |file: &String| FileSource::hub(&snapshot, name, file, &self.columns);
            Ok::<_, TrainError>(files.iter().map(source).collect())
        };
        Ok(Sources {
            train: sources(train, self.max_train_samples)?,
            eval: sources(eval, self.max_eval_samples)?,
        })
    }

    /// The files to train on, and those to evaluate on.
    fn choose<'a>(
        &self,
        splits: &'a Splits,
        parts: Parts,
    ) -> Result<(&'a [String], &'a [String]), String> {
        let found = match &self.eval_split {
            Some(split) => Some(splits.files(split)?),
            None => splits.evaluation().map(|split| splits.files(split)).transpose()?,
        };
        if parts == Parts::Evaluation {
            return match found {
                Some(eval) => Ok((&[], eval)),
                None => splits.files("validation").map(|eval| (&[] as &[String], eval)),
            };
        }
        let train = splits.files(&self.train_split)?;
        let elsewhere = self.eval_fraction > 0.0 || !self.eval_files.is_empty();
        let eval = found.filter(|_| !elsewhere).unwrap_or_default();
        // A run that trains on the split that would be evaluated on has nothing to evaluate on.
        Ok((train, if eval == train && self.eval_split.is_none() { &[] } else { eval }))
    }
}

/// Why a folder with these files gives nothing to learn from.
fn no_data(files: &[String]) -> String {
    if files.iter().any(|file| read::is_data(file)) {
        return "no data file in this folder itself; with --dataset-name those in the folders below are read too".into();
    }
    let endings = read::Format::endings();
    match files.iter().any(|file| file.ends_with(".arrow")) {
        true => "this folder holds Arrow files, as save_to_disk of the datasets package writes them, which are not read; write the data set with its to_parquet or to_json".into(),
        false => format!("no data file in this folder; expected names ending with {endings}"),
    }
}

/// Who names a folder as a file trains on all of it, perhaps without meaning to.
fn tell_of_splits(folder: &Path, files: &[PathBuf]) {
    let names = files.iter().filter_map(|file| file.file_name());
    let files = names.map(|name| name.to_string_lossy().into_owned()).collect();
    let splits = Folder { files, card: None, converted: false }.splits(None);
    let splits = splits.as_ref().map_or_else(|_| Vec::new(), Splits::names);
    if splits.len() > 1 {
        tracing::warn!(
            folder = %folder.display(),
            ?splits,
            "the folder holds several splits, and all of them are read; name it with --dataset-name to read one"
        );
    }
}
