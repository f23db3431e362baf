//! A server is rolled under load: how long its clients pause, and that they lose nothing.
//!
//! Clients train through a proxy on the real `offshoot serve`, which is ended and started again on the same
//! store and address: with a successor that waits beside it (`standby`), and without (`restart`). A pause
//! is the longest time between two answers that a client sees around a roll. At the end each client's
//! adapter, and every number of each of its steps, is compared with a run without rolls.

mod report;
mod server;
mod team;

use anyhow::{Context, ensure};
use clap::{Parser, ValueEnum};
use offshoot_benches::Trunk;
use offshoot_tests::proxy::Proxy;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use report::{Report, Roll, Series, quantile};
use server::{Server, Service};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use team::{Outcome, Progress, Team};
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;

/// Longer than a roll and some steps take.
const PATIENCE: Duration = Duration::from_secs(180);
/// Steps of each client between two rolls, at least.
const STEPS_BETWEEN: u64 = 2;

#[derive(Parser)]
struct Args {
    /// Rolls of each way.
    #[arg(long, default_value_t = 20)]
    rolls: usize,
    /// That train all the time.
    #[arg(long, default_value_t = 4)]
    clients: usize,
    /// Only this one.
    #[arg(long, value_enum)]
    way: Option<Way>,
    /// The moments of the rolls are a function of it.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// The tiny model of the tests instead of the demo's.
    #[arg(long)]
    tiny: bool,
    /// The `offshoot` to roll [default: the one of this program's own build].
    #[arg(long)]
    program: Option<PathBuf>,
    /// Where report.json, report.md and the servers' logs go.
    #[arg(long, default_value = "target/roll")]
    out: PathBuf,
    /// cargo says that it is a bench.
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Way {
    /// The old one ends, then the new one starts.
    Restart,
    /// The new one waits beside the old one.
    Standby,
}

impl Way {
    fn name(self) -> &'static str {
        match self {
            Way::Restart => "restart",
            Way::Standby => "standby",
        }
    }
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let program = args.program.clone().map_or_else(own_build, Ok)?;
    ensure!(
        program.is_file(),
        "{} is missing; build it with cargo build --release",
        program.display()
    );
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."));
    let out = std::path::absolute(workspace.join(&args.out))?;
    std::fs::create_dir_all(&out).context("cannot make the folder of --out")?;
    let trunk = if args.tiny { tiny() } else { Trunk::find()? };
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let begun = Instant::now();
    let mut report = Report {
        trunk: trunk.what.clone(),
        seed: args.seed,
        program: program.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        seconds: 0.0,
        series: Vec::new(),
    };
    for way in [Way::Restart, Way::Standby] {
        if args.way.is_some_and(|wanted| wanted != way) {
            continue;
        }
        let service = Service::new(&program, &trunk, out.join(way.name()))?;
        let (rolls, outcomes, usual) = roll_all(&runtime, service, &args, way)?;
        let plain = Service::new(&program, &trunk, out.join(format!("{}-without", way.name())))?;
        let steps = outcomes.iter().map(|outcome| outcome.digests.len() as u64).max().unwrap_or(0);
        let expected = undisturbed(&runtime, &plain, steps)?;
        report.series.push(series(way, rolls, (&outcomes, &expected), usual));
        report.seconds = begun.elapsed().as_secs_f64();
        std::fs::write(out.join("report.json"), serde_json::to_string_pretty(&report)? + "\n")?;
        std::fs::write(out.join("report.md"), report.markdown())?;
    }
    println!("\n{}", report.markdown());
    let bad = |s: &Series| s.lost_steps + s.doubled_steps > 0 || !s.bit_equal;
    ensure!(!report.series.iter().any(bad), "a roll cost steps or bits; see {}", out.display());
    Ok(())
}

/// `target/PROFILE/offshoot` beside `target/PROFILE/deps/roll-HASH`.
fn own_build() -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe().context("this program has no path")?;
    let profile =
        own.parent().and_then(Path::parent).context("this program is in no build folder")?;
    Ok(profile.join("offshoot"))
}

fn tiny() -> Trunk {
    Trunk::at(offshoot_tests::fixture("llama"), 1..3, "the tests' tiny llama")
}

/// Clients on their way.
struct Crowd {
    teams: Vec<(Arc<Progress>, JoinHandle<anyhow::Result<Outcome>>)>,
    until: Arc<AtomicU64>,
}

impl Crowd {
    fn begin(runtime: &Runtime, endpoint: &str, n: usize) -> anyhow::Result<Crowd> {
        let until = Arc::new(AtomicU64::new(u64::MAX));
        let mut teams = Vec::new();
        for _ in 0..n {
            let team = runtime.block_on(Team::new(endpoint, until.clone()))?;
            teams.push((team.progress.clone(), runtime.spawn(team.train())));
        }
        Ok(Crowd { teams, until })
    }

    /// Until each has taken so many more steps.
    fn more_steps(&self, n: u64) -> anyhow::Result<()> {
        let taken = |progress: &Progress| progress.taken.load(Ordering::SeqCst);
        let wanted: Vec<u64> = self.teams.iter().map(|(team, _)| taken(team) + n).collect();
        self.wait(|i, progress| taken(progress) >= wanted[i])
    }

