//! A heavy session (4 x 512) beside a light one (1 x 32) at the engine, equal weights, both always
//! with work in the queue: how long the light one waits, and who gets how much.

use anyhow::Context;
use clap::Parser;
use offshoot_adapters::LoraSpec;
use offshoot_benches::{Inputs, Shape, Trunk, share_cores};
use offshoot_proto::WireDType;
use offshoot_server::direct::{
    Adapter, DirectEngine, DirectSession, PendingBackward, PendingForward, Times,
};
use offshoot_server::{ComputeDType, LimitsConfig, TrunkConfig};
use std::collections::VecDeque;
use std::time::{Duration, Instant};

#[derive(Parser)]
struct Args {
    /// Of each of the two measurements.
    #[arg(long, default_value_t = 60.0)]
    seconds: f64,
    #[arg(long, default_value = "cpu")]
    device: String,
    /// cargo says that it is a bench.
    #[arg(long, hide = true)]
    bench: bool,
}

const HEAVY: Shape = Shape { sequences: 4, tokens: 512, train: true };
const LIGHT: Shape = Shape { sequences: 1, tokens: 32, train: true };
/// Microbatches that a client of the protocol may have in flight.
const BACKLOG: usize = 4;
/// What each job costs its session for a token: see the scheduler.
const FORWARD_COST: usize = 2;
const BACKWARD_COST: usize = 3;

fn main() -> anyhow::Result<()> {
    share_cores()?;
    let args = Args::parse();
    let trunk = Trunk::find()?;
    println!("{}, f32, rank 8, {} s each", trunk.what, args.seconds);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
    runtime.block_on(latency(&trunk, &args))?;
    runtime.block_on(shares(&trunk, &args))
}

/// With the backlog of the protocol's default limits.
async fn latency(trunk: &Trunk, args: &Args) -> anyhow::Result<()> {
    let setting = Setting { trunk, args, max_tokens_per_batch: 16384, backlog: [BACKLOG, BACKLOG] };
    let [heavy, light] = run(setting).await?;
    println!("\n## How long the light session waits, backlogs of {BACKLOG} microbatches\n");
    // What a batch with the heavy session's jobs takes, and what its share for one of them is.
    let batch = |job: &Job| job.times.execute;
    let one =
        |job: &Job| job.times.execute.mul_f64(HEAVY.n_tokens() as f64 / job.times.n_tokens as f64);
    let mean = |time: fn(&Job) -> Duration| {
        let [forward, backward] = [Kind::Forward, Kind::Backward]
            .map(|kind| median(&sorted(heavy.iter().filter(|job| job.kind == kind).map(time))));
        println!(
            "forward {forward:.2?}, backward {backward:.2?}, mean {:.2?}",
            (forward + backward) / 2
        );
        (forward + backward) / 2
    };
    print!("A batch with heavy microbatches: ");
    let batch = mean(batch);
    print!("\nOne heavy microbatch of it: ");
    let one = mean(one);
    println!(
        "\n| light session | jobs | p50 | p99 | p99 in heavy batches | bar | | in heavy microbatches |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    for kind in [Kind::Forward, Kind::Backward] {
        let times = sorted(light.iter().filter(|job| job.kind == kind).map(Job::latency));
        let p99 = times.get((99 * times.len()).div_ceil(100).max(1) - 1).copied();
        let p99 = p99.context("the light session had no answer in time")?;
        let [in_batches, in_ones] = [batch, one].map(|unit| p99.as_secs_f64() / unit.as_secs_f64());
        let verdict = if in_batches < 2.0 { "reached" } else { "NOT REACHED" };
        println!(
            "| {kind:?} | {} | {:.2?} | {p99:.2?} | {in_batches:.2} | < 2 | {verdict} | {in_ones:.2} |",
            times.len(),
            median(&times)
        );
    }
    Ok(())
}

