//! Chat templates against Transformers. The reference is made by `make_chat_templates.py`.

use offshoot_trainer::tokenizer::{ChatTemplate, Conversation, Tokenizer};
use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

#[derive(Deserialize)]
struct Fixture {
    bos_token: String,
    eos_token: String,
    templates: BTreeMap<String, String>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    template: String,
    conversation: String,
    messages: Vec<Value>,
    tools: Vec<Value>,
    /// The template does not take the conversation.
    refused: Option<String>,
    #[serde(default)]
    text: String,
    #[serde(default)]
    before_answer: String,
    #[serde(default)]
    ids: Vec<u32>,
    /// Only of templates that mark the assistant's words.
    from_assistant: Option<Vec<u8>>,
}

fn fixture() -> Fixture {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/chat_templates.json");
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

fn fixture_dir() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/tiny_text")
}

/// The fixture's tokenizer with this template.
fn tokenizer(template: &str) -> Tokenizer {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("template.jinja");
    fs::write(&file, template).unwrap();
    let tokenizer = Tokenizer::from_dir(&fixture_dir(), &Value::Null).unwrap();
    tokenizer.with_chat_template(file.to_str().unwrap()).unwrap()
}

impl Case {
    fn conversation(&self) -> Conversation<'_> {
        Conversation { messages: &self.messages, tools: &self.tools }
    }

    fn name(&self) -> String {
        format!("{}, {}", self.template, self.conversation)
    }
}

/// Each tag takes the white space around it away, or leaves it, as it did.
fn without_marks(template: &str) -> String {
    let ends = template.replace("endgeneration", "endif");
    ends.replace("{% generation", "{% if true").replace("{%- generation", "{%- if true")
}

#[test]
fn texts_are_those_of_transformers() {
    let Fixture { bos_token, eos_token, templates, cases } = fixture();
    assert!(cases.len() > 40);
    for case in cases {
        let source = templates[&case.template].clone();
        let chat = ChatTemplate::new(source, bos_token.clone(), eos_token.clone()).unwrap();
        if let Some(refused) = &case.refused {
            let error = chat.render(case.conversation(), false).unwrap_err().to_string();
            assert!(error.contains(refused), "{}: {error}", case.name());
            continue;
        }
        let name = case.name();
        assert_eq!(chat.render(case.conversation(), false).unwrap(), case.text, "{name}");
        assert_eq!(chat.render(case.conversation(), true).unwrap(), case.before_answer, "{name}");
    }
}

/// Transformers knows the assistant's words by marks in the template; here they are found without.
#[test]
fn the_assistants_tokens_are_those_of_transformers_with_and_without_marks() {
    let Fixture { templates, cases, .. } = fixture();
    let mut n_compared = 0;
    for case in cases.iter().filter(|case| case.refused.is_none()) {
        let template = &templates[&case.template];
        for source in [template.clone(), without_marks(template)] {
            let tokens = tokenizer(&source).encode_chat(case.conversation(), 0).unwrap();
            assert_eq!(tokens.ids, case.ids, "{}", case.name());
            let Some(expected) = &case.from_assistant else { continue };
            let found: Vec<u8> = tokens.from_assistant.iter().map(|&said| said.into()).collect();
            assert!(expected.contains(&1) && expected.contains(&0));
            assert_eq!(&found, expected, "{}:\n{source}", case.name());
            n_compared += 1;
        }
    }
    assert!(n_compared > 60, "{n_compared}");
}

#[test]
fn only_the_last_turn_can_be_asked_for() {
    let Fixture { templates, cases, .. } = fixture();
    for case in cases.iter().filter(|case| case.conversation == "two turns") {
        let Some(expected) = &case.from_assistant else { continue };
        let template = &templates[&case.template];
        let last = case.messages.len() - 1;
        let begin = expected.windows(2).rposition(|pair| pair == [0, 1]).unwrap() + 1;
        for source in [template.clone(), without_marks(template)] {
            let tokens = tokenizer(&source).encode_chat(case.conversation(), last).unwrap();
            let first = tokens.from_assistant.iter().position(|&said| said);
            assert_eq!(first, Some(begin), "{}", case.name());
        }
    }
}

#[test]
fn a_template_is_chosen_by_name_or_file() {
    let dir = tempfile::tempdir().unwrap();
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        fs::copy(fixture_dir().join(file), dir.path().join(file)).unwrap();
    }
    let config = dir.path().join("tokenizer_config.json");
    let mut settings: Value = serde_json::from_str(&fs::read_to_string(&config).unwrap()).unwrap();
    let load = || Tokenizer::from_dir(dir.path(), &Value::Null).unwrap();
    let said = |tokenizer: &Tokenizer, tools: &[Value]| {
        let messages = [serde_json::json!({"role": "assistant", "content": "x"})];
        let conversation = Conversation { messages: &messages, tools };
        tokenizer.encode_chat(conversation, 1).map(|tokens| tokenizer.decode(&tokens.ids).unwrap())
    };
    let mut set = |value: Value| {
        settings["chat_template"] = value;
        fs::write(&config, settings.to_string()).unwrap();
    };
    let named = |name: &str| serde_json::json!({"name": name, "template": format!("as {name}")});
    let tool = [serde_json::json!({"type": "function"})];

    set(Value::from(vec![named("default"), named("tool_use"), named("rag")]));
    assert_eq!(said(&load(), &[]).unwrap(), "as default");
    assert_eq!(said(&load(), &tool).unwrap(), "as tool_use");
    let rag = load().with_chat_template("rag").unwrap();
    assert_eq!(said(&rag, &tool).unwrap(), "as rag");
    let error = load().with_chat_template("none").err().unwrap().to_string();
    assert_eq!(
        error,
        "--chat-template = none: neither a file nor a chat template of this model, which has default, rag, tool_use"
    );

    set(Value::from(vec![named("rag"), named("other")]));
    let error = said(&load(), &[]).err().unwrap().to_string();
    assert!(error.contains("choose one with --chat-template: other, rag"), "{error}");

    // A file beside the model goes before its settings.
    fs::write(dir.path().join("chat_template.jinja"), "as file").unwrap();
    fs::create_dir(dir.path().join("additional_chat_templates")).unwrap();
    fs::write(dir.path().join("additional_chat_templates/more.jinja"), "as more").unwrap();
    assert_eq!(said(&load(), &[]).unwrap(), "as file");
    assert_eq!(said(&load().with_chat_template("more").unwrap(), &[]).unwrap(), "as more");

    set(Value::Null);
    fs::remove_file(dir.path().join("chat_template.jinja")).unwrap();
    fs::remove_dir_all(dir.path().join("additional_chat_templates")).unwrap();
    let error = said(&load(), &[]).err().unwrap().to_string();
    assert_eq!(
        error,
        "this model has no chat template, and the data have messages. An Instruct model has one (in tokenizer_config.json or chat_template.jinja); for a base model use plain text or prompt and completion, or give it a template with --chat-template FILE"
    );
}
