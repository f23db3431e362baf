use super::*;
use crate::data::Sample;
use crate::noise::Perturbation;
use crate::verify::draw_adapter;
use offshoot_model::weights::Checkpoint;
use offshoot_model::{ModelConfig, Part, PartSpec};
use serde_json::Value;
use std::path::{Path, PathBuf};
use tch::{Device, Kind};

/// A tiny model, and texts of it.
struct Case {
    checkpoint: Checkpoint,
    config: ModelConfig,
    choice: Choice,
    /// What tests/make_leak.py has found with Transformers and autograd.
    expected: Value,
}

impl Case {
    fn of(family: &str) -> Self {
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        let text = std::fs::read_to_string(here.join("tests/leak.json")).unwrap();
        let mut all: Value = serde_json::from_str(&text).unwrap();
        let expected = all[family].take();
        let samples = |name: &str| -> Vec<Sample> {
            let ids: Vec<Vec<i64>> = serde_json::from_value(expected[name].clone()).unwrap();
            ids.into_iter().map(|ids| Sample { learn: vec![true; ids.len()], ids }).collect()
        };
        let choice = Choice { test: samples("test"), fit: samples("fit") };
        let dir: PathBuf = here.join("../../tests/fixtures").join(family);
        let checkpoint = Checkpoint::open(&dir).unwrap();
        let config = ModelConfig::from_json(checkpoint.config()).unwrap();
        Case { checkpoint, config, choice, expected }
    }

    fn options(&self) -> LeakOptions<'_> {
        let (checkpoint, config) = (&self.checkpoint, &self.config);
        LeakOptions {
            subject: Subject { checkpoint, config, kind: Kind::Float, device: Device::Cpu },
            adapter: None,
            split_points_1: vec![0, 1, 3],
            split_point_2: None,
            privacy: PrivacyOptions::default(),
            n_tokens: 1000,
            n_reader_tokens: 1000,
            n_labels: 1000,
        }
    }

    fn measure(&self, options: &LeakOptions) -> Leak {
        measure_choice(options, &self.choice, true, &mut |_, _| {}).unwrap()
    }

    fn data_set(&self) -> DataSet {
        DataSet::of(&[self.choice.test.as_slice(), &self.choice.fit].concat())
    }
}

/// Number of tokens, from a share.
fn count(share: f64, n: usize) -> i64 {
    (share * n as f64).round() as i64
}

#[track_caller]
fn assert_found(what: &str, found: &Recovered, (expected, n): (&Value, usize)) {
    for (share, expected) in [(found.top_1, &expected[0]), (found.top_10, &expected[1])] {
        let (found, expected) = (count(share, n), expected.as_i64().unwrap());
        println!("{what}: {found} of {n}, the reference {expected}");
        // Cosines that are equal but for rounding may change places.
        assert!((found - expected).abs() <= 1, "{what}: {found}, the reference {expected}");
    }
}

#[test]
fn the_readers_find_what_the_reference_finds() {
    for family in ["gpt2", "llama", "qwen2", "qwen3", "gemma"] {
        let case = Case::of(family);
        let mut options = case.options();
        options.split_point_2 = Some(4);
        let leak = case.measure(&options);
        assert_eq!((leak.tokens, leak.samples, leak.reader_tokens), (12 * 23, 12, 40 * 23));
        for split in &leak.split_points {
            let point = split.split_point_1;
            let expected = &case.expected["tokens"][point.to_string()];
            for (name, found) in [
                ("nearest", &split.nearest),
                ("centred", &split.centred),
                ("linear", &split.linear),
            ] {
                let what = format!("{family}, split point {point}, {name}");
                assert_found(&what, found, (&expected[name], leak.tokens));
            }
        }
        for point in [3, 4] {
            options.split_point_2 = Some(point);
            let labels = case.measure(&options).labels.unwrap();
            let expected = &case.expected["labels"][point.to_string()];
            let what = format!("{family}, labels at {point}");
            assert_found(&what, &labels.direct, (expected, labels.labels));
            // The linear reader is no reference's, but it is no fool either.
            assert!(labels.linear.top_1 > 2.0 * labels.baseline.top_1, "{what}: {labels:?}");
        }
    }
}

#[test]
fn noise_and_clipping_reach_the_readers() {
    let case = Case::of("llama");
    let mut options = case.options();
    (options.split_points_1, options.split_point_2) = (vec![1], Some(4));
    let read = |options: &LeakOptions| {
        let mut leak = case.measure(options);
        (leak.split_points.remove(0), leak.labels.unwrap())
    };
    let (plain, plain_labels) = read(&options);
    let with = |clip_norm: f64, noise: f64| PrivacyOptions {
        hidden: Perturbation { clip_norm: Some(clip_norm * plain.norms.median), noise },
        gradients: Perturbation { clip_norm: Some(clip_norm * plain_labels.norms.median), noise },
        noise_key: Some(NoiseKey::of([1; 32])),
    };
    // Nobody is as long: nothing changes, the norms that are told least of all.
    options.privacy = with(100.0, 0.0);
    let (same, same_labels) = read(&options);
    assert_eq!((same.linear.top_1, same.norms), (plain.linear.top_1, plain.norms));
    assert_eq!(same_labels.direct.top_1, plain_labels.direct.top_1);
    // A cosine does not see how long a row is.
    options.privacy = with(0.5, 0.0);
    let (clipped, clipped_labels) = read(&options);
    assert_eq!(clipped.nearest.top_1, plain.nearest.top_1);
    assert_eq!(clipped_labels.direct.top_1, plain_labels.direct.top_1);
    options.privacy = with(1.0, 1.0);
    let (some, some_labels) = read(&options);
    options.privacy = with(1.0, 100.0);
    let (much, much_labels) = read(&options);
    let falls = [plain.linear.top_1, some.linear.top_1, much.linear.top_1];
    println!("linear {falls:?}");
    assert!(falls.is_sorted_by(|more, less| more > less), "{falls:?}");
    let falls = [&plain_labels, &some_labels, &much_labels].map(|labels| labels.direct.top_1);
    println!("labels {falls:?}");
    assert!(falls.is_sorted_by(|more, less| more > less), "{falls:?}");
    assert!(much.linear.top_1 < 1.5 * case.measure(&options).baseline.top_1);
}

