use super::*;
use std::fs;
use std::path::Path;

fn tokenizer() -> Tokenizer {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/tiny_text");
    Tokenizer::from_dir(&dir, &serde_json::Value::Null).unwrap()
}

fn options(max_seq_length: usize) -> DataOptions {
    DataOptions { max_seq_length, max_samples: None, prompt_format: PromptFormat::Plain }
}

fn load(name: &str, text: &str, options: &DataOptions) -> Result<DataSet, TrainError> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    fs::write(&path, text).unwrap();
    DataSet::load(&[path], options, &tokenizer())
}

/// Text of the tokens that are learned, with special tokens left out.
fn learned(sample: &Sample) -> String {
    let ids = sample.ids.iter().zip(&sample.learn).filter(|(_, learn)| **learn);
    tokenizer().decode(&ids.map(|(&id, _)| id as u32).collect::<Vec<_>>()).unwrap()
}

fn whole(sample: &Sample) -> String {
    tokenizer().decode(&sample.ids.iter().map(|&id| id as u32).collect::<Vec<_>>()).unwrap()
}

#[test]
fn paragraphs_are_samples_that_end_with_eos() {
    let data = load("a.txt", "\nOne tree.\nTwo trees.\n \n\nThree.\n", &options(100)).unwrap();
    let texts: Vec<String> = data.samples.iter().map(whole).collect();
    assert_eq!(texts, ["One tree.\nTwo trees.", "Three."]);
    let eos = i64::from(tokenizer().eos_id().unwrap());
    assert!(data.samples.iter().all(|s| s.ids.last() == Some(&eos)));
    assert!(data.samples.iter().all(|s| s.learn.iter().all(|&learn| learn)));
}

#[test]
fn a_long_paragraph_becomes_several_samples_and_loses_nothing() {
    let text = "The trunk holds the branches, and the branches hold the leaves.";
    let data = load("a.txt", text, &options(5)).unwrap();
    assert!(data.samples.len() > 2);
    assert!(data.samples.iter().all(|s| s.ids.len() <= 5));
    let joined: Vec<i64> = data.samples.iter().flat_map(|s| s.ids.clone()).collect();
    let mut expected = tokenizer().encode(text).unwrap();
    expected.push(tokenizer().eos_id().unwrap());
    let last_is_single = expected.len() % 5 == 1;
    assert!(!last_is_single, "choose another text: a piece of one token is passed over");
    assert_eq!(joined, widen(&expected).collect::<Vec<_>>());
}

#[test]
fn only_the_completion_is_learned() {
    let line = r#"{"prompt": "What is a tree?", "completion": "A tall plant."}"#;
    let data = load("a.jsonl", line, &options(100)).unwrap();
    assert_eq!(whole(&data.samples[0]), "What is a tree?\nA tall plant.");
    assert_eq!(learned(&data.samples[0]), "A tall plant.");

    let line = r#"{"prompt": "Q: tree? A:", "completion": " tall"}"#;
    let data = load("a.jsonl", line, &options(100)).unwrap();
    assert_eq!(whole(&data.samples[0]), "Q: tree? A: tall");

    let as_chat = DataOptions { prompt_format: PromptFormat::Chat, ..options(100) };
    let data = load("a.jsonl", line, &as_chat).unwrap();
    assert_eq!(whole(&data.samples[0]), "user\nQ: tree? A:\nassistant\n tall\n");
    assert_eq!(learned(&data.samples[0]), " tall");
}

#[test]
fn only_the_assistants_turns_are_learned() {
    let line = r#"{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there"}, {"role": "user", "content": "And?"}, {"role": "assistant", "content": "More"}]}"#;
    let data = load("a.jsonl", line, &options(200)).unwrap();
    let sample = &data.samples[0];
    assert_eq!(learned(sample), "Hello thereMore");
    // The token that ends a turn is learned, twice; the line break behind it is not.
    let end = i64::from(tokenizer().eos_id().unwrap());
    let n = sample.ids.iter().zip(&sample.learn).filter(|(id, learn)| **id == end && **learn);
    assert_eq!(n.count(), 2);
    assert_eq!(sample.learn.last(), Some(&false));
}

