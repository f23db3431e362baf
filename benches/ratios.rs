//! Ratios of the engine without network and clients, each measured in turn within this run, with
//! the bars that they have to reach.

use anyhow::ensure;
use clap::Parser;
use offshoot_benches::{
    Effort, Group, InTurn, Inputs, ModelSize, Setting, Shape, Trunk, in_turn, share_cores,
};
use offshoot_server::{ComputeDType, LoraBatching};
use std::time::Duration;

#[derive(Parser)]
#[command(about = "What batches across sessions give, measured in turn")]
struct Args {
    /// Which tables; all if none is named.
    #[arg(value_parser = ["batched", "decode", "lora", "idle", "matrix"])]
    tables: Vec<String>,
    /// At least so many rounds of each row.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// More rounds of quick rows, until so many seconds are over.
    #[arg(long, default_value_t = 20.0)]
    seconds: f64,
    /// f32, bf16.
    #[arg(long, value_delimiter = ',', default_value = "f32,bf16")]
    dtypes: Vec<String>,
    /// cpu, or cuda with libtorch_cuda.so preloaded.
    #[arg(long, default_value = "cpu")]
    device: String,
    /// A random model of this size instead of SmolLM2.
    #[arg(long, value_parser = ["smollm2-135m", "qwen2-0.5b", "llama-7b"])]
    size: Option<String>,
    /// cargo says that it is a bench.
    #[arg(long, hide = true)]
    bench: bool,
}

const ALONE: usize = 1;
const BATCHED: usize = 16384;

fn main() -> anyhow::Result<()> {
    share_cores()?;
    let args = Args::parse();
    let trunk = match args.size.as_deref() {
        None => Trunk::find()?,
        Some("qwen2-0.5b") => Trunk::random(ModelSize::QWEN2_05B)?,
        Some("llama-7b") => Trunk::random(ModelSize::LLAMA_7B)?,
        Some(_) => Trunk::random(ModelSize::SMOLLM2_135M)?,
    };
    println!("{}, on {}\n", trunk.what, args.device);
    let bench = Bench { trunk, args };
    let named = |table: &str| {
        let tables = &bench.args.tables;
        tables.iter().any(|t| t == table) || tables.is_empty() && table != "matrix"
    };
    if named("batched") {
        bench.batched()?;
    }
    if named("decode") {
        bench.decode()?;
    }
    if named("lora") {
        bench.lora()?;
    }
    if named("idle") {
        bench.idle()?;
    }
    if named("matrix") {
        bench.matrix()?;
    }
    Ok(())
}

struct Bench {
    trunk: Trunk,
    args: Args,
}

/// Several settings under one load.
struct Row {
    dtype: ComputeDType,
    shape: Shape,
    settings: Vec<Setting>,
}

impl Bench {
    fn effort(&self) -> Effort {
        Effort { n_rounds: self.args.rounds, time: Duration::from_secs_f64(self.args.seconds) }
    }

    fn dtypes(&self) -> anyhow::Result<Vec<ComputeDType>> {
        let dtype = |name: &String| match name.as_str() {
            "f32" => Ok(ComputeDType::F32),
            "bf16" => Ok(ComputeDType::Bf16),
            _ => anyhow::bail!("--dtypes {name}: expected f32, bf16"),
        };
        self.args.dtypes.iter().map(dtype).collect()
    }

    fn setting(&self, dtype: ComputeDType, n_sessions: usize) -> Setting {
        Setting {
            trunk: self.trunk.clone(),
            dtype,
            device: self.args.device.clone(),
            batching: LoraBatching::Auto,
            max_tokens_per_batch: BATCHED,
            n_sessions,
            rank: 8,
            n_idle: 0,
        }
    }

    /// Measures a row; gives the times and the largest batch of each setting.
    fn measure(&self, row: &Row) -> anyhow::Result<(InTurn, Vec<usize>)> {
        let groups: Result<Vec<Group>, _> = row.settings.iter().map(Group::start).collect();
        let mut groups = groups?;
        let inputs = Inputs::new(row.shape, groups[0].hidden_size(), row.dtype);
        let mut n_jobs = vec![0; groups.len()];
        let times = in_turn(groups.len(), self.effort(), |which| {
            let round = groups[which].round(&inputs)?;
            n_jobs[which] = round.n_jobs.max(n_jobs[which]);
            Ok(round.time)
        })?;
        Ok((times, n_jobs))
    }

