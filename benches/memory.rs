//! What the engine reserves for a pass against what the pass takes: predicted bytes over the
//! resident peak, on the CPU, for a grid of tokens and lengths. The ledger is safe where the ratio is
//! at least 1, and wastes room where it is far above.
//!
//! Tapes and LoRA gradients are known exactly and are taken off the peak; what is left is the
//! workspace, with whatever the C library's allocator loses in between.

use anyhow::{Result, ensure};
use clap::Parser;
use offshoot_adapters::{AdapterSet, LoraSpec};
use offshoot_benches::{Trunk, peak_above, share_cores};
use offshoot_model::weights::Checkpoint;
use offshoot_model::{ModelConfig, Part, PartSpec, Rows, Segment, Tape, TapeSize, Work};
use tch::{Device, Kind, Tensor};

#[derive(Parser)]
struct Args {
    /// Only with float32 (or only with bf16).
    #[arg(long, value_parser = ["f32", "bf16"])]
    dtype: Option<String>,
    /// cargo says that it is a bench.
    #[arg(long, hide = true)]
    bench: bool,
}

/// Sessions, sequences of each, tokens of each sequence.
const GRID: [[usize; 3]; 7] =
    [[1, 1, 32], [8, 1, 32], [1, 4, 128], [1, 1, 512], [4, 4, 128], [1, 4, 512], [1, 1, 2048]];

fn main() -> Result<()> {
    // As the server has it.
    share_cores()?;
    let args = Args::parse();
    let trunk = Trunk::find()?;
    println!("{}, rank 8 on all linear layers, {} threads\n", trunk.what, tch::get_num_threads());
    println!(
        "| dtype | sessions | microbatch | tape | tapes MB | pass | predicted / measured MB \
         | measured bytes a token | predicted / measured |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
    let _no_grad = tch::no_grad_guard();
    let mut lowest = f64::MAX;
    for (name, kind) in [("f32", Kind::Float), ("bf16", Kind::BFloat16)] {
        if args.dtype.as_ref().is_some_and(|only| only != name) {
            continue;
        }
        let trial = Trial::load(&trunk, kind)?;
        // libtorch's own buffers, once.
        trial.measure([1, 1, 128], TapeSize::Full)?;
        for shape in GRID {
            for size in TapeSize::ALL {
                let [n, sequences, tokens] = shape;
                let measured = trial.measure(shape, size)?;
                let tapes = measured.tape_bytes as f64 / 1e6;
                let passes = [("forward", measured.forward), ("backward", measured.backward)];
                for (pass, bytes) in passes {
                    println!(
                        "| {name} | {n} | {sequences} x {tokens} | {size:?} | {tapes:.1} | {pass} | {}",
                        bytes.cells(n * sequences * tokens)
                    );
                    lowest = lowest.min(bytes.ratio());
                }
            }
        }
    }
    println!("\nLowest predicted / measured: {lowest:.2}");
    Ok(())
}

struct Trial {
    part: Part,
    hidden_size: i64,
}

/// Of one batch.
struct Measured {
    tape_bytes: u64,
    /// Beside tapes.
    forward: Bytes,
    /// Beside tapes and LoRA gradients.
    backward: Bytes,
}

struct Bytes {
    predicted: u64,
    measured: u64,
}

impl Bytes {
    fn ratio(&self) -> f64 {
        self.predicted as f64 / self.measured.max(1) as f64
    }

    fn cells(&self, n_tokens: usize) -> String {
        let mb = |bytes: u64| bytes as f64 / 1e6;
        let (predicted, measured, ratio) = (mb(self.predicted), mb(self.measured), self.ratio());
        let a_token = self.measured / n_tokens as u64;
        format!("{predicted:.1} / {measured:.1} | {a_token} | {ratio:.2} |")
    }
}

impl Trial {
    fn load(trunk: &Trunk, kind: Kind) -> Result<Trial> {
        let checkpoint = Checkpoint::find(&trunk.model.display().to_string())?;
        let config = ModelConfig::from_json(checkpoint.config())?;
        let spec = PartSpec { layers: trunk.layers.clone(), embed: false, head: false };
        let part = Part::load(&checkpoint, &config, spec, kind, Device::Cpu)?;
        Ok(Trial { part, hidden_size: config.hidden_size })
    }

    /// Forward and backward of one batch.
    fn measure(&self, [n, sequences, tokens]: [usize; 3], size: TapeSize) -> Result<Measured> {
        let part = &self.part;
        let adapters = (0..n as u64).map(|seed| self.adapter(seed)).collect::<Result<Vec<_>>>()?;
        let per_session = (sequences * tokens) as i64;
        let n_tokens = per_session * n as i64;
        let options = (part.kind(), Device::Cpu);
        let x = Tensor::randn([n_tokens, self.hidden_size], options);
        let grad = Tensor::randn([n_tokens, self.hidden_size], options);
        let rows = Rows::new(&vec![tokens; n * sequences], None, Device::Cpu);
        let segment = |(i, adapter)| {
            let start = i as i64 * per_session;
            Segment { rows: start..start + per_session, adapter: Some(adapter), dropout: None }
        };
        let segments: Vec<Segment> = adapters.iter().enumerate().map(segment).collect();
        let keep = vec![Some(size); n];
        let (tapes, forward) = peak_above(|| part.forward(&x, &rows, &segments, &keep).1)?;
        let tapes: Vec<&Tape> = tapes.iter().flatten().collect();
        let tape_bytes: u64 = tapes.iter().map(|tape| tape.bytes()).sum();
        let predict = |adapter| part.tape_bytes(per_session as u64, size, Some(adapter));
        let predicted: u64 = adapters.iter().map(predict).sum();
        ensure!(
            tape_bytes == predicted,
            "tapes have {tape_bytes} bytes, {predicted} were predicted"
        );
        let (_, backward) = peak_above(|| part.backward(&tapes, &grad, &rows, &segments, true))?;
        // Float32, all of one adapter in one flat tensor.
        let gradients: u64 = adapters.iter().map(|adapter| 4 * adapter.n_parameters() as u64).sum();
        let workspace = |work, peak: u64| Bytes {
            predicted: part.workspace_bytes(n_tokens as u64, work),
            measured: peak,
        };
        Ok(Measured {
            tape_bytes,
            forward: workspace(Work::Forward, forward.saturating_sub(tape_bytes)),
            backward: workspace(Work::Backward(size), backward.saturating_sub(gradients)),
        })
    }

    fn adapter(&self, seed: u64) -> Result<AdapterSet> {
        let sites = self.part.sites(&["all-linear".to_string()])?;
        Ok(AdapterSet::init(LoraSpec::default(), sites, seed, Device::Cpu)?)
    }
}
