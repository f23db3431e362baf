use super::{Hit, watch, within};
use crate::program::PATIENCE;
use crate::world::{CROWD_RANK, World};
use anyhow::Context;
use offshoot_client::{
    ADAMW_DEFAULTS, Client, ForwardInput, HostTensor, LoraConfig, OpenSession, WireDType,
};
use offshoot_tests::process::Signal;
use rand::Rng;
use rand::rngs::StdRng;
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Hex of a hash: the name of a whole file.
const NAME_CHARS: usize = 64;

/// Kills the server while it writes a file, or as soon as one has its name. Where it hit is told from
/// what is left.
pub(super) fn kill_server_at_blob(
    world: &mut World,
    rng: &mut StdRng,
    behind: bool,
) -> anyhow::Result<Hit> {
    let blobs = world.store().join("blobs");
    let Some(mut watch) = watch(&blobs) else { return Ok(Hit::default()) };
    for _ in 0..200 {
        let Some(seen) = watch.next(Duration::from_millis(50))? else { continue };
        if seen.renamed != behind {
            continue;
        }
        if behind {
            std::thread::sleep(Duration::from_micros(rng.random_range(0..1500)));
        } else {
            std::thread::sleep(within(rng, 3));
        }
        world.kill_server()?;
        let left = names(&blobs);
        let half = left.iter().any(|name| name.len() != NAME_CHARS);
        world.start_server()?;
        let collected = names(&blobs).len() < left.iter().filter(|n| n.len() == NAME_CHARS).count();
        return Ok(match (half, collected) {
            (true, _) => Hit::at("half written"),
            (false, true) => Hit::at("written, not recorded"),
            (false, false) => Hit::at("between two snapshots"),
        });
    }
    Ok(Hit::default())
}

fn names(folder: &Path) -> BTreeSet<String> {
    let Ok(entries) = std::fs::read_dir(folder) else { return BTreeSet::new() };
    let names = entries.filter_map(|entry| Some(entry.ok()?.file_name().to_str()?.to_string()));
    names.collect()
}

/// Bytes of the largest file in the store.
fn largest(store: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(store) else { return 0 };
    let sizes = entries.filter_map(Result::ok).map(|entry| match entry.metadata() {
        Ok(data) if data.is_dir() => largest(&entry.path()),
        Ok(data) => data.len(),
        Err(_) => 0,
    });
    sizes.max().unwrap_or(0)
}

/// Writes behind a random size fail, until one did.
pub(super) fn fill(world: &mut World, rng: &mut StdRng) -> anyhow::Result<Hit> {
    let Some(server) = &world.server else { return Ok(Hit::default()) };
    let before = world.seen.n_full.load(Ordering::SeqCst);
    // Within the largest file that there is.
    let bytes = rng.random_range(0..largest(&world.store()).max(2));
    server.process.limit_file_size(Some(bytes))?;
    world.log.line(&format!("-- disk full behind {bytes} bytes of a file"));
    let failed = |w: &World| w.seen.n_full.load(Ordering::SeqCst) > before;
    let hit = world.wait_until(Duration::from_secs(4), failed);
    std::thread::sleep(within(rng, 200));
    world.log.line("-- room again");
    if let Some(server) = &mut world.server
        && server.process.ended()?.is_none()
    {
        server.process.limit_file_size(None)?;
    }
    Ok(Hit::if_so(hit))
}

/// The trainer stands still until its session was written to the disk.
pub(super) fn idle(world: &mut World) -> anyhow::Result<Hit> {
    let Some(trainer) = &world.trainer else { return Ok(Hit::default()) };
    trainer.signal(Signal::STOP)?;
    // Snapshots that were on their way come first.
    std::thread::sleep(Duration::from_millis(100));
    let left = match watch(&world.store().join("blobs")) {
        Some(mut watch) => watch.next(Duration::from_secs(2))?.is_some(),
        None => false,
    };
    trainer.signal(Signal::CONT)?;
    Ok(Hit::if_so(left))
}

/// Nobody can connect until the session is parked.
pub(super) fn lease(world: &mut World) -> anyhow::Result<Hit> {
    let Some(address) = world.server.as_ref().map(|server| server.address) else {
        return Ok(Hit::default());
    };
    let before = world.seen.n_parked.load(Ordering::SeqCst);
    world.proxy.set_upstream(None);
    world.proxy.cut();
    let parked = |w: &World| w.seen.n_parked.load(Ordering::SeqCst) > before;
    let hit = world.wait_until(Duration::from_secs(3), parked);
    world.proxy.set_upstream(Some(address));
    Ok(Hit::if_so(hit))
}

/// Another session trains on a device that holds one.
pub(super) fn crowd(world: &mut World) -> anyhow::Result<Hit> {
    let Some(address) = world.server.as_ref().map(|server| server.address) else {
        return Ok(Hit::default());
    };
    let mut watch = watch(&world.store().join("blobs")).context("the store has blobs")?;
    // Made within the runtime, whose timer it is.
    let visit =
        async { tokio::time::timeout(PATIENCE, visit(address.to_string(), CROWD_RANK)).await };
    world.common.runtime.block_on(visit)?.context("the other session failed")?;
    Ok(Hit::if_so(watch.next(Duration::ZERO)?.is_some()))
}

/// Opens a session, uses it once and forgets it.
pub async fn visit(endpoint: String, rank: u32) -> anyhow::Result<u64> {
    let client = Client::connect(&endpoint).await?;
    let server = client.describe().await?;
    let open = OpenSession {
        name: "visitor".into(),
        fingerprint: server.fingerprint,
        split_point_1: server.split_point_1,
        split_point_2: server.split_point_2,
        lora: LoraConfig { r: rank, lora_alpha: 1.0, ..Default::default() },
        adamw: ADAMW_DEFAULTS,
        seed: 3,
        wire_dtype: WireDType::F32,
        initial_adapter: vec![],
    };
    let session = client.open(open).await?;
    let hidden = vec![0.5; 3 * server.hidden_size];
    let input = ForwardInput {
        hidden: HostTensor::from_f32(&hidden, vec![3, server.hidden_size], WireDType::F32),
        seq_lens: vec![3],
        position_ids: vec![],
        want_input_grad: false,
        dropout_key: 0,
    };
    let (output, microbatch, _) = session.forward(input).await?;
    microbatch.backward(output).await?;
    let memory = client.describe().await?.memory;
    session.close(true).await?;
    Ok(memory.weights_bytes + memory.adapter_bytes + memory.adapter_bytes / 2)
}
