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
//! lock      whoever has it has the store
//! ```

mod aside;
mod backup;
mod blobs;
mod failures;
mod lock;
mod record;
mod records;
mod reserve;
mod write;

pub use backup::{StoreContent, backup, check, peek};
pub use lock::StoreLock;
pub use record::{BlobName, Kept, Origin, Record, SnapshotRecord, Why};

use crate::error::Error;
use crate::meter::{Meter, Meters};
use crate::session::{DRAIN_RETRY, SessionId};
use crate::trace;
use blobs::{Blobs, is_full};
use failures::Failures;
use records::{DamagedRecord, Records};
use reserve::{RESERVE_BYTES, Reserve};
use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, RwLockReadGuard};
use std::time::SystemTime;
use tokio::sync::oneshot;

/// A snapshot on its way to the disk.
#[derive(Debug)]
pub struct NewSnapshot {
    pub step: u64,
    pub sequence: u64,
    pub why: Why,
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
    /// What live sessions use, which is saved with every record. None: nobody counts.
    meters: OnceLock<Arc<Meters>>,
    /// How many snapshots name each blob, those included that are just being written. Held while
    /// records change and files are deleted, not while files are written: that takes long, and goes
    /// on for several sessions at once.
    references: Mutex<References>,
    /// Whoever changes the store holds it to read.
    is_closed: RwLock<bool>,
    /// Dropped after the records are closed.
    lock: Mutex<Option<StoreLock>>,
    /// The last field, for the same reason.
    closes: Mutex<Option<oneshot::Sender<()>>>,
}

type References = HashMap<BlobName, usize>;

impl Store {
    /// Opens or creates the store, makes an older one new, sets damaged records aside, and deletes
    /// what an earlier process left half done.
    pub fn open(dir: &Path, kept: Kept) -> Result<Store, Error> {
        Store::open_locked(StoreLock::take(dir)?, kept)
    }

    /// The same with a lock that was waited for.
    pub fn open_locked(lock: StoreLock, kept: Kept) -> Result<Store, Error> {
        let dir = &lock.dir().to_path_buf();
        let blobs = Blobs::open(dir)?;
        let reserve = Reserve::of(dir);
        let (records, damaged) = open_records(dir, &reserve)?;
        let store = Store {
            records,
            blobs,
            reserve,
            failures: Failures::default(),
            kept,
            meters: OnceLock::new(),
            references: Mutex::default(),
            is_closed: RwLock::default(),
            lock: Mutex::new(Some(lock)),
            closes: Mutex::default(),
        };
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
        *self.closes.lock().unwrap_or_else(PoisonError::into_inner) = Some(closes);
        closed
    }

    /// Ends what is being written, and lets another server have the store at once, whoever still holds
    /// this one. From now on nothing is changed; who tries is told that the server drains.
    pub fn close(&self) {
        *self.is_closed.write().unwrap_or_else(PoisonError::into_inner) = true;
        self.records.close();
        *self.lock.lock().unwrap_or_else(PoisonError::into_inner) = None;
        *self.closes.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// To be held while something is changed.
    fn still_open(&self) -> Result<RwLockReadGuard<'_, bool>, Error> {
        let is_closed = self.is_closed.read().unwrap_or_else(PoisonError::into_inner);
        match *is_closed {
            true => Err(Error::Draining { retry_after: DRAIN_RETRY }),
            false => Ok(is_closed),
        }
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
        let n_bytes = snapshot.state.len();
        let append = || self.append(session, snapshot, || self.known(session));
        trace::snapshot_write(session, n_bytes, append)
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
        let n_bytes = snapshot.state.len();
        trace::snapshot_write(session, n_bytes, || self.append(session, snapshot, known))
    }

    /// The client asked for a snapshot at the point where the session goes on: the head is it.
    pub fn claim_head(&self, session: SessionId) -> Result<SnapshotRecord, Error> {
        let _open = self.still_open()?;
        let mut references = self.references();
        let record = self.known(session)?;
        self.noted(session, self.claim(&mut references, session, record))
    }

    /// The client still has a use for these snapshots: they stay beside the last few that it asked
    /// for, and at most as many.
    pub fn keep(&self, session: SessionId, names: &[String]) -> Result<(), Error> {
        let _open = self.still_open()?;
        let _guard = self.references();
        let mut record = self.known(session)?;
        let changed = record.keep(names, self.kept.of_client);
        if changed { self.noted(session, self.put(session, record)) } else { Ok(()) }
    }

