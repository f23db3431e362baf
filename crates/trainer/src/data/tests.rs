use super::source::{Content, DataSource, DataSpec, Located, Place, Record};
use super::*;
use crate::tokenizer::Tokenizer;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

fn tokenizer() -> Tokenizer {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/tiny_text");
    Tokenizer::from_dir(&dir, &serde_json::Value::Null).unwrap()
}

fn options(max_seq_length: usize) -> DataOptions {
    DataOptions { max_seq_length, ..DataOptions::default() }
}

fn load(name: &str, text: &str, options: &DataOptions) -> Result<DataSet, TrainError> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    fs::write(&path, text).unwrap();
    let sources = DataSpec::files(vec![path]).open()?;
    DataSet::load(&sources.train, options, &tokenizer())
}

/// Records from memory that count how often they are asked for.
#[derive(Clone, Default)]
struct Fixed {
    records: Vec<Record>,
    fingerprint: Option<String>,
    read: Arc<AtomicUsize>,
}

impl DataSource for Fixed {
    fn name(&self) -> String {
        "memory".into()
    }

    fn records(&self) -> Result<Box<dyn Iterator<Item = Located> + Send + '_>, TrainError> {
        self.read.fetch_add(1, Ordering::Relaxed);
        let records = self.records.iter().cloned().enumerate();
        Ok(Box::new(records.map(|(i, record)| Ok((Place::row("memory", i + 1), record)))))
    }

    fn fingerprint(&self) -> Result<Option<String>, TrainError> {
        Ok(self.fingerprint.clone())
    }
}

fn from_memory(records: Vec<Record>, options: &DataOptions) -> Result<DataSet, TrainError> {
    let source: Box<dyn DataSource> = Box::new(Fixed { records, ..Fixed::default() });
    DataSet::load(&[source], options, &tokenizer())
}

fn samples(data: &DataSet) -> Vec<Sample> {
    (0..data.len()).map(|i| data.sample(i)).collect()
}

fn decode(ids: impl Iterator<Item = i64>) -> String {
    tokenizer().decode(&ids.map(|id| id as u32).collect::<Vec<_>>()).unwrap()
}

/// Text of the tokens that are learned, with special tokens left out.
fn learned(sample: &Sample) -> String {
    let ids = sample.ids.iter().zip(&sample.learn).filter(|(_, learn)| **learn);
    decode(ids.map(|(&id, _)| id))
}

fn whole(sample: &Sample) -> String {
    decode(sample.ids.iter().copied())
}

#[test]
fn paragraphs_are_samples_that_end_with_eos() {
    let data = load("a.txt", "\nOne tree.\nTwo trees.\n \n\nThree.\n", &options(100)).unwrap();
    let samples = samples(&data);
    let texts: Vec<String> = samples.iter().map(whole).collect();
    assert_eq!(texts, ["One tree.\nTwo trees.", "Three."]);
    let eos = i64::from(tokenizer().eos_id().unwrap());
    assert!(samples.iter().all(|s| s.ids.last() == Some(&eos)));
    assert!(samples.iter().all(|s| s.learn.iter().all(|&learn| learn)));
}

const LONG: &str = "The trunk holds the branches, and the branches hold the leaves.";

#[test]
fn a_long_paragraph_becomes_several_samples_and_loses_nothing() {
    let data = load("a.txt", LONG, &options(5)).unwrap();
    assert!(data.len() > 2);
    assert_eq!((data.stats.n_split, data.stats.n_truncated), (1, 0));
    let samples = samples(&data);
    assert!(samples.iter().all(|s| s.ids.len() <= 5));
    let joined: Vec<u32> = samples.iter().flat_map(|s| &s.ids).map(|&id| id as u32).collect();
    let mut expected = tokenizer().encode(LONG).unwrap();
    expected.push(tokenizer().eos_id().unwrap());
    let last_is_single = expected.len() % 5 == 1;
    assert!(!last_is_single, "choose another text: a piece of one token is passed over");
    assert_eq!(joined, expected);

    let truncate = DataOptions { long_samples: Some(LongSamples::Truncate), ..options(5) };
    let data = load("a.txt", LONG, &truncate).unwrap();
    assert_eq!((data.len(), data.stats.n_split, data.stats.n_truncated), (1, 0, 1));
    assert_eq!(data.sample(0), samples[0]);
}

