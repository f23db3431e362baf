use crate::TrainError;
use crate::data::source::{Content, Place, Record};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

/// One row of a table, or one JSON object: values by column.
pub(crate) type Row = Map<String, Value>;

/// The rows of a file with their places, read as they are asked for.
pub(super) type Rows = Box<dyn Iterator<Item = Result<(Place, Row), TrainError>> + Send>;

/// Columns by name. Those that are not named are found by the names that data sets usually have.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Columns {
    /// `--text-column`
    pub text: Option<String>,
    /// `--prompt-column`
    pub prompt: Option<String>,
    /// `--completion-column`
    pub completion: Option<String>,
    /// `--messages-column`
    pub messages: Option<String>,
    /// `--chosen-column`
    pub chosen: Option<String>,
    /// `--rejected-column`
    pub rejected: Option<String>,
    /// Set for `--loss dpo`: `chosen` and `rejected` are looked for before anything else. Data sets
    /// of preferences often carry the chosen conversation as `messages` too.
    pub preferences: bool,
}

/// Prompts and completions as data sets call them, in the order in which they are looked for.
const PAIRS: [(&str, &str); 9] = [
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("question", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("query", "response"),
    ("problem", "solution"),
    ("input", "output"),
];
const CONVERSATIONS: [&str; 3] = ["messages", "conversations", "conversation"];
/// Stands beside an instruction: what it is about.
const CONTEXTS: [&str; 2] = ["input", "context"];
const TOOLS: &str = "tools";

/// Which columns make a record, and of which kind.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Layout {
    Text(String),
    Completion { prompt: String, context: Option<String>, completion: String },
    Chat { messages: String, tools: Option<String> },
    Preference { prompt: Option<String>, chosen: String, rejected: String },
}

impl Columns {
    /// The first two options that cannot stand together.
    pub(crate) fn conflict(&self) -> Option<(&'static str, &'static str)> {
        let pair = self.chosen.as_ref().map(|_| "chosen-column");
        let pair = pair.or(self.rejected.as_ref().map(|_| "rejected-column"));
        let completion = self.completion.as_ref().map(|_| "completion-column");
        // A prompt may stand before a completion or before two answers.
        let prompt = self.prompt.as_ref().filter(|_| pair.is_none()).map(|_| "prompt-column");
        let kinds = [
            self.text.as_ref().map(|_| "text-column"),
            self.messages.as_ref().map(|_| "messages-column"),
            completion.or(prompt),
            pair,
        ];
        let mut given = kinds.into_iter().flatten();
        Some((given.next()?, given.next()?))
    }

    /// What a table with these columns gives; the error names what there is and what to do.
    pub(crate) fn layout(&self, names: &[&str]) -> Result<Layout, String> {
        match self.named(names)? {
            Some(layout) => Ok(layout),
            None => self.detected(names).ok_or_else(|| {
                format!(
                    "no column says what to learn: expected \"text\", or \"prompt\" and \"completion\" (or \"question\" and \"answer\", \"instruction\" and \"output\"), or \"messages\", or \"chosen\" and \"rejected\"; the columns are {}. Name yours with --text-column, with --prompt-column and --completion-column, or with --messages-column",
                    list(names)
                )
            }),
        }
    }