#[test]
fn an_adapter_changes_what_is_read_and_a_stranger_does_not_have_it() {
    let case = Case::of("qwen2");
    let whole = PartSpec::whole(&case.config);
    let part = Part::load(&case.checkpoint, &case.config, whole, Kind::Float, Device::Cpu).unwrap();
    let mut drawn =
        draw_adapter(&case.config, &part.sites(&case.config.default_targets()).unwrap(), 1);
    drawn.tensors.iter_mut().for_each(|(_, tensor)| *tensor = &*tensor * 6.0);
    let adapter = Adapter {
        spec: drawn.spec,
        tensors: drawn.tensors,
        base_model: None,
        origin: PathBuf::from("drawn"),
    };
    let plain = case.measure(&case.options());
    let options = LeakOptions { adapter: Some(&adapter), ..case.options() };
    let known = measure_choice(&options, &case.choice, true, &mut |_, _| {}).unwrap();
    let strange = measure_choice(&options, &case.choice, false, &mut |_, _| {}).unwrap();
    let linear = |leak: &Leak| leak.split_points[2].linear.top_1;
    println!(
        "linear at 3: {} without, {} known, {} to a stranger",
        linear(&plain),
        linear(&known),
        linear(&strange)
    );
    assert_eq!(known.split_points[0].linear.top_1, 1.0, "no layer, no adapter");
    assert_ne!(known.split_points[2].norms, plain.split_points[2].norms);
    assert!(linear(&known) > linear(&strange), "the map of another bottom reads worse");
}

#[test]
fn nothing_that_is_measured_is_known_to_the_reader() {
    let case = Case::of("llama");
    let text = case.data_set();
    let mut options = case.options();
    (options.n_tokens, options.n_reader_tokens) = (100, 10_000);
    let choice = Choice::of(&options, &LeakData { text: &text, reader: None }).unwrap();
    let n = |samples: &[Sample]| samples.iter().map(|sample| sample.ids.len()).sum::<usize>();
    assert_eq!(n(&choice.test), 100);
    assert!(choice.fit.len() > 40 && choice.fit.iter().all(|fit| !choice.test.contains(fit)));
    // At most half of it is measured; the same half each time.
    options.n_tokens = 10_000;
    let half = || Choice::of(&options, &LeakData { text: &text, reader: None }).unwrap();
    assert_eq!(n(&half().test), 52 * 24 / 2);
    assert_eq!(half().test, half().test);
    // All of it, if the reader knows other text, even if that is the same.
    let data = LeakData { text: &text, reader: Some(&text) };
    assert!(Choice::of(&options, &data).is_err(), "nothing is left for the reader");
    let other = DataSet::of(&case.choice.fit);
    let own = DataSet::of(&case.choice.test);
    let choice = Choice::of(&options, &LeakData { text: &own, reader: Some(&other) }).unwrap();
    assert_eq!((choice.test.len(), choice.fit.len()), (12, 40));
}

#[test]
fn wrong_split_points_and_short_texts_are_refused() {
    let case = Case::of("llama");
    let (text, short) = (case.data_set(), DataSet::of(&case.choice.test[..1]));
    let said = |change: &dyn Fn(&mut LeakOptions), text: &DataSet| {
        let mut options = case.options();
        change(&mut options);
        let data = LeakData { text, reader: None };
        measure(&options, &data, &mut |_, _| {}).unwrap_err().to_string()
    };
    let text_of = |points: &[usize]| said(&|o| o.split_points_1 = points.to_vec(), &text);
    assert_eq!(text_of(&[1, 4]), "--split-point-1 = 4: the model has 4 layers: expected 0 to 3");
    assert!(text_of(&[2, 1]).contains("rising order"));
    assert!(text_of(&[]).contains("at least one"));
    let error = said(&|o| o.split_point_2 = Some(5), &text);
    assert_eq!(error, "--split-point-2 = 5: the model has 4 layers: expected 1 to 4");
    let error = said(&|o| (o.split_points_1, o.split_point_2) = (vec![1, 2], Some(2)), &text);
    let expected = "the trunk ends before layer 2 (--split-point-2): expected 0 to 1";
    assert_eq!(error, format!("--split-point-1 = 2: {expected}"));
    let error = said(&|_| {}, &short);
    assert!(error.contains("too little text for the linear reader to learn from"), "{error}");
}
