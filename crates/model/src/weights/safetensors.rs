//! A Hugging Face directory: `config.json` and one or several safetensors files.

use super::{Entries, Entry, Mapped, Opened, Stored, WeightsError};
use ::safetensors::Dtype;
use ::safetensors::tensor::Metadata;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use tch::Kind;

pub(super) const CONFIG: &str = "config.json";
pub(super) const SINGLE: &str = "model.safetensors";
pub(super) const INDEX: &str = "model.safetensors.index.json";
const EXPECTED: &str =
    "config.json with model.safetensors or model.safetensors.index.json, or one .gguf file";
const KNOWN: &str = "F64, F32, F16, BF16, I64, I32, I16, I8, U8, BOOL";

/// Opens the directory: maps every file that belongs to the model, reads all headers.
pub(super) fn open(dir: &Path) -> Result<Opened, WeightsError> {
    let config = read_json(&dir.join(CONFIG))?;
    if !config.is_object() {
        return Err(WeightsError::BadFile {
            file: dir.join(CONFIG),
            format: "JSON",
            reason: "a model's configuration is an object".into(),
        });
    }
    let index = dir.join(INDEX);
    let mut opened = Opened { files: vec![], entries: Entries::new(), config, tokenizer: None };
    if index.exists() {
        let weight_map = read_index(&index)?;
        for shard in weight_map.values().collect::<BTreeSet<_>>() {
            let path = dir.join(shard);
            if !path.exists() {
                let reason = format!("the shard {shard} that it names does not exist");
                return Err(WeightsError::BadIndex { index, reason });
            }
            add_file(&mut opened, &path)?;
        }
        for (name, shard) in &weight_map {
            if !opened.entries.contains_key(super::names::canonical(name)) {
                let reason = format!("it says that {shard} holds {name}, which is not there");
                return Err(WeightsError::BadIndex { index, reason });
            }
        }
    } else {
        for path in lone_files(dir)? {
            add_file(&mut opened, &path)?;
        }
    }
    Ok(opened)
}

/// `model.safetensors`, or else every safetensors file that is no adapter.
fn lone_files(dir: &Path) -> Result<Vec<PathBuf>, WeightsError> {
    if dir.join(SINGLE).exists() {
        return Ok(vec![dir.join(SINGLE)]);
    }
    let is_weights = |path: &PathBuf| {
        path.extension().is_some_and(|e| e == "safetensors")
            && !path.file_name().is_some_and(|n| n.to_string_lossy().starts_with("adapter_"))
    };
    let files: Vec<_> = list(dir)?.into_iter().filter(is_weights).collect();
    if files.is_empty() { Err(not_a_model(dir)) } else { Ok(files) }
}

/// The error for a path without a model, saying what it holds and what would help.
pub(super) fn not_a_model(dir: &Path) -> WeightsError {
    if dir.is_file() {
        let found = "another file; give the directory that holds it".into();
        return WeightsError::NotAModel { path: dir.to_path_buf(), expected: EXPECTED, found };
    }
    let names: Vec<String> = list(dir)
        .unwrap_or_default()
        .iter()
        .filter_map(|path| Some(path.file_name()?.to_string_lossy().into_owned()))
        .collect();
    let ends = |end: &str| names.iter().any(|name| name.ends_with(end));
    let found = if ends("adapter_config.json") {
        "a PEFT adapter; give its base model".into()
    } else if names.iter().filter(|name| name.ends_with(".gguf")).count() > 1 {
        "several .gguf files; give the path of one".into()
    } else if ends(".bin") || ends(".pth") || ends(".pt") {
        "weights as pickle files only; save the model with safe_serialization=True".into()
    } else if names.is_empty() {
        "an empty directory".into()
    } else {
        let more = if names.len() > 8 { ", ..." } else { "" };
        format!("{}{more}", names[..names.len().min(8)].join(", "))
    };
    WeightsError::NotAModel { path: dir.to_path_buf(), expected: EXPECTED, found }
}

/// The paths in `dir`, sorted.
pub(super) fn list(dir: &Path) -> Result<Vec<PathBuf>, WeightsError> {
    let io = |source| WeightsError::Io { path: dir.to_path_buf(), source };
    let mut paths = std::fs::read_dir(dir)
        .map_err(io)?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<Vec<_>, _>>()
        .map_err(io)?;
    paths.sort();
    Ok(paths)
}

