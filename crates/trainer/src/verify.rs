//! The proof that the split is invisible: one microbatch through bottom, a real server's trunk and
//! top, against the same model uncut in this process, and against recorded numbers of Transformers
//! and PEFT.

use crate::data::{Batch, Sample};
use crate::split::{Checkpointing, SplitModel, SplitOptions};
use crate::wire::{host_to_tensor, to_wire};
use crate::{TrainError, data};
use offshoot_adapters::peft::PeftAdapter;
use offshoot_adapters::{AdamW, AdapterSet, LoraSpec, Site};
use offshoot_client::{Client, LoraConfig, OpenSession, Session, WireDType};
use offshoot_model::weights::Checkpoint;
use offshoot_model::{DropoutKey, ModelConfig, Part, PartSpec, Rows, Segment, SplitPoints};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use safetensors::SafeTensors;
use safetensors::tensor::Dtype;
use std::collections::BTreeMap;
use std::path::Path;
use tch::{Device, Kind, Tensor};

/// Largest relative error of logits and loss, in float32.
pub const LOGITS_BOUND: f64 = 1e-5;
/// Largest relative error of a LoRA tensor's gradient, in float32.
pub const GRADIENT_BOUND: f64 = 1e-4;

/// Names the dropout masks that both sides draw, with [`SEED`].
const DROPOUT_KEY: u64 = 3;
const SEED: u64 = 5;

/// What is compared: a model, an adapter for all of it, and token sequences.
pub struct Subject {
    pub checkpoint: Checkpoint,
    pub config: ModelConfig,
    pub split: SplitPoints,
    pub adapter: PeftAdapter,
    /// Sequences of token ids.
    pub sequences: Vec<Vec<i64>>,
}

/// What one microbatch gives: the mean loss over all predicted tokens of all sequences and its
/// gradients, with the adapter's dropout on, and the logits without dropout.
pub struct Numbers {
    pub loss: f64,
    /// `[T, V]` of each sequence.
    pub logits: Vec<Tensor>,
    /// By PEFT's names in a saved adapter.
    pub gradients: BTreeMap<String, Tensor>,
}

/// One line of the table.
#[derive(Debug, Clone, PartialEq)]
pub struct Comparison {
    /// `loss`, `logits.0` or a LoRA tensor's name.
    pub what: String,
    /// Norm of the difference over norm of the reference.
    pub error: f64,
    pub bound: f64,
}

impl Comparison {
    /// False also for an error that is no number.
    pub fn passes(&self) -> bool {
        self.error < self.bound
    }
}

/// Reads `input_ids`, a list of unequal lists, from a JSON file; other keys are ignored.
pub fn read_case(path: &Path) -> Result<Vec<Vec<i64>>, TrainError> {
    let wrong = |problem: String| TrainError::Data { path: path.into(), line: None, problem };
    let text = std::fs::read_to_string(path).map_err(TrainError::io(path))?;
    let json: serde_json::Value =
        serde_json::from_str(&text).map_err(|e| wrong(format!("not JSON: {e}")))?;
    serde_json::from_value(json["input_ids"].clone()).map_err(|e| {
        wrong(format!("input_ids is no list of lists of token ids ({e}); expected {{\"input_ids\": [[1, 2, 3], [4, 5]]}}"))
    })
}

/// Sequences of unequal lengths with ids drawn from the vocabulary.
pub fn draw_case(config: &ModelConfig, seed: u64) -> Vec<Vec<i64>> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut sequence =
        |n: usize| -> Vec<i64> { (0..n).map(|_| rng.random_range(0..config.vocab_size)).collect() };
    [17, 5, 31, 2].map(|n| sequence(n.min(config.max_positions))).into()
}

/// An adapter with dropout and with a B that is not zero, so that no gradient is.
pub fn draw_adapter(config: &ModelConfig, sites: &[Site], seed: u64) -> PeftAdapter {
    let target_modules = config.default_targets();
    let spec = LoraSpec { lora_dropout: 0.1, target_modules, ..LoraSpec::default() };
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut matrix = |rows: i64, columns: i64| {
        let bound = 1.0 / (columns as f32).sqrt();
        let values: Vec<f32> =
            (0..rows * columns).map(|_| rng.random_range(-bound..bound)).collect();
        Tensor::from_slice(&values).view([rows, columns])
    };
    let r = spec.r as i64;
    let tensors = sites.iter().flat_map(|site| {
        let [a, b] = site.peft_names();
        [(a, matrix(r, site.d_in)), (b, matrix(site.d_out, r) * 0.1)]
    });
    PeftAdapter { tensors: tensors.collect(), spec, base_model: None }
}