    fn wait(&self, is_so: impl Fn(usize, &Progress) -> bool) -> anyhow::Result<()> {
        let begun = Instant::now();
        for (i, (progress, running)) in self.teams.iter().enumerate() {
            while !is_so(i, progress) {
                ensure!(!running.is_finished(), "a client has ended; its error is above");
                ensure!(begun.elapsed() < PATIENCE, "a client got no answer in {PATIENCE:?}");
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        Ok(())
    }

    /// The longest time between two answers of each, from `from` to the first one behind `to`.
    fn pauses(&self, from: Instant, to: Instant) -> anyhow::Result<Vec<f64>> {
        self.wait(|_, progress| progress.answers().last().is_some_and(|last| *last > to))?;
        let pause = |progress: &Progress| {
            let answers = progress.answers();
            let around = answers.windows(2).filter(|two| two[1] > from && two[0] < to);
            around.map(|two| (two[1] - two[0]).as_secs_f64()).fold(0.0, f64::max)
        };
        Ok(self.teams.iter().map(|(progress, _)| pause(progress)).collect())
    }

    /// All stop at the same step.
    fn end(self, runtime: &Runtime) -> anyhow::Result<Vec<Outcome>> {
        let furthest = |progress: &Progress| progress.furthest.load(Ordering::SeqCst);
        let furthest = self.teams.iter().map(|(team, _)| furthest(team)).max().unwrap_or(0);
        self.until.store(furthest + 2, Ordering::SeqCst);
        let mut outcomes = Vec::new();
        for (_, running) in self.teams {
            outcomes.push(runtime.block_on(running)??);
        }
        Ok(outcomes)
    }
}

fn roll_all(
    runtime: &Runtime,
    mut service: Service,
    args: &Args,
    way: Way,
) -> anyhow::Result<(Vec<Roll>, Vec<Outcome>, f64)> {
    let mut rng = StdRng::seed_from_u64(args.seed);
    let (mut server, address) = service.serve()?;
    // The next ones have the same, as behind a name that does not change.
    service.port = address.port();
    let proxy = runtime.block_on(Proxy::start(address))?;
    let crowd = Crowd::begin(runtime, &proxy.endpoint(), args.clients)?;
    crowd.more_steps(STEPS_BETWEEN)?;
    let usual = usual_gap(&crowd);
    let mut rolls = Vec::new();
    for number in 1..=args.rolls {
        crowd.more_steps(STEPS_BETWEEN)?;
        std::thread::sleep(Duration::from_millis(rng.random_range(0..500)));
        let (next, roll) = roll(&service, &crowd, (server, way))?;
        server = next;
        let longest = quantile(&roll.pause_seconds, 1.0);
        let Roll { ended_seconds, ready_seconds, .. } = roll;
        println!(
            "{} {number:>2}: longest pause {longest:.2} s; old one ended after {ended_seconds:.2} s, new one \
             served after {ready_seconds:.2} s",
            way.name()
        );
        rolls.push(roll);
    }
    let outcomes = crowd.end(runtime)?;
    server.terminate()?;
    server.ended()?;
    Ok((rolls, outcomes, usual))
}

fn roll(
    service: &Service,
    crowd: &Crowd,
    (mut old, way): (Server, Way),
) -> anyhow::Result<(Server, Roll)> {
    let (mut next, asked, ended);
    match way {
        Way::Restart => {
            asked = old.terminate()?;
            ended = old.ended()?;
            next = service.start(false)?;
        }
        Way::Standby => {
            next = service.start(true)?;
            next.standby()?;
            crowd.more_steps(1)?;
            asked = old.terminate()?;
            ended = old.ended()?;
        }
    }
    let (_, ready) = next.ready()?;
    let roll = Roll {
        ended_seconds: (ended - asked).as_secs_f64(),
        ready_seconds: (ready - asked).as_secs_f64(),
        pause_seconds: crowd.pauses(asked, ready)?,
    };
    Ok((next, roll))
}

/// Median, so far.
fn usual_gap(crowd: &Crowd) -> f64 {
    let mut gaps = Vec::new();
    for (progress, _) in &crowd.teams {
        let answers = progress.answers();
        gaps.extend(answers.windows(2).map(|two| (two[1] - two[0]).as_secs_f64()));
    }
    quantile(&gaps, 0.5)
}

/// One client, so many steps, one server.
fn undisturbed(runtime: &Runtime, service: &Service, steps: u64) -> anyhow::Result<Outcome> {
    let (mut server, address) = service.serve()?;
    let until = Arc::new(AtomicU64::new(steps));
    let team = runtime.block_on(Team::new(&address.to_string(), until))?;
    let outcome = runtime.block_on(team.train())?;
    server.terminate()?;
    server.ended()?;
    Ok(outcome)
}

fn series(
    way: Way,
    rolls: Vec<Roll>,
    (outcomes, expected): (&[Outcome], &Outcome),
    usual_gap_seconds: f64,
) -> Series {
    let sum = |of: &dyn Fn(&Outcome) -> u64| outcomes.iter().map(of).sum();
    let steps = expected.digests.len() as u64;
    let is_equal = |o: &Outcome| o.digests == expected.digests && o.adapter == expected.adapter;
    Series {
        way: way.name(),
        clients: outcomes.len(),
        steps,
        lost_steps: sum(&|outcome| steps.saturating_sub(outcome.steps)),
        doubled_steps: sum(&|outcome| outcome.steps.saturating_sub(steps)),
        replayed_steps: sum(&|outcome| outcome.replayed),
        times_back: sum(&|outcome| outcome.went_back),
        bit_equal: outcomes.iter().all(is_equal),
        usual_gap_seconds,
        rolls,
    }
}
