use crate::TrainError;
use minijinja::value::Kwargs;
use minijinja::{Environment, ErrorKind, context};
use serde::Serialize;
use serde_json::Value;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};
use std::io;
use std::ops::Range;

/// Messages for a chat template.
#[derive(Clone, Copy, Debug)]
pub struct Conversation<'a> {
    /// Objects with `role` and `content`.
    pub messages: &'a [Value],
    /// Descriptions of functions that the model may call; mostly there are none.
    pub tools: &'a [Value],
}

impl<'a> Conversation<'a> {
    /// Without tools.
    pub fn new(messages: &'a [Value]) -> Self {
        Conversation { messages, tools: &[] }
    }

    /// Its first `n` messages.
    pub(super) fn first(self, n: usize) -> Self {
        Conversation { messages: &self.messages[..n], ..self }
    }
}

/// The text of a conversation.
#[derive(Debug)]
pub(super) struct Rendered {
    pub text: String,
    /// Where in it (in bytes) the template says that the assistant speaks; none if it does not say
    /// so (`{% generation %}` of Transformers).
    pub turns: Option<Vec<Range<usize>>>,
}

/// A model's Jinja chat template, set up as Transformers sets it up.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    bos_token: String,
    eos_token: String,
    /// The template itself says what the assistant's words are.
    marks_turns: bool,
}

const NAME: &str = "chat_template";

// Stand around the assistant's words while a template is rendered. Unicode keeps these code points
// free of characters for ever.
const BEGIN: char = '\u{fdd0}';
const END: char = '\u{fdd1}';

impl ChatTemplate {
    /// `source` is the template's text; the tokens are what it may name.
    pub fn new(source: String, bos_token: String, eos_token: String) -> Result<Self, TrainError> {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        // minijinja's own escapes for HTML, which Transformers' does not.
        environment.add_filter("tojson", to_json);
        let (known, marks_turns) = replace_generation_tags(&source);
        environment.add_template_owned(NAME, known).map_err(wrong)?;
        Ok(ChatTemplate { environment, source, bos_token, eos_token, marks_turns })
    }

    /// The text of a conversation. With `add_generation_prompt` it ends where the assistant begins
    /// to speak.
    pub fn render(
        &self,
        conversation: Conversation,
        add_generation_prompt: bool,
    ) -> Result<String, TrainError> {
        let mut text = self.render_marked(conversation, add_generation_prompt)?;
        text.retain(|c| c != BEGIN && c != END);
        Ok(text)
    }

    /// The text of a conversation, with the turns that the template marks.
    pub(super) fn render_with_turns(
        &self,
        conversation: Conversation,
    ) -> Result<Rendered, TrainError> {
        let marked = self.render_marked(conversation, false)?;
        let (mut text, mut turns, mut begin) = (String::with_capacity(marked.len()), vec![], 0);
        for c in marked.chars() {
            match c {
                BEGIN => begin = text.len(),
                END => turns.push(begin..text.len()),
                c => text.push(c),
            }
        }
        Ok(Rendered { text, turns: self.marks_turns.then_some(turns) })
    }

    fn render_marked(
        &self,
        conversation: Conversation,
        add_generation_prompt: bool,
    ) -> Result<String, TrainError> {
        let template = self.environment.get_template(NAME).map_err(wrong)?;
        let Conversation { messages, tools } = conversation;
        let text = template.render(context! {
            messages => messages,
            tools => (!tools.is_empty()).then_some(tools),
            documents => (),
            add_generation_prompt => add_generation_prompt,
            bos_token => self.bos_token,
            eos_token => self.eos_token,
        });
        text.map_err(wrong)
    }

    /// What two templates have in common exactly if they write every conversation alike, today.
    pub(crate) fn fingerprint(&self) -> String {
        let mut parts = vec![self.source.clone(), self.bos_token.clone(), self.eos_token.clone()];
        if self.source.contains("strftime_now") {
            parts.push(time::OffsetDateTime::now_utc().date().to_string());
        }
        parts.join("\0")
    }
}

/// Transformers' own tag, `{% generation %} ... {% endgeneration %}`, which no Jinja knows: each tag
/// becomes a mark between two ordinary ones, so that white space around it is treated as around any
/// tag. The second value says whether there was one.
fn replace_generation_tags(source: &str) -> (String, bool) {
    let (mut known, mut rest, mut found) = (String::with_capacity(source.len()), source, false);
    while let Some(open) = rest.find("{%") {
        let Some(close) = rest[open..].find("%}").map(|n| open + n) else { break };
        let inside = &rest[open + 2..close];
        let word = inside.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        let mark = match word {
            "generation" => Some(BEGIN),
            "endgeneration" => Some(END),
            _ => None,
        };
        known += &rest[..open];
        match mark {
            Some(mark) => {
                found = true;
                let control = |c: Option<char>| {
                    c.filter(|c| matches!(c, '-' | '+')).map_or(String::new(), String::from)
                };
                let (left, right) =
                    (control(inside.chars().next()), control(inside.chars().next_back()));
                known += &format!("{{%{left} if true %}}{{{{ \"{mark}\" }}}}{{% endif {right}%}}");
            }
            None => known += &rest[open..close + 2],
        }
        rest = &rest[close + 2..];
    }
    known += rest;
    (known, found)
}

/// minijinja puts the cause of an error that a function raised in its source.
fn wrong(error: minijinja::Error) -> TrainError {
    let mut problem = error.to_string();
    let mut source = std::error::Error::source(&error);
    while let Some(cause) = source {
        problem += &format!(": {cause}");
        source = cause.source();
    }
    TrainError::ChatTemplate { problem }
}