impl Subject {
    /// Refuses ids outside the vocabulary, empty or too long sequences, and a case that predicts
    /// nothing.
    pub fn check(&self) -> Result<(), TrainError> {
        let wrong = |problem: String| {
            Err(TrainError::Option { option: "case", value: "input_ids".into(), problem })
        };
        for (i, sequence) in self.sequences.iter().enumerate() {
            if sequence.is_empty() || sequence.len() > self.config.max_positions {
                let (n, max) = (sequence.len(), self.config.max_positions);
                return wrong(format!("sequence {i} has {n} tokens, expected 1 to {max}"));
            }
            if let Some(id) = sequence.iter().find(|id| !(0..self.config.vocab_size).contains(*id))
            {
                let v = self.config.vocab_size;
                return wrong(format!(
                    "sequence {i} holds the id {id}, the vocabulary has 0 to {}",
                    v - 1
                ));
            }
        }
        if self.sequences.iter().all(|s| s.len() < 2) {
            return wrong("no sequence has two tokens, so nothing is predicted".into());
        }
        Ok(())
    }

    fn batch(&self) -> Batch {
        let mut batch = Batch::default();
        for ids in &self.sequences {
            batch.push(&Sample { ids: ids.clone(), learn: vec![true; ids.len()] });
        }
        batch
    }

    /// The whole model in this process.
    pub fn uncut(&self) -> Result<Numbers, TrainError> {
        let _guard = tch::no_grad_guard();
        let (config, spec) = (&self.config, PartSpec::whole(&self.config));
        let part = Part::load(&self.checkpoint, config, spec, Kind::Float, Device::Cpu)?;
        let sites = part.sites(&self.adapter.spec.target_modules)?;
        let mut adapter = AdapterSet::init(self.adapter.spec.clone(), sites, SEED, Device::Cpu)?;
        adapter.load_named(&self.adapter.tensors)?;

        let batch = self.batch();
        let rows = Rows::new(&batch.seq_lens, None, Device::Cpu);
        let labels = Tensor::from_slice(&batch.labels);
        let segment =
            |dropout| [Segment { rows: 0..rows.n_tokens(), adapter: Some(&adapter), dropout }];
        let embedded = part.embed(&Tensor::from_slice(&batch.ids), &rows);
        let logits = part.logits(&part.forward_eval(&embedded, &rows, &segment(None)));
        let segments = segment(Some(DropoutKey { seed: SEED, microbatch: DROPOUT_KEY }));
        let (hidden, tape) = part.forward_train(&embedded, &rows, &segments[0]);
        let loss = part.loss(&hidden, &labels, 1.0 / n_predicted(&batch));
        let back = part.backward(&[&tape], &loss.grad, &rows, &segments, false);
        adapter.accumulate(&back.lora[0]);
        Ok(Numbers {
            loss: loss.loss_sum / n_predicted(&batch),
            logits: self.by_sequence(&logits),
            gradients: adapter.named_gradients().into_iter().collect(),
        })
    }

    /// Bottom and top in this process, the trunk on a server. The session is deleted afterwards.
    pub async fn split(&self, client: &Client) -> Result<Numbers, TrainError> {
        let spec = self.adapter.spec.clone();
        let options = SplitOptions {
            split: self.split,
            lora: spec.clone(),
            adamw: AdamW::default(),
            seed: SEED,
            kind: Kind::Float,
            checkpointing: Checkpointing::Auto,
            devices: vec![Device::Cpu],
        };
        let mut model = SplitModel::load(&self.checkpoint, &self.config, &options)?;
        model.load_adapter(&self.adapter.tensors)?;
        let to_host = |(name, tensor): &(String, Tensor)| {
            self.is_of_trunk(name).then(|| (name.clone(), to_wire(tensor, WireDType::F32)))
        };
        let session = client
            .open(OpenSession {
                name: "verify".into(),
                fingerprint: self.checkpoint.fingerprint(),
                split_point_1: self.split.s1 as u32,
                split_point_2: self.split.s2 as u32,
                lora: LoraConfig {
                    r: spec.r as u32,
                    lora_alpha: spec.lora_alpha,
                    lora_dropout: spec.lora_dropout,
                    use_rslora: spec.use_rslora,
                    target_modules: spec.target_modules,
                },
                adamw: offshoot_client::ADAMW_DEFAULTS,
                seed: SEED,
                wire_dtype: WireDType::F32,
                initial_adapter: self.adapter.tensors.iter().filter_map(to_host).collect(),
            })
            .await?;
        let numbers = self.run(&mut model, &session).await;
        session.close(true).await?;
        numbers
    }

    async fn run(&self, model: &mut SplitModel, session: &Session) -> Result<Numbers, TrainError> {
        let batch = self.batch();
        let logits = self.by_sequence(&model.logits(session, &batch).await?);
        let scale = 1.0 / n_predicted(&batch);
        let result = model.microbatch(session, &batch, DROPOUT_KEY, scale).await?;
        let trunk = session.export_with_gradients().await?.gradients;
        let own = model.adapters().into_iter().flatten().flat_map(AdapterSet::named_gradients);
        let trunk = trunk.into_iter().map(|(name, tensor)| (name, host_to_tensor(&tensor)));
        Ok(Numbers { loss: result.loss.sum * scale, logits, gradients: own.chain(trunk).collect() })
    }