    /// From the options; none if no option was given.
    fn named(&self, names: &[&str]) -> Result<Option<Layout>, String> {
        let asked = |option: &str, name: &Option<String>| match name {
            Some(name) if !names.contains(&name.as_str()) => Err(format!(
                "there is no column \"{name}\", which --{option}-column asks for; the columns are {}",
                list(names)
            )),
            name => Ok(name.clone()),
        };
        let text = asked("text", &self.text)?;
        let prompt = asked("prompt", &self.prompt)?;
        let completion = asked("completion", &self.completion)?;
        let messages = asked("messages", &self.messages)?;
        let chosen = asked("chosen", &self.chosen)?;
        let rejected = asked("rejected", &self.rejected)?;
        let other = |wanted: Option<String>, usual: &[&str], option: &str| {
            let mut there = usual.iter().filter(|name| names.contains(name));
            let found = wanted.or_else(|| there.next().map(|name| name.to_string()));
            found.ok_or_else(|| {
                format!(
                    "the other column of the pair is missing: name it with --{option}-column; the columns are {}",
                    list(names)
                )
            })
        };
        if let Some(text) = text {
            return Ok(Some(Layout::Text(text)));
        }
        if let Some(messages) = messages {
            return Ok(Some(Layout::Chat { messages, tools: tools(names) }));
        }
        if chosen.is_some() || rejected.is_some() {
            return Ok(Some(Layout::Preference {
                prompt: prompt.or_else(|| usual_prompt(names)),
                chosen: other(chosen, &["chosen"], "chosen")?,
                rejected: other(rejected, &["rejected"], "rejected")?,
            }));
        }
        if prompt.is_none() && completion.is_none() {
            return Ok(None);
        }
        // A prompt's own column says everything: no context is added to it.
        let context = prompt.is_none().then(|| context(names, "instruction")).flatten();
        let prompt = other(prompt, &PAIRS.map(|(prompt, _)| prompt), "prompt")?;
        let context = context.filter(|_| prompt == "instruction");
        let completion = other(completion, &PAIRS.map(|(_, completion)| completion), "completion")?;
        Ok(Some(Layout::Completion { prompt, context, completion }))
    }

    fn detected(&self, names: &[&str]) -> Option<Layout> {
        let has = |name: &str| names.contains(&name);
        let pairs = || {
            (has("chosen") && has("rejected")).then(|| Layout::Preference {
                prompt: usual_prompt(names),
                chosen: "chosen".into(),
                rejected: "rejected".into(),
            })
        };
        if let Some(layout) = self.preferences.then(pairs).flatten() {
            return Some(layout);
        }
        if let Some(messages) = CONVERSATIONS.into_iter().find(|name| has(name)) {
            return Some(Layout::Chat { messages: messages.into(), tools: tools(names) });
        }
        if let Some((prompt, completion)) = PAIRS.into_iter().find(|(p, c)| has(p) && has(c)) {
            return Some(Layout::Completion {
                prompt: prompt.into(),
                context: context(names, prompt),
                completion: completion.into(),
            });
        }
        pairs().or_else(|| has("text").then(|| Layout::Text("text".into())))
    }
}

fn usual_prompt(names: &[&str]) -> Option<String> {
    PAIRS.iter().map(|(prompt, _)| *prompt).find(|name| names.contains(name)).map(String::from)
}

fn context(names: &[&str], prompt: &str) -> Option<String> {
    let mut known = CONTEXTS.iter().filter(|_| prompt == "instruction");
    known.find(|name| names.contains(name)).map(|name| name.to_string())
}

fn tools(names: &[&str]) -> Option<String> {
    names.contains(&TOOLS).then(|| TOOLS.into())
}

fn list(names: &[&str]) -> String {
    if names.is_empty() {
        return "none".into();
    }
    names.iter().map(|name| format!("\"{name}\"")).collect::<Vec<_>>().join(", ")
}

impl Layout {
    /// The columns that are read; all others may stay where they are.
    pub(crate) fn columns(&self) -> Vec<&str> {
        let all = match self {
            Layout::Text(text) => vec![Some(text)],
            Layout::Completion { prompt, context, completion } => {
                vec![Some(prompt), context.as_ref(), Some(completion)]
            }
            Layout::Chat { messages, tools } => vec![Some(messages), tools.as_ref()],
            Layout::Preference { prompt, chosen, rejected } => {
                vec![prompt.as_ref(), Some(chosen), Some(rejected)]
            }
        };
        all.into_iter().flatten().map(String::as_str).collect()
    }

