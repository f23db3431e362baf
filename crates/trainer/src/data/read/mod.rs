//! Data files as sources: which kind a file is, what is in it, and which files make a split.

mod card;
mod columns;
mod input;
mod json;
mod lines;
mod parquet;
mod splits;
mod table;

pub use columns::Columns;
pub(crate) use splits::{Folder, Splits, is_data};

use super::hub::Snapshot;
use crate::TrainError;
use crate::data::source::{DataSource, Located, Place};
use columns::{Row, Rows};
use input::{Compression, Input};
use lines::Lines;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Counts when the records of one and the same file become others.
const VERSION: &str = "offshoot records 1";

/// How the records stand in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    Text,
    JsonLines,
    Json,
    Csv,
    Tsv,
    Parquet,
}

const ENDINGS: [(&str, Format); 12] = [
    ("txt", Format::Text),
    ("text", Format::Text),
    ("md", Format::Text),
    ("jsonl", Format::JsonLines),
    ("ndjson", Format::JsonLines),
    ("jsonlines", Format::JsonLines),
    ("json", Format::Json),
    ("csv", Format::Csv),
    ("tsv", Format::Tsv),
    ("parquet", Format::Parquet),
    ("pq", Format::Parquet),
    ("parq", Format::Parquet),
];

impl Format {
    /// By a name's ending, with or without one of a compression.
    pub(crate) fn of_name(name: &str) -> Option<Format> {
        let (name, _) = Compression::of_name(name);
        let (_, ending) = name.rsplit_once('.')?;
        let ending = ending.to_lowercase();
        ENDINGS.iter().find(|(known, _)| *known == ending).map(|(_, format)| *format)
    }

    /// All endings that are known, for messages.
    pub(crate) fn endings() -> String {
        let names: Vec<_> = ENDINGS.iter().map(|(ending, _)| format!(".{ending}")).collect();
        format!("{}, each also with .gz or .zst", names.join(", "))
    }
}

/// One data file.
pub(crate) struct FileSource {
    place: FilePlace,
    name: Arc<str>,
    columns: Columns,
}

enum FilePlace {
    Disk(PathBuf),
    /// Fetched when it is read, and not before.
    Hub(Arc<Snapshot>, String),
}

impl FileSource {
    /// A file whose path is its name.
    pub(crate) fn local(path: PathBuf, columns: &Columns) -> Box<dyn DataSource> {
        let name = path.display().to_string().into();
        Box::new(FileSource { place: FilePlace::Disk(path), name, columns: columns.clone() })
    }

    /// `file` of the data set `name`.
    pub(crate) fn hub(
        snapshot: &Arc<Snapshot>,
        name: &str,
        file: &str,
        columns: &Columns,
    ) -> Box<dyn DataSource> {
        let place = FilePlace::Hub(snapshot.clone(), file.into());
        let name = format!("{name}/{file}").into();
        Box::new(FileSource { place, name, columns: columns.clone() })
    }

    fn path(&self) -> Result<PathBuf, TrainError> {
        Ok(match &self.place {
            FilePlace::Disk(path) => path.clone(),
            FilePlace::Hub(snapshot, file) => snapshot.file(file)?,
        })
    }

    /// By the name's ending; without a known one, by the first bytes, and text at last.
    fn format(&self) -> Result<Format, TrainError> {
        if let Some(format) = Format::of_name(&self.name) {
            return Ok(format);
        }
        let mut input = Input::open(&self.path()?, &self.name)?;
        let mut magic = Vec::new();
        let read = (&mut input.reader).take(parquet::MAGIC.len() as u64).read_to_end(&mut magic);
        read.map_err(|error| input.origin.failed(&input.origin.whole(), &error))?;
        Ok(if magic == parquet::MAGIC { Format::Parquet } else { Format::Text })
    }

