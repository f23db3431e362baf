//! What is trained: each setting with its own loss, wire, split, cadence of snapshots and budget.

use crate::fault::Kind;
use anyhow::Context;
use std::fs;
use std::path::{Path, PathBuf};

/// A run that is disturbed, and once not.
pub struct Setting {
    pub name: &'static str,
    /// Split points, of the four layers.
    pub split: [usize; 2],
    /// Options of `offshoot train` beside the usual ones.
    pub train: &'static str,
    /// Whether it learns preferences.
    pub preferences: bool,
    /// Steps between checkpoints.
    pub save_interval: u64,
    /// Settings of the server beside the usual ones, as TOML.
    pub server: &'static str,
    /// Whether the server's memory holds only one adapter.
    pub crowded: bool,
    /// What may happen to it.
    pub kinds: &'static [Kind],
}

/// What may happen to any run.
const EVERYWHERE: &[Kind] = &[
    Kind::KillServer,
    Kind::KillServerTwice,
    Kind::KillServerInBlob,
    Kind::KillServerBehindBlob,
    Kind::KillTrainer,
    Kind::KillTrainerInCheckpoint,
    Kind::KillBoth,
    Kind::Cut,
    Kind::Mute,
    Kind::Delay,
    Kind::LateFrames,
    Kind::LateHello,
    Kind::Drain,
    Kind::PauseServer,
    Kind::FullDisk,
];

/// Where the memory of both sides has to do: each restart of the trainer begins anew.
const WITHOUT_CHECKPOINTS: &[Kind] = &[
    Kind::KillServer,
    Kind::KillServerTwice,
    Kind::KillServerInBlob,
    Kind::KillServerBehindBlob,
    Kind::Cut,
    Kind::Mute,
    Kind::Delay,
    Kind::LateFrames,
    Kind::LateHello,
    Kind::Drain,
    Kind::PauseServer,
];

/// Where sessions leave the device, and the server, all the time.
const COMING_AND_GOING: &[Kind] = &[
    Kind::Idle,
    Kind::Lease,
    Kind::Crowd,
    Kind::Idle,
    Kind::Lease,
    Kind::Crowd,
    Kind::KillServer,
    Kind::KillTrainer,
    Kind::KillServerInBlob,
    Kind::KillBoth,
    Kind::Cut,
    Kind::Drain,
    Kind::FullDisk,
];

/// Once in a whole bench: it takes as long as the client's keepalive.
const HALF_OPEN: &[Kind] = &[Kind::HalfOpen, Kind::Cut, Kind::Mute, Kind::Delay, Kind::KillServer];

/// Where a setting says nothing else.
const USUAL: Setting = Setting {
    name: "",
    split: [1, 3],
    train: "",
    preferences: false,
    save_interval: 10,
    server: "",
    crowded: false,
    kinds: EVERYWHERE,
};

pub const SETTINGS: &[Setting] = &[
    Setting {
        name: "accumulated",
        train: "--gradient-accumulation-steps 3 --microbatches-in-flight 3 --wire-dtype f32 \
                --lora-rank 8 --eval-interval 16",
        save_interval: 5,
        server: "[session]\nsnapshot_seconds = 0.0\nsnapshot_steps = 0\n",
        ..USUAL
    },
    Setting {
        name: "bf16-by-steps",
        split: [0, 3],
        train: "--gradient-accumulation-steps 2 --microbatches-in-flight 2 --wire-dtype bf16 \
                --lora-rank 32 --use-rslora",
        save_interval: 9,
        server: "[session]\nsnapshot_seconds = 0.0\nsnapshot_steps = 3\n",
        ..USUAL
    },
    Setting {
        name: "dpo-by-seconds",
        train: "--loss dpo --wire-dtype f32 --lora-rank 16",
        preferences: true,
        save_interval: 6,
        server: "[session]\nsnapshot_seconds = 0.1\nsnapshot_steps = 0\n",
        ..USUAL
    },
    Setting {
        name: "large-adapter",
        split: [1, 4],
        train: "--gradient-accumulation-steps 2 --microbatches-in-flight 2 --wire-dtype f32 \
                --lora-rank 256",
        save_interval: 4,
        server: "[session]\nsnapshot_seconds = 0.0\nsnapshot_steps = 2\n",
        ..USUAL
    },
    Setting {
        name: "no-checkpoints",
        split: [0, 3],
        train: "--gradient-accumulation-steps 2 --microbatches-in-flight 2 --wire-dtype bf16 \
                --lora-rank 64",
        save_interval: 100_000,
        server: "[session]\nsnapshot_seconds = 0.0\nsnapshot_steps = 4\n",
        kinds: WITHOUT_CHECKPOINTS,
        ..USUAL
    },
    Setting {
        name: "coming-and-going",
        train: "--gradient-accumulation-steps 2 --microbatches-in-flight 2 --wire-dtype f32 \
                --lora-rank 256",
        save_interval: 7,
        server: "[session]\nlease_seconds = 0.3\nidle_seconds = 0.2\nturn_seconds = 0.0\n\
                 snapshot_seconds = 0.0\nsnapshot_steps = 5\n",
        crowded: true,
        kinds: COMING_AND_GOING,
        ..USUAL
    },
    Setting {
        name: "half-open",
        train: "--wire-dtype f32 --lora-rank 8",
        kinds: HALF_OPEN,
        ..USUAL
    },
];

/// Texts to learn from, the same for every run.
pub struct Texts {
    dir: PathBuf,
}

impl Texts {
    pub fn write(dir: &Path) -> anyhow::Result<Texts> {
        let leaves = |i: u32| format!("Branch {i} of the trunk has {} leaves.", i * 7);
        let texts: Vec<String> = (0..48).map(leaves).collect();
        let pairs = (0..40).map(|i| {
            let record = serde_json::json!({
                "prompt": format!("How many leaves has branch {i}?"),
                "chosen": format!("It has {} leaves.", i * 7),
                "rejected": format!("Nobody counted those of branch {i}."),
            });
            format!("{record}\n")
        });
        for (name, text) in [
            ("train.txt", texts.join("\n\n")),
            ("eval.txt", "The last branch has no leaves.".to_string()),
            ("pairs.jsonl", pairs.collect()),
        ] {
            fs::write(dir.join(name), text).context("cannot write the texts")?;
        }
        Ok(Texts { dir: dir.to_path_buf() })
    }

    /// What this setting trains on.
    pub fn train_file(&self, setting: &Setting) -> PathBuf {
        self.dir.join(if setting.preferences { "pairs.jsonl" } else { "train.txt" })
    }

    pub fn eval_file(&self) -> PathBuf {
        self.dir.join("eval.txt")
    }
}
