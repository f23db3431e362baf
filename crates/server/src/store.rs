//! What survives the process: a record for each session, and the large parts of its snapshots as
//! files named by their hash.
//!
//! A snapshot's blobs are written and synced first; then the record that names them is flushed. So a
//! record never names a file that may be missing, whenever the process dies. Files that no record
//! names are deleted. What is damaged is found by its checksum, kept under another name for people,
//! and harms nobody else: a session goes back to its newest whole snapshot. All methods block;
//! callers run them beside the runtime's threads.
//!
//! ```text
//! records/  sled; `records` is the only file that names it
//! blobs/    HASH
//! damaged/  HASH, SESSION.record
//! reserve   room for the next start
//! ```

mod blobs;
mod failures;
mod record;
mod records;
mod reserve;

pub use record::{BlobName, Kept, Origin, Record, SnapshotRecord};

use crate::error::Error;
use crate::session::SessionId;
use blobs::{Blobs, Damage, file_error, is_full, names_in};
use failures::Failures;
use records::{DamagedRecord, Records};
use reserve::{RESERVE_BYTES, Reserve};
use std::collections::{HashMap, HashSet};
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};
use tokio::sync::oneshot;

/// A snapshot on its way to the disk.
#[derive(Debug)]
pub struct NewSnapshot {
    pub step: u64,
    pub sequence: u64,
    pub origin: Origin,
    pub state: Vec<u8>,
    pub answers: Option<Vec<u8>>,
}

/// A snapshot as it was read.
#[derive(Debug)]
pub struct StoredSnapshot {
    pub record: SnapshotRecord,
    pub state: Vec<u8>,
    pub answers: Option<Vec<u8>>,
}

/// See the module's text.
pub struct Store {
    records: Records,
    blobs: Blobs,
    reserve: Reserve,
    failures: Failures,
    kept: Kept,
    /// How many snapshots name each blob, those included that are just being written. Held while
    /// records change and files are deleted, not while files are written: that takes long, and goes
    /// on for several sessions at once.
    references: Mutex<References>,
    /// The last field, so that it is dropped after the records are closed.
    closes: Mutex<Option<oneshot::Sender<()>>>,
}

type References = HashMap<BlobName, usize>;

impl Store {
    /// Opens or creates the store, makes an older one new, sets damaged records aside, and deletes
    /// what an earlier process left half done.
    pub fn open(dir: &Path, kept: Kept) -> Result<Store, Error> {
        let blobs = Blobs::open(dir)?;
        let reserve = Reserve::of(dir);
        let (records, damaged) = open_records(dir, &reserve)?;
        let (references, closes, failures) = Default::default();
        let store = Store { records, blobs, reserve, failures, kept, references, closes };
        store.collect(&damaged)?;
        // Behind the files that are deleted.
        if let Err(error) = store.reserve.take() {
            tracing::error!(
                path = %dir.display(), bytes = RESERVE_BYTES, %error,
                "the store's disk is full: what is stored is served, and no new snapshot is written \
                 until there is room"
            );
        }
        Ok(store)
    }

    /// Ends when the store is closed and another server can open it: a call that nobody waits for
    /// any more may hold it a little longer than its owner does.
    pub fn closed(&self) -> oneshot::Receiver<()> {
        let (closes, closed) = oneshot::channel();
        *self.closes.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(closes);
        closed
    }

    /// Makes a new session durable, with its first snapshot.
    pub fn create(
        &self,
        session: SessionId,
        record: Record,
        snapshot: NewSnapshot,
    ) -> Result<SnapshotRecord, Error> {
        self.append(session, snapshot, || Ok(record))
    }

    /// Adds a snapshot, from which the session will go on unless it has a later point already, and
    /// drops those that are too many.
    pub fn add_snapshot(
        &self,
        session: SessionId,
        snapshot: NewSnapshot,
    ) -> Result<SnapshotRecord, Error> {
        self.known(session)?;
        self.append(session, snapshot, || self.known(session))
    }

    /// The same, unless `ended` is set before the record is written: then nothing is changed, and
    /// the error is [`Error::Ended`].
    pub fn add_snapshot_unless(
        &self,
        ended: &AtomicBool,
        session: SessionId,
        snapshot: NewSnapshot,
    ) -> Result<SnapshotRecord, Error> {
        let known = || match ended.load(Ordering::Acquire) {
            true => Err(Error::Ended),
            false => self.known(session),
        };
        known()?;
        self.append(session, snapshot, known)
    }

