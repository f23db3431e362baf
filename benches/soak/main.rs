//! A server under hostile clients for a long time, and what its other tenants notice.
//!
//! The real `offshoot serve` with a tenants file: two tenants train all the time, a third attacks in
//! one way after the other, with a calm time before and after each. The attackers are processes of
//! their own at the lowest priority, because what they compute is not what is measured. Every second
//! the server's resident memory, threads, open files and the tenants' tokens are noted.

mod attacks;
mod plot;
mod server;
mod teams;

use anyhow::{Context, ensure};
use attacks::Kind;
use clap::{Parser, Subcommand, ValueEnum};
use offshoot_benches::Trunk;
use serde_json::{Value, json};
use server::{Sample, ServerProcess};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use teams::Team;

#[derive(Parser)]
struct Args {
    #[command(subcommand)]
    part: Option<Part>,
    /// All phases together, the calm ones included.
    #[arg(long, default_value_t = 22.0)]
    minutes: f64,
    /// Only these attacks.
    #[arg(long, value_enum, value_delimiter = ',')]
    kinds: Vec<Kind>,
    /// The program that serves.
    #[arg(long, default_value = "target/release/offshoot")]
    offshoot: PathBuf,
    /// Where summary.json, samples.csv, table.md and soak.png go.
    #[arg(long, default_value = "target/soak")]
    out: PathBuf,
    /// Layers of the trunk. Few make many small jobs, so that the wire counts for more.
    #[arg(long, default_value_t = 8)]
    layers: usize,
    /// cargo says that it is a bench.
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Subcommand)]
enum Part {
    /// One attack, by this program's own child.
    #[command(hide = true)]
    Attack { kind: Kind, endpoint: String, seconds: f64 },
}

/// From one change to the next, before samples count: queues empty, caches fill.
const SETTLING: Duration = Duration::from_secs(3);
const SAMPLE_INTERVAL: Duration = Duration::from_secs(1);

/// What goes on from one moment to another.
struct Phase {
    /// None: calm.
    kind: Option<Kind>,
    from: f64,
    to: f64,
    /// What the attacker tells of itself.
    told: Value,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    if let Some(Part::Attack { kind, endpoint, seconds }) = &args.part {
        return attacks::run(*kind, endpoint, Duration::from_secs_f64(*seconds));
    }
    let kinds =
        if args.kinds.is_empty() { Kind::value_variants().to_vec() } else { args.kinds.clone() };
    let mut trunk = Trunk::find()?;
    trunk.layers.end = trunk.layers.start + args.layers;
    let n_phases = 2 * kinds.len() + 1;
    let each = Duration::from_secs_f64(60.0 * args.minutes / n_phases as f64);
    ensure!(
        each > 3 * SETTLING,
        "{:.0} s for each phase are too few: more --minutes",
        each.as_secs_f64()
    );
    println!("{}: {} phases of {:.0} s", trunk.what, n_phases, each.as_secs_f64());

    let server = ServerProcess::start(&args.offshoot, &trunk)?;
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let teams = [server::GOOD[0], server::GOOD[1]].map(|name| (name, server.token(name)));
    let teams = teams
        .into_iter()
        .map(|(name, token)| runtime.block_on(Team::start(name, server.endpoint(), token)))
        .collect::<Result<Vec<_>, _>>()?;

    let begun = Instant::now();
    let mut samples = Vec::new();
    let mut phases = Vec::new();
    for index in 0..n_phases {
        let kind = (index % 2 == 1).then(|| kinds[index / 2]);
        let from = begun.elapsed().as_secs_f64();
        let attacker = kind.map(|kind| attack(kind, &server, each)).transpose()?;
        let until = Instant::now() + each;
        while Instant::now() < until {
            samples.push(sample(&server, &teams, begun)?);
            std::thread::sleep(
                SAMPLE_INTERVAL.min(until.saturating_duration_since(Instant::now())),
            );
        }
        let to = begun.elapsed().as_secs_f64();
        // At their priority they may end late; that is no part of any phase.
        let mut told = Value::Null;
        if let Some(mut attacker) = attacker {
            while attacker.try_wait()?.is_none() {
                samples.push(sample(&server, &teams, begun)?);
                std::thread::sleep(SAMPLE_INTERVAL);
            }
            told = counts_of(attacker)?;
        }
        phases.push(Phase { kind, from, to, told });
        let name = kind.map_or("calm".into(), name);
        println!("{:5.0} s  {name}", begun.elapsed().as_secs_f64());
    }
    for team in teams {
        runtime.block_on(team.end())?;
    }
    let left = server.end()?;
    report(&args, &trunk, Measured { samples, phases, left })
}

fn name(kind: Kind) -> String {
    kind.to_possible_value().map_or_else(String::new, |value| value.get_name().to_string())
}

