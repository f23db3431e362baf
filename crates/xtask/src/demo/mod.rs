//! Two teams fine-tune one real model through one shared trunk, as real processes on loopback.

mod data;
mod metrics;
mod process;
mod progress;
mod report;

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Args;

use crate::command::{cargo, in_root, run as run_command, target_dir};
use crate::setup;
use metrics::Metrics;
use process::{Process, Server};
use progress::Progress;
use report::{Memory, Report};

/// What the demo can be told.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// A model directory, a GGUF file or a hub name. Default: SmolLM2-135M-Instruct, fetched
    #[arg(long)]
    model: Option<String>,
    /// First layer of the trunk
    #[arg(long, default_value_t = 0)]
    split_point_1: u32,
    /// Layer after the trunk's last. Default with the default model: 20 of its 30
    #[arg(long)]
    split_point_2: Option<u32>,
    /// Optimizer steps of each team
    #[arg(long, default_value_t = 40)]
    steps: u32,
    /// Tokens that a sequence is cut to
    #[arg(long, default_value_t = 128)]
    max_seq_length: u32,
    /// Highest learning rate of the schedule
    #[arg(long, default_value_t = 2e-3)]
    learning_rate: f64,
    /// dtype of the weights and products on both sides
    #[arg(long, default_value = "f32")]
    dtype: String,
    /// Both teams are asked to go on from this, before and after training. The line break is what
    /// stands between prompt and completion in support's training text
    #[arg(long, default_value = "My computer is slow.\n")]
    sample_prompt: String,
}

/// Someone with text of their own.
pub struct Team {
    name: &'static str,
    /// What their text is, for people.
    about: &'static str,
    train: &'static str,
    eval: &'static str,
    /// Sequences in a step: both teams' steps have some 500 tokens.
    batch_size: u32,
}

const TEAMS: [Team; 2] = [
    Team {
        name: "support",
        about: "questions and answers",
        train: "support.jsonl",
        eval: "support.eval.jsonl",
        batch_size: 16,
    },
    Team {
        name: "scribe",
        about: "the King James Bible",
        train: "scribe.txt",
        eval: "scribe.eval.txt",
        batch_size: 4,
    },
];

/// Of SmolLM2's 30 layers, these are the trunk's end unless the user says otherwise.
const DEFAULT_SPLIT_POINT_2: u32 = 20;
/// A training that writes nothing for so long is taken for stuck.
const STUCK_AFTER: Duration = Duration::from_secs(180);
const POLL_EVERY: Duration = Duration::from_millis(200);

/// The release binary that `cargo build --release -p offshoot` leaves.
pub fn binary() -> PathBuf {
    target_dir().join("release/offshoot")
}

/// Fetches what the demo runs on and says where it is.
pub fn fetch() -> Result<()> {
    let model = data::prepare(&in_root(".demo"), None)?;
    println!("{model}");
    Ok(())
}

/// Runs the demo and prints its report; an error if a team's loss did not fall.
pub fn run(options: Options) -> Result<()> {
    ensure!(
        options.model.is_none() || options.split_point_2.is_some(),
        "with a model of your own, say where its trunk ends: --split-point-2 LAYER"
    );
    setup::libtorch()?;
    let home = in_root(".demo");
    let model = data::prepare(&home, options.model.as_deref())?;
    run_command(cargo().args(["build", "--release", "--package", "offshoot"]))?;

    let started = Instant::now();
    let run = home.join("run");
    let _ = fs::remove_dir_all(&run);
    fs::create_dir_all(&run)?;
    let report = train(&options, &model, &home, &run)?;
    report.print(started.elapsed());
    report.check()
}