    fn batched(&self) -> anyhow::Result<()> {
        println!("## Batched against one job at a time, 8 sessions, rank 8\n");
        println!(
            "| dtype | microbatch | batched tokens/s | alone tokens/s | ratio (quartiles) | bar | |"
        );
        println!("|---|---|---|---|---|---|---|");
        for dtype in self.dtypes()? {
            let small = if dtype == ComputeDType::F32 { 1.6 } else { 1.8 };
            for (sequences, tokens, train, bar) in
                [(1, 32, true, small), (4, 128, true, 0.97), (1, 1, false, 3.0)]
            {
                let shape = Shape { sequences, tokens, train };
                let together = self.setting(dtype, 8);
                let alone = Setting { max_tokens_per_batch: ALONE, ..together.clone() };
                let row = Row { dtype, shape, settings: vec![together, alone] };
                let (times, n_jobs) = self.measure(&row)?;
                // A whole batch of 8, and a batch of one: otherwise the ratio says nothing.
                ensure!(n_jobs == [8, 1], "the largest batches had {n_jobs:?} jobs, not 8 and 1");
                let speed = |i| tokens_per_second(8, shape, times.median(i));
                println!(
                    "| {} | {} | {:.0} | {:.0} | {} | {bar} | {} |",
                    dtype.name(),
                    microbatch(shape),
                    speed(0),
                    speed(1),
                    ratio(times.speedup(0, 1)),
                    verdict(times.speedup(0, 1)[1], bar)
                );
            }
        }
        println!();
        Ok(())
    }

    /// One token of each session behind what its key/value cache holds.
    fn decode(&self) -> anyhow::Result<()> {
        println!(
            "## Decoding with caches, batched against one job at a time, 8 sessions, rank 8\n"
        );
        println!(
            "| dtype | tokens before | batched tokens/s | alone tokens/s | ratio (quartiles) | bar | |"
        );
        println!("|---|---|---|---|---|---|---|");
        for dtype in self.dtypes()? {
            for (before, bar) in [(256, 3.0), (1024, 2.0)] {
                let together = self.setting(dtype, 8);
                let alone = Setting { max_tokens_per_batch: ALONE, ..together.clone() };
                let mut groups = [Group::start(&together)?, Group::start(&alone)?];
                let token = Shape { sequences: 1, tokens: 1, train: false };
                let token = Inputs::new(token, groups[0].hidden_size(), dtype).input.hidden;
                for group in &mut groups {
                    group.prefill(before, dtype)?;
                }
                let mut n_jobs = [0; 2];
                let times = in_turn(groups.len(), self.effort(), |which| {
                    // Goes back to the same prefix each time.
                    let round = groups[which].decode(before, &token)?;
                    n_jobs[which] = round.n_jobs.max(n_jobs[which]);
                    Ok(round.time)
                })?;
                ensure!(n_jobs == [8, 1], "the largest batches had {n_jobs:?} jobs, not 8 and 1");
                let speed = |i: usize| 8.0 / times.median(i).as_secs_f64();
                println!(
                    "| {} | {before} | {:.0} | {:.0} | {} | {bar} | {} |",
                    dtype.name(),
                    speed(0),
                    speed(1),
                    ratio(times.speedup(0, 1)),
                    verdict(times.speedup(0, 1)[1], bar)
                );
            }
        }
        println!();
        Ok(())
    }