#[test]
fn errors_name_file_and_line() {
    let cases = [
        (
            "{\"text\": \"a\"}\n\n{\"text\": 3}",
            "a.jsonl:3: \"text\" is a number, expected a string",
        ),
        ("{\"text\": \"a\"}\n{\"text\":", "a.jsonl:2: not a JSON object"),
        ("[1]", "a.jsonl:1: not a JSON object"),
        ("{\"prompt\": \"a\"}", "the fields are \"prompt\""),
        ("{\"messages\": [{\"role\": \"user\", \"content\": \"x\"}]}", "nothing to learn"),
        ("{\"messages\": [{\"content\": \"x\"}]}", "message 0 has no \"role\""),
        (" \n", "the file is empty"),
    ];
    for (text, expected) in cases {
        let error = load("a.jsonl", text, &options(10)).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    let error = load("a.parquet", "x", &options(10)).unwrap_err().to_string();
    assert!(error.contains(".jsonl"), "{error}");
    let missing = DataSet::load(&["nowhere.txt".into()], &options(10), &tokenizer());
    assert!(missing.unwrap_err().to_string().starts_with("nowhere.txt: "));
}

#[test]
fn a_folder_is_its_data_files_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
    let error = DataSet::load(&[dir.path().into()], &options(9), &tokenizer()).unwrap_err();
    assert!(error.to_string().contains("no data file in this folder"), "{error}");
    write("b.txt", "second words");
    write("a.jsonl", "{\"text\": \"first words\"}");
    write("notes.bin", "not data");
    let data = DataSet::load(&[dir.path().into()], &options(50), &tokenizer()).unwrap();
    let texts: Vec<String> = data.samples.iter().map(whole).collect();
    assert_eq!(texts, ["first words", "second words"]);
    let two = DataOptions { max_samples: Some(1), ..options(50) };
    let data = DataSet::load(&[dir.path().into()], &two, &tokenizer()).unwrap();
    assert_eq!(data.samples.len(), 1);
}

#[test]
fn what_has_nothing_to_predict_is_passed_over_and_counted() {
    let lines =
        "{\"prompt\": \"a very long prompt\", \"completion\": \"b\"}\n{\"text\": \"words\"}";
    let data = load("a.jsonl", lines, &options(3)).unwrap();
    assert_eq!(data.n_skipped, 1);
    let only = "{\"prompt\": \"a very long prompt\", \"completion\": \"b\"}";
    let error = load("a.jsonl", only, &options(3)).unwrap_err().to_string();
    assert!(error.contains("raise --max-seq-length"), "{error}");
}

fn sample(ids: &[i64]) -> Sample {
    Sample { ids: ids.to_vec(), learn: vec![true; ids.len()] }
}

#[test]
fn batches_are_packed_and_labels_shifted_within_each_sequence() {
    let masked = Sample { ids: vec![7, 8, 9, 6], learn: vec![false, false, true, true] };
    let data = DataSet { samples: vec![sample(&[1, 2, 3]), masked, sample(&[4, 5])], n_skipped: 0 };
    let batches = data.batches(&[2, 0, 1], 3, 1000);
    assert_eq!(
        batches,
        [Batch {
            ids: vec![7, 8, 9, 6, 1, 2, 3, 4, 5],
            seq_lens: vec![4, 3, 2],
            labels: vec![-100, 9, 6, -100, 2, 3, -100, 5, -100],
        }]
    );
    assert_eq!(batches[0].n_tokens(), 9);
    assert_eq!(batches[0].n_predicted(), 5);
}

#[test]
fn a_batch_too_large_for_the_server_is_split() {
    let data = DataSet { samples: (0..5).map(|_| sample(&[1, 2, 3])).collect(), n_skipped: 0 };
    let lens = |batch_size, max_tokens| -> Vec<usize> {
        let batches = data.batches(&[0, 1, 2, 3, 4], batch_size, max_tokens);
        batches.iter().map(|b| b.seq_lens.len()).collect()
    };
    assert_eq!(lens(2, 1000), [2, 2, 1]);
    assert_eq!(lens(4, 7), [2, 2, 1]);
    assert_eq!(lens(4, 2), [1, 1, 1, 1, 1]);
}

#[test]
fn the_fingerprint_tells_data_sets_apart() {
    let of = |samples: &[Sample]| DataSet { samples: samples.to_vec(), n_skipped: 0 }.fingerprint();
    assert_eq!(of(&[sample(&[1, 2])]), of(&[sample(&[1, 2])]));
    assert_ne!(of(&[sample(&[1, 2]), sample(&[3])]), of(&[sample(&[1]), sample(&[2, 3])]));
    let masked = Sample { ids: vec![1, 2], learn: vec![true, false] };
    assert_ne!(of(&[sample(&[1, 2])]), of(&[masked]));
}
