//! The written out forward and backward against libtorch's autograd, in turn, on all layers of a
//! model: `explicit_vs_autograd MODEL [ROUNDS] [SEQUENCES] [TOKENS]`.
//!
//! One session with rank 8 on every linear layer, without dropout. The opponent is what a user of
//! PEFT has whose weights are in the same dtype: libtorch's fused operators where there are any, LoRA
//! leaves in float32, rounded for the products. It prints tokens per second of forward and backward
//! together (medians), and the bytes that stay between the two.

#[allow(dead_code, reason = "the oracle's tests use all of it")]
#[path = "../tests/oracle/decoder.rs"]
mod decoder;

use decoder::{Decoder, Leaves, Microbatch, Precision, Style};
use offshoot_adapters::{AdapterSet, LoraSpec};
use offshoot_model::allocator::allocated_bytes;
use offshoot_model::weights::Checkpoint;
use offshoot_model::{ModelConfig, Part, PartSpec, Rows, Segment};
use std::error::Error;
use std::time::{Duration, Instant};
use tch::{Device, Kind, Tensor};

fn main() -> Result<(), Box<dyn Error>> {
    offshoot_model::allocator::keep_freed_memory();
    let args: Vec<String> = std::env::args().collect();
    let usage = "usage: explicit_vs_autograd MODEL [ROUNDS] [SEQUENCES] [TOKENS]";
    let checkpoint = Checkpoint::find(args.get(1).ok_or(usage)?)?;
    let number = |i: usize, default| args.get(i).and_then(|n| n.parse().ok()).unwrap_or(default);
    let (rounds, sequences, tokens) = (number(2, 7), number(3, 4), number(4, 128));
    println!("{sequences} x {tokens} tokens, {rounds} rounds, {} threads", tch::get_num_threads());
    for kind in [Kind::Float, Kind::BFloat16] {
        let bench = Bench::load(&checkpoint, kind, vec![tokens; sequences])?;
        bench.compare(rounds);
    }
    Ok(())
}

/// Both implementations of one model, and what they compute on.
struct Bench {
    part: Part,
    decoder: Decoder,
    adapter: AdapterSet,
    seq_lens: Vec<usize>,
    rows: Rows,
    /// `[N, H]` each, float32.
    x: Tensor,
    grad: Tensor,
}

/// One forward and backward.
struct Run {
    time: Duration,
    /// That the heap grew by while the forward ran, less its output.
    held_bytes: u64,
    /// What the implementation says that it keeps.
    tape_bytes: Option<u64>,
    /// `[N, H]` by the input, and by A of the first site.
    gradients: [Tensor; 2],
}

impl Bench {
    fn load(
        checkpoint: &Checkpoint,
        kind: Kind,
        seq_lens: Vec<usize>,
    ) -> Result<Bench, Box<dyn Error>> {
        let config = ModelConfig::from_json(checkpoint.config())?;
        let layers = 0..config.n_layers;
        let spec = PartSpec { layers: layers.clone(), embed: true, head: false };
        let part = Part::load(checkpoint, &config, spec, kind, Device::Cpu)?;
        let precision = Precision { weights: kind, compute: kind };
        let decoder = Decoder::load(checkpoint, layers, precision, Style::Operators);
        let sites = part.sites(&["all-linear".to_string()])?;
        let adapter = AdapterSet::init(LoraSpec::default(), sites, 1, Device::Cpu)?;
        tch::manual_seed(1);
        for site in 0..adapter.sites().len() {
            let (_, mut b) = adapter.matrices(site);
            b.copy_(&(b.randn_like() * 0.02));
        }
        let rows = Rows::new(&seq_lens, None, Device::Cpu);
        let shape = [rows.n_tokens(), config.hidden_size];
        let ids = Tensor::randint(config.vocab_size, [shape[0]], (Kind::Int64, Device::Cpu));
        let x = part.embed(&ids, &rows).to_kind(Kind::Float);
        let grad = Tensor::randn(shape, (Kind::Float, Device::Cpu));
        Ok(Bench { part, decoder, adapter, seq_lens, rows, x, grad })
    }