    /// The client asked for a snapshot at the point where the session goes on: the head is it.
    pub fn claim_head(&self, session: SessionId) -> Result<SnapshotRecord, Error> {
        let mut references = self.references();
        let record = self.known(session)?;
        self.noted(session, self.claim(&mut references, session, record))
    }

    /// The client still has a use for these snapshots: they stay beside the last few that it asked
    /// for, and at most as many.
    pub fn keep(&self, session: SessionId, names: &[String]) -> Result<(), Error> {
        let _guard = self.references();
        let mut record = self.known(session)?;
        let changed = record.keep(names, self.kept.of_client);
        if changed { self.noted(session, self.records.put(session, record)) } else { Ok(()) }
    }

    /// Sets where the session goes on, and which clients may: none that began before `epoch`.
    pub fn set_head(&self, session: SessionId, snapshot: &str, epoch: u64) -> Result<(), Error> {
        let _guard = self.references();
        let mut record = self.known(session)?;
        if record.snapshot(snapshot).is_none() {
            return Err(record.no_such(session, snapshot));
        }
        record.head = snapshot.into();
        record.epoch = record.epoch.max(epoch);
        self.noted(session, self.records.put(session, record))
    }

    /// A client has begun: those before it cannot come back, also after a restart.
    pub fn set_epoch(&self, session: SessionId, epoch: u64) -> Result<(), Error> {
        let _guard = self.references();
        let mut record = self.known(session)?;
        if record.epoch >= epoch {
            return Ok(());
        }
        record.epoch = epoch;
        self.noted(session, self.records.put(session, record))
    }

    /// A session's record, if it is known.
    pub fn record(&self, session: SessionId) -> Result<Option<Record>, Error> {
        if let Some(record) = self.records.get(session) {
            return Ok(Some(record));
        }
        let path = self.aside(&session.to_string());
        if !path.exists() {
            return Ok(None);
        }
        let blobs = self.blobs.dir().to_path_buf();
        Err(Error::RecordDamaged { session, path, blobs })
    }

    /// All sessions but those whose records are damaged.
    pub fn records(&self) -> Vec<(SessionId, Record)> {
        self.records.all()
    }

    /// Those of these sessions that are there and not damaged.
    pub fn records_of(&self, sessions: &[SessionId]) -> Vec<(SessionId, Record)> {
        let known = |&session| Some((session, self.records.get(session)?));
        sessions.iter().filter_map(known).collect()
    }

    /// Reads a snapshot and checks it against its hashes. A damaged one is set aside; the error says
    /// which one is whole.
    pub fn read(
        &self,
        session: SessionId,
        snapshot: &SnapshotRecord,
    ) -> Result<StoredSnapshot, Error> {
        let mut contents = Vec::new();
        for name in snapshot.blobs() {
            match self.blobs.read(name)? {
                Ok(content) => contents.push(content),
                Err(_) => return Err(self.set_aside(session, &snapshot.id)?),
            }
        }
        let mut contents = contents.into_iter();
        let state = contents.next().unwrap_or_default();
        Ok(StoredSnapshot { state, answers: contents.next(), record: snapshot.clone() })
    }

    /// The record of a session that begins again: its head was read and is whole. If it was not, the
    /// session has gone back to the newest snapshot that is. What an actor that has ended was still
    /// writing has landed, or does not any more.
    pub fn whole_head(&self, session: SessionId) -> Result<Record, Error> {
        loop {
            let record = self.known(session)?;
            let head = record.head().ok_or_else(|| unknown(session))?;
            if self.damage_of(head)?.is_none() {
                let _guard = self.references();
                let now = self.known(session)?;
                if now.head == record.head {
                    return Ok(now);
                }
                continue;
            }
            match self.set_aside(session, &head.id)? {
                Error::SnapshotDamaged { whole: Some(_), .. } | Error::UnknownSnapshot { .. } => {}
                other => return Err(other),
            }
        }
    }

    /// Deletes a session with all its snapshots.
    pub fn forget(&self, session: SessionId) -> Result<(), Error> {
        let mut references = self.references();
        let Some(record) = self.record(session)? else { return Ok(()) };
        self.noted(session, self.records.remove(session))?;
        self.noted(session, self.release(&mut references, record.blobs()))
    }

    /// A failed write is in the log.
    fn noted<T>(&self, session: SessionId, written: Result<T, Error>) -> Result<T, Error> {
        written.inspect_err(|error| self.failures.note(session, error))
    }

    fn append(
        &self,
        session: SessionId,
        new: NewSnapshot,
        record: impl FnOnce() -> Result<Record, Error>,
    ) -> Result<SnapshotRecord, Error> {
        self.noted(session, self.write(session, new, record))
    }