/// Tensor name to file name, from `model.safetensors.index.json`. File names are plain: nothing
/// outside the directory is ever opened or fetched because of an index.
pub(super) fn read_index(index: &Path) -> Result<BTreeMap<String, String>, WeightsError> {
    let bad = |reason: String| WeightsError::BadIndex { index: index.to_path_buf(), reason };
    let json = read_json(index)?;
    let map = json.get("weight_map").and_then(Value::as_object);
    let map = map.ok_or_else(|| bad("it has no object weight_map".into()))?;
    let mut shards = BTreeMap::new();
    for (name, shard) in map {
        let plain = |shard: &&str| {
            !shard.contains(['/', '\\']) && !shard.starts_with('.') && !shard.is_empty()
        };
        let Some(shard) = shard.as_str().filter(plain) else {
            return Err(bad(format!("the shard {shard} of {name} is no plain file name")));
        };
        shards.insert(name.clone(), shard.to_string());
    }
    if shards.is_empty() {
        return Err(bad("its weight_map is empty".into()));
    }
    Ok(shards)
}

pub(super) fn read_json(path: &Path) -> Result<Value, WeightsError> {
    let text = std::fs::read(path)
        .map_err(|source| WeightsError::Io { path: path.to_path_buf(), source })?;
    serde_json::from_slice(&text).map_err(|e| WeightsError::BadFile {
        file: path.to_path_buf(),
        format: "JSON",
        reason: e.to_string(),
    })
}

fn add_file(opened: &mut Opened, path: &Path) -> Result<(), WeightsError> {
    let file = Mapped::open(path, "safetensors")?;
    let (data_start, metadata) = read_header(&file)?;
    let index = opened.files.len();
    for (name, info) in metadata.tensors() {
        let entry = Entry {
            file: index,
            bytes: data_start + info.data_offsets.0..data_start + info.data_offsets.1,
            shape: info.shape.iter().map(|&n| n as i64).collect(),
            stored: stored(info.dtype),
            heads: None,
            name,
        };
        opened.entries.insert(super::names::canonical(&entry.name).to_string(), entry);
    }
    opened.files.push(file);
    Ok(())
}

/// Longest header that is read, as in the format's own library: a model has some KiB.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Where the tensors' bytes begin, and what the header says about them. The library checks the
/// header in itself; how it fits the file is checked here, where no sum of lengths can overflow.
fn read_header(file: &Mapped) -> Result<(usize, Metadata), WeightsError> {
    let bytes = file.bytes();
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
        return Err(file.truncated(8));
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER_BYTES {
        return Err(file.bad(format!(
            "its header would have {length} bytes, at most {MAX_HEADER_BYTES} are read"
        )));
    }
    let Some(header) = rest.get(..length as usize) else {
        return Err(file.truncated(8 + length));
    };
    let metadata: Metadata = serde_json::from_slice(header)
        .map_err(|e| file.bad(format!("invalid JSON in its header: {e}")))?;
    let (found, header_end) = (bytes.len() as u64, 8 + length);
    let needed = header_end.saturating_add(metadata.data_len() as u64);
    match found.checked_sub(needed) {
        Some(0) => Ok((header_end as usize, metadata)),
        Some(surplus) => Err(file.bad(format!("{surplus} bytes more than its header says"))),
        None => Err(file.truncated(needed)),
    }
}

fn stored(dtype: Dtype) -> Stored {
    match dtype {
        Dtype::F64 => Stored::Plain(Kind::Double),
        Dtype::F32 => Stored::Plain(Kind::Float),
        Dtype::F16 => Stored::Plain(Kind::Half),
        Dtype::BF16 => Stored::Plain(Kind::BFloat16),
        Dtype::I64 => Stored::Plain(Kind::Int64),
        Dtype::I32 => Stored::Plain(Kind::Int),
        Dtype::I16 => Stored::Plain(Kind::Int16),
        Dtype::I8 => Stored::Plain(Kind::Int8),
        Dtype::U8 => Stored::Plain(Kind::Uint8),
        Dtype::BOOL => Stored::Plain(Kind::Bool),
        other => Stored::Other { found: other.to_string(), known: KNOWN },
    }
}
