//! Where the time of one training step of an uncut model goes, in one process:
//! `step MODEL [f32|bf16] [SEQUENCES] [TOKENS]`.

use offshoot_adapters::{AdamW, AdapterSet, LoraSpec};
use offshoot_model::weights::Checkpoint;
use offshoot_model::{ModelConfig, Part, PartSpec, Rows, Segment};
use std::time::Instant;
use tch::{Device, Kind, Tensor};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    offshoot_model::allocator::keep_freed_memory();
    let args: Vec<String> = std::env::args().collect();
    let kind = if args.get(2).is_some_and(|k| k == "bf16") { Kind::BFloat16 } else { Kind::Float };
    let number = |i: usize, default| args.get(i).and_then(|n| n.parse().ok()).unwrap_or(default);
    let (sequences, tokens): (usize, usize) = (number(3, 4), number(4, 128));

    let checkpoint = Checkpoint::find(args.get(1).ok_or("usage: step MODEL")?)?;
    let config = ModelConfig::from_json(checkpoint.config())?;
    let part = Part::load(&checkpoint, &config, PartSpec::whole(&config), kind, Device::Cpu)?;
    let sites = part.sites(&config.default_targets())?;
    let mut adapter = AdapterSet::init(LoraSpec::default(), sites, 1, Device::Cpu)?;
    let rows = Rows::new(&vec![tokens; sequences], None, Device::Cpu);
    let n = (sequences * tokens) as i64;
    let ids = Tensor::randint(config.vocab_size, [n], (Kind::Int64, Device::Cpu));
    for _ in 0..8 {
        let start = Instant::now();
        let hidden = part.embed(&ids, &rows);
        let segments = [Segment { rows: 0..n, adapter: Some(&adapter), dropout: None }];
        let (hidden, tape) = part.forward_train(&hidden, &rows, &segments[0]);
        let (forward, bytes) = (start.elapsed(), tape.bytes());
        let start = Instant::now();
        let loss = part.loss(&hidden, &ids, 1.0 / n as f64);
        let head = start.elapsed();
        let start = Instant::now();
        let back = part.backward(&[&tape], &loss.grad, &rows, &segments, false);
        adapter.accumulate(&back.lora[0]);
        let backward = start.elapsed();
        let start = Instant::now();
        adapter.step(&AdamW::default(), 1e-4, 1.0);
        println!(
            "forward {forward:.2?} head {head:.2?} backward {backward:.2?} step {:.0?}; loss {:.3}, tape {} MB",
            start.elapsed(),
            loss.loss_sum / n as f64,
            bytes / 1_000_000
        );
    }
    Ok(())
}
