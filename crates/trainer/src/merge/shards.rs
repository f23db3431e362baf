//! Which tensor goes into which file, and the files, by the names that Transformers gives them.

use super::{Source, write_json};
use crate::TrainError;
use offshoot_model::{Parameter, host};
use safetensors::tensor::{Dtype, View};
use serde_json::{Map, Value, json};
use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::HashMap;
use std::fs;
use std::path::Path;
use tch::Kind;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// One tensor of a file.
struct Place {
    parameter: Parameter,
    kind: Kind,
    /// The same as the parameter's.
    shape: Vec<usize>,
}

impl Place {
    fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.kind.elt_size_in_bytes()
    }
}

/// The files and what is in them.
pub(super) struct Plan {
    files: Vec<Vec<Place>>,
}

impl Plan {
    /// Fills one file after the other. A tensor larger than `max_bytes` gets one of its own.
    pub fn new<'a>(tensors: impl Iterator<Item = (&'a Parameter, Kind)>, max_bytes: u64) -> Self {
        let mut files: Vec<Vec<Place>> = vec![Vec::new()];
        let mut used = 0;
        for (parameter, kind) in tensors {
            let shape = parameter.shape.iter().map(|&n| n as usize).collect();
            let place = Place { parameter: parameter.clone(), kind, shape };
            let bytes = place.bytes() as u64;
            if used > 0 && used + bytes > max_bytes {
                files.push(Vec::new());
                used = 0;
            }
            used += bytes;
            files.last_mut().expect("there is a first file").push(place);
        }
        Plan { files }
    }

    pub fn n_files(&self) -> usize {
        self.files.len()
    }

    pub fn n_tensors(&self) -> usize {
        self.files.iter().map(Vec::len).sum()
    }

    pub fn bytes(&self) -> u64 {
        self.files.iter().flatten().map(|place| place.bytes() as u64).sum()
    }

    fn file_name(&self, index: usize) -> String {
        match self.n_files() {
            1 => SINGLE.into(),
            n => format!("model-{:05}-of-{n:05}.safetensors", index + 1),
        }
    }

    /// Writes the files, and the index if there are several.
    pub fn write(&self, dir: &Path, source: &Source<'_>) -> Result<(), TrainError> {
        let mut weight_map = Map::new();
        for (i, places) in self.files.iter().enumerate() {
            let name = self.file_name(i);
            write_file(&dir.join(&name), places, source)?;
            let in_file = places.iter().map(|place| place.parameter.name.clone());
            weight_map.extend(in_file.map(|tensor| (tensor, Value::from(name.clone()))));
        }
        if self.n_files() == 1 {
            return Ok(());
        }
        let index = json!({ "metadata": { "total_size": self.bytes() }, "weight_map": weight_map });
        write_json(&dir.join(INDEX), &index)
    }
}

fn write_file(path: &Path, places: &[Place], source: &Source<'_>) -> Result<(), TrainError> {
    let failed = RefCell::new(None);
    let tensors = places.iter().map(|place| {
        let lazy = Lazy { place, source, failed: &failed };
        (place.parameter.name.as_str(), lazy)
    });
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    let written = safetensors::serialize_to_file(tensors, Some(metadata), path);
    if let Some(error) = failed.take() {
        return Err(error);
    }
    written.map_err(|error| match error {
        safetensors::SafeTensorError::IoError(source) => {
            TrainError::Io { path: path.into(), source }
        }
        other => TrainError::Io { path: path.into(), source: std::io::Error::other(other) },
    })?;
    // The library makes it a private file; it is as public as any other file of this folder.
    let usual = path.with_file_name(super::settings::CONFIG);
    let permissions = fs::metadata(&usual).map_err(TrainError::io(&usual))?.permissions();
    fs::set_permissions(path, permissions).map_err(TrainError::io(path))
}

/// A tensor that is made when its bytes are written, and dropped then.
struct Lazy<'a> {
    place: &'a Place,
    source: &'a Source<'a>,
    /// The first error; the file is worth nothing then.
    failed: &'a RefCell<Option<TrainError>>,
}

impl View for Lazy<'_> {
    fn dtype(&self) -> Dtype {
        match self.place.kind {
            Kind::BFloat16 => Dtype::BF16,
            Kind::Half => Dtype::F16,
            _ => Dtype::F32,
        }
    }

    fn shape(&self) -> &[usize] {
        &self.place.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        if self.failed.borrow().is_some() {
            return Cow::Owned(Vec::new());
        }
        let Place { parameter, kind, .. } = self.place;
        match self.source.tensor(parameter, *kind) {
            Ok(tensor) => Cow::Owned(host::bytes_of(&tensor, *kind).to_vec()),
            Err(error) => {
                *self.failed.borrow_mut() = Some(error);
                Cow::Owned(Vec::new())
            }
        }
    }

    fn data_len(&self) -> usize {
        self.place.bytes()
    }
}
