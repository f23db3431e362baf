//! The decoder, the LoRA gradients and the optimizer against numbers that Transformers and PEFT
//! computed (tests/fixtures/make_fixtures.py), for every family, uncut and cut.

use offshoot_adapters::{AdamW, AdapterSet, peft};
use offshoot_model::weights::Checkpoint;
use offshoot_model::{ModelConfig, Part, PartSpec, Rows, Segment, Tape};
use safetensors::SafeTensors;
use serde_json::Value;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor};

const FAMILIES: [&str; 5] = ["gpt2", "llama", "qwen2", "qwen3", "gemma"];

fn fixture(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures").join(family)
}

/// The model in consecutive parts, each with its share of the fixture's adapter.
struct Chain {
    parts: Vec<Part>,
    adapters: Vec<AdapterSet>,
    rows: Rows,
    ids: Tensor,
    labels: Tensor,
}

struct Outcome {
    loss: f64,
    logits: Tensor,
    gradients: HashMap<String, Tensor>,
}

impl Chain {
    /// Cut before each of the layers in `cuts`.
    fn load(dir: &Path, cuts: &[usize], kind: Kind) -> Self {
        let checkpoint = Checkpoint::open(dir).unwrap();
        let config = ModelConfig::from_json(checkpoint.config()).unwrap();
        let adapter = peft::read_dir(&dir.join("adapter")).unwrap();
        let mut bounds = vec![0];
        bounds.extend(cuts);
        bounds.push(config.n_layers);
        let mut parts = Vec::new();
        let mut adapters = Vec::new();
        for pair in bounds.windows(2) {
            let spec = PartSpec {
                layers: pair[0]..pair[1],
                embed: pair[0] == 0 && parts.is_empty(),
                head: pair[1] == config.n_layers && parts.len() == bounds.len() - 2,
            };
            let part = Part::load(&checkpoint, &config, spec, kind, Device::Cpu).unwrap();
            let sites = part.sites(&adapter.spec.target_modules).unwrap();
            let mut set = AdapterSet::init(adapter.spec.clone(), sites, 0, Device::Cpu).unwrap();
            set.load_named(&adapter.tensors).unwrap();
            parts.push(part);
            adapters.push(set);
        }
        let case = case(dir);
        let sequences: Vec<Vec<i64>> = serde_json::from_value(case["input_ids"].clone()).unwrap();
        let seq_lens: Vec<usize> = sequences.iter().map(Vec::len).collect();
        let labels: Vec<i64> =
            sequences.iter().flat_map(|s| s[1..].iter().copied().chain([-100])).collect();
        Chain {
            parts,
            adapters,
            rows: Rows::new(&seq_lens, None, Device::Cpu),
            ids: Tensor::from_slice(&sequences.concat()),
            labels: Tensor::from_slice(&labels),
        }
    }

    fn segment<'a>(&self, adapter: &'a AdapterSet) -> [Segment<'a>; 1] {
        [Segment { rows: 0..self.rows.n_tokens(), adapter: Some(adapter), dropout: None }]
    }

    /// One microbatch; gradients accumulate in the adapters.
    fn microbatch(&mut self) -> Outcome {
        let mut hidden = self.parts[0].embed(&self.ids, &self.rows);
        let mut tapes: Vec<Tape> = Vec::new();
        for (part, adapter) in self.parts.iter().zip(&self.adapters) {
            let (y, tape) = part.forward_train(&hidden, &self.rows, &self.segment(adapter)[0]);
            hidden = y;
            tapes.push(tape);
        }
        let top = self.parts.last().unwrap();
        let n_predicted = self.labels.ge(0).sum(Kind::Int64).int64_value(&[]);
        let loss = top.loss(&hidden, &self.labels, 1.0 / n_predicted as f64);
        assert_eq!(loss.n_predicted, n_predicted);
        let mut grad = Some(loss.grad);
        for i in (0..self.parts.len()).rev() {
            let segments = self.segment(&self.adapters[i]);
            let (part, tape) = (&self.parts[i], tapes.pop().unwrap());
            assert!(tape.bytes() > 0 || part.layers().is_empty());
            let by_output = grad.take().unwrap();
            let back = part.backward(&[&tape], &by_output, &self.rows, &segments, i > 0);
            assert_eq!(back.input.is_some(), i > 0);
            grad = back.input;
            self.adapters[i].accumulate(&back.lora[0]);
        }
        let gradients = self.adapters.iter().flat_map(AdapterSet::named_gradients).collect();
        Outcome { loss: loss.loss_sum / n_predicted as f64, logits: top.logits(&hidden), gradients }
    }

    fn logits_of(&self, logits: &Tensor) -> Vec<Tensor> {
        let starts = self.rows.positions().eq(0).nonzero().squeeze_dim(1);
        let mut starts = Vec::<i64>::try_from(starts).unwrap();
        starts.push(self.rows.n_tokens());
        starts.windows(2).map(|w| logits.narrow(0, w[0], w[1] - w[0])).collect()
    }
}

