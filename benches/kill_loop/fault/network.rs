use super::{Hit, within};
use crate::world::World;
use rand::Rng;
use rand::rngs::StdRng;
use std::sync::atomic::Ordering;
use std::time::Duration;

const LONG: Duration = Duration::from_secs(20);

/// The connection there is, and the next few, each after a random number of bytes.
pub(super) fn cut(world: &mut World, rng: &mut StdRng) -> anyhow::Result<Hit> {
    let n = rng.random_range(0..4);
    world.proxy.cut_after((0..n).map(|_| rng.random_range(20..40_000)));
    let before = world.seen.interruptions();
    world.proxy.cut();
    let hit = world.wait_until(LONG, |w| w.seen.interruptions() > before || is_over(w));
    // Of connections that carried too little to be cut.
    world.wait_until(Duration::from_millis(300), |w| w.proxy.cuts_left() == 0);
    world.proxy.forget_plan();
    Ok(Hit::if_so(hit))
}

pub(super) fn mute(world: &mut World, rng: &mut StdRng) -> anyhow::Result<Hit> {
    let before = world.seen.interruptions();
    world.proxy.mute(true);
    std::thread::sleep(within(rng, 300));
    world.proxy.cut();
    world.proxy.mute(false);
    Ok(Hit::if_so(world.wait_until(LONG, |w| w.seen.interruptions() > before || is_over(w))))
}

pub(super) fn half_open(world: &mut World) -> anyhow::Result<Hit> {
    let (before, connections) = (world.seen.interruptions(), world.proxy.connections());
    world.proxy.mute(true);
    // The client's keepalive ends the connection; a new one can be heard.
    let patience = Duration::from_secs(80);
    let noticed = world.wait_until(patience, |w| w.proxy.connections() > connections);
    world.proxy.mute(false);
    let back = world.wait_until(patience, |w| w.seen.interruptions() > before);
    Ok(Hit::if_so(noticed && back))
}

pub(super) fn delay(world: &mut World, rng: &mut StdRng) -> anyhow::Result<Hit> {
    world.proxy.hold(true);
    // Nothing may be on its way while a checkpoint is written.
    let hit = world.wait_until(Duration::from_secs(2), |w| w.proxy.n_held() > 0 || is_over(w));
    std::thread::sleep(within(rng, 400));
    world.proxy.hold(false);
    Ok(Hit::if_so(hit))
}

pub(super) fn late_frames(world: &mut World) -> anyhow::Result<Hit> {
    world.proxy.hold(true);
    let waits = world.wait_until(Duration::from_secs(2), |w| w.proxy.n_held() > 0 || is_over(w));
    strand_and_deliver(world, waits)
}

pub(super) fn late_hello(world: &mut World) -> anyhow::Result<Hit> {
    world.proxy.hold(true);
    let connections = world.proxy.connections();
    world.proxy.cut();
    world.wait_until(LONG, |w| w.proxy.connections() > connections || is_over(w));
    // Preface, settings and headers come first; the message is behind them.
    let enough = |w: &World| w.proxy.n_held() > 200 || is_over(w);
    let waits = world.wait_until(Duration::from_secs(5), enough);
    std::thread::sleep(Duration::from_millis(20));
    strand_and_deliver(world, waits)
}

fn strand_and_deliver(world: &mut World, waits: bool) -> anyhow::Result<Hit> {
    let (before, n_late) = (world.seen.interruptions(), world.proxy.n_late());
    let n_stranded = world.proxy.n_stranded();
    // There may be no connection just now.
    let stranded = |w: &World| {
        w.proxy.strand();
        w.proxy.n_stranded() > n_stranded || is_over(w)
    };
    world.wait_until(LONG, stranded);
    world.proxy.hold(false);
    let back = world.wait_until(LONG, |w| w.seen.interruptions() > before || is_over(w));
    world.proxy.deliver_late();
    let late = world.wait_until(LONG, |w| w.proxy.n_late() > n_late);
    let bytes = world.proxy.take_late();
    let session = session(world);
    let names = |id: &String| bytes.windows(id.len()).any(|part| part == id.as_bytes());
    Ok(match waits && back && late && !bytes.is_empty() {
        true if session.as_ref().is_some_and(names) => Hit::at("with its Hello"),
        true => Hit::at("frames"),
        false => Hit::default(),
    })
}

/// The session's id, as the trainer wrote it down.
fn session(world: &World) -> Option<String> {
    let text = std::fs::read_to_string(world.output().join("metrics.jsonl")).ok()?;
    let events =
        text.lines().rev().filter_map(|l| serde_json::from_str::<serde_json::Value>(l).ok());
    events.filter_map(|event| Some(event["session"].as_str()?.to_string())).next()
}

/// Nobody is there any more to notice anything.
fn is_over(world: &World) -> bool {
    world.seen.furthest.load(Ordering::SeqCst) >= world.common.n_steps
}