    /// Writes the blobs, then the record: `record` is asked for while no other changes.
    fn write(
        &self,
        session: SessionId,
        new: NewSnapshot,
        record: impl FnOnce() -> Result<Record, Error>,
    ) -> Result<SnapshotRecord, Error> {
        let snapshot = SnapshotRecord {
            id: String::new(),
            step: new.step,
            sequence: new.sequence,
            origin: new.origin,
            state: BlobName::of(&new.state),
            answers: new.answers.as_deref().map(BlobName::of),
            bytes: (new.state.len() + new.answers.as_ref().map_or(0, Vec::len)) as u64,
        };
        // Named before they are there, so that nobody deletes them meanwhile.
        let named: Vec<BlobName> = snapshot.blobs().cloned().collect();
        name_blobs(&mut self.references(), &named);
        let contents = [Some(new.state.as_slice()), new.answers.as_deref()].into_iter().flatten();
        let written = self.reserve.take();
        let written = written.and_then(|()| self.blobs.write_all(named.iter().zip(contents)));
        let mut references = self.references();
        let record = match written.and_then(|()| record()) {
            Ok(record) => record,
            Err(error) => {
                self.release(&mut references, named.iter())?;
                return Err(error);
            }
        };
        // If this fails, the record on disk may be the new one: its files stay until the next start.
        let snapshot = self.record_snapshot(&mut references, session, record, snapshot)?;
        self.release(&mut references, named.iter())?;
        Ok(snapshot)
    }

    fn record_snapshot(
        &self,
        references: &mut References,
        session: SessionId,
        mut record: Record,
        mut snapshot: SnapshotRecord,
    ) -> Result<SnapshotRecord, Error> {
        // Asked twice for the same point, as after a lost answer: it is there already.
        if let Some(head) = record.head().filter(|head| is_same(head, &snapshot)).cloned() {
            return match snapshot.origin {
                Origin::Client => self.claim(references, session, record),
                Origin::Server => Ok(head),
            };
        }
        snapshot.id = format!("{}-step{}", record.n_snapshots + 1, snapshot.step);
        record.push(snapshot.clone());
        let dropped = record.drop_surplus(self.kept);
        self.records.put(session, record)?;
        name_blobs(references, snapshot.blobs());
        self.release(references, dropped.iter().flat_map(SnapshotRecord::blobs))?;
        Ok(snapshot)
    }

    fn claim(
        &self,
        references: &mut References,
        session: SessionId,
        mut record: Record,
    ) -> Result<SnapshotRecord, Error> {
        let head = record.claim_head().ok_or_else(|| unknown(session))?;
        let dropped = record.drop_surplus(self.kept);
        self.records.put(session, record)?;
        self.release(references, dropped.iter().flat_map(SnapshotRecord::blobs))?;
        Ok(head)
    }

    fn known(&self, session: SessionId) -> Result<Record, Error> {
        self.record(session)?.ok_or_else(|| unknown(session))
    }

    /// What is wrong with a snapshot's files, if anything.
    fn damage_of(&self, snapshot: &SnapshotRecord) -> Result<Option<Damage>, Error> {
        for name in snapshot.blobs() {
            if let Some(damage) = self.blobs.check(name)? {
                return Ok(Some(damage));
            }
        }
        Ok(None)
    }

    /// A snapshot of a session was found damaged: the session cannot go on from it any more, and its
    /// damaged files are kept for people. The error to be told, which names the newest whole one. If
    /// none is whole, all stays as it is.
    fn set_aside(&self, session: SessionId, id: &str) -> Result<Error, Error> {
        let mut references = self.references();
        let mut record = self.known(session)?;
        let Some(place) = record.snapshots.iter().position(|snapshot| snapshot.id == id) else {
            // Dropped, or set aside by another, meanwhile.
            return Ok(record.no_such(session, id));
        };
        let damaged = record.snapshots[place].clone();
        let Some(damage) = self.damage_of(&damaged)? else {
            return Ok(record.no_such(session, id));
        };
        let (before, after) = (record.snapshots[..place].iter().rev(), &record.snapshots[place..]);
        let mut whole = None;
        for other in before.chain(after.iter().skip(1)) {
            if self.damage_of(other)?.is_none() {
                whole = Some(other.id.clone());
                break;
            }
        }
        let cause = damage.to_string();
        tracing::error!(
            %session, snapshot = id, step = damaged.step, cause, whole = whole.as_deref(),
            "a snapshot is damaged"
        );
        if let Some(whole) = &whole {
            for name in damaged.blobs() {
                if self.blobs.check(name)?.is_some() {
                    self.blobs.set_aside(name)?;
                }
            }
            record.set_aside(place, &cause, whole);
            self.records.put(session, record)?;
            self.release(&mut references, damaged.blobs())?;
        }
        Ok(Error::SnapshotDamaged { session, snapshot: id.into(), cause, whole })
    }

