//! What durability costs: step time with the server's default snapshots against none and against one
//! at every step, in turn within one run; one snapshot's time and bytes; and how long a store of many
//! sessions takes to open.
//!
//! Over real sockets, server and client in one process, the optimizer step not waited for, as a
//! trainer does it. Blocks of the settings follow each other, so the default's minute passes while
//! others run: it takes a snapshot in each of its blocks, more often than it would by itself. The
//! cost measured is an upper bound by that factor, which is printed.

use anyhow::{Context, Result, ensure};
use clap::Parser;
use offshoot_adapters::LoraSpec;
use offshoot_benches::{Effort, ModelSize, Trunk, in_turn, share_cores};
use offshoot_client::{Client, LoraConfig, Session, StepTaken};
use offshoot_server::direct::open_store;
use offshoot_server::{RunningServer, Server, ServerConfig};
use offshoot_tests::run::{input, open_request};
use std::path::Path;
use std::time::{Duration, Instant};
use tokio::runtime::Runtime;
use tokio::task::JoinSet;

#[derive(Parser)]
struct Args {
    /// Of each block of steps.
    #[arg(long, default_value_t = 30.0)]
    block_seconds: f64,
    /// Blocks of each setting; 0: only the store is measured.
    #[arg(long, default_value_t = 6)]
    rounds: usize,
    /// In the store that is opened.
    #[arg(long, default_value_t = 1000)]
    sessions: usize,
    #[arg(long, default_value_t = 16)]
    rank: u32,
    /// cargo says that it is a bench.
    #[arg(long, hide = true)]
    bench: bool,
}

/// Of a microbatch; one makes a step, which is the most that snapshots could weigh.
const SEQ_LENS: [u32; 4] = [128; 4];
const WARM_UP: Duration = Duration::from_secs(3);
const N_SNAPSHOTS: usize = 9;
const N_OPENS: usize = 5;

fn main() -> Result<()> {
    share_cores()?;
    let args = Args::parse();
    let runtime = Runtime::new()?;
    let trunk = Trunk::find()?;
    println!(
        "{}, f32, rank {} on all linear layers, steps of 4 x 128 tokens\n",
        trunk.what, args.rank
    );
    if args.rounds > 0 {
        overhead(&runtime, &trunk, &args)?;
    }
    runtime.block_on(store_of_many(&args))
}

/// A server with a session that trains.
struct Training {
    server: RunningServer,
    session: Session,
    _store: tempfile::TempDir,
    hidden_size: usize,
    n_steps: u64,
    n_taken: u64,
    /// Time that it trained.
    time: Duration,
}

impl Training {
    async fn start(
        trunk: &Trunk,
        rank: u32,
        change: impl FnOnce(&mut ServerConfig),
    ) -> Result<Training> {
        let store = tempfile::tempdir()?;
        let mut config = config_of(trunk, store.path());
        change(&mut config);
        let server = Server::start(config).await?;
        let client = Client::connect(&server.local_addr().to_string()).await?;
        let hidden_size = client.describe().await?.hidden_size;
        let mut request = open_request(&client).await?;
        let target_modules = vec!["all-linear".into()];
        request.lora = LoraConfig { r: rank, lora_alpha: 16.0, target_modules, ..request.lora };
        let session = client.open(request).await?;
        let (n_steps, n_taken, time) = (0, 0, Duration::ZERO);
        Ok(Training { server, session, _store: store, hidden_size, n_steps, n_taken, time })
    }

    /// Trains for so long; the time of a step.
    async fn train(&mut self, least: Duration) -> Result<Duration> {
        let (begun, mut steps) = (Instant::now(), Vec::new());
        while begun.elapsed() < least {
            let key = self.n_steps + steps.len() as u64;
            let (output, microbatch, _) =
                self.session.forward(input(key, &SEQ_LENS, self.hidden_size)).await?;
            microbatch.backward(output).await?;
            steps.push(self.session.step(1e-4, 1.0).await?);
        }
        self.session.settle().await?;
        let time = begun.elapsed();
        let n = steps.len() as u32;
        for step in &mut steps {
            let taken: StepTaken = step.now().context("all are answered")??;
            self.n_taken += u64::from(taken.snapshot);
        }
        self.n_steps += u64::from(n);
        self.time += time;
        Ok(time / n)
    }
}

fn config_of(trunk: &Trunk, store: &Path) -> ServerConfig {
    let mut config = ServerConfig::default();
    config.listen.port = 0;
    config.model.name = trunk.model.display().to_string();
    config.model.split_point_1 = trunk.layers.start;
    config.model.split_point_2 = trunk.layers.end;
    config.store.dir = store.to_path_buf();
    config
}