fn attack(kind: Kind, server: &ServerProcess, each: Duration) -> anyhow::Result<Child> {
    let seconds = each.as_secs_f64().to_string();
    let program = std::env::current_exe()?;
    Command::new("nice")
        .args(["-n", "19"])
        .arg(program)
        .args(["attack", &name(kind), server.endpoint(), &seconds])
        // Not in the arguments, which everybody on the machine can read.
        .env(attacks::TOKEN, server.token(server::BAD))
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start an attacker")
}

fn counts_of(attacker: Child) -> anyhow::Result<Value> {
    let output = attacker.wait_with_output()?;
    ensure!(output.status.success(), "the attacker failed: {}", output.status);
    Ok(serde_json::from_slice(&output.stdout)?)
}

fn sample(server: &ServerProcess, teams: &[Team], begun: Instant) -> anyhow::Result<Sample> {
    let tokens = teams.iter().map(|team| team.n_tokens.load(Ordering::Relaxed)).collect();
    server.sample(begun.elapsed().as_secs_f64(), tokens)
}

struct Measured {
    samples: Vec<Sample>,
    phases: Vec<Phase>,
    /// What the server said at its end.
    left: Value,
}

/// Tokens of a second, and the highest resident memory, within a phase.
struct Rates {
    of_teams: Vec<f64>,
    peak_resident: u64,
}

fn rates(samples: &[Sample], phase: &Phase) -> anyhow::Result<Rates> {
    let from = phase.from + SETTLING.as_secs_f64();
    let within: Vec<&Sample> = samples
        .iter()
        .filter(|sample| sample.seconds >= from && sample.seconds <= phase.to)
        .collect();
    let (Some(first), Some(last)) = (within.first(), within.last()) else {
        anyhow::bail!("a phase without samples");
    };
    let seconds = last.seconds - first.seconds;
    let tokens = first.tokens.iter().zip(&last.tokens);
    Ok(Rates {
        of_teams: tokens.map(|(from, to)| (to - from) as f64 / seconds).collect(),
        peak_resident: within.iter().map(|sample| sample.resident).max().unwrap_or(0),
    })
}

fn report(args: &Args, trunk: &Trunk, measured: Measured) -> anyhow::Result<()> {
    let Measured { samples, phases, left } = measured;
    let rates = phases.iter().map(|phase| rates(&samples, phase)).collect::<Result<Vec<_>, _>>()?;
    let mut rows = Vec::new();
    let mut table = String::from(
        "| attack | what it did | others' tokens/s, calm | during | ratio | server's peak MB |\n\
         |---|---|---|---|---|---|\n",
    );
    for index in (1..phases.len()).step_by(2) {
        let Some(kind) = phases[index].kind else { continue };
        let all = |rates: &Rates| rates.of_teams.iter().sum::<f64>();
        let calm = (all(&rates[index - 1]) + all(&rates[index + 1])) / 2.0;
        let during = all(&rates[index]);
        let peak = rates[index].peak_resident as f64 / 1e6;
        table += &format!(
            "| {} | {} | {calm:.0} | {during:.0} | {:.3} | {peak:.0} |\n",
            name(kind),
            in_words(&phases[index].told),
            during / calm
        );
        rows.push(json!({
            "attack": name(kind), "told": phases[index].told, "calm": calm, "during": during,
            "ratio": during / calm, "teams": rates[index].of_teams, "peak_resident_bytes": rates[index].peak_resident,
        }));
    }
    let worst = rows.iter().filter_map(|row| row["ratio"].as_f64()).fold(f64::INFINITY, f64::min);
    println!("\n{table}\nthe worst ratio is {worst:.3}; bar: 0.90");
    println!("left at the end: {left}");
    std::fs::create_dir_all(&args.out)?;
    let summary = json!({
        "trunk": trunk.what, "layers": args.layers, "minutes": args.minutes, "rows": rows,
        "calm": phases.iter().zip(&rates).filter(|(phase, _)| phase.kind.is_none())
            .map(|(phase, rates)| json!({ "from": phase.from, "to": phase.to, "tokens_per_second": rates.of_teams }))
            .collect::<Vec<_>>(),
        "left": left,
    });
    std::fs::write(args.out.join("summary.json"), serde_json::to_string_pretty(&summary)? + "\n")?;
    std::fs::write(args.out.join("table.md"), &table)?;
    std::fs::write(args.out.join("samples.csv"), server::to_csv(&samples))?;
    let attacks: Vec<(String, f64, f64)> =
        phases.iter().filter_map(|phase| Some((name(phase.kind?), phase.from, phase.to))).collect();
    plot::write(&args.out.join("soak.png"), &samples, &attacks)?;
    println!("written to {}", args.out.display());
    Ok(())
}

/// The counts that the attacker told, the largest first.
fn in_words(told: &Value) -> String {
    let Some(counts) = told.as_object() else { return String::new() };
    let mut counts: Vec<(&String, u64)> =
        counts.iter().filter_map(|(what, n)| Some((what, n.as_u64()?))).collect();
    counts.sort_by_key(|&(_, n)| std::cmp::Reverse(n));
    counts.iter().map(|(what, n)| format!("{n} {what}")).collect::<Vec<_>>().join(", ")
}
