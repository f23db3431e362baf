//! The engine without network and clients, piece by piece: 8 sessions that submit at the same time,
//! in one batch and one job at a time. For ratios use the `ratios` bench, which measures in turn.

use criterion::{Criterion, Throughput};
use offshoot_benches::{Group, Inputs, Setting, Shape, Trunk, share_cores};
use offshoot_server::{ComputeDType, LoraBatching};
use std::time::Duration;

const N_SESSIONS: usize = 8;

fn main() -> anyhow::Result<()> {
    share_cores()?;
    let trunk = Trunk::find()?;
    println!("{}", trunk.what);
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_secs(1))
        .measurement_time(Duration::from_secs(10))
        .configure_from_args();
    for dtype in [ComputeDType::F32, ComputeDType::Bf16] {
        for (name, max_tokens_per_batch) in [("batched", 16384), ("alone", 1)] {
            let setting = Setting {
                trunk: trunk.clone(),
                dtype,
                device: "cpu".into(),
                batching: LoraBatching::Auto,
                max_tokens_per_batch,
                n_sessions: N_SESSIONS,
                rank: 8,
                n_idle: 0,
            };
            measure(&mut criterion, name, &setting)?;
        }
    }
    criterion.final_summary();
    Ok(())
}

fn measure(criterion: &mut Criterion, name: &str, setting: &Setting) -> anyhow::Result<()> {
    let mut engine = Group::start(setting)?;
    let mut group = criterion.benchmark_group(format!("{} {name}", setting.dtype.name()));
    for (sequences, tokens, train) in [(1, 32, true), (4, 128, true), (1, 1, false)] {
        let shape = Shape { sequences, tokens, train };
        let inputs = Inputs::new(shape, engine.hidden_size(), setting.dtype);
        group.throughput(Throughput::Elements((N_SESSIONS * shape.n_tokens()) as u64));
        let mode = if train { "train" } else { "eval" };
        group.bench_function(format!("{sequences}x{tokens} {mode}"), |bencher| {
            bencher.iter_custom(|n| {
                let round = |_| engine.round(&inputs).expect("the engine runs").time;
                (0..n).map(round).sum()
            });
        });
    }
    group.finish();
    Ok(())
}
