use crate::TrainError;
use minijinja::{Environment, ErrorKind, context};
use serde_json::Value;

/// A model's Jinja chat template, set up as Transformers sets it up.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos_token: String,
    eos_token: String,
}

const NAME: &str = "chat_template";

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
        environment.add_template_owned(NAME, source).map_err(wrong)?;
        Ok(ChatTemplate { environment, bos_token, eos_token })
    }

    /// The text of a conversation; `messages` are objects with `role` and `content`. With
    /// `add_generation_prompt` it ends where the assistant begins to speak.
    pub fn render(
        &self,
        messages: &[Value],
        add_generation_prompt: bool,
    ) -> Result<String, TrainError> {
        let template = self.environment.get_template(NAME).map_err(wrong)?;
        let text = template.render(context! {
            messages => messages,
            add_generation_prompt => add_generation_prompt,
            bos_token => self.bos_token,
            eos_token => self.eos_token,
        });
        text.map_err(wrong)
    }
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

fn to_json(value: &minijinja::Value) -> Result<String, minijinja::Error> {
    serde_json::to_string(value)
        .map_err(|e| minijinja::Error::new(ErrorKind::BadSerialization, e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn template(source: &str) -> ChatTemplate {
        ChatTemplate::new(source.into(), "<s>".into(), "</s>".into()).unwrap()
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
        assert_eq!(chat.render(&messages, false).unwrap(), "<s>[Hi]Yes</s>");
        assert_eq!(chat.render(&messages[..1], true).unwrap(), "<s>[Hi]>");
    }

    #[test]
    fn a_template_refuses_with_its_own_words() {
        let chat = template("{{ raise_exception('roles must alternate') }}");
        let error = chat.render(&[], false).unwrap_err().to_string();
        assert!(error.contains("roles must alternate"), "{error}");
        let error = ChatTemplate::new("{% if %}".into(), String::new(), String::new()).unwrap_err();
        assert!(error.to_string().starts_with("the model's chat template: "), "{error}");
    }

    #[test]
    fn dates_and_json_come_out_as_in_transformers() {
        let chat = template("{{ strftime_now('%Y') | length }} {{ messages | tojson }}");
        let text = chat.render(&[json!({"role": "<user>"})], false).unwrap();
        assert_eq!(text, r#"4 [{"role":"<user>"}]"#);
    }
}
