//! A session's record: what it is, which snapshots it has and which of them are kept.

use offshoot_adapters::{AdamW, LoraSpec};
use serde::{Deserialize, Serialize};

/// A session as it lies on disk.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Whose session it is; empty without a tenants file.
    #[serde(default)]
    pub tenant: String,
    pub name: String,
    pub lora: LoraSpec,
    pub adamw: AdamW,
    pub seed: u64,
    /// `f32` or `bf16`.
    pub wire_dtype: String,
    /// Of the base model.
    pub fingerprint: String,
    pub split_point_1: usize,
    pub split_point_2: usize,
    /// Where the session goes on: one of `snapshots`.
    pub head: String,
    /// In the order in which they were taken, or asked for again.
    pub snapshots: Vec<SnapshotRecord>,
    /// Snapshots taken so far, for their names.
    pub n_snapshots: u64,
    /// Names of those that the client still has a use for, however old they are.
    #[serde(default)]
    pub kept: Vec<String>,
}

/// One snapshot of a session.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotRecord {
    pub id: String,
    pub step: u64,
    pub sequence: u64,
    pub origin: Origin,
    /// safetensors of the adapter's state.
    pub state: BlobName,
    /// Recorded answers, if there are any.
    pub answers: Option<BlobName>,
    /// Of both blobs.
    pub bytes: u64,
}

/// Who wanted a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Origin {
    /// It was asked for, so a checkpoint of the client may name it.
    Client,
    /// The session began, or left the device: lease, close, drain.
    Server,
}

/// Hex blake3 of a blob's content.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BlobName(pub(super) String);

impl BlobName {
    /// The name that only this content has.
    pub(super) fn of(content: &[u8]) -> BlobName {
        BlobName(blake3::hash(content).to_hex().to_string())
    }
}

impl Record {
    /// A snapshot of this session.
    pub fn snapshot(&self, id: &str) -> Option<&SnapshotRecord> {
        self.snapshots.iter().find(|snapshot| snapshot.id == id)
    }

    /// The snapshot that the session goes on from.
    pub fn head(&self) -> Option<&SnapshotRecord> {
        self.snapshot(&self.head)
    }

    /// The newest snapshot; the session goes on from it.
    pub(super) fn push(&mut self, snapshot: SnapshotRecord) {
        self.n_snapshots += 1;
        self.head = snapshot.id.clone();
        self.snapshots.push(snapshot);
    }

    /// The client asked for a snapshot at the point of the head: that one is it, and the newest of
    /// those asked for, whoever wanted it first.
    pub(super) fn claim_head(&mut self) -> Option<SnapshotRecord> {
        let place = self.snapshots.iter().position(|snapshot| snapshot.id == self.head)?;
        let head = SnapshotRecord { origin: Origin::Client, ..self.snapshots.remove(place) };
        self.snapshots.push(head.clone());
        Some(head)
    }

    /// Notes the snapshots that the client still has a use for, at most `n_kept`. Whether that changed
    /// anything.
    pub(super) fn keep(&mut self, names: &[String], n_kept: usize) -> bool {
        let mut kept: Vec<String> = Vec::new();
        for name in names {
            if kept.len() < n_kept && !kept.contains(name) && self.snapshot(name).is_some() {
                kept.push(name.clone());
            }
        }
        let changed = kept != self.kept;
        self.kept = kept;
        changed
    }

    /// Takes out all but the last `n_asked_for` snapshots that the client asked for, those that it
    /// still has a use for and the newest of the server's own, so that a client that is drained often keeps what its checkpoints name.
    /// The head, pushed or claimed just before, is the newest of its kind and stays.
    pub(super) fn drop_surplus(&mut self, n_asked_for: usize) -> Vec<SnapshotRecord> {
        let (mut of_client, mut of_server) = (n_asked_for, 1);
        let newest_first = std::mem::take(&mut self.snapshots).into_iter().rev();
        let (mut kept, dropped): (Vec<_>, _) = newest_first.partition(|snapshot| {
            let left = match snapshot.origin {
                Origin::Client => &mut of_client,
                Origin::Server => &mut of_server,
            };
            let is_recent = *left > 0;
            *left = left.saturating_sub(1);
            is_recent || self.kept.contains(&snapshot.id)
        });
        kept.reverse();
        self.snapshots = kept;
        dropped
    }

    pub(super) fn blobs(&self) -> impl Iterator<Item = &BlobName> {
        self.snapshots.iter().flat_map(SnapshotRecord::blobs)
    }
}

impl SnapshotRecord {
    pub(super) fn blobs(&self) -> impl Iterator<Item = &BlobName> {
        std::iter::once(&self.state).chain(&self.answers)
    }
}
