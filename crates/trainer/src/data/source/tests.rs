use super::*;
use offshoot_model::weights::HubSettings;
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

fn numbers(n: usize) -> String {
    (0..n).map(|i| format!("{{\"text\": \"number {i}\"}}\n")).collect()
}

fn texts(sources: &[Box<dyn DataSource>]) -> Vec<String> {
    let mut texts = Vec::new();
    for source in sources {
        for located in source.records().unwrap() {
            match located.unwrap().1 {
                Record::Text(text) => texts.push(text),
                other => panic!("{other:?}"),
            }
        }
    }
    texts
}

/// No test of these asks a hub.
fn no_hub() -> HubSettings {
    HubSettings {
        endpoint: "http://127.0.0.1:1".into(),
        cache: "nowhere".into(),
        token: None,
        offline: true,
    }
}

fn open(spec: DataSpec) -> Result<(Vec<String>, Vec<String>), String> {
    let sources = spec.open_with(&no_hub()).map_err(|error| error.to_string())?;
    Ok((texts(&sources.train), texts(&sources.eval)))
}

fn write(dir: &Path, name: &str, texts: &[&str]) {
    let path = dir.join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let lines = texts.iter().map(|text| format!("{{\"text\": \"{text}\"}}\n"));
    fs::write(path, lines.collect::<String>()).unwrap();
}

#[test]
fn the_held_out_part_is_a_function_of_seed_and_record() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (dir.path().join("a.jsonl"), dir.path().join("b.jsonl"));
    let all = numbers(1000);
    let (first, second) = all.split_at(all.find("{\"text\": \"number 400\"}").unwrap());
    fs::write(&a, first).unwrap();
    fs::write(&b, second).unwrap();
    let spec = |files: Vec<&std::path::PathBuf>, seed: u64| DataSpec {
        eval_fraction: 0.1,
        seed,
        ..DataSpec::files(files.into_iter().cloned().collect())
    };
    let (train, eval) = open(spec(vec![&a, &b], 1)).unwrap();
    // Nothing is lost, nothing is in both, the order stays, and the part is about a tenth.
    assert!((70..130).contains(&eval.len()), "{}", eval.len());
    let whole: BTreeSet<_> = train.iter().chain(&eval).collect();
    assert_eq!((whole.len(), train.len() + eval.len()), (1000, 1000));
    let place = |text: &String| text[7..].parse::<usize>().unwrap();
    assert!(train.is_sorted_by_key(place) && eval.is_sorted_by_key(place));
    // The same records are held out whatever else there is, and others with another seed.
    let of = |(_, eval): (Vec<String>, Vec<String>)| eval.into_iter().collect::<BTreeSet<_>>();
    let alone: BTreeSet<_> = of(open(spec(vec![&b], 1)).unwrap());
    let together: BTreeSet<_> = eval.into_iter().filter(|text| place(text) >= 400).collect();
    assert_eq!(alone, together);
    assert_ne!(alone, of(open(spec(vec![&b], 2)).unwrap()));
}

#[test]
fn an_empty_part_says_which_way_to_go() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.jsonl");
    fs::write(&path, numbers(2)).unwrap();
    let error_of = |fraction: f64, eval: bool| {
        let spec = DataSpec { eval_fraction: fraction, ..DataSpec::files(vec![path.clone()]) };
        let sources = spec.open_with(&no_hub()).unwrap();
        let part = if eval { &sources.eval } else { &sources.train };
        part[0].records().unwrap().find_map(Result::err).unwrap().to_string()
    };
    assert!(error_of(1e-9, true).contains("raise --eval-fraction"));
    assert!(error_of(1.0 - 1e-9, false).contains("lower --eval-fraction"));
}

