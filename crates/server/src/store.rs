//! What survives the process: a record for each session in sled, and the large parts of its
//! snapshots as files named by their hash. The only file that names sled.
//!
//! A snapshot's blobs are written and synced first; then one sled transaction with the record that
//! names them is flushed. So a record never names a file that may be missing, whenever the process
//! dies. Files that no record names are deleted. All methods block; callers run them beside the
//! runtime's threads.

mod record;

pub use record::{BlobName, Origin, Record, SnapshotRecord};

use crate::error::Error;
use crate::session::SessionId;
use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};
use tokio::sync::oneshot;

/// Of the records and the blobs. Another one is refused.
const FORMAT_VERSION: u32 = 2;
const VERSION_KEY: &[u8] = b"format_version";

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
    dir: PathBuf,
    db: sled::Db,
    sessions: sled::Tree,
    /// Of those that a client asked for.
    snapshots_kept: usize,
    /// How many snapshots name each blob, those included that are just being written. Held while
    /// records change and files are deleted, not while files are written: that takes long, and goes
    /// on for several sessions at once.
    references: Mutex<HashMap<BlobName, usize>>,
    /// Names files that are not whole yet.
    n_written: AtomicU64,
    /// The last field, so that it is dropped after the records are closed.
    closes: Mutex<Option<oneshot::Sender<()>>>,
}

impl Store {
    /// Opens or creates the store, and deletes what an earlier process left half done.
    pub fn open(dir: &Path, snapshots_kept: usize) -> Result<Store, Error> {
        let blobs = dir.join("blobs");
        fs::create_dir_all(&blobs).map_err(file_error(&blobs))?;
        let path = dir.join("records");
        let db = sled::Config::new().path(&path).open().map_err(|error| match error {
            sled::Error::Io(io) if is_lock(&io) => Error::StoreLocked { path: dir.to_path_buf() },
            other => records_error(dir)(other),
        })?;
        check_version(&db, dir)?;
        let sessions = db.open_tree("sessions").map_err(records_error(dir))?;
        let (references, closes) = (Mutex::default(), Mutex::default());
        let (dir, n_written) = (dir.to_path_buf(), AtomicU64::new(0));
        let store = Store { dir, db, sessions, snapshots_kept, references, n_written, closes };
        store.collect()?;
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
        self.append(session, Some(record), snapshot)
    }

    /// Adds a snapshot, from which the session will go on, and drops those that are too many.
    pub fn add_snapshot(
        &self,
        session: SessionId,
        snapshot: NewSnapshot,
    ) -> Result<SnapshotRecord, Error> {
        self.known(session)?;
        self.append(session, None, snapshot)
    }

    /// The client asked for a snapshot at the point where the session goes on: the head is it.
    pub fn claim_head(&self, session: SessionId) -> Result<SnapshotRecord, Error> {
        let mut references = self.references();
        let record = self.known(session)?;
        self.claim(&mut references, session, record)
    }

    /// The client still has a use for these snapshots: they stay beside the last few that it asked
    /// for, and at most as many.
    pub fn keep(&self, session: SessionId, names: &[String]) -> Result<(), Error> {
        let _guard = self.references();
        let mut record = self.known(session)?;
        if record.keep(names, self.snapshots_kept) { self.put(session, &record) } else { Ok(()) }
    }

    /// Sets where the session goes on.
    pub fn set_head(&self, session: SessionId, snapshot: &str) -> Result<(), Error> {
        let _guard = self.references();
        let mut record = self.known(session)?;
        record.head = snapshot.into();
        self.put(session, &record)
    }

    /// A session's record, if it is known.
    pub fn record(&self, session: SessionId) -> Result<Option<Record>, Error> {
        let value = self.sessions.get(session.to_string()).map_err(records_error(&self.dir))?;
        value.map(|bytes| self.decode(&bytes)).transpose()
    }

    /// All sessions.
    pub fn records(&self) -> Result<Vec<(SessionId, Record)>, Error> {
        let of_entry = |entry: sled::Result<(sled::IVec, sled::IVec)>| {
            let (key, value) = entry.map_err(records_error(&self.dir))?;
            let key = String::from_utf8_lossy(&key);
            let session = SessionId::parse(&key).ok_or_else(|| Error::StoreRecords {
                path: self.dir.clone(),
                cause: format!("\"{key}\" is no session id"),
            })?;
            Ok((session, self.decode(&value)?))
        };
        self.sessions.iter().map(of_entry).collect()
    }