#[test]
fn only_the_completion_is_learned() {
    let line = r#"{"prompt": "What is a tree?", "completion": "A tall plant."}"#;
    let data = load("a.jsonl", line, &options(100)).unwrap();
    assert_eq!(whole(&data.sample(0)), "What is a tree?\nA tall plant.");
    assert_eq!(learned(&data.sample(0)), "A tall plant.");
    let all = DataOptions { loss_on: Some(LossOn::All), ..options(100) };
    let data = load("a.jsonl", line, &all).unwrap();
    assert_eq!(learned(&data.sample(0)), "What is a tree?\nA tall plant.");

    let line = r#"{"prompt": "Q: tree? A:", "completion": " tall"}"#;
    let data = load("a.jsonl", line, &options(100)).unwrap();
    assert_eq!(whole(&data.sample(0)), "Q: tree? A: tall");

    let as_chat = DataOptions { prompt_format: PromptFormat::Chat, ..options(100) };
    let data = load("a.jsonl", line, &as_chat).unwrap();
    assert_eq!(whole(&data.sample(0)), "user\nQ: tree? A:\nassistant\n tall\n");
    assert_eq!(learned(&data.sample(0)), " tall");
}

#[test]
fn the_prompts_beginning_is_cut_before_the_completion() {
    let completion = |n_prompt: usize, n_completion: usize, limit: usize| {
        let record = Record::Completion {
            prompt: format!("{}\n", vec!["a"; n_prompt].join(" ")),
            completion: vec!["b"; n_completion].join(" "),
        };
        let data = from_memory(vec![record], &options(limit)).unwrap();
        let sample = data.sample(0);
        let n_learned = sample.learn.iter().filter(|&&learn| learn).count();
        (sample.ids.len(), n_learned, sample.learn[0], data.stats.n_truncated)
    };
    let (n_prompt, n_completion) = {
        let (all, completion, ..) = completion(30, 30, 1000);
        (all - completion, completion)
    };
    assert!(n_prompt >= 30 && n_completion >= 30);
    // The completion stays whole, the prompt's end with it.
    assert_eq!(completion(30, 30, n_completion + 20), (n_completion + 20, n_completion, false, 1));
    // A quarter of the limit is the prompt's.
    assert_eq!(completion(30, 30, 40), (40, 30, false, 1));
    // The completion is cut only where it does not fit.
    assert_eq!(completion(30, 30, n_prompt + n_completion).3, 0);

    let question = format!("{}then what? ", "first words, ".repeat(9));
    let line = format!(r#"{{"prompt": "{question}", "completion": "{LONG}"}}"#);
    let n = tokenizer().encode(LONG).unwrap().len() + 1;
    let data = load("a.jsonl", &line, &options(n + n / 2)).unwrap();
    assert_eq!(data.length(0), n + n / 2);
    assert_eq!(learned(&data.sample(0)), LONG);
    let prompt = whole(&data.sample(0)).replace(LONG, "");
    assert!(question.ends_with(&prompt) && prompt.ends_with("then what? "), "{prompt:?}");

    let split = DataOptions { long_samples: Some(LongSamples::Split), ..options(6) };
    let data = load("a.jsonl", &line, &split).unwrap();
    assert!(data.len() > 2 && data.stats.n_split == 1);
}

const TALK: &str = r#"{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there"}, {"role": "user", "content": "And?"}, {"role": "assistant", "content": "More"}]}"#;

#[test]
fn only_the_assistants_turns_are_learned() {
    let data = load("a.jsonl", TALK, &options(200)).unwrap();
    let sample = data.sample(0);
    assert_eq!(learned(&sample), "Hello thereMore");
    // The token that ends a turn is learned, twice; the line break behind it is not.
    let end = i64::from(tokenizer().eos_id().unwrap());
    let n = sample.ids.iter().zip(&sample.learn).filter(|(id, learn)| **id == end && **learn);
    assert_eq!(n.count(), 2);
    assert_eq!(sample.learn.last(), Some(&false));

    let of = |loss_on| DataOptions { loss_on: Some(loss_on), ..options(200) };
    let last = load("a.jsonl", TALK, &of(LossOn::Completion)).unwrap();
    assert_eq!(learned(&last.sample(0)), "More");
    let all = load("a.jsonl", TALK, &of(LossOn::All)).unwrap();
    assert!(all.sample(0).learn.iter().all(|&learn| learn));
}

#[test]
fn a_conversation_loses_its_end_and_only_then_the_first_questions_beginning() {
    let whole_one = load("a.jsonl", TALK, &options(200)).unwrap().sample(0);
    let first_answer_ends =
        1 + whole_one.learn.windows(2).position(|pair| pair == [true, false]).unwrap();
    let cut = load("a.jsonl", TALK, &options(first_answer_ends)).unwrap().sample(0);
    assert_eq!(cut.ids, whole_one.ids[..first_answer_ends]);
    let shorter = load("a.jsonl", TALK, &options(first_answer_ends - 2)).unwrap().sample(0);
    assert_eq!(learned(&shorter), "Hello there");
    assert_ne!(shorter.ids[..4], whole_one.ids[..4]);
}

#[test]
fn a_preference_is_two_samples_with_one_prompt() {
    let text = |text: &str| Content::Text(text.into());
    let records = vec![Record::Preference {
        prompt: text("What is a tree, in a word or two?"),
        chosen: text("A tall plant."),
        rejected: text("No."),
    }];
    let data = from_memory(records.clone(), &options(100)).unwrap();
    assert_eq!((data.unit, data.len(), data.n_units()), (2, 2, 1));
    assert_eq!(learned(&data.sample(0)), "A tall plant.");
    assert_eq!(learned(&data.sample(1)), "No.");
    let n_prompt = |sample: &Sample| sample.learn.iter().take_while(|&&learn| !learn).count();
    let n = n_prompt(&data.sample(0));
    // The longer answer decides what is cut off the prompt of both.
    let cut = from_memory(records.clone(), &options(data.length(0) - 2)).unwrap();
    assert_eq!(n_prompt(&cut.sample(0)), n - 2);
    assert_eq!(n_prompt(&cut.sample(1)), n - 2);
    assert_eq!(cut.sample(1).ids, data.sample(1).ids[2..]);
    assert_eq!(cut.stats.n_truncated, 1);

    let message = |role: &str, text: &str| serde_json::json!({"role": role, "content": text});
    let as_messages = |role: &str, text: &str| Content::Messages(vec![message(role, text)]);
    let records = vec![Record::Preference {
        prompt: Content::Messages(vec![
            message("user", "One?"),
            message("assistant", "Two."),
            message("user", "Three?"),
        ]),
        chosen: as_messages("assistant", "Four."),
        rejected: as_messages("assistant", "Five."),
    }];
    let data = from_memory(records.clone(), &options(200)).unwrap();
    assert_eq!(learned(&data.sample(0)), "Four.");
    assert_eq!(learned(&data.sample(1)), "Five.");

    let mixed = [vec![Record::Text("words and words".into())], records].concat();
    let error = from_memory(mixed, &options(200)).unwrap_err().to_string();
    assert!(error.starts_with("memory, row 2: preference pairs and other records"), "{error}");
}

#[test]
fn errors_name_file_and_line() {
    let cases = [
        ("{\"text\": \"a\"}\n\n{\"text\": 3}", "a.jsonl:3: "),
        ("{\"text\": \"a\"}\n{\"text\":", "a.jsonl:2: not a JSON object"),
        ("{\"messages\": [{\"role\": \"user\", \"content\": \"x\"}]}", "nothing to learn"),
    ];
    for (text, expected) in cases {
        let error = load("a.jsonl", text, &options(10)).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    // The template's refusal comes with the place, though it is found on another thread.
    let mut lines = vec![TALK; 40];
    lines.push(r#"{"messages": [{"role": "assistant", "content": [1]}]}"#);
    let error = load("a.jsonl", &lines.join("\n"), &options(200)).unwrap_err().to_string();
    assert!(error.contains("a.jsonl:41: the model's chat template: "), "{error}");
}

#[test]
fn what_comes_after_the_last_sample_wanted_is_not_read() {
    let text =
        "{\"text\": \"first words\"}\n{\"text\": \"\"}\n{\"text\": \"second words\"}\nno JSON";
    let two = DataOptions { max_samples: Some(2), ..options(50) };
    let data = load("a.jsonl", text, &two).unwrap();
    assert_eq!(
        samples(&data).iter().map(whole).collect::<Vec<_>>(),
        ["first words", "second words"]
    );
    assert_eq!((data.stats.n_records, data.stats.n_skipped), (3, 1));
    let three = DataOptions { max_samples: Some(3), ..options(50) };
    let error = load("a.jsonl", text, &three).unwrap_err().to_string();
    assert!(error.contains("a.jsonl:4: not a JSON object"), "{error}");
    // A long text may end beyond the limit.
    let two = DataOptions { max_samples: Some(2), ..options(5) };
    assert_eq!(load("a.txt", LONG, &two).unwrap().len(), 2);
}

#[test]
fn many_records_stay_in_order() {
    // More than one chunk, and more threads than one where there are.
    let records: Vec<Record> = (0..5000).map(|i| Record::Text(format!("text {i}"))).collect();
    let data = from_memory(records, &options(50)).unwrap();
    assert_eq!(data.len(), 5000);
    for i in [0, 1, 2047, 2048, 2049, 4095, 4096, 4999] {
        assert_eq!(whole(&data.sample(i)), format!("text {i}"));
    }
}

#[test]
fn what_has_nothing_to_predict_is_passed_over_and_counted() {
    let lines = "{\"prompt\": \"words\", \"completion\": \" \"}\n{\"text\": \"words\"}";
    let data = load("a.jsonl", lines, &options(30)).unwrap();
    assert_eq!((data.len(), data.stats.n_skipped, data.stats.n_records), (1, 1, 2));
    let line = data.stats.to_string();
    assert!(line.starts_with("2 records, 1 sample, "), "{line}");
    assert!(line.ends_with(", 1 record passed over (50.0%)"), "{line}");
    let only = "{\"prompt\": \"a prompt\", \"completion\": \"\"}";
    let error = load("a.jsonl", only, &options(30)).unwrap_err().to_string();
    assert!(error.contains("raise --max-seq-length"), "{error}");
    let error = from_memory(vec![], &options(30)).unwrap_err().to_string();
    assert_eq!(error, "no sample to train on in memory: there is no record");
}

fn sample(ids: &[i64]) -> Sample {
    Sample { ids: ids.to_vec(), learn: vec![true; ids.len()] }
}

#[test]
fn batches_are_packed_and_labels_shifted_within_each_sequence() {
    let masked = Sample { ids: vec![7, 8, 9, 6], learn: vec![false, false, true, true] };
    let data = DataSet::of(&[sample(&[1, 2, 3]), masked, sample(&[4, 5])]);
    let batches = data.in_order(MicrobatchSize::Samples(3), 1000).unwrap();
    assert_eq!(
        batches,
        [Batch {
            ids: vec![7, 8, 9, 6, 1, 2, 3, 4, 5],
            seq_lens: vec![4, 3, 2],
            labels: vec![-100, 9, 6, -100, 2, 3, -100, 5, -100],
            samples: vec![1, 0, 2],
        }]
    );
    assert_eq!(batches[0].n_tokens(), 9);
    assert_eq!(batches[0].n_predicted(), 5);
    assert_eq!((data.n_tokens(), data.highest_id(), data.stats.n_learned), (9, 9, 5));
}

#[test]
fn the_fingerprint_tells_data_sets_apart() {
    let of = |samples: &[Sample]| DataSet::of(samples).fingerprint();
    assert_eq!(of(&[sample(&[1, 2])]), of(&[sample(&[1, 2])]));
    assert_ne!(of(&[sample(&[1, 2]), sample(&[3])]), of(&[sample(&[1]), sample(&[2, 3])]));
    let masked = Sample { ids: vec![1, 2], learn: vec![true, false] };
    assert_ne!(of(&[sample(&[1, 2])]), of(&[masked]));
    // Recorded by the release before: runs begun with it must be known again.
    assert_eq!(of(&[sample(&[1, 2]), sample(&[3])]), RECORDED);
}

const RECORDED: &str = "6493c8de2cd3e7fda90cb1e37864ecb0";

#[test]
fn samples_are_made_once() {
    let dir = tempfile::tempdir().unwrap();
    let cached = DataOptions { cache_dir: Some(dir.path().join("new")), ..options(50) };
    let records = vec![Record::Text("one tree".into()), Record::Text("two trees".into())];
    let source = |records: &[Record], fingerprint: Option<&str>| Fixed {
        records: records.to_vec(),
        fingerprint: fingerprint.map(String::from),
        read: Arc::default(),
    };
    // How often the records were asked for, and whether the cache had the samples.
    let load = |source: Fixed, options: &DataOptions| {
        let read = source.read.clone();
        let data = DataSet::load(&[Box::new(source)], options, &tokenizer()).unwrap();
        (data.cached, read.load(Ordering::Relaxed), data)
    };
    let (found, read, first) = load(source(&records, Some("a")), &cached);
    assert_eq!((found, read), (false, 1));
    let (found, read, second) = load(source(&records, Some("a")), &cached);
    assert_eq!((found, read), (true, 0));
    assert_eq!(DataSet { cached: false, ..second }, first);

    // Another source, another option, another template: made again.
    assert!(!load(source(&records, Some("b")), &cached).0);
    for other in [
        DataOptions { max_seq_length: 49, ..cached.clone() },
        DataOptions { max_samples: Some(1), ..cached.clone() },
        DataOptions { loss_on: Some(LossOn::All), ..cached.clone() },
        DataOptions { long_samples: Some(LongSamples::Truncate), ..cached.clone() },
        DataOptions { prompt_format: PromptFormat::Chat, ..cached.clone() },
    ] {
        assert!(!load(source(&records, Some("a")), &other).0, "{other:?}");
        assert!(load(source(&records, Some("a")), &other).0, "{other:?}");
    }
    let template = dir.path().join("other.jinja");
    fs::write(&template, "{{ messages }}").unwrap();
    let tokenizer = tokenizer().with_chat_template(template.to_str().unwrap()).unwrap();
    let other: Box<dyn DataSource> = Box::new(source(&records, Some("a")));
    assert!(!DataSet::load(&[other], &cached, &tokenizer).unwrap().cached);
    let off = DataOptions { cache_dir: None, ..cached.clone() };
    assert!(!load(source(&records, Some("a")), &off).0);

    // Without a fingerprint the records are read once more, to be compared.
    assert_eq!(load(source(&records, None), &cached).1, 2);
    assert!(load(source(&records, None), &cached).0);
    assert!(!load(source(&records[..1], None), &cached).0);
}

#[test]
fn a_changed_file_is_tokenised_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.txt");
    let cached = DataOptions { cache_dir: Some(dir.path().join("cache")), ..options(50) };
    let load = |text: &str| {
        fs::write(&path, text).unwrap();
        let sources = DataSpec::files(vec![path.clone()]).open().unwrap();
        DataSet::load(&sources.train, &cached, &tokenizer()).unwrap().cached
    };
    assert_eq!([load("one tree"), load("one tree"), load("one free")], [false, true, false]);
    assert!(load("one tree"));
}

#[test]
fn a_damaged_cache_is_made_again() {
    let dir = tempfile::tempdir().unwrap();
    let cached = DataOptions { cache_dir: Some(dir.path().into()), ..options(50) };
    let load = || {
        let records = vec![Record::Text("one tree".into()), Record::Text("two".into())];
        from_memory(records, &cached).unwrap()
    };
    let whole = load();
    let file = fs::read_dir(dir.path()).unwrap().next().unwrap().unwrap().path();
    let bytes = fs::read(&file).unwrap();
    // Cut off at every length, and with every byte changed.
    let cut = (0..bytes.len()).step_by(7).map(|n| bytes[..n].to_vec());
    let changed = (0..bytes.len()).map(|i| {
        let mut bytes = bytes.clone();
        bytes[i] ^= 1;
        bytes
    });
    for damaged in cut.chain(changed) {
        fs::write(&file, &damaged).unwrap();
        let again = load();
        assert_eq!(DataSet { cached: false, ..again }, whole);
    }
    assert!(load().cached);
}
