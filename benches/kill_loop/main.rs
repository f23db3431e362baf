//! Nothing lost, nothing doubled: training runs with the real server and the real trainer as
//! processes, disturbed at random moments, each compared bit by bit with a run that nobody disturbed.
//!
//! What happens is a function of the seed; the instruction that it hits is not, since processes do not
//! run twice in the same way. So a failure is found again by running its number again, if need be
//! several times; its folder with the logs of both sides stays.
//!
//! Its sleeps do not wait for anything to have happened: they are the random moments at which faults
//! strike and end, and the pauses between two looks at a run.

mod compare;
mod fault;
mod program;
mod report;
mod setting;
mod world;

use anyhow::{Context, bail, ensure};
use clap::Parser;
use compare::Outcome;
use fault::{Kind, strike, within};
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use report::{Report, Run, Struck};
use setting::{SETTINGS, Setting, Texts};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use world::{CROWD_RANK, Common, Trainer, World};

#[derive(Parser)]
struct Args {
    /// What happens when is a function of it.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// No run begins after so long.
    #[arg(long, default_value_t = 720.0)]
    seconds: f64,
    /// Fewer faults that interrupted something are a failure.
    #[arg(long, default_value_t = 200)]
    min_faults: usize,
    /// Optimizer steps of each run; about one fault comes in ten.
    #[arg(long, default_value_t = 160)]
    steps: u64,
    /// Only this run, as its failure said.
    #[arg(long)]
    run: Option<u64>,
    /// Only settings whose name has this in it.
    #[arg(long)]
    setting: Option<String>,
    /// Only faults whose name (such as full_disk) has this in it.
    #[arg(long)]
    fault: Option<String>,
    /// The `offshoot` to disturb [default: the one of this program's own build].
    #[arg(long)]
    program: Option<PathBuf>,
    /// Where report.json, report.md and the folders of failed runs go.
    #[arg(long, default_value = "target/kill_loop")]
    out: PathBuf,
    /// Keep the folders of all runs.
    #[arg(long)]
    keep: bool,
    /// cargo says that it is a bench.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let program = args.program.clone().map_or_else(own_build, Ok)?;
    ensure!(program.is_file(), "{} is missing; build it with cargo build", program.display());
    let out = std::path::absolute(workspace().join(&args.out))?;
    std::fs::create_dir_all(&out).context("cannot make the folder of --out")?;
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let texts = Texts::write(&out)?;
    let n_steps = args.steps;
    let mut common = Common { program, texts, n_steps, runtime, budget: None };
    common.budget = Some(budget(&common, &out)?);
    println!("seed {}, {}, logs in {}", args.seed, common.program.display(), out.display());

    let begun = Instant::now();
    let mut references: HashMap<&str, Outcome> = HashMap::new();
    let mut report = Report {
        seed: args.seed,
        program: common.program.display().to_string(),
        seconds: 0.0,
        runs: Vec::new(),
    };
    for number in args.run.unwrap_or(0).. {
        let setting = &SETTINGS[number as usize % SETTINGS.len()];
        let is_wanted = args.setting.as_ref().is_none_or(|part| setting.name.contains(part));
        // Its one fault of its own takes long.
        let again = setting.kinds.contains(&Kind::HalfOpen) && number as usize >= SETTINGS.len();
        let over = begun.elapsed().as_secs_f64() > args.seconds;
        if over || (number > 10_000) {
            break;
        }
        if !is_wanted || (again && args.run.is_none()) {
            continue;
        }
        if !references.contains_key(setting.name) {
            references.insert(setting.name, reference(&common, setting, &out)?);
        }
        let expected = &references[setting.name];
        let dir = out.join(format!("run-{number}-{}", setting.name));
        let run = disturbed(&common, setting, &dir, (&args, number), expected).with_context(|| {
            format!(
                "run {number} ({}) failed; its files and log.txt are in {}; again with --seed {} --run {number}",
                setting.name,
                dir.display(),
                args.seed,
            )
        });
        let run = match run {
            Ok(run) => run,
            Err(error) => {
                report.seconds = begun.elapsed().as_secs_f64();
                write_report(&report, &out)?;
                return Err(error);
            }
        };
        println!(
            "run {number:>3} {:<16} {:>3} faults, {:>3} hit, {:>4} steps replayed, {:>2} rollbacks, {:>3} reconnections, {:>5.1} s, equal",
            setting.name,
            run.faults.len(),
            run.faults.iter().filter(|fault| fault.hit.hit).count(),
            run.replayed_steps,
            run.rollbacks,
            run.reconnections,
            run.seconds,
        );
        report.runs.push(run);
        if !args.keep {
            std::fs::remove_dir_all(&dir)?;
        }
        if args.run.is_some() {
            break;
        }
    }
    report.seconds = begun.elapsed().as_secs_f64();
    write_report(&report, &out)?;
    println!("\n{}", report.markdown());
    let enough = args.run.is_some() || report.n_hits() >= args.min_faults;
    ensure!(enough, "only {} faults interrupted something", report.n_hits());
    Ok(())
}

fn write_report(report: &Report, out: &Path) -> anyhow::Result<()> {
    std::fs::write(out.join("report.json"), serde_json::to_string_pretty(report)? + "\n")?;
    std::fs::write(out.join("report.md"), report.markdown())?;
    Ok(())
}

/// `target/PROFILE/offshoot` beside `target/PROFILE/deps/kill_loop-HASH`.
fn own_build() -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe().context("this program has no path")?;
    let profile =
        own.parent().and_then(Path::parent).context("this program is in no build folder")?;
    Ok(profile.join("offshoot"))
}

fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."))
}

/// What one adapter and half of one more take beside the weights.
fn budget(common: &Common, out: &Path) -> anyhow::Result<u64> {
    let crowded = SETTINGS.iter().find(|setting| setting.crowded).context("one is")?;
    let dir = fresh(&out.join("budget"))?;
    let mut world = World::begin(common, crowded, &dir)?;
    world.kill_trainer()?;
    let address = world.server.as_ref().context("it was started")?.address.to_string();
    let bytes = common.runtime.block_on(fault::visit(address, CROWD_RANK))?;
    drop(world);
    std::fs::remove_dir_all(&dir)?;
    Ok(bytes)
}

/// Without what an earlier run left.
fn fresh(dir: &Path) -> anyhow::Result<PathBuf> {
    if dir.exists() {
        std::fs::remove_dir_all(dir)?;
    }
    std::fs::create_dir_all(dir)?;
    Ok(dir.to_path_buf())
}

/// The run that nobody disturbs.
fn reference(common: &Common, setting: &Setting, out: &Path) -> anyhow::Result<Outcome> {
    let dir = fresh(&out.join(format!("reference-{}", setting.name)))?;
    let begun = Instant::now();
    let mut world = World::begin(common, setting, &dir)?;
    while world.look()? == Trainer::Runs {
        std::thread::sleep(Duration::from_millis(2));
    }
    ensure!(world.look()? == Trainer::Done, "the undisturbed run failed; see {}", dir.display());
    world.drain_server()?;
    let outcome = Outcome::read(&world.output(), &world.store(), common.n_steps)?;
    ensure!(outcome.lost_and_doubled(common.n_steps) == (0, 0), "the undisturbed run is not whole");
    println!("undisturbed {:<12} {:>5.1} s", setting.name, begun.elapsed().as_secs_f64());
    std::fs::remove_dir_all(&dir)?;
    Ok(outcome)
}

/// All kinds in turn, in a random order each time.
struct Plan {
    kinds: Vec<Kind>,
    left: Vec<Kind>,
}

impl Plan {
    fn next(&mut self, rng: &mut StdRng) -> Kind {
        if self.left.is_empty() {
            self.left = self.kinds.clone();
            self.left.shuffle(rng);
            // Once is enough: it takes longer than all the others.
            self.kinds.retain(|kind| *kind != Kind::HalfOpen);
        }
        self.left.pop().unwrap_or(Kind::KillServer)
    }
}

fn disturbed(
    common: &Common,
    setting: &'static Setting,
    dir: &Path,
    (args, number): (&Args, u64),
    expected: &Outcome,
) -> anyhow::Result<Run> {
    let dir = fresh(dir)?;
    let mut rng = StdRng::seed_from_u64(args.seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ number);
    let wanted = |kind: &&Kind| match &args.fault {
        Some(part) => serde_json::to_string(kind).is_ok_and(|name| name.contains(part)),
        None => true,
    };
    let kinds: Vec<Kind> = setting.kinds.iter().filter(wanted).copied().collect();
    ensure!(!kinds.is_empty(), "no fault of this setting is left");
    let mut plan = Plan { kinds, left: Vec::new() };
    let begun = Instant::now();
    let mut world = World::begin(common, setting, &dir)?;
    let mut faults = Vec::new();
    loop {
        // From within the first steps on.
        let before = world.seen.steps();
        let n = rng.random_range(0..=12);
        let kind = plan.next(&mut rng);
        if world.wait_for_steps(before, n)? == Trainer::Done {
            break;
        }
        std::thread::sleep(within(&mut rng, 25));
        let (step, at) = (world.seen.furthest.load(Ordering::SeqCst), Instant::now());
        world.log.line(&format!("-- {kind:?}"));
        let hit = strike(kind, &mut world, &mut rng).with_context(|| format!("{kind:?}"))?;
        world.log.line(&format!("-- {kind:?}: {hit:?}"));
        let struck = Instant::now();
        let steps = world.seen.steps();
        let trainer = world.wait_for_steps(steps, 1).with_context(|| format!("{kind:?}"))?;
        faults.push(Struck {
            kind,
            step,
            seconds: (at - begun).as_secs_f64(),
            hit,
            recovery_seconds: struck.elapsed().as_secs_f64(),
        });
        if trainer == Trainer::Done {
            break;
        }
    }
    // Of the last fault, perhaps.
    if world.server.is_none() {
        world.start_server()?;
    }
    world.drain_server()?;
    let panics = world.seen.n_panics.load(Ordering::SeqCst);
    if panics > 0 {
        bail!("{panics} panics; see log.txt");
    }
    let outcome = Outcome::read(&world.output(), &world.store(), common.n_steps)?;
    let (lost_steps, doubled_steps) = outcome.lost_and_doubled(common.n_steps);
    ensure!(lost_steps + doubled_steps == 0, "{lost_steps} steps lost, {doubled_steps} doubled");
    outcome.equals(expected)?;
    let count = |of: &std::sync::atomic::AtomicU64| of.load(Ordering::SeqCst);
    Ok(Run {
        number,
        setting: setting.name,
        n_steps: common.n_steps,
        seconds: begun.elapsed().as_secs_f64(),
        faults,
        replayed_steps: count(&world.seen.n_replayed),
        lost_steps,
        doubled_steps,
        rollbacks: count(&world.seen.n_rollbacks),
        reconnections: count(&world.seen.n_reconnections),
        gave_up: world.n_gave_up,
        errors: world.seen.errors.lock().map(|said| said.clone()).unwrap_or_default(),
        compared_bytes: outcome.n_bytes(),
    })
}
