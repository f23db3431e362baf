use super::columns::{Columns, Layout};
use crate::data::source::{Content, Record};
use serde_json::{Value, json};

fn record_with(columns: &Columns, row: Value) -> Result<Record, String> {
    let row = row.as_object().unwrap();
    let names: Vec<&str> = row.keys().map(String::as_str).collect();
    columns.layout(&names)?.record(row)
}

fn record(row: Value) -> Result<Record, String> {
    record_with(&Columns::default(), row)
}

fn pair(prompt: &str, completion: &str) -> Record {
    Record::Completion { prompt: prompt.into(), completion: completion.into() }
}

fn list(messages: Value) -> Vec<Value> {
    messages.as_array().unwrap().clone()
}

fn chat(messages: Value) -> Record {
    Record::Chat { messages: list(messages), tools: Vec::new() }
}

fn user_and_assistant(user: &str, assistant: &str) -> Value {
    json!([{"role": "user", "content": user}, {"role": "assistant", "content": assistant}])
}

#[test]
fn usual_names_are_found() {
    for (row, expected) in [
        (json!({"text": "a", "id": 3}), Record::Text("a".into())),
        (json!({"prompt": "a", "completion": "b", "text": "c"}), pair("a", "b")),
        (json!({"question": "a", "answer": "b"}), pair("a", "b")),
        (json!({"query": "a", "response": "b", "type": "x"}), pair("a", "b")),
        // Alpaca, whose `text` is all of it in one, and Dolly.
        (json!({"instruction": "a", "input": "", "output": "b", "text": "c"}), pair("a", "b")),
        (json!({"instruction": "a", "input": "x", "output": "b"}), pair("a\n\nx", "b")),
        (
            json!({"instruction": "a", "context": "x", "response": "b", "category": "c"}),
            pair("a\n\nx", "b"),
        ),
        (json!({"messages": user_and_assistant("a", "b")}), chat(user_and_assistant("a", "b"))),
        (
            json!({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}),
            chat(user_and_assistant("a", "b")),
        ),
        // Prompts and completions as messages.
        (
            json!({"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}),
            chat(user_and_assistant("a", "b")),
        ),
    ] {
        assert_eq!(record(row.clone()).unwrap(), expected, "{row}");
    }
}

#[test]
fn options_name_columns_and_the_other_of_a_pair_is_found() {
    let row = json!({"title": "t", "body": "b", "answer": "a", "question": "q"});
    let with = |columns: Columns| record_with(&columns, row.clone());
    let name = |name: &str| Some(name.to_string());
    let text = Columns { text: name("body"), ..Columns::default() };
    assert_eq!(with(text).unwrap(), Record::Text("b".into()));
    let prompt = Columns { prompt: name("title"), ..Columns::default() };
    assert_eq!(with(prompt).unwrap(), pair("t", "a"));
    let completion = Columns { completion: name("body"), ..Columns::default() };
    assert_eq!(with(completion).unwrap(), pair("q", "b"));
    let missing = Columns { prompt: name("head"), ..Columns::default() };
    let error = with(missing).unwrap_err();
    assert!(
        error.contains("there is no column \"head\", which --prompt-column asks for"),
        "{error}"
    );
    let chosen = Columns { chosen: name("body"), ..Columns::default() };
    let error = with(chosen).unwrap_err();
    assert!(error.contains("name it with --rejected-column"), "{error}");

    let both = Columns { text: name("a"), messages: name("b"), ..Columns::default() };
    assert_eq!(both.conflict(), Some(("text-column", "messages-column")));
    let pairs = Columns { prompt: name("a"), chosen: name("b"), ..Columns::default() };
    assert_eq!(pairs.conflict(), None);
}

#[test]
fn preferences_are_looked_for_first_where_they_are_wanted() {
    let row = json!({
        "prompt": "a",
        "messages": user_and_assistant("a", "b"),
        "chosen": user_and_assistant("a", "b"),
        "rejected": user_and_assistant("a", "c"),
    });
    assert_eq!(record(row.clone()).unwrap(), chat(user_and_assistant("a", "b")));
    let columns = Columns { preferences: true, ..Columns::default() };
    let answer =
        |text: &str| Content::Messages(vec![json!({"role": "assistant", "content": text})]);
    let expected = Record::Preference {
        prompt: Content::Messages(vec![json!({"role": "user", "content": "a"})]),
        chosen: answer("b"),
        rejected: answer("c"),
    };
    assert_eq!(record_with(&columns, row).unwrap(), expected);
}

#[test]
fn the_prompt_is_split_off_the_answers_of_a_pair() {
    let texts = |prompt: &str, chosen: &str, rejected: &str| Record::Preference {
        prompt: Content::Text(prompt.into()),
        chosen: Content::Text(chosen.into()),
        rejected: Content::Text(rejected.into()),
    };
    // Whole dialogues as texts: no word is cut in two.
    let row =
        json!({"chosen": "Human: Hi\n\nBot: Hello you", "rejected": "Human: Hi\n\nBot: Help"});
    assert_eq!(record(row).unwrap(), texts("Human: Hi\n\nBot:", " Hello you", " Help"));
    let row = json!({"chosen": "Ünö ä", "rejected": "Ünö ö"});
    assert_eq!(record(row).unwrap(), texts("Ünö", " ä", " ö"));
    // Answers that begin with the prompt, and answers that do not.
    let row = json!({"prompt": "Q: a", "chosen": "Q: a b", "rejected": "Q: a c"});
    assert_eq!(record(row).unwrap(), texts("Q: a", " b", " c"));
    let row = json!({"prompt": "Q: a", "chosen": "b", "rejected": "c"});
    assert_eq!(record(row).unwrap(), texts("Q: a", "b", "c"));
    let error = record(json!({"chosen": "b", "rejected": "c"})).unwrap_err();
    assert!(error.contains("the pair has no prompt"), "{error}");

    // Conversations: the prompt as messages, as text, or in the answers only.
    let user = json!({"role": "user", "content": "a"});
    let says = |text: &str| json!({"role": "assistant", "content": text});
    let expected = Record::Preference {
        prompt: Content::Messages(vec![user.clone()]),
        chosen: Content::Messages(vec![says("b")]),
        rejected: Content::Messages(vec![says("c")]),
    };
    for row in [
        json!({"prompt": [user], "chosen": [says("b")], "rejected": [says("c")]}),
        json!({"prompt": [user], "chosen": [user, says("b")], "rejected": [user, says("c")]}),
        json!({"prompt": "a", "chosen": [says("b")], "rejected": [says("c")]}),
        json!({"prompt": [user], "chosen": "b", "rejected": "c"}),
        json!({"chosen": [user, says("b")], "rejected": [user, says("c")]}),
    ] {
        assert_eq!(record(row.clone()).unwrap(), expected, "{row}");
    }
    // Equal answers keep their last message.
    let same = json!({"chosen": [user, says("b")], "rejected": [user, says("b")]});
    let Record::Preference { chosen, .. } = record(same).unwrap() else { panic!() };
    assert_eq!(chosen, Content::Messages(vec![says("b")]));
}

#[test]
fn tools_and_fields_of_messages_are_kept_and_empty_fields_dropped() {
    let row = json!({
        "messages": [
            {"role": "assistant", "content": null, "tool_calls": [{"name": "f"}], "name": null},
        ],
        "tools": "[{\"name\": \"f\"}]",
    });
    let expected = Record::Chat {
        messages: list(
            json!([{"role": "assistant", "content": null, "tool_calls": [{"name": "f"}]}]),
        ),
        tools: list(json!([{"name": "f"}])),
    };
    assert_eq!(record(row).unwrap(), expected);
}

#[test]
fn values_of_another_kind_are_errors() {
    for (row, expected) in [
        (json!({"text": 3}), "\"text\" is a number, expected a string"),
        (json!({"prompt": "a"}), "no column says what to learn"),
        (json!({}), "the columns are none"),
        (json!({"messages": 3}), "\"messages\" is a number, expected a list"),
        (json!({"messages": "x"}), "\"messages\" is a text that is no JSON list"),
        (json!({"messages": [{"content": "x"}]}), "message 0 has no \"role\""),
        (json!({"messages": [{"role": "user"}]}), "message 0 has no \"content\""),
        (json!({"messages": [{"role": "user", "content": "x"}]}), "nothing to learn"),
        (json!({"prompt": "a", "completion": {"b": 1}}), "\"completion\" is an object"),
    ] {
        let error = record(row.clone()).unwrap_err();
        assert!(error.contains(expected), "{row}: {error}");
    }
}

#[test]
fn a_layout_says_which_columns_it_reads() {
    let layout = Columns::default().layout(&["output", "input", "text", "instruction"]).unwrap();
    assert_eq!(layout.columns(), ["instruction", "input", "output"]);
    let expected = Layout::Completion {
        prompt: "instruction".into(),
        context: Some("input".into()),
        completion: "output".into(),
    };
    assert_eq!(layout, expected);
}