    /// Reads a snapshot and checks it against its hash.
    pub fn read(&self, snapshot: &SnapshotRecord) -> Result<StoredSnapshot, Error> {
        Ok(StoredSnapshot {
            state: self.read_blob(&snapshot.state)?,
            answers: snapshot.answers.as_ref().map(|name| self.read_blob(name)).transpose()?,
            record: snapshot.clone(),
        })
    }

    /// Deletes a session with all its snapshots.
    pub fn forget(&self, session: SessionId) -> Result<(), Error> {
        let mut references = self.references();
        let Some(record) = self.record(session)? else { return Ok(()) };
        self.sessions.remove(session.to_string()).map_err(records_error(&self.dir))?;
        self.db.flush().map_err(records_error(&self.dir))?;
        self.release(&mut references, record.blobs())
    }

    /// Writes the blobs, then the record: the one that there is, unless the session is new.
    fn append(
        &self,
        session: SessionId,
        fresh: Option<Record>,
        new: NewSnapshot,
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
        self.name_blobs(&mut self.references(), &named);
        let written = self.write_blobs(&named, [Some(&new.state), new.answers.as_ref()]);
        let mut references = self.references();
        let record = || fresh.map_or_else(|| self.known(session), Ok);
        let recorded = written
            .and_then(|()| record())
            .and_then(|record| self.record_snapshot(&mut references, session, record, snapshot));
        let released = self.release(&mut references, named.iter());
        recorded.and_then(|snapshot| released.map(|()| snapshot))
    }

    fn record_snapshot(
        &self,
        references: &mut HashMap<BlobName, usize>,
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
        let dropped = record.drop_surplus(self.snapshots_kept);
        self.put(session, &record)?;
        self.name_blobs(references, snapshot.blobs());
        self.release(references, dropped.iter().flat_map(SnapshotRecord::blobs))?;
        Ok(snapshot)
    }

    fn claim(
        &self,
        references: &mut HashMap<BlobName, usize>,
        session: SessionId,
        mut record: Record,
    ) -> Result<SnapshotRecord, Error> {
        let unknown = || Error::UnknownSession(session.to_string());
        let head = record.claim_head().ok_or_else(unknown)?;
        let dropped = record.drop_surplus(self.snapshots_kept);
        self.put(session, &record)?;
        self.release(references, dropped.iter().flat_map(SnapshotRecord::blobs))?;
        Ok(head)
    }

    fn known(&self, session: SessionId) -> Result<Record, Error> {
        self.record(session)?.ok_or_else(|| Error::UnknownSession(session.to_string()))
    }

    fn decode(&self, bytes: &[u8]) -> Result<Record, Error> {
        serde_json::from_slice(bytes).map_err(|error| Error::StoreRecords {
            path: self.dir.clone(),
            cause: format!("a session's record cannot be read: {error}"),
        })
    }

    /// Durable when it returns.
    fn put(&self, session: SessionId, record: &Record) -> Result<(), Error> {
        let bytes = serde_json::to_vec(record).map_err(|error| Error::StoreRecords {
            path: self.dir.clone(),
            cause: format!("a session's record cannot be written: {error}"),
        })?;
        self.sessions.insert(session.to_string(), bytes).map_err(records_error(&self.dir))?;
        self.db.flush().map_err(records_error(&self.dir))?;
        Ok(())
    }

    fn blob_path(&self, name: &BlobName) -> PathBuf {
        self.dir.join("blobs").join(&name.0)
    }

