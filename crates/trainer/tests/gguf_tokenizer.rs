//! Tokenizers from GGUF metadata. The reference is made by `make_gguf_tokenizer.py`.

use offshoot_model::weights::GgufTokenizer;
use offshoot_trainer::tokenizer::Tokenizer;
use serde_json::Value;
use std::path::{Path, PathBuf};

/// OFFSHOOT_TOKENIZER_FIXTURE names another file of the script, such as one with the whole
/// vocabulary, which is too large to keep here.
fn fixture() -> Value {
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/gguf_tokenizer.json");
    let path = std::env::var_os("OFFSHOOT_TOKENIZER_FIXTURE").map_or(own, PathBuf::from);
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn metadata(fixture: &Value) -> GgufTokenizer {
    let strings =
        |field: &str| -> Vec<String> { serde_json::from_value(fixture[field].clone()).unwrap() };
    GgufTokenizer {
        model: fixture["model"].as_str().unwrap().into(),
        pre: fixture["pre"].as_str().unwrap().into(),
        tokens: strings("tokens"),
        token_types: serde_json::from_value(fixture["token_types"].clone()).unwrap(),
        merges: strings("merges"),
        scores: vec![],
        bos_token_id: fixture["bos_token_id"].as_u64().map(|id| id as u32),
        eos_token_id: fixture["eos_token_id"].as_u64().map(|id| id as u32),
        add_bos_token: fixture["add_bos_token"].as_bool().unwrap(),
        chat_template: fixture["chat_template"].as_str().map(String::from),
    }
}

#[test]
fn smollm2_from_gguf_gives_the_reference_ids() {
    let fixture = fixture();
    let tokenizer = Tokenizer::from_gguf(&metadata(&fixture), "smollm2.gguf").unwrap();
    assert_eq!(tokenizer.vocab_size(), fixture["tokens"].as_array().unwrap().len());
    let cases = fixture["cases"].as_array().unwrap();
    assert!(cases.len() > 20);
    for case in cases {
        let text = case["text"].as_str().unwrap();
        let expected: Vec<u32> = serde_json::from_value(case["ids"].clone()).unwrap();
        assert_eq!(tokenizer.encode(text).unwrap(), expected, "{text:?}");
        assert_eq!(tokenizer.decode(&expected).unwrap(), case["decoded"], "{text:?}");
    }
}

#[test]
fn smollm2s_chat_template_renders() {
    let tokenizer = Tokenizer::from_gguf(&metadata(&fixture()), "smollm2.gguf").unwrap();
    let ids = tokenizer.encode_prompt_as_chat("Hi").unwrap();
    // <|im_start|> and <|im_end|> are tokens 1 and 2: system turn, user turn, assistant's begin.
    assert_eq!(ids.iter().filter(|&&id| id == 1).count(), 3);
    assert_eq!(ids.iter().filter(|&&id| id == 2).count(), 2);
    let text = tokenizer.decode(&ids).unwrap();
    assert!(text.ends_with("user\nHi\nassistant\n"), "{text:?}");
}

#[test]
fn what_cannot_be_read_is_said() {
    let mut other = metadata(&fixture());
    other.pre = "tekken".into();
    let error = Tokenizer::from_gguf(&other, "a.gguf").err().unwrap().to_string();
    assert!(error.contains("\"tekken\"") && error.contains("smollm, "), "{error}");
    other.model = "llama".into();
    let error = Tokenizer::from_gguf(&other, "a.gguf").err().unwrap().to_string();
    assert!(error.contains("a.gguf") && error.contains("Hugging Face directory"), "{error}");

    let mut plain = metadata(&fixture());
    plain.chat_template = None;
    let tokenizer = Tokenizer::from_gguf(&plain, "a.gguf").unwrap();
    let error = tokenizer.encode_prompt_as_chat("Hi").unwrap_err().to_string();
    assert!(error.contains("no chat template"), "{error}");
}

#[test]
fn each_rule_cuts_words_its_own_way() {
    // Bytes and the pairs of them that show where a word ends.
    let mut base = metadata(&fixture());
    let pair = |a: &str, b: &str| (format!("{a} {b}"), format!("{a}{b}"));
    base.merges.clear();
    base.tokens.truncate(17 + 256);
    for (merge, token) in
        [pair("1", "2"), pair("12", "3"), pair("123", "4"), pair("Ġ", "1"), pair("!", "Ċ")]
    {
        base.merges.push(merge);
        base.tokens.push(token);
    }
    base.token_types = base.token_types[..17].to_vec();
    let words = |pre: &str, text: &str| -> Vec<String> {
        let tokenizer =
            Tokenizer::from_gguf(&GgufTokenizer { pre: pre.into(), ..base.clone() }, "x").unwrap();
        let ids = tokenizer.encode(text).unwrap();
        ids.iter().map(|&id| tokenizer.decode(&[id]).unwrap()).collect()
    };
    assert_eq!(words("gpt-2", "1234 1!\n"), ["1234", " 1", "!", "\n"]);
    assert_eq!(words("default", "1234"), ["1234"]);
    assert_eq!(words("smollm", "1234 1!\n"), ["1", "2", "3", "4", " ", "1", "!", "\n"]);
    assert_eq!(words("llama-bpe", "1234 1!\n"), ["123", "4", " ", "1", "!\n"]);
    assert_eq!(words("qwen2", "1234 1!\n"), ["1", "2", "3", "4", " ", "1", "!\n"]);
}