    fn explicit(&self) -> Run {
        let kind = self.part.kind();
        let (x, grad) = (self.x.to_kind(kind), self.grad.to_kind(kind));
        let segment = || Segment {
            rows: 0..self.rows.n_tokens(),
            adapter: Some(&self.adapter),
            dropout: None,
        };
        let before = allocated_bytes();
        let begun = Instant::now();
        let (y, tape) = self.part.forward_train(&x, &self.rows, &segment());
        let forward = begun.elapsed();
        let held_bytes = allocated_bytes().saturating_sub(before + bytes_of(&y));
        let tape_bytes = Some(tape.bytes());
        let begun = Instant::now();
        let back = self.part.backward(&[&tape], &grad, &self.rows, &[segment()], true);
        let time = forward + begun.elapsed();
        let (a, _) = self.adapter.views(&back.lora[0], 0);
        let input = back.input.expect("it was wanted");
        Run { time, held_bytes, tape_bytes, gradients: [input, a.copy()] }
    }

    fn autograd(&self) -> Run {
        let kind = self.decoder.kind();
        let x = self.x.to_kind(kind).copy().set_requires_grad(true);
        let grad = self.grad.to_kind(kind);
        let leaves = Leaves::new(&self.adapter, Kind::Float);
        let mut by = leaves.tensors();
        by.push(x.shallow_clone());
        let (seq_lens, position_ids, dropout) = (&*self.seq_lens, None, None);
        let before = allocated_bytes();
        let begun = Instant::now();
        let input = Microbatch { x: &x, seq_lens, position_ids, dropout };
        let y = self.decoder.forward(&input, Some(&leaves));
        let forward = begun.elapsed();
        let held_bytes = allocated_bytes().saturating_sub(before + bytes_of(&y));
        let begun = Instant::now();
        // tch passes no incoming gradient; the product and the sum are nothing beside the layers.
        let mut gradients = Tensor::run_backward(&[(y * &grad).sum(kind)], &by, false, false);
        let time = forward + begun.elapsed();
        let input = gradients.pop().expect("x is the last");
        Run { time, held_bytes, tape_bytes: None, gradients: [input, gradients.swap_remove(0)] }
    }

    /// In turn, so that whatever else the machine does meets both.
    fn compare(&self, rounds: usize) {
        let n_tokens = self.rows.n_tokens() as f64;
        let (explicit, autograd) = (self.explicit(), self.autograd());
        let names = ["input", "first A"];
        let (weights, rows) = (self.decoder.kind(), self.part.kind());
        // Where products in bfloat16 are slow, the explicit math keeps its rows in float32.
        println!(
            "\n{weights:?} weights; rows of the explicit math in {rows:?}, of autograd in {weights:?}"
        );
        println!("  warm-up, and how far apart the two are:");
        for ((a, b), name) in explicit.gradients.iter().zip(&autograd.gradients).zip(names) {
            let norm = |t: Tensor| t.to_kind(Kind::Double).norm().double_value(&[]);
            let apart = norm(a.to_kind(Kind::Double) - b) / norm(b.shallow_clone());
            println!("  gradient by {name}: relative difference {apart:.1e}");
        }
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        let mut held = [0, 0];
        for _ in 0..rounds {
            let (explicit, autograd) = (self.explicit(), self.autograd());
            ours.push(explicit.time.as_secs_f64());
            theirs.push(autograd.time.as_secs_f64());
            held = [explicit.held_bytes, autograd.held_bytes];
        }
        let all = |times: &[f64]| {
            times.iter().map(|t| format!("{:.0}", t * 1e3)).collect::<Vec<_>>().join(" ")
        };
        println!("  explicit ms: {}", all(&ours));
        println!("  autograd ms: {}", all(&theirs));
        let (ours, theirs) = (median(ours), median(theirs));
        let (ours_rate, theirs_rate) = (n_tokens / ours, n_tokens / theirs);
        println!("  tokens/s: explicit {ours_rate:.0}, autograd {theirs_rate:.0}");
        println!("  speed ratio explicit / autograd: {:.3}", theirs / ours);
        let tape = explicit.tape_bytes.expect("the explicit forward has a tape") as f64;
        let [held_explicit, held_autograd] = held.map(|bytes| bytes as f64 / 1e6);
        println!(
            "  held between forward and backward, MB: explicit {held_explicit:.1} (tape.bytes() {:.1}), autograd {held_autograd:.1}",
            tape / 1e6
        );
        println!("  bytes ratio explicit / autograd: {:.3}", tape / 1e6 / held_autograd);
    }
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn bytes_of(tensor: &Tensor) -> u64 {
    (tensor.numel() * tensor.kind().elt_size_in_bytes()) as u64
}