    fn located(&self) -> Result<Box<dyn Iterator<Item = Located> + Send + '_>, TrainError> {
        let path = self.path()?;
        let open = || Input::open(&path, &self.name);
        let columns = &self.columns;
        let rows: Rows = match self.format()? {
            Format::Text => return Ok(Box::new(lines::paragraphs(Lines::new(open()?)))),
            Format::JsonLines => Box::new(lines::json_lines(Lines::new(open()?))),
            Format::Json => json::rows(open, columns)?,
            Format::Csv => table::rows(open()?, None, columns)?,
            Format::Tsv => table::rows(open()?, Some(b'\t'), columns)?,
            Format::Parquet => parquet::rows(&path, &self.name, columns)?,
        };
        Ok(Box::new(rows.map(|row| {
            let (place, row) = row?;
            let record = record(&row, columns).map_err(|problem| place.wrong(problem))?;
            Ok((place, record))
        })))
    }
}

fn record(row: &Row, columns: &Columns) -> Result<super::source::Record, String> {
    let names: Vec<&str> = row.keys().map(String::as_str).collect();
    columns.layout(&names)?.record(row)
}

impl DataSource for FileSource {
    fn name(&self) -> String {
        self.name.to_string()
    }

    fn records(&self) -> Result<Box<dyn Iterator<Item = Located> + Send + '_>, TrainError> {
        let mut located = self.located()?;
        let (mut any, mut ended) = (false, false);
        Ok(Box::new(std::iter::from_fn(move || {
            if ended {
                return None;
            }
            let next = located.next();
            ended = !matches!(next, Some(Ok(_)));
            if next.is_none() && !any {
                return Some(Err(Place::whole(self.name.clone()).wrong("the file is empty")));
            }
            any = true;
            next
        })))
    }

    fn fingerprint(&self) -> Result<Option<String>, TrainError> {
        let mut hasher = blake3::Hasher::new();
        let how = format!("{VERSION} {:?} {:?}", self.format()?, self.columns);
        hasher.update(how.as_bytes());
        match &self.place {
            FilePlace::Disk(path) => {
                let file = File::open(path).map_err(TrainError::io(path))?;
                hasher.update_reader(file).map_err(TrainError::io(path))?;
            }
            // The commit stands for the content, so that nothing is fetched for this.
            FilePlace::Hub(snapshot, file) => {
                hasher.update(format!(" {} {file}", snapshot.commit()).as_bytes());
            }
        }
        Ok(Some(hasher.finalize().to_hex()[..32].to_string()))
    }
}

/// The data files of a folder, sorted by name; folders within it are not looked into.
pub(crate) fn folder_files(folder: &Path) -> Result<Vec<PathBuf>, TrainError> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).map_err(TrainError::io(folder))? {
        let entry = entry.map_err(TrainError::io(folder))?;
        if is_data(&entry.file_name().to_string_lossy()) && entry.path().is_file() {
            files.push(entry.path());
        }
    }
    files.sort();
    Ok(files)
}

/// The names of the folders in a folder that have data files themselves, sorted. What cannot be
/// looked into has none.
pub(crate) fn folders_with_data(folder: &Path) -> Result<Vec<String>, TrainError> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).map_err(TrainError::io(folder))? {
        let entry = entry.map_err(TrainError::io(folder))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let path = entry.path();
        let is_open = !name.starts_with(['.', '_']) && path.is_dir();
        if is_open && folder_files(&path).is_ok_and(|files| !files.is_empty()) {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

/// All files below a folder, as paths within it with slashes, sorted.
pub(crate) fn files_below(folder: &Path) -> Result<Vec<String>, TrainError> {
    let mut files = Vec::new();
    let mut open = vec![(folder.to_path_buf(), String::new())];
    while let Some((path, within)) = open.pop() {
        for entry in fs::read_dir(&path).map_err(TrainError::io(&path))? {
            let entry = entry.map_err(TrainError::io(&path))?;
            let name = format!("{within}{}", entry.file_name().to_string_lossy());
            match entry.path().is_dir() {
                true => open.push((entry.path(), format!("{name}/"))),
                false => files.push(name),
            }
        }
    }
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod columns_tests;
#[cfg(test)]
mod damage_tests;
#[cfg(test)]
mod tests;