    /// The record that a row makes; the error says which value is wrong.
    pub(crate) fn record(&self, row: &Row) -> Result<Record, String> {
        match self {
            Layout::Text(text) => string(row, text).map(Record::Text),
            Layout::Completion { prompt, context, completion } => {
                let mut prompt = content(row, prompt)?;
                if let (Content::Text(prompt), Some(context)) = (&mut prompt, context) {
                    let context = string(row, context)?;
                    if !context.trim().is_empty() {
                        *prompt = format!("{prompt}\n\n{context}");
                    }
                }
                self::completion(prompt, content(row, completion)?)
            }
            Layout::Chat { messages, tools } => {
                let messages = self::messages(&row[messages], messages)?;
                let tools =
                    tools.as_ref().map_or(Ok(Vec::new()), |name| self::tool_list(row, name));
                chat(messages, tools?)
            }
            Layout::Preference { prompt, chosen, rejected } => {
                let prompt = prompt.as_ref().map(|prompt| content(row, prompt)).transpose()?;
                preference(prompt, content(row, chosen)?, content(row, rejected)?)
            }
        }
    }
}

/// A missing value is an empty text, which the run counts among what it passes over.
fn string(row: &Row, column: &str) -> Result<String, String> {
    match row.get(column) {
        Some(Value::String(text)) => Ok(text.clone()),
        None | Some(Value::Null) => Ok(String::new()),
        Some(other) => Err(format!("\"{column}\" is {}, expected a string", kind(other))),
    }
}

fn content(row: &Row, column: &str) -> Result<Content, String> {
    match row.get(column) {
        Some(list @ Value::Array(_)) => messages(list, column).map(Content::Messages),
        _ => string(row, column).map(Content::Text),
    }
}

fn as_messages(content: Content, role: &str) -> Vec<Value> {
    match content {
        Content::Text(text) => vec![json!({ "role": role, "content": text })],
        Content::Messages(messages) => messages,
    }
}

/// A conversation as soon as one of the two is one.
fn completion(prompt: Content, completion: Content) -> Result<Record, String> {
    match (prompt, completion) {
        (Content::Text(prompt), Content::Text(completion)) => {
            Ok(Record::Completion { prompt, completion })
        }
        (prompt, completion) => {
            let mut messages = as_messages(prompt, "user");
            messages.extend(as_messages(completion, "assistant"));
            chat(messages, Vec::new())
        }
    }
}

fn chat(messages: Vec<Value>, tools: Vec<Value>) -> Result<Record, String> {
    if !messages.iter().any(|message| message["role"] == "assistant") {
        return Err("no message has the role \"assistant\", so there is nothing to learn".into());
    }
    Ok(Record::Chat { messages, tools })
}

/// Splits what both answers begin with off as the prompt, where the data set has it in the answers.
fn preference(
    prompt: Option<Content>,
    chosen: Content,
    rejected: Content,
) -> Result<Record, String> {
    let (prompt, chosen, rejected) = match (chosen, rejected) {
        (Content::Text(chosen), Content::Text(rejected)) => match prompt {
            Some(Content::Text(prompt)) => {
                let (chosen, rejected) =
                    match (chosen.strip_prefix(&prompt), rejected.strip_prefix(&prompt)) {
                        (Some(chosen), Some(rejected)) => {
                            (chosen.to_string(), rejected.to_string())
                        }
                        _ => (chosen, rejected),
                    };
                (Content::Text(prompt), Content::Text(chosen), Content::Text(rejected))
            }
            None => {
                let at = common_text(&chosen, &rejected);
                let text = |text: &str| Content::Text(text.into());
                (text(&chosen[..at]), text(&chosen[at..]), text(&rejected[at..]))
            }
            Some(Content::Messages(prompt)) => {
                let answer =
                    |text| Content::Messages(as_messages(Content::Text(text), "assistant"));
                (Content::Messages(prompt), answer(chosen), answer(rejected))
            }
        },
        (chosen, rejected) => {
            let chosen = as_messages(chosen, "assistant");
            let rejected = as_messages(rejected, "assistant");
            let (prompt, at) = conversation_prompt(prompt, &chosen, &rejected);
            let answer = |messages: Vec<Value>| Content::Messages(messages[at..].to_vec());
            (Content::Messages(prompt), answer(chosen), answer(rejected))
        }
    };
    let empty = match &prompt {
        Content::Text(text) => text.is_empty(),
        Content::Messages(messages) => messages.is_empty(),
    };
    if empty {
        return Err("the pair has no prompt: expected a column \"prompt\" (--prompt-column), or the same beginning in both answers".into());
    }
    Ok(Record::Preference { prompt, chosen, rejected })
}