fn train(
    options: &Options,
    model: &str,
    home: &std::path::Path,
    run: &std::path::Path,
) -> Result<Report> {
    let split = [
        format!("--split-point-1={}", options.split_point_1),
        format!("--split-point-2={}", options.split_point_2.unwrap_or(DEFAULT_SPLIT_POINT_2)),
    ];
    eprintln!("server: loading the trunk");
    let mut server = Server::start(model, &split, &options.dtype, run)?;
    eprintln!("server: ready on 127.0.0.1:{}, log in .demo/run/server.log", server.port);
    let mut memory = Memory::idle(server.resident_bytes());

    let mut clients = Vec::new();
    let progress = Progress::new(&TEAMS, options.steps);
    for (i, team) in TEAMS.iter().enumerate() {
        let folder = run.join(team.name);
        let client = Process::start(
            team.name,
            &run.join(format!("{}.log", team.name)),
            client_arguments(options, model, &split, server.port, home, team, &folder),
        )?;
        clients.push((client, Metrics::new(&folder.join("metrics.jsonl"))));
        // The next team comes when this one is at work, so that memory can be read in between.
        let last = i + 1 == TEAMS.len();
        watch(&mut server, &mut clients, &progress, &mut memory, |clients| {
            if last { clients.iter().all(is_done) } else { clients[i].1.has_started() }
        })?;
    }
    progress.finish();
    memory.peak = server.peak_bytes();
    server.stop()?;

    let teams = TEAMS.iter().zip(clients).map(|(team, (_, metrics))| {
        let folder = run.join(team.name).join("adapter");
        ensure!(
            folder.join("adapter_model.safetensors").is_file(),
            "team {} left no adapter in {}",
            team.name,
            folder.display()
        );
        metrics.summary(team, format!(".demo/run/{}/adapter", team.name))
    });
    Ok(Report {
        teams: teams.collect::<Result<_>>()?,
        memory,
        model: model.to_owned(),
        sample_prompt: options.sample_prompt.clone(),
    })
}

fn client_arguments(
    options: &Options,
    model: &str,
    split: &[String; 2],
    port: u16,
    home: &std::path::Path,
    team: &Team,
    folder: &std::path::Path,
) -> Vec<String> {
    let warmup = (options.steps / 10).max(1);
    let mut arguments = vec!["train".to_owned(), format!("--model-name={model}")];
    arguments.extend_from_slice(split);
    arguments.extend([
        "--server-host=127.0.0.1".into(),
        format!("--server-port={port}"),
        format!("--session-name={}", team.name),
        format!("--train-file={}", home.join(team.train).display()),
        format!("--eval-file={}", home.join(team.eval).display()),
        format!("--output-dir={}", folder.display()),
        "--lora-rank=8".into(),
        "--lora-alpha=16".into(),
        "--lora-dropout=0.05".into(),
        format!("--batch-size={}", team.batch_size),
        format!("--max-seq-length={}", options.max_seq_length),
        format!("--learning-rate={}", options.learning_rate),
        format!("--warmup-steps={warmup}"),
        format!("--max-steps={}", options.steps),
        format!("--save-interval={}", options.steps),
        format!("--eval-interval={}", options.steps),
        "--log-interval=1".into(),
        format!("--sample-prompt={}", options.sample_prompt),
        format!("--dtype={}", options.dtype),
        "--seed=1".into(),
    ]);
    arguments
}

fn is_done((client, _): &(Process, Metrics)) -> bool {
    client.has_ended()
}

/// Reads what the clients write and the server's memory until `until` holds.
fn watch(
    server: &mut Server,
    clients: &mut [(Process, Metrics)],
    progress: &Progress,
    memory: &mut Memory,
    until: impl Fn(&[(Process, Metrics)]) -> bool,
) -> Result<()> {
    let mut heard = Instant::now();
    loop {
        server.expect_alive()?;
        for (i, (client, metrics)) in clients.iter_mut().enumerate() {
            client.poll()?;
            for event in metrics.read_new().context("cannot read a team's metrics.jsonl")? {
                heard = Instant::now();
                progress.show(i, &event);
            }
        }
        // A session is live from a team's first event until its process ends.
        let live = clients.iter().filter(|(c, m)| m.has_started() && !c.has_ended()).count();
        memory.add(live, server.resident_bytes());
        if until(clients) {
            return Ok(());
        }
        ensure!(
            heard.elapsed() < STUCK_AFTER,
            "no team wrote anything for {} s; see the logs in .demo/run",
            STUCK_AFTER.as_secs()
        );
        std::thread::sleep(POLL_EVERY);
    }
}