fn overhead(runtime: &Runtime, trunk: &Trunk, args: &Args) -> Result<()> {
    let start = |seconds: Option<f64>, steps: u64| {
        runtime.block_on(Training::start(trunk, args.rank, |config| {
            config.session.snapshot_seconds = seconds.unwrap_or(config.session.snapshot_seconds);
            config.session.snapshot_steps = steps;
        }))
    };
    let mut all = [start(Some(0.0), 0)?, start(None, 0)?, start(Some(0.0), 1)?];
    let block = Duration::from_secs_f64(args.block_seconds);
    let mut n_warm = 0;
    let effort = Effort { n_rounds: args.rounds, time: Duration::ZERO };
    let times = in_turn(all.len(), effort, |candidate| {
        n_warm += 1;
        let least = if n_warm <= 3 { WARM_UP } else { block };
        runtime.block_on(all[candidate].train(least))
    })?;
    println!(
        "## Step time, {} blocks of {} s each, in turn\n",
        times.n_rounds(),
        args.block_seconds
    );
    println!(
        "| snapshots | steps | of them with a snapshot | trained s for each | step ms, median block | more than none: quartiles of the rounds | bar | |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    let names = ["none", "default", "at every step"];
    for (candidate, (name, training)) in names.into_iter().zip(&all).enumerate() {
        let more = times.speedup(0, candidate).map(|ratio| 100.0 * (ratio - 1.0));
        let (bar, verdict) = match candidate {
            1 if more[1] < 2.0 => ("< 2 %", "reached"),
            1 => ("< 2 %", "NOT REACHED"),
            _ => ("", ""),
        };
        let each = training.time.as_secs_f64() / training.n_taken as f64;
        let each = if training.n_taken == 0 { "".into() } else { format!("{each:.1}") };
        println!(
            "| {name} | {} | {} | {each} | {:.2} | {:+.2} % {:+.2} % {:+.2} % | {bar} | {verdict} |",
            training.n_steps,
            training.n_taken,
            times.median(candidate).as_secs_f64() * 1e3,
            more[0],
            more[1],
            more[2],
        );
    }
    runtime.block_on(one_snapshot(&mut all[0]))?;
    for training in all {
        let Training { server, session, _store, .. } = training;
        runtime.block_on(async {
            drop(session);
            ensure!(server.drain(Duration::from_secs(60)).await == 0, "a session was lost");
            Ok(())
        })?;
    }
    Ok(())
}

/// As a checkpoint asks for it: until it is durable.
async fn one_snapshot(training: &mut Training) -> Result<()> {
    let (mut times, mut bytes) = (Vec::new(), 0);
    for _ in 0..N_SNAPSHOTS {
        training.train(Duration::from_millis(1)).await?;
        let begun = Instant::now();
        bytes = training.session.snapshot().await?.bytes;
        times.push(begun.elapsed());
    }
    times.sort();
    println!("\n## One snapshot, from the question to the answer, {N_SNAPSHOTS} times\n");
    println!("| MB | median ms | least | most |\n|---|---|---|---|");
    let ms = |n: usize| times[n].as_secs_f64() * 1e3;
    println!(
        "| {:.2} | {:.1} | {:.1} | {:.1} |\n",
        bytes as f64 / 1e6,
        ms(N_SNAPSHOTS / 2),
        ms(0),
        ms(N_SNAPSHOTS - 1)
    );
    Ok(())
}

/// A store with so many sessions of ten snapshots each, made by a server as clients make it.
async fn store_of_many(args: &Args) -> Result<()> {
    const TINY: ModelSize =
        ModelSize { hidden: 64, mlp: 128, layers: 6, heads: 2, kv_heads: 2, vocab: 64 };
    const AT_A_TIME: usize = 16;
    let (trunk, store) = (Trunk::random(TINY)?, tempfile::tempdir()?);
    let config = config_of(&trunk, store.path());
    let server = Server::start(config.clone()).await?;
    let client = Client::connect(&server.local_addr().to_string()).await?;
    let hidden_size = client.describe().await?.hidden_size;
    let mut all = JoinSet::new();
    for n in 0..args.sessions {
        while all.len() >= AT_A_TIME {
            all.join_next().await.context("there are some")???;
        }
        all.spawn(fill(client.clone(), n as u64, hidden_size, config.store.snapshots_kept));
    }
    while let Some(filled) = all.join_next().await {
        filled??;
    }
    drop(client);
    ensure!(server.drain(Duration::from_secs(60)).await == 0, "a session was lost");

    println!("## Opening a store\n");
    println!("| sessions | snapshots | ms, {N_OPENS} times | bar | |\n|---|---|---|---|---|");
    let (mut times, mut slowest) = (Vec::new(), Duration::ZERO);
    let mut found = (0, 0);
    for _ in 0..N_OPENS {
        let opened = open_store(&config.store)?;
        found = (opened.n_sessions, opened.n_snapshots);
        slowest = slowest.max(opened.time);
        times.push(format!("{:.0}", opened.time.as_secs_f64() * 1e3));
    }
    ensure!(found.0 == args.sessions, "{} sessions of {} are there", found.0, args.sessions);
    let verdict = if slowest < Duration::from_secs(1) { "reached" } else { "NOT REACHED" };
    println!("| {} | {} | {} | < 1 s | {verdict} |", found.0, found.1, times.join(" "));
    Ok(())
}

/// A session with all snapshots that are kept of a client, and parked.
async fn fill(client: Client, seed: u64, hidden_size: usize, n_snapshots: usize) -> Result<()> {
    let mut request = open_request(&client).await?;
    request.seed = seed;
    request.lora.r = LoraSpec::default().r.min(4) as u32;
    let session = client.open(request).await?;
    for n in 0..n_snapshots as u64 {
        // Another point, and another adapter.
        let (output, microbatch, _) = session.forward(input(n, &[3], hidden_size)).await?;
        microbatch.backward(output).await?;
        session.step(0.01, 1.0).await?;
        session.snapshot().await?;
    }
    session.evaluate(input(0, &[2], hidden_size)).await?;
    session.close(false).await?;
    Ok(())
}
