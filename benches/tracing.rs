//! What tracing costs: training steps of the real model with every span of both processes kept and sent to
//! a collector that listens, against steps without tracing. Two servers stand side by side, and runs of the
//! real program take turns.

use anyhow::{Context, bail, ensure};
use clap::Parser;
use offshoot_benches::{Effort, in_turn};
use offshoot_platform::otlp::Sink;
use offshoot_platform::{offshoot, root};
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

#[derive(Parser)]
struct Args {
    /// Each of a run without and a run with tracing.
    #[arg(long, default_value_t = 8)]
    rounds: usize,
    /// Of one run; the first two do not count.
    #[arg(long, default_value_t = 12)]
    steps: usize,
    /// A Hugging Face directory; else that of `cargo xtask demo`.
    #[arg(long)]
    model: Option<String>,
    /// cargo says that it is a bench.
    #[arg(long, hide = true)]
    bench: bool,
}

const LAYERS: (u32, u32) = (2, 26);
/// Of a step's time.
const BAR: f64 = 0.02;
const N_FIRST: usize = 2;
const OFF: usize = 0;
const ON: usize = 1;

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    ensure!(args.steps > N_FIRST, "--steps must be more than {N_FIRST}");
    let demo = root().join(".demo");
    let model = args.model.clone().unwrap_or_else(|| demo.join("smollm2-hf").display().to_string());
    ensure!(Path::new(&model).is_dir(), "{model} is not there; `cargo xtask demo` fetches it");
    let dir = tempfile::tempdir()?;
    let sink = Sink::start();
    let bench = Bench { args: &args, model: &model, dir: dir.path(), sink: &sink };
    let servers = [bench.serve(OFF)?, bench.serve(ON)?];
    let mut number = 0;
    println!(
        "SmolLM2 4 x 128, trunk {LAYERS:?}, {} steps a run, {} rounds",
        args.steps, args.rounds
    );
    let effort = Effort { n_rounds: args.rounds, time: Duration::ZERO };
    let times = in_turn(2, effort, |candidate| {
        number += 1;
        bench.run(candidate, &servers[candidate].address, number)
    })?;
    let [low, middle, high] = times.speedup(ON, OFF).map(|speedup| 1.0 / speedup - 1.0);
    let spans = sink.spans().len();
    let steps = (args.rounds + 1) * args.steps;
    println!("\n| | median step |\n|---|---|");
    println!("| without tracing | {:.1?} |", times.median(OFF));
    println!("| every span sent | {:.1?} |", times.median(ON));
    // A slower candidate has the higher ratio, so the quartiles change places.
    println!(
        "\nTracing costs {:+.2} % of a step (quartiles over {} rounds {:+.2} % to {:+.2} %); bar {:.0} %: {}",
        100.0 * middle,
        times.n_rounds(),
        100.0 * high,
        100.0 * low,
        100.0 * BAR,
        if middle < BAR { "reached" } else { "NOT REACHED" }
    );
    println!("{spans} spans came, {:.0} for each of {steps} steps", spans as f64 / steps as f64);
    ensure!(spans > 10 * steps, "too few spans came: this measured nothing");
    Ok(())
}

struct Bench<'a> {
    args: &'a Args,
    model: &'a str,
    dir: &'a Path,
    sink: &'a Sink,
}

struct Server {
    process: Child,
    address: String,
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Bench<'_> {
    fn serve(&self, candidate: usize) -> anyhow::Result<Server> {
        let mut command = Command::new(offshoot());
        let (first, behind) = LAYERS;
        command.args(["serve", "--port", "0", "--log", "warn", "--model-name", self.model]);
        command.args([
            "--split-point-1",
            &first.to_string(),
            "--split-point-2",
            &behind.to_string(),
        ]);
        command.arg("--store-dir").arg(self.dir.join(format!("store-{candidate}")));
        command.env_remove("OTEL_EXPORTER_OTLP_ENDPOINT");
        if candidate == ON {
            command.env("OFFSHOOT_TELEMETRY__OTLP_ENDPOINT", self.sink.grpc());
        }
        let mut process =
            command.stdout(Stdio::piped()).spawn().context("cannot start a server")?;
        let output = process.stdout.take().context("its output")?;
        let mut line = String::new();
        BufReader::new(output).read_line(&mut line)?;
        let Some(address) = line.trim().strip_prefix("ready grpc=") else {
            bail!("the server does not start: {line:?}");
        };
        Ok(Server { address: address.to_string(), process })
    }

    /// The median step of one run.
    fn run(&self, candidate: usize, address: &str, number: usize) -> anyhow::Result<Duration> {
        let output = self.dir.join(format!("run-{number}"));
        let steps = self.args.steps.to_string();
        let mut command = Command::new(offshoot());
        command.args(["train", "--server", address, "--model-name", self.model]);
        command.args(["--max-steps", &steps, "--batch-size", "4", "--max-seq-length", "128"]);
        command.args(["--quiet", "--no-tensorboard", "--wire-dtype", "f32"]);
        command.arg("--train-file").arg(root().join(".demo/scribe.txt"));
        command.arg("--output-dir").arg(&output);
        command.env("OFFSHOOT_CACHE", self.dir.join("tokens"));
        command.env_remove("OTEL_EXPORTER_OTLP_ENDPOINT");
        if candidate == ON {
            command.args(["--otlp-endpoint", &self.sink.grpc()]);
        }
        let ended = command.stdout(Stdio::null()).status()?;
        ensure!(ended.success(), "a run ended with {ended}");
        let text = fs::read_to_string(output.join("metrics.jsonl"))?;
        let mut seconds = Vec::new();
        for line in text.lines() {
            let event: serde_json::Value = serde_json::from_str(line)?;
            if event["event"] == "step" {
                let rate = event["steps_per_second"].as_f64().context("steps_per_second")?;
                seconds.push(1.0 / rate);
            }
        }
        ensure!(seconds.len() == self.args.steps, "{} steps were taken", seconds.len());
        let mut counted = seconds.split_off(N_FIRST);
        counted.sort_by(f64::total_cmp);
        Ok(Duration::from_secs_f64(counted[counted.len() / 2]))
    }
}