/// With so much work waiting that neither session is ever without: batches hold as many tokens as
/// one heavy job, and the light backlog has as many as the heavy one.
async fn shares(trunk: &Trunk, args: &Args) -> anyhow::Result<()> {
    let light_backlog = 2 * HEAVY.n_tokens() / LIGHT.n_tokens();
    let backlog = [2, light_backlog];
    let max_tokens_per_batch = HEAVY.n_tokens();
    let setting = Setting { trunk, args, max_tokens_per_batch, backlog };
    let [heavy, light] = run(setting).await?;
    let cost = |jobs: &[Job], shape: Shape| -> usize {
        jobs.iter().map(|job| job.kind.cost() * shape.n_tokens()).sum()
    };
    let (heavy, light) = (cost(&heavy, HEAVY), cost(&light, LIGHT));
    let share = light as f64 / (heavy + light) as f64;
    println!("\n## Who gets how much, backlogs of {backlog:?} microbatches\n");
    println!(
        "| heavy token costs | light token costs | light's share | of an equal share | bar | |"
    );
    println!("|---|---|---|---|---|---|");
    let of_equal = 2.0 * share;
    let verdict = if (0.95..=1.05).contains(&of_equal) { "reached" } else { "NOT REACHED" };
    println!("| {heavy} | {light} | {share:.3} | {of_equal:.3} | 0.95 to 1.05 | {verdict} |");
    Ok(())
}

struct Setting<'a> {
    trunk: &'a Trunk,
    args: &'a Args,
    max_tokens_per_batch: usize,
    /// Microbatches in flight, heavy and light.
    backlog: [usize; 2],
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Forward,
    Backward,
}

impl Kind {
    fn cost(self) -> usize {
        match self {
            Kind::Forward => FORWARD_COST,
            Kind::Backward => BACKWARD_COST,
        }
    }
}

/// A job that was answered.
struct Job {
    kind: Kind,
    times: Times,
}

impl Job {
    /// From submission to answer.
    fn latency(&self) -> Duration {
        self.times.queue + self.times.execute
    }
}

async fn run(setting: Setting<'_>) -> anyhow::Result<[Vec<Job>; 2]> {
    let trunk = TrunkConfig {
        name: setting.trunk.model.display().to_string(),
        split_point_1: setting.trunk.layers.start,
        split_point_2: setting.trunk.layers.end,
        device: setting.args.device.clone(),
        dtype: ComputeDType::F32,
        ..TrunkConfig::default()
    };
    let limits = LimitsConfig {
        max_tokens_per_batch: setting.max_tokens_per_batch,
        ..LimitsConfig::default()
    };
    let engine = DirectEngine::start(trunk, &limits).await?;
    let time = Duration::from_secs_f64(setting.args.seconds);
    let mut sessions = Vec::new();
    for (shape, backlog) in [HEAVY, LIGHT].into_iter().zip(setting.backlog) {
        let adapter = Adapter { lora: LoraSpec::default(), seed: 1, wire_dtype: WireDType::F32 };
        let inputs = Inputs::new(shape, engine.trunk().hidden_size, ComputeDType::F32);
        sessions.push(Session { session: engine.open(adapter).await?, inputs, backlog });
    }
    let light = sessions.pop().expect("two were pushed");
    let heavy = sessions.pop().expect("two were pushed");
    let begun = Instant::now();
    let (heavy, light) = tokio::try_join!(heavy.drive(begun, time), light.drive(begun, time))?;
    Ok([heavy, light])
}

struct Session {
    session: DirectSession,
    inputs: Inputs,
    backlog: usize,
}

enum Pending {
    Forward(PendingForward),
    Backward(PendingBackward),
}

impl Session {
    /// Keeps the backlog full. Gives what was answered in time, without a tenth to warm up.
    async fn drive(mut self, begun: Instant, time: Duration) -> anyhow::Result<Vec<Job>> {
        let (mut pending, mut jobs) = (VecDeque::new(), Vec::new());
        for _ in 0..self.backlog {
            pending.push_back(Pending::Forward(self.session.forward(self.inputs.input.clone())?));
        }
        while let Some(next) = pending.pop_front() {
            let (kind, times) = match next {
                Pending::Forward(forward) => {
                    let times = forward.done().await?.times;
                    let backward = self.session.backward(self.inputs.grad.clone())?;
                    pending.push_back(Pending::Backward(backward));
                    (Kind::Forward, times)
                }
                Pending::Backward(backward) => {
                    let times = backward.done().await?.times;
                    let forward = self.session.forward(self.inputs.input.clone())?;
                    pending.push_back(Pending::Forward(forward));
                    (Kind::Backward, times)
                }
            };
            if begun.elapsed() > time {
                break;
            }
            if begun.elapsed() > time / 10 {
                jobs.push(Job { kind, times });
            }
        }
        Ok(jobs)
    }
}

fn sorted(times: impl Iterator<Item = Duration>) -> Vec<Duration> {
    let mut times: Vec<Duration> = times.collect();
    times.sort();
    times
}

/// Zero if there is none.
fn median(sorted: &[Duration]) -> Duration {
    sorted.get(sorted.len() / 2).copied().unwrap_or_default()
}
