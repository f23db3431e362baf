//! A session's record: what it is, which snapshots it has and which of them are kept.

use crate::error::Error;
use crate::meter::Metered;
use crate::session::SessionId;
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
    /// Clients that began before cannot attach any more.
    #[serde(default)]
    pub epoch: u64,
    /// The last few snapshots that were found damaged.
    #[serde(default)]
    pub damaged: Vec<DamagedSnapshot>,
    /// What it used, until this record was written.
    #[serde(default)]
    pub metering: Metered,
    /// When the session was opened: Unix milliseconds; 0 if an older version did it.
    #[serde(default)]
    pub opened_millis: u64,
}

/// A snapshot that the session cannot go on from any more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DamagedSnapshot {
    pub id: String,
    pub step: u64,
    /// What is wrong with it.
    pub cause: String,
    /// The newest one that was whole when this was found.
    pub whole: String,
}

/// Damaged snapshots that a record remembers.
const MAX_DAMAGED: usize = 8;

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
    /// [`Why::name`]; empty if an older version took it. A text, so that an older version reads what a
    /// newer one knows.
    #[serde(default)]
    pub reason: String,
    /// Unix milliseconds; 0 if an older version took it.
    #[serde(default)]
    pub taken_millis: u64,
}

/// How many snapshots of a session stay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kept {
    /// Of those that its client asked for, beside as many that it still names.
    pub of_client: usize,
    /// Of those that the server took by itself.
    pub of_server: usize,
}

/// Who wanted a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Origin {
    /// It was asked for, so a checkpoint of the client may name it.
    Client,
    /// The session began, trained for a while, or left the device: lease, close, drain.
    Server,
}

/// What a snapshot was taken for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// The client asked.
    Client,
    /// The session began.
    Opened,
    /// It has trained for a while.
    Training,
    /// It left the device: idle, for another's sake, or sent away.
    Left,
    /// Its client was gone for too long.
    Lease,
    /// Its client was done.
    Closed,
    /// The server ended.
    Drain,
    /// Its tenant was taken out of the tenants file.
    Removed,
}

impl Why {
    /// Whose wish that is.
    pub fn origin(self) -> Origin {
        match self {
            Why::Client => Origin::Client,
            Why::Opened | Why::Training | Why::Left | Why::Lease => Origin::Server,
            Why::Closed | Why::Drain | Why::Removed => Origin::Server,
        }
    }

    /// In records and lists.
    pub fn name(self) -> &'static str {
        match self {
            Why::Client => "client",
            Why::Opened => "opened",
            Why::Training => "training",
            Why::Left => "left",
            Why::Lease => "lease",
            Why::Closed => "closed",
            Why::Drain => "drain",
            Why::Removed => "removed",
        }
    }
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

    /// The file's name.
    pub(super) fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether it can be a blob's: a file that is not whole has another.
    pub(super) fn is_hash(&self) -> bool {
        let is_hex = |c: u8| matches!(c, b'0'..=b'9' | b'a'..=b'f');
        self.0.len() == 2 * blake3::OUT_LEN && self.0.bytes().all(is_hex)
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

    /// All that the session can be set back to, the newest first.
    pub fn newest_first(&self) -> impl Iterator<Item = &SnapshotRecord> {
        self.snapshots.iter().rev()
    }

    /// Why a snapshot that is asked for is not there.
    pub fn no_such(&self, session: SessionId, id: &str) -> Error {
        if let Some(damaged) = self.damaged.iter().rev().find(|damaged| damaged.id == id) {
            let whole = Some(damaged.whole.clone());
            let (snapshot, cause) = (id.into(), damaged.cause.clone());
            return Error::SnapshotDamaged { session, snapshot, cause, whole };
        }
        let known: Vec<&str> = self.newest_first().map(|snapshot| snapshot.id.as_str()).collect();
        Error::UnknownSnapshot { session, snapshot: id.into(), known: known.join(", ") }
    }

    /// A snapshot is damaged: the session goes back to a whole one, if it would go on from this.
    pub(super) fn set_aside(&mut self, place: usize, cause: &str, whole: &str) {
        let SnapshotRecord { id, step, .. } = self.snapshots.remove(place);
        if self.head == id {
            self.head = whole.into();
        }
        self.kept.retain(|kept| *kept != id);
        let (cause, whole) = (cause.into(), whole.into());
        self.damaged.push(DamagedSnapshot { id, step, cause, whole });
        let n_surplus = self.damaged.len().saturating_sub(MAX_DAMAGED);
        self.damaged.drain(..n_surplus);
    }

    /// Adds a snapshot. The session goes on from it, unless it has a later point already: frames are
    /// applied once, so a higher number is later.
    pub(super) fn push(&mut self, snapshot: SnapshotRecord) {
        self.n_snapshots += 1;
        let head = self.snapshots.iter().position(|known| known.id == self.head);
        match head.filter(|&head| self.snapshots[head].sequence > snapshot.sequence) {
            Some(place) => self.snapshots.insert(place, snapshot),
            None => {
                self.head = snapshot.id.clone();
                self.snapshots.push(snapshot);
            }
        }
    }

    /// The client asked for a snapshot at the point of the head: that one is it, and the newest of
    /// those asked for, whoever wanted it first.
    pub(super) fn claim_head(&mut self) -> Option<SnapshotRecord> {
        let place = self.snapshots.iter().position(|snapshot| snapshot.id == self.head)?;
        let (origin, reason) = (Origin::Client, Why::Client.name().into());
        let head = SnapshotRecord { origin, reason, ..self.snapshots.remove(place) };
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

    /// Takes out one snapshot, unless the session goes on from it.
    pub(super) fn delete(&mut self, session: SessionId, id: &str) -> Result<SnapshotRecord, Error> {
        let place = self.snapshots.iter().position(|snapshot| snapshot.id == id);
        let place = place.ok_or_else(|| self.no_such(session, id))?;
        if self.head == id {
            return Err(Error::HeadSnapshot { session, snapshot: id.into() });
        }
        self.kept.retain(|kept| kept != id);
        Ok(self.snapshots.remove(place))
    }

    /// Takes out all but the head, the last few snapshots that the client asked for, those that it
    /// still has a use for, and the last few of the server's own, so that a client that is drained
    /// often keeps what its checkpoints name.
    pub(super) fn drop_surplus(&mut self, kept: Kept) -> Vec<SnapshotRecord> {
        let Kept { mut of_client, mut of_server } = kept;
        let newest_first = std::mem::take(&mut self.snapshots).into_iter().rev();
        let (mut kept, dropped): (Vec<_>, _) = newest_first.partition(|snapshot| {
            let left = match snapshot.origin {
                Origin::Client => &mut of_client,
                Origin::Server => &mut of_server,
            };
            let is_recent = *left > 0;
            *left = left.saturating_sub(1);
            is_recent || snapshot.id == self.head || self.kept.contains(&snapshot.id)
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
    /// Why it was taken, for people.
    pub fn reason(&self) -> &str {
        match (self.reason.as_str(), self.origin) {
            ("", Origin::Client) => Why::Client.name(),
            // Of an older version's, more is not known.
            ("", Origin::Server) => "server",
            (reason, _) => reason,
        }
    }

    pub(super) fn blobs(&self) -> impl Iterator<Item = &BlobName> {
        std::iter::once(&self.state).chain(&self.answers)
    }
}