    fn name_blobs<'a>(
        &self,
        references: &mut HashMap<BlobName, usize>,
        blobs: impl IntoIterator<Item = &'a BlobName>,
    ) {
        for blob in blobs {
            *references.entry(blob.clone()).or_default() += 1;
        }
    }

    /// Durable when it returns.
    fn write_blobs(
        &self,
        names: &[BlobName],
        contents: [Option<&Vec<u8>>; 2],
    ) -> Result<(), Error> {
        for (name, bytes) in names.iter().zip(contents.into_iter().flatten()) {
            self.write_blob(name, bytes)?;
        }
        // Also for files that were there: whoever wrote them may not have come so far.
        let dir = self.dir.join("blobs");
        File::open(&dir).and_then(|dir| dir.sync_all()).map_err(file_error(&dir))
    }

    /// Written under another name first: a file under a hash is whole.
    fn write_blob(&self, name: &BlobName, bytes: &[u8]) -> Result<(), Error> {
        let path = self.blob_path(name);
        if fs::metadata(&path).is_ok_and(|there| there.len() == bytes.len() as u64) {
            return Ok(());
        }
        let half = path.with_extension(self.n_written.fetch_add(1, Ordering::Relaxed).to_string());
        let write = || {
            let mut file = File::create(&half)?;
            file.write_all(bytes)?;
            file.sync_all()?;
            fs::rename(&half, &path)
        };
        write().map_err(file_error(&path))
    }

    fn read_blob(&self, name: &BlobName) -> Result<Vec<u8>, Error> {
        let path = self.blob_path(name);
        let bytes = fs::read(&path).map_err(file_error(&path))?;
        let found = BlobName::of(&bytes);
        if found != *name { Err(Error::StoreDamaged { path, found: found.0 }) } else { Ok(bytes) }
    }

    fn delete_blob(&self, name: &BlobName) -> Result<(), Error> {
        let path = self.blob_path(name);
        match fs::remove_file(&path) {
            // It could not be written.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other.map_err(file_error(&path)),
        }
    }

    /// Deletes files that lost their last name.
    fn release<'a>(
        &self,
        references: &mut HashMap<BlobName, usize>,
        blobs: impl Iterator<Item = &'a BlobName>,
    ) -> Result<(), Error> {
        for blob in blobs {
            let Some(count) = references.get_mut(blob) else { continue };
            *count -= 1;
            if *count == 0 {
                references.remove(blob);
                self.delete_blob(blob)?;
            }
        }
        Ok(())
    }

    /// Counts references anew and deletes every file that no record names.
    fn collect(&self) -> Result<(), Error> {
        let mut references = self.references();
        references.clear();
        for (_, record) in self.records()? {
            self.name_blobs(&mut references, record.blobs());
        }
        let dir = self.dir.join("blobs");
        for entry in fs::read_dir(&dir).map_err(file_error(&dir))? {
            let entry = entry.map_err(file_error(&dir))?;
            let name = BlobName(entry.file_name().to_string_lossy().into_owned());
            if !references.contains_key(&name) {
                fs::remove_file(entry.path()).map_err(file_error(&entry.path()))?;
            }
        }
        Ok(())
    }

    fn references(&self) -> MutexGuard<'_, HashMap<BlobName, usize>> {
        // A panic in between leaves at worst a file too many, which the next start collects.
        self.references.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

fn is_same(head: &SnapshotRecord, new: &SnapshotRecord) -> bool {
    (head.sequence, head.step, &head.state) == (new.sequence, new.step, &new.state)
}

fn is_lock(error: &io::Error) -> bool {
    // sled wraps the system's error; its text is the only mark.
    error.kind() == io::ErrorKind::WouldBlock
        || error.to_string().contains("could not acquire lock")
}

fn check_version(db: &sled::Db, dir: &Path) -> Result<(), Error> {
    let expected = FORMAT_VERSION.to_string();
    match db.get(VERSION_KEY).map_err(records_error(dir))? {
        Some(found) if found == expected.as_bytes() => Ok(()),
        Some(found) => Err(Error::StoreVersion {
            path: dir.to_path_buf(),
            found: String::from_utf8_lossy(&found).into_owned(),
            expected: FORMAT_VERSION,
        }),
        None => {
            db.insert(VERSION_KEY, expected.as_bytes()).map_err(records_error(dir))?;
            db.flush().map_err(records_error(dir))?;
            Ok(())
        }
    }
}

fn file_error(path: &Path) -> impl Fn(io::Error) -> Error + '_ {
    |source| Error::StoreFile { path: path.to_path_buf(), source }
}

fn records_error(dir: &Path) -> impl Fn(sled::Error) -> Error + '_ {
    |error| Error::StoreRecords { path: dir.to_path_buf(), cause: error.to_string() }
}

#[cfg(test)]
#[path = "store_tests.rs"]
mod tests;
