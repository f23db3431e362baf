mod columns;

pub use columns::Columns;

use super::source::{DataSource, Located, Place, Record};
use crate::TrainError;
use serde_json::{Map, Value};
use std::fs;
use std::path::{Path, PathBuf};

/// The data files that `paths` name, each as a source.
pub(super) fn sources(paths: &[PathBuf]) -> Result<Vec<Box<dyn DataSource>>, TrainError> {
    let files = data_files(paths)?.into_iter();
    Ok(files.map(|path| Box::new(FileSource { path }) as Box<dyn DataSource>).collect())
}

struct FileSource {
    path: PathBuf,
}

impl DataSource for FileSource {
    fn name(&self) -> String {
        self.path.display().to_string()
    }

    fn records(&self) -> Result<Box<dyn Iterator<Item = Located> + Send + '_>, TrainError> {
        Ok(Box::new(records(&self.path)?.into_iter().map(Ok)))
    }
}

fn line(path: &Path, line: usize) -> Place {
    Place::line(path.display().to_string(), line)
}

const JSONL: [&str; 3] = ["jsonl", "ndjson", "jsonlines"];
const TEXT: [&str; 3] = ["txt", "text", "md"];

fn extension(path: &Path) -> String {
    path.extension().unwrap_or_default().to_string_lossy().to_lowercase()
}

/// Files as they are; a folder stands for the data files in it, sorted by name.
fn data_files(paths: &[PathBuf]) -> Result<Vec<PathBuf>, TrainError> {
    let mut files = Vec::new();
    for path in paths {
        if !path.is_dir() {
            files.push(path.clone());
            continue;
        }
        let mut inside = Vec::new();
        for entry in fs::read_dir(path).map_err(TrainError::io(path))? {
            let file = entry.map_err(TrainError::io(path))?.path();
            let known = extension(&file);
            if JSONL.contains(&known.as_str()) || TEXT.contains(&known.as_str()) {
                inside.push(file);
            }
        }
        if inside.is_empty() {
            return Err(TrainError::Data {
                path: path.clone(),
                line: None,
                problem: format!(
                    "no data file in this folder; expected names ending with .{}",
                    [TEXT, JSONL].concat().join(", .")
                ),
            });
        }
        inside.sort();
        files.extend(inside);
    }
    Ok(files)
}

/// The records of one file: JSONL by its name, anything else is text.
fn records(path: &Path) -> Result<Vec<(Place, Record)>, TrainError> {
    let wrong =
        |problem: &str| TrainError::Data { path: path.into(), line: None, problem: problem.into() };
    let bytes = fs::read(path).map_err(TrainError::io(path))?;
    let text = String::from_utf8(bytes)
        .map_err(|_| wrong("not UTF-8 text; is it a compressed or binary file?"))?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
    if text.trim().is_empty() {
        return Err(wrong("the file is empty"));
    }
    match extension(path).as_str() {
        known if JSONL.contains(&known) => json_lines(path, text),
        "json" | "csv" | "parquet" => Err(wrong(
            "this kind of file is not read; write one JSON object per line into a .jsonl file, with \"text\", \"prompt\" and \"completion\", or \"messages\"",
        )),
        _ => Ok(paragraphs(path, text)),
    }
}

fn paragraphs(path: &Path, text: &str) -> Vec<(Place, Record)> {
    let mut records = Vec::new();
    let mut open: Vec<&str> = Vec::new();
    // A blank line after the last one closes the last paragraph.
    for (i, text) in text.lines().chain([""]).enumerate() {
        if !text.trim().is_empty() {
            open.push(text);
        } else if !open.is_empty() {
            let place = line(path, i + 1 - open.len());
            records.push((place, Record::Text(open.join("\n").trim().to_string())));
            open.clear();
        }
    }
    records
}

fn json_lines(path: &Path, text: &str) -> Result<Vec<(Place, Record)>, TrainError> {
    let mut records = Vec::new();
    for (i, text) in text.lines().enumerate() {
        if text.trim().is_empty() {
            continue;
        }
        let place = line(path, i + 1);
        let object: Map<String, Value> = serde_json::from_str(text)
            .map_err(|e| place.wrong(format!("not a JSON object: {e}")))?;
        let record = record(&object).map_err(|problem| place.wrong(problem))?;
        records.push((place, record));
    }
    Ok(records)
}

fn record(object: &Map<String, Value>) -> Result<Record, String> {
    let string = |field: &str| match &object[field] {
        Value::String(text) => Ok(text.clone()),
        other => Err(format!("\"{field}\" is {}, expected a string", kind(other))),
    };
    if let Some(messages) = object.get("messages") {
        return Ok(Record::Chat { messages: chat(messages)?, tools: Vec::new() });
    }
    match (object.contains_key("prompt"), object.contains_key("completion")) {
        (true, true) => {
            Ok(Record::Completion { prompt: string("prompt")?, completion: string("completion")? })
        }
        (false, false) if object.contains_key("text") => string("text").map(Record::Text),
        _ => {
            let found: Vec<_> = object.keys().map(|k| format!("\"{k}\"")).collect();
            let found = if found.is_empty() { "none".into() } else { found.join(", ") };
            Err(format!(
                "expected the field \"text\", or \"prompt\" and \"completion\", or \"messages\"; the fields are {found}"
            ))
        }
    }
}

fn chat(messages: &Value) -> Result<Vec<Value>, String> {
    let list = messages
        .as_array()
        .ok_or_else(|| format!("\"messages\" is {}, expected a list", kind(messages)))?;
    for (i, message) in list.iter().enumerate() {
        if !message["role"].is_string() {
            return Err(format!("message {i} has no \"role\" that is a string"));
        }
        if message.get("content").is_none() {
            return Err(format!("message {i} has no \"content\""));
        }
    }
    if !list.iter().any(|message| message["role"] == "assistant") {
        return Err("no message has the role \"assistant\", so there is nothing to learn".into());
    }
    Ok(list.clone())
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
