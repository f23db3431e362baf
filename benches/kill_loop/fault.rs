//! What goes wrong, and whether it hit.

mod disk;
mod network;

pub use disk::visit;

use crate::world::World;
use offshoot_tests::process::Signal;
use offshoot_tests::watch::FolderWatch;
use rand::Rng;
use rand::rngs::StdRng;
use serde::Serialize;
use std::path::Path;
use std::time::Duration;

/// What may happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    KillServer,
    /// A second time, while its clients come back.
    KillServerTwice,
    /// As soon as a file is being written in its store.
    KillServerInBlob,
    /// As soon as such a file has its name, before the record names it.
    KillServerBehindBlob,
    KillTrainer,
    /// While it writes a checkpoint.
    KillTrainerInCheckpoint,
    KillBoth,
    /// Connections end after a random number of bytes.
    Cut,
    /// What the server says is lost, then the connection.
    Mute,
    /// The same without an end of the connection: the client has to notice by itself.
    HalfOpen,
    /// Nothing arrives for a while, then all of it.
    Delay,
    /// The frames of a connection that has ended arrive when its successor is attached.
    LateFrames,
    /// The first words of a connection that has ended arrive when its successor is attached.
    LateHello,
    /// Writes of the server fail, then there is room again.
    FullDisk,
    /// SIGTERM and a new server.
    Drain,
    /// The server stands still for a while.
    PauseServer,
    /// The trainer says nothing until its session leaves the device.
    Idle,
    /// The trainer cannot connect until its session is parked.
    Lease,
    /// Another session needs the room.
    Crowd,
}

impl Kind {
    /// As tables name it.
    pub fn what(self) -> &'static str {
        match self {
            Kind::KillServer => "kill -9 of the server, between or within frames",
            Kind::KillServerTwice => "the same again while its client comes back",
            Kind::KillServerInBlob => "kill -9 of the server while it writes a snapshot",
            Kind::KillServerBehindBlob => "kill -9 of the server before the snapshot is recorded",
            Kind::KillTrainer => "kill -9 of the trainer, then --resume latest",
            Kind::KillTrainerInCheckpoint => "kill -9 of the trainer while it writes a checkpoint",
            Kind::KillBoth => "kill -9 of both",
            Kind::Cut => "connections cut after random numbers of bytes, within frames",
            Kind::Mute => "answers lost, then the connection",
            Kind::HalfOpen => "half-open connection, noticed by the client itself",
            Kind::Delay => "all bytes held back, then delivered",
            Kind::LateFrames => "frames of an old connection delivered behind the new one's",
            Kind::LateHello => "a Hello of an old connection delivered behind the new one's",
            Kind::FullDisk => "disk full while the server writes, then room again",
            Kind::Drain => "drain (SIGTERM) and restart",
            Kind::PauseServer => "server stopped and continued",
            Kind::Idle => "session sent to disk for want of frames",
            Kind::Lease => "lease ended while the client was away",
            Kind::Crowd => "session sent to disk for want of room",
        }
    }
}

/// What came of a fault.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Hit {
    /// It did interrupt something.
    pub hit: bool,
    /// Where, if that can be told.
    pub place: Option<&'static str>,
}

impl Hit {
    fn at(place: &'static str) -> Hit {
        Hit { hit: true, place: Some(place) }
    }

    fn if_so(hit: bool) -> Hit {
        Hit { hit, place: None }
    }
}

/// A random time of at most so many milliseconds.
pub fn within(rng: &mut StdRng, millis: u64) -> Duration {
    Duration::from_micros(rng.random_range(0..=millis * 1000))
}

/// Does it. What is dead afterwards is mended by whoever asked.
pub fn strike(kind: Kind, world: &mut World, rng: &mut StdRng) -> anyhow::Result<Hit> {
    match kind {
        Kind::KillServer => kill_server(world, rng),
        Kind::KillServerTwice => {
            kill_server(world, rng)?;
            world.start_server()?;
            std::thread::sleep(within(rng, 250));
            kill_server(world, rng)
        }
        Kind::KillServerInBlob => disk::kill_server_at_blob(world, rng, false),
        Kind::KillServerBehindBlob => disk::kill_server_at_blob(world, rng, true),
        Kind::KillTrainer => Ok(Hit::if_so(world.kill_trainer()?)),
        Kind::KillTrainerInCheckpoint => kill_in_checkpoint(world, rng),
        Kind::KillBoth => {
            let server_first = rng.random_bool(0.5);
            if server_first {
                world.kill_server()?;
            }
            std::thread::sleep(within(rng, 60));
            let hit = world.kill_trainer()?;
            std::thread::sleep(within(rng, 30));
            world.kill_server()?;
            Ok(Hit::if_so(hit))
        }
        Kind::Cut => network::cut(world, rng),
        Kind::Mute => network::mute(world, rng),
        Kind::HalfOpen => network::half_open(world),
        Kind::Delay => network::delay(world, rng),
        Kind::LateFrames => network::late_frames(world),
        Kind::LateHello => network::late_hello(world),
        Kind::FullDisk => disk::fill(world, rng),
        Kind::Drain => {
            world.drain_server()?;
            Ok(Hit::if_so(true))
        }
        Kind::PauseServer => pause(world, rng),
        Kind::Idle => disk::idle(world),
        Kind::Lease => disk::lease(world),
        Kind::Crowd => disk::crowd(world),
    }
}

fn kill_server(world: &mut World, rng: &mut StdRng) -> anyhow::Result<Hit> {
    world.kill_server()?;
    // Nobody is there for a while.
    std::thread::sleep(within(rng, 200));
    Ok(Hit::if_so(true))
}

fn pause(world: &mut World, rng: &mut StdRng) -> anyhow::Result<Hit> {
    let Some(server) = &world.server else { return Ok(Hit::default()) };
    server.process.signal(Signal::STOP)?;
    let before = world.seen.steps();
    std::thread::sleep(Duration::from_millis(100) + within(rng, 300));
    // One was on its way at most.
    let stood = world.seen.steps() <= before + 1;
    server.process.signal(Signal::CONT)?;
    Ok(Hit::if_so(stood))
}

fn kill_in_checkpoint(world: &mut World, rng: &mut StdRng) -> anyhow::Result<Hit> {
    let Some(mut watch) = watch(&world.output()) else { return Ok(Hit::default()) };
    for _ in 0..400 {
        let Some(seen) = watch.next(Duration::from_millis(50))? else { continue };
        if seen.name.starts_with(".checkpoint_step_") {
            std::thread::sleep(within(rng, 4));
            let hit = world.kill_trainer()?;
            let half = format!("{}/{}", world.output().display(), seen.name);
            let within_writing = Path::new(&half).exists();
            return Ok(match (hit, within_writing) {
                (true, true) => Hit::at("checkpoint half written"),
                (true, false) => Hit::at("checkpoint just written"),
                (false, _) => Hit::default(),
            });
        }
    }
    Ok(Hit::default())
}

/// None: the folder is not there yet.
fn watch(folder: &Path) -> Option<FolderWatch> {
    FolderWatch::new(folder).ok()
}
