//! A tenant is alone: sessions with other ranks, alphas and targets that share every batch see the
//! numbers and end with the adapters that each gets alone, for every family.
//!
//! Not bit for bit: products of other shapes run other kernels. To 1e-5 in float32.

#[path = "batched/nan_stays_home.rs"]
mod nan_stays_home;
#[path = "batched/pressure.rs"]
mod pressure;
#[path = "batched/probe.rs"]
mod probe;

use offshoot_client::{
    ADAMW_DEFAULTS, AdamWConfig, Client, ExportedAdapter, LoraConfig, OpenSession,
};
use offshoot_server::{LoraBatching, ServerConfig};
use offshoot_tests::run::open_request;
use offshoot_tests::together::{Player, distance, round, server_for};
use offshoot_tests::{TestServer, fixture};
use std::path::Path;

const FAMILIES: [&str; 5] = ["gpt2", "llama", "qwen2", "qwen3", "gemma"];

/// What float32 may differ, relative to the largest value.
const F32: f64 = 1e-5;

/// Optimizer steps.
const STEPS: usize = 5;

/// A family's layers 1 and 2 of four.
fn of_family(family: &str, config: ServerConfig) -> ServerConfig {
    let mut config = config;
    config.model.name = fixture(family).display().to_string();
    config
}

/// The numbers of one player after [`STEPS`] steps, and its adapter.
struct Seen {
    numbers: Vec<(String, Vec<f32>)>,
    adapter: ExportedAdapter,
    batch_jobs: Vec<u32>,
}

/// Four sessions' settings: other ranks, scalings, dropout and targets.
async fn settings(client: &Client) -> Vec<OpenSession> {
    let modules = client.describe().await.unwrap().lora_modules;
    let lora = |r, lora_alpha, lora_dropout, use_rslora, targets: &[String]| LoraConfig {
        r,
        lora_alpha,
        lora_dropout,
        use_rslora,
        target_modules: targets.to_vec(),
    };
    let (first, last) = (&modules[..2], &modules[modules.len() - 1..]);
    let choices = [
        lora(2, 4.0, 0.0, false, &["all-linear".to_string()]),
        lora(5, 3.0, 0.1, false, first),
        lora(1, 8.0, 0.3, true, last),
        lora(16, 32.0, 0.05, false, &modules[1..]),
    ];
    let mut all = Vec::new();
    for (number, lora) in choices.into_iter().enumerate() {
        let open = open_request(client).await.unwrap();
        all.push(OpenSession { lora, adamw: smooth(), seed: number as u64, ..open });
    }
    all
}

/// AdamW divides a gradient by its own size: with PyTorch's eps the sign of rounding noise becomes a
/// whole step. With this one a small difference stays small.
fn smooth() -> AdamWConfig {
    AdamWConfig { eps: 1e-3, weight_decay: 0.05, ..ADAMW_DEFAULTS }
}

/// Opens these sessions and lets them train together.
async fn play(config: ServerConfig, choose: impl Fn(usize) -> bool) -> Vec<Seen> {
    let server = TestServer::start_with(config).await;
    let client = Client::connect(&server.endpoint()).await.unwrap();
    let hidden_size = client.describe().await.unwrap().hidden_size;
    let mut players = Vec::new();
    for (number, open) in settings(&client).await.into_iter().enumerate() {
        if choose(number) {
            let session = client.open(open).await.unwrap();
            players.push(Player::new(session, hidden_size, number as u64));
        }
    }
    for _ in 0..STEPS {
        round(&mut players.iter_mut().collect::<Vec<_>>()).await;
    }
    let mut seen = Vec::new();
    for player in players {
        let Player { session, numbers, batch_jobs, .. } = player;
        let adapter = session.export().await.unwrap();
        assert_eq!(adapter.step, STEPS as u64);
        session.close(true).await.unwrap();
        seen.push(Seen { numbers, adapter, batch_jobs });
    }
    server.drain().await;
    seen
}

/// In the order of their names.
fn tensors(adapter: &ExportedAdapter) -> Vec<(String, Vec<f32>)> {
    let values = |(name, t): &(String, offshoot_client::HostTensor)| (name.clone(), t.to_f32());
    let mut all: Vec<_> = adapter.tensors.iter().map(values).collect();
    all.sort_by(|a, b| a.0.cmp(&b.0));
    assert!(!all.is_empty());
    all
}

async fn check_family(family: &str, lora_batching: LoraBatching) {
    let folder = store();
    let mut config = of_family(family, server_for(4, folder.path()));
    config.model.lora_batching = lora_batching;
    let together = play(config, |_| true).await;
    for (number, together) in together.iter().enumerate() {
        let folder = store();
        let config = of_family(family, server_for(1, folder.path()));
        let alone = play(config, |n| n == number).await.remove(0);
        assert!(together.batch_jobs.iter().all(|n| *n == 4), "{:?}", together.batch_jobs);
        assert!(alone.batch_jobs.iter().all(|n| *n == 1), "{:?}", alone.batch_jobs);
        let numbers = distance(&together.numbers, &alone.numbers);
        let adapter = distance(&tensors(&together.adapter), &tensors(&alone.adapter));
        println!(
            "{family} {lora_batching:?}, session {number}: numbers {numbers:.1e}, adapter {adapter:.1e}"
        );
        assert!(numbers < F32 && adapter < F32, "{family} {number}: {numbers:.1e} {adapter:.1e}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn batched_equals_alone() {
    for family in FAMILIES {
        check_family(family, LoraBatching::Auto).await;
    }
    for lora_batching in [LoraBatching::Stacked, LoraBatching::Loop] {
        check_family("llama", lora_batching).await;
    }
}

/// A store for a test's server.
fn store() -> tempfile::TempDir {
    tempfile::tempdir().expect("a folder")
}

/// The tiny llama for `n_players`.
fn llama(n_players: usize, store: &Path) -> ServerConfig {
    of_family("llama", server_for(n_players, store))
}