    fn lora(&self) -> anyhow::Result<()> {
        println!("## How the LoRA of a batch is computed\n");
        println!(
            "| dtype | sessions | microbatch | rank | stacked ms | loop ms | auto ms | stacked against loop | auto against the better |"
        );
        println!("|---|---|---|---|---|---|---|---|---|");
        for dtype in self.dtypes()? {
            for (n_sessions, sequences, tokens) in [(8, 1, 32), (8, 4, 128), (16, 1, 32)] {
                for rank in [8, 64] {
                    let shape = Shape { sequences, tokens, train: true };
                    let modes = [LoraBatching::Stacked, LoraBatching::Loop, LoraBatching::Auto];
                    let setting =
                        |batching| Setting { batching, rank, ..self.setting(dtype, n_sessions) };
                    let row = Row { dtype, shape, settings: modes.map(setting).to_vec() };
                    let (times, _) = self.measure(&row)?;
                    let ms = |i| times.median(i).as_secs_f64() * 1e3;
                    let better = if ms(0) < ms(1) { 0 } else { 1 };
                    println!(
                        "| {} | {n_sessions} | {} | {rank} | {:.1} | {:.1} | {:.1} | {} | {} |",
                        dtype.name(),
                        microbatch(shape),
                        ms(0),
                        ms(1),
                        ms(2),
                        ratio(times.speedup(0, 1)),
                        ratio(times.speedup(2, better))
                    );
                }
            }
        }
        println!();
        Ok(())
    }

    fn idle(&self) -> anyhow::Result<()> {
        println!("## 1000 idle sessions beside 8 that train\n");
        println!("| dtype | microbatch | with them tokens/s | without | ratio | bar | |");
        println!("|---|---|---|---|---|---|---|");
        for dtype in self.dtypes()? {
            let shape = Shape { sequences: 1, tokens: 32, train: true };
            let without = self.setting(dtype, 8);
            let with = Setting { n_idle: 1000, ..without.clone() };
            let row = Row { dtype, shape, settings: vec![with, without] };
            let (times, _) = self.measure(&row)?;
            let speed = |i| tokens_per_second(8, shape, times.median(i));
            println!(
                "| {} | {} | {:.0} | {:.0} | {} | 0.97 | {} |",
                dtype.name(),
                microbatch(shape),
                speed(0),
                speed(1),
                ratio(times.speedup(0, 1)),
                verdict(times.speedup(0, 1)[1], 0.97)
            );
        }
        println!();
        Ok(())
    }

    /// For accelerators: the number of sessions grows.
    fn matrix(&self) -> anyhow::Result<()> {
        println!("## By number of sessions\n");
        println!(
            "| dtype | microbatch | sessions | batched tokens/s | alone tokens/s | ratio | products, TFLOP/s |"
        );
        println!("|---|---|---|---|---|---|---|");
        for dtype in self.dtypes()? {
            let n_weights = n_weights(&self.setting(dtype, 0))?;
            for (sequences, tokens) in [(4, 512), (1, 64)] {
                for n_sessions in [1, 2, 4, 8, 16] {
                    let shape = Shape { sequences, tokens, train: true };
                    let together = Setting {
                        max_tokens_per_batch: 1 << 16,
                        ..self.setting(dtype, n_sessions)
                    };
                    let alone = Setting { max_tokens_per_batch: ALONE, ..together.clone() };
                    let row = Row { dtype, shape, settings: vec![together, alone] };
                    let (times, _) = self.measure(&row)?;
                    let speed = |i| tokens_per_second(n_sessions, shape, times.median(i));
                    // Forward and gradient by the input, 2 operations each.
                    let flops = 4.0 * n_weights as f64 * speed(0);
                    println!(
                        "| {} | {} | {n_sessions} | {:.0} | {:.0} | {} | {:.3} |",
                        dtype.name(),
                        microbatch(shape),
                        speed(0),
                        speed(1),
                        ratio(times.speedup(0, 1)),
                        flops / 1e12
                    );
                }
            }
        }
        println!();
        Ok(())
    }
}

/// Values of the trunk's weights.
fn n_weights(setting: &Setting) -> anyhow::Result<u64> {
    let sites = Group::start(setting)?.engine().trunk().sites;
    Ok(sites.iter().map(|site| (site.d_in * site.d_out) as u64).sum())
}

fn tokens_per_second(n_sessions: usize, shape: Shape, time: Duration) -> f64 {
    (n_sessions * shape.n_tokens()) as f64 / time.as_secs_f64()
}

fn microbatch(shape: Shape) -> String {
    let mode = if shape.train { "forward + backward" } else { "forward only" };
    format!("{} x {}, {mode}", shape.sequences, shape.tokens)
}

fn ratio([low, middle, high]: [f64; 3]) -> String {
    format!("{middle:.2} ({low:.2} to {high:.2})")
}

fn verdict(found: f64, bar: f64) -> &'static str {
    if found >= bar { "reached" } else { "NOT REACHED" }
}