    /// Sets where the session goes on, and which clients may: none that began before `epoch`.
    pub fn set_head(&self, session: SessionId, snapshot: &str, epoch: u64) -> Result<(), Error> {
        let _open = self.still_open()?;
        let _guard = self.references();
        let mut record = self.known(session)?;
        if record.snapshot(snapshot).is_none() {
            return Err(record.no_such(session, snapshot));
        }
        record.head = snapshot.into();
        record.epoch = record.epoch.max(epoch);
        self.noted(session, self.put(session, record))
    }

    /// A client has begun: those before it cannot come back, also after a restart.
    pub fn set_epoch(&self, session: SessionId, epoch: u64) -> Result<(), Error> {
        let _open = self.still_open()?;
        let _guard = self.references();
        let mut record = self.known(session)?;
        if record.epoch >= epoch {
            return Ok(());
        }
        record.epoch = epoch;
        self.noted(session, self.put(session, record))
    }

    /// From now on what live sessions use is saved with their records.
    pub fn follow(&self, meters: Arc<Meters>) {
        let _ = self.meters.set(meters);
    }

    /// Saves what a live session has used so far.
    pub fn save_meter(&self, session: SessionId) -> Result<(), Error> {
        let _open = self.still_open()?;
        let _guard = self.references();
        let record = self.known(session)?;
        self.noted(session, self.put(session, record))
    }

    /// Durable when it returns, with what the session has used so far.
    fn put(&self, session: SessionId, mut record: Record) -> Result<(), Error> {
        if let Some(meter) = self.meter(session) {
            record.metering = meter.metered();
        }
        self.records.put(session, record)
    }

    fn meter(&self, session: SessionId) -> Option<Arc<Meter>> {
        self.meters.get()?.get(session)
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

    /// Looks at those of these sessions that are there and not damaged, without a copy.
    pub fn look_at(&self, sessions: &[SessionId], look: impl FnMut(SessionId, &Record)) {
        self.records.look_at(sessions, look);
    }

    /// Looks at all sessions but those whose records are damaged.
    pub fn look_at_all(&self, look: impl FnMut(SessionId, &Record)) {
        self.records.each_with_id(look);
    }

    /// Those of these sessions that are there and not damaged.
    pub fn records_of(&self, sessions: &[SessionId]) -> Vec<(SessionId, Record)> {
        let known = |&session| Some((session, self.records.get(session)?));
        sessions.iter().filter_map(known).collect()
    }

    /// Deletes a snapshot that the session does not go on from, with its files.
    pub fn delete_snapshot(&self, session: SessionId, snapshot: &str) -> Result<(), Error> {
        let _open = self.still_open()?;
        let mut references = self.references();
        let mut record = self.known(session)?;
        let deleted = record.delete(session, snapshot)?;
        self.noted(session, self.put(session, record))?;
        self.noted(session, self.release(&mut references, deleted.blobs()))
    }

    /// Reads a snapshot and checks it against its hashes. A damaged one is set aside; the error says
    /// which one is whole.
    pub fn read(
        &self,
        session: SessionId,
        snapshot: &SnapshotRecord,
    ) -> Result<StoredSnapshot, Error> {
        let _open = self.still_open()?;
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

    /// Deletes a session with all its snapshots.
    pub fn forget(&self, session: SessionId) -> Result<(), Error> {
        let _open = self.still_open()?;
        let mut references = self.references();
        let Some(record) = self.record(session)? else { return Ok(()) };
        self.noted(session, self.records.remove(session))?;
        self.noted(session, self.release(&mut references, record.blobs()))
    }

    /// A failed write is in the log.
    fn noted<T>(&self, session: SessionId, written: Result<T, Error>) -> Result<T, Error> {
        written.inspect_err(|error| self.failures.note(session, error))
    }

    fn known(&self, session: SessionId) -> Result<Record, Error> {
        self.record(session)?.ok_or_else(|| unknown(session))
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

    fn references(&self) -> MutexGuard<'_, References> {
        // A panic in between leaves at worst a file too many, which the next start collects.
        self.references.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

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

/// Unix milliseconds.
pub fn millis_of(time: SystemTime) -> u64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
pub(crate) mod tests;
