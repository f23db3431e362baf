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
    #[arg(long, default_value_t = 120.0)]
    seconds: f64,
    #[arg(long, default_value = "cpu")]
    device: String,
    /// cargo says that it is a bench.
    #[arg(long, hide = true)]
    bench: bool,
}

const HEAVY: Shape = Shape { sequences: 4, tokens: 512, train: true };
const LIGHT: Shape = Shape { sequences: 1, tokens: 32, train: true };
const N_LAYERS: usize = 2;
/// Microbatches that a client of the protocol may have in flight.
const BACKLOG: usize = 4;
/// Answers of one batch come within less.
const SAME_BATCH: Duration = Duration::from_millis(5);
/// What each job costs its session for a token: see the scheduler.
const FORWARD_COST: usize = 2;
const BACKWARD_COST: usize = 3;

fn main() -> anyhow::Result<()> {
    share_cores()?;
    let args = Args::parse();
    let mut trunk = Trunk::find()?;
    // Who goes first does not depend on the depth, and shallow jobs are many.
    trunk.layers.end = trunk.layers.start + N_LAYERS;
    println!("{}, of these {N_LAYERS}, f32, rank 8, {} s each", trunk.what, args.seconds);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
    runtime.block_on(latency(&trunk, &args))?;
    runtime.block_on(shares(&trunk, &args))
}

/// With the backlog of the protocol's default limits.
async fn latency(trunk: &Trunk, args: &Args) -> anyhow::Result<()> {
    let setting = Setting { trunk, args, max_tokens_per_batch: 16384 };
    let [heavy, light] = run(setting).await?;
    println!("\n## How long the light session waits, backlogs of {BACKLOG} microbatches\n");
    let of_kind = |jobs: &[Job], kind, time: fn(&Job) -> Duration| {
        let mut times: Vec<Duration> =
            jobs.iter().filter(|job| job.kind == kind).map(time).collect();
        times.sort();
        times
    };
    let [forward, backward] = [Kind::Forward, Kind::Backward]
        .map(|kind| percentile(&of_kind(&heavy, kind, |job| job.times.execute), 50));
    let (forward, backward) = (forward?, backward?);
    let batch = (forward + backward) / 2;
    println!("A heavy batch: forward {forward:.2?}, backward {backward:.2?}, mean {batch:.2?}.");
    println!("Jobs of one session run one after the other, so the bar is for the time from when a");
    println!("job is the first of its session until its answer; its own backlog is not in that.\n");
    println!(
        "| light session | jobs | p50 | p99 | p99 in heavy batches | bar | | p99 with own backlog |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    for kind in [Kind::Forward, Kind::Backward] {
        let times = of_kind(&light, kind, |job| job.at_the_front);
        let (p50, p99) = (percentile(&times, 50)?, percentile(&times, 99)?);
        let in_batches = p99.as_secs_f64() / batch.as_secs_f64();
        let verdict = if in_batches < 2.0 { "reached" } else { "NOT REACHED" };
        let whole = percentile(&of_kind(&light, kind, Job::latency), 99)?;
        println!(
            "| {kind:?} | {} | {p50:.2?} | {p99:.2?} | {in_batches:.2} | < 2 | {verdict} | {whole:.2?} |",
            times.len()
        );
    }
    // Times are as noisy as the machine; how often the other one went first is not.
    let meanwhile = light.iter().map(|job| {
        let until = job.answered - SAME_BATCH;
        let from = job.answered - job.at_the_front + SAME_BATCH;
        heavy.iter().filter(|other| other.answered > from && other.answered < until).count()
    });
    let most = meanwhile.max().unwrap_or(0);
    println!(
        "\nAt most {most} heavy batches ended while a light job was the first of its session, its own not counted."
    );
    Ok(())
}

/// With batches that hold no more than one heavy job, so that there is something to share.
async fn shares(trunk: &Trunk, args: &Args) -> anyhow::Result<()> {
    let setting = Setting { trunk, args, max_tokens_per_batch: HEAVY.n_tokens() };
    let [heavy, light] = run(setting).await?;
    let cost = |jobs: &[Job], shape: Shape| -> usize {
        jobs.iter().map(|job| job.kind.cost() * shape.n_tokens()).sum()
    };
    let (heavy, light) = (cost(&heavy, HEAVY), cost(&light, LIGHT));
    let share = light as f64 / (heavy + light) as f64;
    println!("\n## Who gets how much, batches of at most {} tokens\n", HEAVY.n_tokens());
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
    /// From when it was the first of its session's that waited until its answer.
    at_the_front: Duration,
    answered: Instant,
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
    for shape in [HEAVY, LIGHT] {
        let adapter = Adapter { lora: LoraSpec::default(), seed: 1, wire_dtype: WireDType::F32 };
        let inputs = Inputs::new(shape, engine.trunk().hidden_size, ComputeDType::F32);
        sessions.push(Session { session: engine.open(adapter).await?, inputs });
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
}

enum Pending {
    Forward(PendingForward),
    Backward(PendingBackward),
}

impl Session {
    /// Keeps the backlog full. Gives what was answered in time, without a tenth to warm up.
    async fn drive(mut self, begun: Instant, time: Duration) -> anyhow::Result<Vec<Job>> {
        let (mut pending, mut jobs) = (VecDeque::new(), Vec::new());
        for _ in 0..BACKLOG {
            pending.push_back(Pending::Forward(self.session.forward(self.inputs.input.clone())?));
        }
        let mut before = None;
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
            let answered = Instant::now();
            if begun.elapsed() > time {
                break;
            }
            if begun.elapsed() > time / 10 {
                let latency = times.queue + times.execute;
                let at_the_front = before.map_or(latency, |before| latency.min(answered - before));
                jobs.push(Job { kind, times, at_the_front, answered });
            }
            before = Some(answered);
        }
        Ok(jobs)
    }
}

/// Nearest rank.
fn percentile(sorted: &[Duration], percent: usize) -> anyhow::Result<Duration> {
    let rank = (percent * sorted.len()).div_ceil(100).max(1);
    sorted.get(rank - 1).copied().context("a session had no answer in time; use more --seconds")
}
