//! What the store promises, by topic: which snapshots are kept, what damage does, and how it opens.

mod damage;
mod handover;
mod opening;
mod snapshots;

use super::*;
use offshoot_adapters::{AdamW, LoraSpec};
use std::collections::BTreeSet;
use std::fs;

pub(crate) fn record() -> Record {
    Record {
        tenant: String::new(),
        name: "team".into(),
        lora: LoraSpec::default(),
        adamw: AdamW::default(),
        seed: 7,
        wire_dtype: "f32".into(),
        fingerprint: "abc".into(),
        split_point_1: 0,
        split_point_2: 3,
        head: String::new(),
        snapshots: Vec::new(),
        n_snapshots: 0,
        kept: Vec::new(),
        epoch: 0,
        damaged: Vec::new(),
        metering: Default::default(),
        opened_millis: 0,
    }
}

/// One that a client asked for.
pub(crate) fn snapshot(step: u64) -> NewSnapshot {
    NewSnapshot {
        step,
        sequence: 3 * step,
        why: Why::Client,
        state: vec![step as u8; 1000],
        answers: Some(vec![step as u8; 10]),
    }
}

/// One that the server took by itself.
fn own(step: u64) -> NewSnapshot {
    NewSnapshot { why: Why::Opened, ..snapshot(step) }
}

fn open(dir: &tempfile::TempDir, of_client: usize) -> Result<Store, Error> {
    Store::open(dir.path(), Kept { of_client, of_server: 1 })
}

fn kept(store: &Store, session: SessionId) -> Vec<u64> {
    store.record(session).unwrap().unwrap().snapshots.iter().map(|s| s.step).collect()
}

fn files(store: &Store) -> BTreeSet<String> {
    let entries = fs::read_dir(store.blobs.dir()).unwrap();
    entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
}

fn named(store: &Store) -> BTreeSet<String> {
    let records = store.records();
    records.iter().flat_map(|(_, record)| record.blobs().map(|blob| blob.0.clone())).collect()
}
