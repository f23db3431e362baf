//! Random tenants, and what autograd says of each alone.

use crate::decoder::{Decoder, Leaves, Microbatch, Precision, Style};
use offshoot_adapters::{AdapterSet, LoraSpec};
use offshoot_model::weights::Checkpoint;
use offshoot_model::{DropoutKey, ModelConfig, Part, PartSpec};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::ops::Range;
use std::path::Path;
use std::rc::Rc;
use tch::{Device, Kind, Tensor};

/// A fixture's layers as the crate runs them, and as autograd does in float64.
pub struct Model {
    pub part: Part,
    pub decoder: Decoder,
}

impl Model {
    /// Weights are rounded to `weights` in both.
    pub fn load(family: &'static str, layers: Range<usize>, weights: Kind) -> Model {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures");
        let checkpoint = Checkpoint::open(&root.join(family)).unwrap();
        let config = ModelConfig::from_json(checkpoint.config()).unwrap();
        let spec = PartSpec { layers: layers.clone(), embed: false, head: false };
        let part = Part::load(&checkpoint, &config, spec, weights, Device::Cpu).unwrap();
        let precision = Precision { weights, compute: Kind::Double };
        let decoder = Decoder::load(&checkpoint, layers, precision, Style::Formulas);
        Model { part, decoder }
    }

    /// Every linear layer's name.
    pub fn modules(&self) -> Vec<String> {
        self.part.config().lora_modules().into_iter().map(String::from).collect()
    }
}

/// Draws whatever is random here: the same for the same seed, whatever other tests do.
pub struct Dice(ChaCha8Rng);

impl Dice {
    pub fn new(seed: u64) -> Dice {
        Dice(ChaCha8Rng::seed_from_u64(seed))
    }

    /// From a range of whole numbers.
    pub fn number(&mut self, range: Range<usize>) -> usize {
        self.0.random_range(range)
    }

    pub fn chance(&mut self, p: f64) -> bool {
        self.0.random_bool(p)
    }

    pub fn any<'a, T>(&mut self, choices: &'a [T]) -> &'a T {
        &choices[self.number(0..choices.len())]
    }

    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.number(0..i + 1));
        }
    }

    /// Uniform, of mean 0 and deviation `scale`.
    pub fn tensor(&mut self, shape: &[i64], scale: f64) -> Tensor {
        let n = shape.iter().product::<i64>() as usize;
        let bound = (scale * 3f64.sqrt()) as f32;
        let values: Vec<f32> = (0..n).map(|_| self.0.random_range(-bound..bound)).collect();
        Tensor::from_slice(&values).view(shape)
    }
}

/// One job's rows, its adapter and the gradient that its client sends.
pub struct Tenant {
    /// None: the base model.
    pub set: Option<Rc<AdapterSet>>,
    pub seq_lens: Vec<usize>,
    pub position_ids: Option<Vec<i64>>,
    pub dropout: Option<DropoutKey>,
    /// `[n, H]`, float32.
    pub x: Tensor,
    /// `[n, H]`, float32, by the output.
    pub grad: Tensor,
}

impl Tenant {
    /// With the given LoRA settings; B is not zero.
    pub fn new(model: &Model, dice: &mut Dice, spec: Option<LoraSpec>, seq_lens: &[usize]) -> Self {
        let set = spec.map(|spec| {
            let sites = model.part.sites(&spec.target_modules).unwrap();
            let set = AdapterSet::init(spec, sites, 0, Device::Cpu).unwrap();
            // LoRA then adds about a third of what the base gives.
            let b_scale = 0.3 / (set.spec().scaling() * (set.spec().r as f64).sqrt());
            for site in 0..set.sites().len() {
                let (mut a, mut b) = set.matrices(site);
                a.copy_(&dice.tensor(&a.size(), 1.0 / (a.size()[1] as f64).sqrt()));
                b.copy_(&dice.tensor(&b.size(), b_scale));
            }
            Rc::new(set)
        });
        Tenant::sharing(model, dice, set, seq_lens)
    }

