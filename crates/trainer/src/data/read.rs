use crate::TrainError;
use serde_json::{Map, Value};
use std::fs;
use std::path::{Path, PathBuf};

/// What one piece of a file says, before it is tokens.
#[derive(Debug, PartialEq)]
pub(super) enum Record {
    Text(String),
    Completion { prompt: String, completion: String },
    Chat(Vec<Value>),
}

/// Where a record stands.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Source {
    path: PathBuf,
    line: usize,
}

impl Source {
    fn wrong(&self, problem: String) -> TrainError {
        TrainError::Data { path: self.path.clone(), line: Some(self.line), problem }
    }

    /// Adds the place to an error of the chat template, which only this record may provoke.
    pub(super) fn explain(&self, error: TrainError) -> TrainError {
        match error {
            TrainError::ChatTemplate { .. } => self.wrong(error.to_string()),
            other => other,
        }
    }
}

const JSONL: [&str; 3] = ["jsonl", "ndjson", "jsonlines"];
const TEXT: [&str; 3] = ["txt", "text", "md"];

fn extension(path: &Path) -> String {
    path.extension().unwrap_or_default().to_string_lossy().to_lowercase()
}

/// Files as they are; a folder stands for the data files in it, sorted by name.
pub(super) fn data_files(paths: &[PathBuf]) -> Result<Vec<PathBuf>, TrainError> {
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
pub(super) fn records(path: &Path) -> Result<Vec<(Source, Record)>, TrainError> {
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

fn paragraphs(path: &Path, text: &str) -> Vec<(Source, Record)> {
    let mut records = Vec::new();
    let mut open: Vec<&str> = Vec::new();
    // A blank line after the last one closes the last paragraph.
    for (i, line) in text.lines().chain([""]).enumerate() {
        if !line.trim().is_empty() {
            open.push(line);
        } else if !open.is_empty() {
            let source = Source { path: path.into(), line: i + 1 - open.len() };
            records.push((source, Record::Text(open.join("\n").trim().to_string())));
            open.clear();
        }
    }
    records
}

fn json_lines(path: &Path, text: &str) -> Result<Vec<(Source, Record)>, TrainError> {
    let mut records = Vec::new();
    for (i, line) in text.lines().enumerate() {
        if line.trim().is_empty() {
            continue;
        }
        let source = Source { path: path.into(), line: i + 1 };
        let object: Map<String, Value> = serde_json::from_str(line)
            .map_err(|e| source.wrong(format!("not a JSON object: {e}")))?;
        let record = record(&object).map_err(|problem| source.wrong(problem))?;
        records.push((source, record));
    }
    Ok(records)
}

fn record(object: &Map<String, Value>) -> Result<Record, String> {
    let string = |field: &str| match &object[field] {
        Value::String(text) => Ok(text.clone()),
        other => Err(format!("\"{field}\" is {}, expected a string", kind(other))),
    };
    if let Some(messages) = object.get("messages") {
        return chat(messages).map(Record::Chat);
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