fn case(dir: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(dir.join("case.json")).unwrap()).unwrap()
}

/// The fixture's numbers, with PEFT's ".default" taken out of the names.
fn reference(dir: &Path) -> HashMap<String, Tensor> {
    let bytes = std::fs::read(dir.join("reference.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    file.iter()
        .map(|(name, view)| {
            let shape: Vec<i64> = view.shape().iter().map(|&n| n as i64).collect();
            let tensor = Tensor::from_data_size(view.data(), &shape, Kind::Float);
            (name.replace(".default.", "."), tensor)
        })
        .collect()
}

/// Norm of the difference over norm of the reference.
fn relative_error(ours: &Tensor, reference: &Tensor) -> f64 {
    assert_eq!(ours.size(), reference.size());
    let norm = |t: &Tensor| t.to_kind(Kind::Double).norm().double_value(&[]);
    norm(&(ours.to_kind(Kind::Double) - reference)) / norm(reference).max(1e-12)
}

#[track_caller]
fn assert_close(what: &str, ours: &Tensor, reference: &Tensor, bound: f64) {
    let error = relative_error(ours, reference);
    assert!(
        error < bound,
        "{what}: relative error {error:.2e}, bound {bound:.0e}\nours {ours}\nreference {reference}"
    );
}

#[test]
fn logits_loss_and_gradients_match_peft() {
    for family in FAMILIES {
        let dir = fixture(family);
        let reference = reference(&dir);
        // Uncut; LoRA in all three parts; an empty bottom; a trunk of one layer.
        for cuts in [vec![], vec![1, 3], vec![0, 2], vec![2, 3]] {
            let mut chain = Chain::load(&dir, &cuts, Kind::Float);
            let outcome = chain.microbatch();
            let what = format!("{family} cut at {cuts:?}");
            let loss = reference["loss"].double_value(&[]);
            assert!((outcome.loss - loss).abs() < 1e-5 * loss, "{what}: {} {loss}", outcome.loss);
            for (i, logits) in chain.logits_of(&outcome.logits).iter().enumerate() {
                let name = format!("logits.{i}");
                assert_close(&format!("{what} {name}"), logits, &reference[&name], 1e-5);
            }
            let expected = reference.iter().filter(|(name, _)| name.starts_with("grad."));
            assert_eq!(outcome.gradients.len(), expected.clone().count(), "{what}");
            for (name, gradient) in expected {
                let ours = &outcome.gradients[name.strip_prefix("grad.").unwrap()];
                assert_close(&format!("{what} {name}"), ours, gradient, 1e-4);
            }
        }
    }
}

#[test]
fn five_clipped_steps_match_peft() {
    for family in FAMILIES {
        let dir = fixture(family);
        let (reference, case) = (reference(&dir), case(&dir));
        let number = |field: &str| case[field].as_f64().unwrap();
        let adamw = AdamW {
            beta1: case["betas"][0].as_f64().unwrap(),
            beta2: case["betas"][1].as_f64().unwrap(),
            eps: number("eps"),
            weight_decay: number("weight_decay"),
        };
        let mut chain = Chain::load(&dir, &[1, 3], Kind::Float);
        let mut clipped = 0;
        for step in 0..case["n_steps"].as_u64().unwrap() {
            let outcome = chain.microbatch();
            let squares: f64 = chain.adapters.iter().map(AdapterSet::grad_norm_squared).sum();
            for (name, ours) in [("loss", outcome.loss), ("norm", squares.sqrt())] {
                let theirs = reference[&format!("{name}_step.{step}")].double_value(&[]);
                let error = (ours - theirs).abs() / theirs;
                assert!(error < 1e-4, "{family} {name} of step {step}: {ours} {theirs}");
            }
            let clip = (number("max_grad_norm") / (squares.sqrt() + 1e-6)).min(1.0);
            clipped += i32::from(clip < 1.0);
            chain.adapters.iter_mut().for_each(|set| set.step(&adamw, number("lr"), clip));
        }
        assert!(clipped > 0, "{family}: the fixture never clips");
        for (name, ours) in chain.adapters.iter().flat_map(AdapterSet::named_tensors) {
            assert_close(
                &format!("{family} {name}"),
                &ours,
                &reference[&format!("after.{name}")],
                1e-4,
            );
        }
    }
}

#[test]
fn bf16_stays_near_f32() {
    for family in FAMILIES {
        let dir = fixture(family);
        let (f32, bf16) = (
            Chain::load(&dir, &[1, 3], Kind::Float).microbatch(),
            Chain::load(&dir, &[1, 3], Kind::BFloat16).microbatch(),
        );
        assert_close(&format!("{family} logits"), &bf16.logits, &f32.logits, 5e-2);
        for (name, gradient) in &f32.gradients {
            assert_close(&format!("{family} {name}"), &bf16.gradients[name], gradient, 0.25);
        }
    }
}