    /// Another microbatch of a session that there is.
    pub fn sharing(
        model: &Model,
        dice: &mut Dice,
        set: Option<Rc<AdapterSet>>,
        seq_lens: &[usize],
    ) -> Self {
        let shape = [seq_lens.iter().sum::<usize>() as i64, model.part.config().hidden_size];
        Tenant {
            set,
            seq_lens: seq_lens.to_vec(),
            position_ids: None,
            dropout: None,
            x: dice.tensor(&shape, 1.0),
            grad: dice.tensor(&shape, 1.0),
        }
    }

    pub fn n_tokens(&self) -> i64 {
        self.x.size()[0]
    }

    pub fn drops(mut self, seed: u64, microbatch: u64) -> Self {
        self.dropout = Some(DropoutKey { seed, microbatch });
        self
    }

    /// What autograd says of this tenant alone.
    pub fn expected(&self, model: &Model) -> Expected {
        let kind = model.decoder.kind();
        let x = self.x.to_kind(kind).copy().set_requires_grad(true);
        let leaves = self.set.as_ref().map(|set| Leaves::new(set, kind));
        let input = Microbatch {
            x: &x,
            seq_lens: &self.seq_lens,
            position_ids: self.position_ids.as_deref(),
            dropout: self.dropout,
        };
        let output = model.decoder.forward(&input, leaves.as_ref());
        let mut by = leaves.iter().flat_map(Leaves::tensors).collect::<Vec<_>>();
        by.push(x);
        let loss = (&output * self.grad.to_kind(kind)).sum(kind);
        let mut gradients = Tensor::run_backward(&[loss], &by, false, false);
        let input = gradients.pop().unwrap();
        Expected { output: output.detach(), input, lora: gradients }
    }
}

/// Autograd's numbers, float64.
pub struct Expected {
    /// `[n, H]`.
    pub output: Tensor,
    /// `[n, H]`.
    pub input: Tensor,
    /// A and B of every site.
    pub lora: Vec<Tensor>,
}

impl Expected {
    /// The largest differences of a backward's results, each relative to the largest value of what
    /// it belongs to.
    pub fn distance_of_backward(&self, set: Option<&AdapterSet>, back: &Gradients) -> f64 {
        let mut worst = back.input.as_ref().map_or(0.0, |input| distance(input, &self.input));
        let Some(set) = set else {
            assert_eq!(back.lora.numel(), 0, "a gradient without an adapter");
            return worst;
        };
        assert_eq!(back.lora.size(), [set.n_parameters()]);
        // Some true gradients vanish (queries of one-token sequences) or nearly do: what cancels out
        // is as exact as what it was summed from.
        let floor = 0.1 * self.lora.iter().map(largest).fold(largest(&self.input), f64::max);
        for (site, pair) in self.lora.chunks(2).enumerate() {
            let (a, b) = set.views(&back.lora, site);
            for (found, expected) in [a, b].iter().zip(pair) {
                worst = worst.max(difference(found, expected) / largest(expected).max(floor));
            }
        }
        worst
    }
}

/// One tenant's share of a backward.
pub struct Gradients {
    pub input: Option<Tensor>,
    /// Flat `[P]`.
    pub lora: Tensor,
}

fn largest(t: &Tensor) -> f64 {
    t.abs().max().double_value(&[])
}

/// NaN in either is an infinite difference.
fn difference(found: &Tensor, expected: &Tensor) -> f64 {
    assert_eq!(found.size(), expected.size());
    let d = largest(&(found.to_kind(Kind::Double) - expected.to_kind(Kind::Double)));
    if d.is_nan() { f64::INFINITY } else { d }
}

/// Largest difference over the largest expected value.
pub fn distance(found: &Tensor, expected: &Tensor) -> f64 {
    difference(found, expected) / largest(expected)
}