#[test]
fn a_folder_as_a_data_set_has_splits() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), "data/train-00001-of-00002.jsonl", &["b"]);
    write(dir.path(), "data/train-00000-of-00002.jsonl", &["a"]);
    write(dir.path(), "data/validation-00000-of-00001.jsonl", &["c"]);
    write(dir.path(), "data/test-00000-of-00001.jsonl", &["d"]);
    let spec =
        DataSpec { dataset_name: Some(dir.path().display().to_string()), ..DataSpec::default() };
    let of = |train: &[&str], eval: &[&str]| {
        let strings =
            |texts: &[&str]| texts.iter().map(|text| text.to_string()).collect::<Vec<_>>();
        (strings(train), strings(eval))
    };
    assert_eq!(open(spec.clone()).unwrap(), of(&["a", "b"], &["c"]));
    let other = DataSpec { eval_split: Some("test".into()), ..spec.clone() };
    assert_eq!(open(other).unwrap(), of(&["a", "b"], &["d"]));
    let other = DataSpec { train_split: "validation".into(), ..spec.clone() };
    assert_eq!(open(other).unwrap(), of(&["c"], &[]));
    let other = DataSpec { train_split: "all".into(), ..spec.clone() };
    let error = open(other).unwrap_err();
    assert!(
        error.contains(
            "there is no split \"all\"; the splits are \"test\", \"train\", \"validation\""
        ),
        "{error}"
    );
    let other = DataSpec { dataset_config: Some("en".into()), ..spec };
    let error = open(other).unwrap_err();
    assert!(error.contains("there is no config \"en\""), "{error}");
}

#[test]
fn a_folder_of_train_file_is_all_its_files() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), "train.jsonl", &["a"]);
    write(dir.path(), "b.jsonl", &["b"]);
    write(dir.path(), "deeper/c.jsonl", &["c"]);
    let files = |path: &Path| DataSpec::files(vec![path.into()]);
    let (train, eval) = open(files(dir.path())).unwrap();
    assert_eq!((train, eval.len()), (vec!["b".to_string(), "a".to_string()], 0));
    fs::create_dir(dir.path().join("empty")).unwrap();
    let error = open(files(&dir.path().join("empty"))).unwrap_err();
    assert!(
        error.contains("no data file in this folder; expected names ending with .txt"),
        "{error}"
    );
    write(dir.path(), "below/a/b.jsonl", &["b"]);
    let error = open(files(&dir.path().join("below"))).unwrap_err();
    assert!(error.contains("with --dataset-name those in the folders below"), "{error}");
    fs::write(dir.path().join("empty/data-00000-of-00001.arrow"), "x").unwrap();
    let error = open(files(&dir.path().join("empty"))).unwrap_err();
    assert!(error.contains("write the data set with its to_parquet"), "{error}");
    let file = dir.path().join("b.jsonl").display().to_string();
    let named = DataSpec { dataset_name: Some(file), ..DataSpec::default() };
    assert_eq!(open(named.clone()).unwrap().0, ["b"]);
    let error = open(DataSpec { dataset_config: Some("en".into()), ..named }).unwrap_err();
    assert!(error.contains("a single file has no configs and splits"), "{error}");
    let error = open(files(Path::new("nowhere.txt"))).unwrap_err();
    assert_eq!(error, "nowhere.txt: there is no such file or folder");
    let named = DataSpec { dataset_name: Some("./nowhere".into()), ..DataSpec::default() };
    let error = open(named).unwrap_err();
    assert!(error.contains("there is no such file or folder"), "{error}");
}

#[test]
fn options_that_cannot_stand_together_are_refused() {
    let file = || DataSpec::files(vec!["a.txt".into()]);
    let name = |name: &str| Some(name.to_string());
    for (spec, expected) in [
        (DataSpec::default(), "--train-file = (none): name what to train on"),
        (
            DataSpec { dataset_name: name("a"), ..file() },
            "--dataset-name = a: leave it or --train-file out",
        ),
        (DataSpec { dataset_config: name("c"), ..file() }, "--dataset-config = c: only a data set"),
        (DataSpec { eval_split: name("test"), ..file() }, "--eval-split = test: only a data set"),
        (DataSpec { eval_fraction: 1.0, ..file() }, "--eval-fraction = 1: expected 0 to below 1"),
        (DataSpec { eval_fraction: f64::NAN, ..file() }, "--eval-fraction = NaN"),
        (
            DataSpec { eval_fraction: 0.1, eval_files: vec!["b".into()], ..file() },
            "--eval-fraction = 0.1: leave it out, or --eval-file",
        ),
        (
            DataSpec { max_eval_samples: Some(0), ..file() },
            "--max-eval-samples = 0: expected at least 1",
        ),
        (
            DataSpec {
                columns: Columns { text: name("a"), chosen: name("b"), ..Columns::default() },
                ..file()
            },
            "leave it or --chosen-column out",
        ),
    ] {
        let error = spec.validate().unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}