fn raise_exception(message: String) -> Result<String, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
}

/// Today's date in UTC, by C's format letters.
fn strftime_now(format: String) -> Result<String, minijinja::Error> {
    let wrong = |problem: String| minijinja::Error::new(ErrorKind::InvalidOperation, problem);
    let items = time::format_description::parse_strftime_owned(&format)
        .map_err(|e| wrong(format!("strftime_now(\"{format}\"): {e}")))?;
    time::OffsetDateTime::now_utc().format(&items).map_err(|e| wrong(e.to_string()))
}

/// As Python's `json.dumps(value, ensure_ascii=False, indent=indent)` writes it.
fn to_json(value: &minijinja::Value, options: Kwargs) -> Result<String, minijinja::Error> {
    let indent: Option<usize> = options.get("indent")?;
    // Others of json.dumps change nothing that templates in use ask for.
    for known in ["ensure_ascii", "separators", "sort_keys"] {
        options.get::<Option<minijinja::Value>>(known)?;
    }
    options.assert_all_used()?;
    let written = match indent {
        Some(n) => {
            let spaces = vec![b' '; n];
            written_with(value, PrettyFormatter::with_indent(&spaces))
        }
        None => written_with(value, Spaced),
    };
    written.map_err(|e| minijinja::Error::new(ErrorKind::BadSerialization, e.to_string()))
}

fn written_with(
    value: &minijinja::Value,
    formatter: impl Formatter,
) -> Result<String, Box<dyn std::error::Error>> {
    let mut bytes = Vec::new();
    value.serialize(&mut Serializer::with_formatter(&mut bytes, formatter))?;
    Ok(String::from_utf8(bytes)?)
}

/// Python writes a space behind every comma and colon.
struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W: ?Sized + io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn template(source: &str) -> ChatTemplate {
        ChatTemplate::new(source.into(), "<s>".into(), "</s>".into()).unwrap()
    }

    fn rendered(chat: &ChatTemplate, messages: &[Value], prompt: bool) -> String {
        chat.render(Conversation::new(messages), prompt).unwrap()
    }

    #[test]
    fn renders_what_pythons_jinja_renders() {
        let source = "{{ bos_token }}{% for m in messages %}\n    {% if m['role'] == 'user' %}\n[{{ m.content.strip() }}]{% else %}\n{{ m['content'] }}{{ eos_token }}{% endif %}\n{% endfor %}\n{% if add_generation_prompt %}>{% endif %}";
        let messages = [
            json!({"role": "user", "content": " Hi "}),
            json!({"role": "assistant", "content": "Yes"}),
        ];
        let chat = template(source);
        // What jinja2 3.1 gives with trim_blocks and lstrip_blocks.
        assert_eq!(rendered(&chat, &messages, false), "<s>[Hi]Yes</s>");
        assert_eq!(rendered(&chat, &messages[..1], true), "<s>[Hi]>");
    }

    #[test]
    fn a_template_refuses_with_its_own_words() {
        let chat = template("{{ raise_exception('roles must alternate') }}");
        let error = chat.render(Conversation::new(&[]), false).unwrap_err().to_string();
        assert!(error.contains("roles must alternate"), "{error}");
        let error = ChatTemplate::new("{% if %}".into(), String::new(), String::new()).unwrap_err();
        assert!(error.to_string().starts_with("the model's chat template: "), "{error}");
    }

    #[test]
    fn dates_and_json_come_out_as_in_transformers() {
        let chat = template("{{ strftime_now('%Y') | length }} {{ messages | tojson }}");
        let messages = [json!({"role": "<user>", "content": ["é", 1]})];
        let text = rendered(&chat, &messages, false);
        assert_eq!(text, r#"4 [{"role": "<user>", "content": ["é", 1]}]"#);
        let chat = template("{{ messages | tojson(indent=2) }}");
        let text = rendered(&chat, &[json!({"role": "a"})], false);
        assert_eq!(text, "[\n  {\n    \"role\": \"a\"\n  }\n]");
    }

    #[test]
    fn tokens_of_another_day_are_not_taken_for_todays() {
        let today = || time::OffsetDateTime::now_utc().date().to_string();
        let (before, dated, after) =
            (today(), template("on {{ strftime_now('%d %b') }}").fingerprint(), today());
        assert!(dated.contains(&before) || dated.contains(&after), "{dated}");
        let same = template("{{ messages }}");
        assert!(!same.fingerprint().contains(&after));
        assert_ne!(same.fingerprint(), template("{{ messages  }}").fingerprint());
    }

    #[test]
    fn tags_of_the_assistants_words_leave_no_trace_but_their_places() {
        let source = "{% for m in messages %}\n{{ m.role }}:\n  {%- generation %}\n {{ m.content }};\n  {% endgeneration -%}\n  .\n{% endfor %}";
        let plain = source.replace("generation %}", "if true %}").replace("endgeneration", "endif");
        let plain = plain.replace("endif true %}", "endif %}");
        let messages =
            [json!({"role": "a", "content": "one"}), json!({"role": "b", "content": "é"})];
        let Rendered { text, turns } =
            template(source).render_with_turns(Conversation::new(&messages)).unwrap();
        assert_eq!(text, rendered(&template(&plain), &messages, false));
        let said: Vec<&str> = turns.unwrap().into_iter().map(|turn| &text[turn]).collect();
        assert_eq!(said, [" one;\n", " é;\n"]);
        let unmarked = template(&plain).render_with_turns(Conversation::new(&messages)).unwrap();
        assert_eq!(unmarked.turns, None);
    }
}
