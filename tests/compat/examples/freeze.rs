//! Keeps what a release promises: its wire contract and a store that its program wrote.
//!
//! ```console
//! cargo build --release -p offshoot
//! cargo run -p offshoot-compat --example freeze -- target/release/offshoot 0.2.0
//! ```
//!
//! Adds `proto/compat/RELEASE` and `tests/compat/stores/RELEASE`; refuses to change what is there.

use anyhow::{Context, Result, ensure};
use offshoot_client::Client;
use offshoot_tests::process::{Signal, signal};
use offshoot_tests::run::{open_request, train};
use offshoot_tests::server_config;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

fn main() -> Result<()> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let [program, release] = &arguments[..] else {
        anyhow::bail!(
            "expected the release's program and its version: freeze target/release/offshoot 0.2.0"
        );
    };
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    let contract = package.join("../../proto/compat").join(release);
    let store = package.join("stores").join(release);
    ensure!(!store.exists(), "{} is there already", store.display());
    // The first one was taken before this program was.
    if !contract.exists() {
        keep_contract(&package.join("../../proto/offshoot/v1"), &contract.join("offshoot/v1"))?;
    }
    let made = tempfile::tempdir()?;
    tokio::runtime::Runtime::new()?.block_on(write_store(program, made.path()))?;
    copy(made.path(), &store)?;
    println!("{}\n{}", contract.display(), store.display());
    Ok(())
}

fn keep_contract(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let path = entry?.path();
        fs::copy(&path, to.join(path.file_name().context("a file")?))?;
    }
    Ok(())
}

/// One session, two steps, a snapshot, and the end of the server.
async fn write_store(program: &str, store: &Path) -> Result<()> {
    let config = server_config(store);
    let model = &config.model;
    let mut server = Command::new(PathBuf::from(program).canonicalize()?)
        .args([
            "serve",
            "--model-name",
            &model.name,
            "--split-point-1",
            "1",
            "--split-point-2",
            "3",
        ])
        .env("OFFSHOOT_LISTEN__PORT", "0")
        .env("OFFSHOOT_MODEL__N_THREADS", "1")
        .env("OFFSHOOT_STORE__DIR", store)
        .env("OFFSHOOT_LIMITS__MAX_TOKENS_PER_BATCH", "1")
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {program}"))?;
    let output = server.stdout.take().context("it is piped")?;
    let ready = BufReader::new(output).lines().next().context("the server ended early")??;
    let address = ready.strip_prefix("ready grpc=").context("it says where it is ready")?;
    let address = address.split_whitespace().next().unwrap_or(address);

    let client = Client::connect(address).await?;
    let hidden_size = client.describe().await?.hidden_size;
    let session = client.open(open_request(&client).await?).await?;
    train(&session, hidden_size, 0..2).await?;
    session.settle().await?;
    session.snapshot().await?;
    session.close(false).await?;
    drop(client);
    signal(&server, Signal::TERM)?;
    let status = server.wait()?;
    ensure!(status.success(), "the server ended with {status}");
    Ok(())
}

/// Files that a server makes again.
const OWN: [&str; 2] = ["lock", "reserve"];

/// Without what a running server has for itself.
fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        if OWN.iter().any(|own| entry.file_name() == *own) {
            continue;
        }
        let target = to.join(entry.file_name());
        match entry.file_type()?.is_dir() {
            true => copy(&entry.path(), &target)?,
            false => drop(fs::copy(entry.path(), target)?),
        }
    }
    Ok(())
}