    fn is_of_trunk(&self, name: &str) -> bool {
        let layer = name.split('.').find_map(|part| part.parse::<usize>().ok());
        layer.is_some_and(|layer| (self.split.s1..self.split.s2).contains(&layer))
    }

    /// Rows of packed logits `[N, V]` for each sequence.
    fn by_sequence(&self, packed: &Tensor) -> Vec<Tensor> {
        let lengths: Vec<i64> = self.sequences.iter().map(|s| s.len() as i64).collect();
        packed.split_with_sizes(&lengths, 0)
    }
}

fn n_predicted(batch: &Batch) -> f64 {
    batch.labels.iter().filter(|&&label| label != data::NOT_PREDICTED).count() as f64
}

/// Recorded numbers of Transformers and PEFT: a safetensors file with `logits.0`, `logits.1`, ... and
/// `grad.<name as in peft_model.named_parameters()>`, and `loss` if it is there.
pub struct Reference {
    tensors: BTreeMap<String, Tensor>,
}

impl Reference {
    pub fn read(path: &Path) -> Result<Self, TrainError> {
        let wrong = |problem: String| TrainError::Data { path: path.into(), line: None, problem };
        let bytes = std::fs::read(path).map_err(TrainError::io(path))?;
        let file = SafeTensors::deserialize(&bytes)
            .map_err(|e| wrong(format!("not a safetensors file ({e}); was it cut off?")))?;
        let mut tensors = BTreeMap::new();
        for (name, view) in file.iter() {
            let wanted = name == "loss" || name.starts_with("logits.") || name.starts_with("grad.");
            if !wanted {
                continue;
            }
            if view.dtype() != Dtype::F32 {
                return Err(wrong(format!("\"{name}\" is {:?}, expected F32", view.dtype())));
            }
            let shape: Vec<i64> = view.shape().iter().map(|&n| n as i64).collect();
            let tensor = Tensor::from_data_size(view.data(), &shape, Kind::Float);
            // named_parameters() names the adapter, a saved file does not.
            tensors.insert(name.replace(".default.", "."), tensor);
        }
        if tensors.is_empty() {
            return Err(wrong("it holds no tensor named logits.N or grad.NAME".into()));
        }
        Ok(Reference { tensors })
    }
}

impl Numbers {
    /// Everything that both sides have to have, compared.
    pub fn compare(&self, reference: &Numbers) -> Vec<Comparison> {
        let mut rows = vec![loss_row(self.loss, reference.loss)];
        for (i, (ours, theirs)) in self.logits.iter().zip(&reference.logits).enumerate() {
            rows.push(row(format!("logits.{i}"), Some(ours), theirs, LOGITS_BOUND));
        }
        for (name, theirs) in &reference.gradients {
            rows.push(row(name.clone(), self.gradients.get(name), theirs, GRADIENT_BOUND));
        }
        rows
    }

    /// Everything that the file holds, compared.
    pub fn compare_recorded(&self, reference: &Reference) -> Vec<Comparison> {
        let compared = reference.tensors.iter().map(|(name, theirs)| {
            if name == "loss" {
                loss_row(self.loss, theirs.double_value(&[]))
            } else if let Some(gradient) = name.strip_prefix("grad.") {
                row(gradient.into(), self.gradients.get(gradient), theirs, GRADIENT_BOUND)
            } else {
                let index: Option<usize> =
                    name.strip_prefix("logits.").and_then(|n| n.parse().ok());
                let ours = index.and_then(|i| self.logits.get(i));
                row(name.clone(), ours, theirs, LOGITS_BOUND)
            }
        });
        compared.collect()
    }
}

fn loss_row(ours: f64, theirs: f64) -> Comparison {
    let error = (ours - theirs).abs() / theirs.abs().max(f64::MIN_POSITIVE);
    Comparison { what: "loss".into(), error, bound: LOGITS_BOUND }
}

/// A tensor that is missing or has another shape has an infinite error.
fn row(what: String, ours: Option<&Tensor>, theirs: &Tensor, bound: f64) -> Comparison {
    let error = match ours {
        Some(ours) if ours.size() == theirs.size() => {
            let norm = |t: &Tensor| t.to_kind(Kind::Double).norm().double_value(&[]);
            let difference = norm(&(ours.to_kind(Kind::Double) - theirs));
            if difference == 0.0 { 0.0 } else { difference / norm(theirs) }
        }
        _ => f64::INFINITY,
    };
    Comparison { what, error, bound }
}