    /// Deletes files that lost their last name.
    fn release<'a>(
        &self,
        references: &mut References,
        blobs: impl Iterator<Item = &'a BlobName>,
    ) -> Result<(), Error> {
        for blob in blobs {
            let Some(count) = references.get_mut(blob) else { continue };
            *count -= 1;
            if *count == 0 {
                references.remove(blob);
                self.blobs.delete(blob)?;
            }
        }
        Ok(())
    }

    /// Sets damaged records aside, counts references anew and deletes every file that no record
    /// names. What a damaged record names cannot be known for certain, so while there is one no
    /// whole file is deleted.
    fn collect(&self, damaged: &[DamagedRecord]) -> Result<(), Error> {
        let mut references = self.references();
        references.clear();
        self.records.each(|record| name_blobs(&mut references, record.blobs()));
        for record in damaged {
            self.set_record_aside(record)?;
            name_blobs(&mut references, &record.names());
        }
        let aside = self.names_set_aside()?;
        let any_damaged = aside.is_some() || !damaged.is_empty();
        name_blobs(&mut references, &aside.unwrap_or_default());
        self.blobs.collect(|name| references.contains_key(name), any_damaged)
    }

    /// Into a file; then it stands in nobody's way.
    fn set_record_aside(&self, damaged: &DamagedRecord) -> Result<(), Error> {
        let key = String::from_utf8_lossy(&damaged.key);
        let name: String =
            key.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
        let path = self.aside(&name);
        tracing::error!(
            session = name, cause = damaged.cause, kept = %path.display(),
            "a session's record is damaged; it cannot go on, its files and all other sessions stay"
        );
        let write = || {
            blobs::private_dir(self.blobs.damaged_dir())?;
            let mut file = blobs::private_file(&path)?;
            file.write_all(&damaged.bytes)?;
            file.sync_all()
        };
        match write() {
            Ok(()) => self.records.remove_damaged(damaged),
            // Then it stays where it is, and is found again.
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "it could not be set aside");
                Ok(())
            }
        }
    }

    /// Blobs named by records that were set aside; none, if there is no such record.
    fn names_set_aside(&self) -> Result<Option<HashSet<BlobName>>, Error> {
        let dir = self.blobs.damaged_dir();
        let entries = match fs::read_dir(dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other.map_err(file_error(dir))?,
        };
        let mut names: Option<HashSet<BlobName>> = None;
        for entry in entries {
            let path = entry.map_err(file_error(dir))?.path();
            if path.extension().is_some_and(|extension| extension == RECORD) {
                let bytes = fs::read(&path).map_err(file_error(&path))?;
                names.get_or_insert_default().extend(names_in(&bytes));
            }
        }
        Ok(names)
    }

    fn aside(&self, name: &str) -> PathBuf {
        self.blobs.damaged_dir().join(name).with_extension(RECORD)
    }

    fn references(&self) -> MutexGuard<'_, References> {
        // A panic in between leaves at worst a file too many, which the next start collects.
        self.references.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// Of the files that hold records that were set aside.
const RECORD: &str = "record";

/// Also on a full disk, as long as there is a reserve to give up.
fn open_records(dir: &Path, reserve: &Reserve) -> Result<(Records, Vec<DamagedRecord>), Error> {
    let no_room = |error| match error {
        Error::StoreFile { source, .. } if is_full(&source) => {
            Error::StoreNoRoom { path: dir.to_path_buf(), n_bytes: RESERVE_BYTES as u64, source }
        }
        other => other,
    };
    match Records::open(dir).map_err(no_room) {
        Err(Error::StoreNoRoom { .. }) if reserve.give_up() => {
            tracing::warn!(path = %dir.display(), "the disk is full: the store opens with its reserve");
            Records::open(dir).map_err(no_room)
        }
        other => other,
    }
}

fn name_blobs<'a>(references: &mut References, blobs: impl IntoIterator<Item = &'a BlobName>) {
    for blob in blobs {
        *references.entry(blob.clone()).or_default() += 1;
    }
}

fn unknown(session: SessionId) -> Error {
    Error::UnknownSession(session.to_string())
}

fn is_same(head: &SnapshotRecord, new: &SnapshotRecord) -> bool {
    (head.sequence, head.step, &head.state) == (new.sequence, new.step, &new.state)
}

#[cfg(test)]
#[path = "store_tests.rs"]
mod tests;