/// The prompt's messages, and how many messages of both answers belong to it.
fn conversation_prompt(
    prompt: Option<Content>,
    chosen: &[Value],
    rejected: &[Value],
) -> (Vec<Value>, usize) {
    if let Some(Content::Messages(prompt)) = &prompt {
        let within = chosen.starts_with(prompt) && rejected.starts_with(prompt);
        return (prompt.clone(), if within { prompt.len() } else { 0 });
    }
    // Each answer keeps at least its last message.
    let most = chosen.len().min(rejected.len()).saturating_sub(1);
    let common = chosen.iter().zip(rejected).take(most).take_while(|(a, b)| a == b).count();
    match prompt {
        Some(prompt) if common == 0 => (as_messages(prompt, "user"), 0),
        _ => (chosen[..common].to_vec(), common),
    }
}

/// Bytes that both texts begin with, back to the last white space, so that no word is cut.
fn common_text(a: &str, b: &str) -> usize {
    let same = a.char_indices().zip(b.chars()).take_while(|((_, a), b)| a == b);
    let end = same.last().map_or(0, |((at, last), _)| at + last.len_utf8());
    a[..end].rfind(char::is_whitespace).unwrap_or(0)
}

/// Messages with `role` and `content`, from those or from ShareGPT's `from` and `value`.
fn messages(value: &Value, column: &str) -> Result<Vec<Value>, String> {
    let parsed;
    let list = match value {
        Value::Array(list) => list,
        // A table without lists, such as CSV, carries them as text.
        Value::String(text) => {
            parsed = serde_json::from_str::<Vec<Value>>(text).map_err(|error| {
                format!("\"{column}\" is a text that is no JSON list of messages: {error}")
            })?;
            &parsed
        }
        other => return Err(format!("\"{column}\" is {}, expected a list", kind(other))),
    };
    list.iter().enumerate().map(|(i, message)| self::message(i, message)).collect()
}

fn message(i: usize, message: &Value) -> Result<Value, String> {
    if let (Value::String(from), Some(value)) = (&message["from"], message.get("value")) {
        let role = match from.as_str() {
            "human" | "user" => "user",
            "gpt" | "assistant" | "chatgpt" | "bot" | "model" => "assistant",
            "function" | "observation" | "tool" => "tool",
            other => other,
        };
        return Ok(json!({ "role": role, "content": value }));
    }
    if !message["role"].is_string() {
        return Err(format!(
            "message {i} has no \"role\" that is a string (nor \"from\" and \"value\")"
        ));
    }
    if message.get("content").is_none() {
        return Err(format!("message {i} has no \"content\""));
    }
    // A table gives every message all fields; templates ask whether a field is there.
    let fields = message.as_object().into_iter().flatten();
    let kept = fields.filter(|(name, value)| *name == "content" || !value.is_null());
    Ok(Value::Object(kept.map(|(name, value)| (name.clone(), value.clone())).collect()))
}

fn tool_list(row: &Row, column: &str) -> Result<Vec<Value>, String> {
    match row.get(column) {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(list)) => Ok(list.clone()),
        Some(Value::String(text)) if text.trim().is_empty() => Ok(Vec::new()),
        Some(Value::String(text)) => serde_json::from_str(text)
            .map_err(|error| format!("\"{column}\" is a text that is no JSON list: {error}")),
        Some(other) => Err(format!("\"{column}\" is {}, expected a list", kind(other))),
    }
}

pub(crate) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
