//! The sessions' records in sled, each with a checksum. The only file that names sled.
//!
//! What is read comes from memory, where each record stands as it was last flushed. sled gives up for
//! good when a write fails, as on a full disk; then it is opened again at the next write, and what is
//! on the disk is made to agree with the memory first.

use super::blobs::{file_error, is_full, names_in, private_dir};
use super::record::{BlobName, Record};
use crate::error::{DISK_RETRY, Error};
use crate::session::SessionId;
use std::collections::{HashMap, HashSet};
use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};
use std::time::Duration;

/// Of the records and the blobs. Older ones from [`OLDEST_READ`] on are made new, others refused.
const FORMAT_VERSION: u32 = 3;
/// Records without a checksum.
const OLDEST_READ: u32 = 2;
const VERSION_KEY: &[u8] = b"format_version";

/// First byte of a record of version 3. One of version 2 is bare JSON and begins with a brace.
const CHECKED: u8 = 3;
const CHECKSUM_BYTES: usize = 16;

/// sled's own threads hold the lock a moment longer than the database: looked at so often, for so long.
const LOCK_PAUSE: Duration = Duration::from_millis(5);
const LOCK_LOOKS: u32 = 400;

/// The records on disk, and the same in memory.
pub(super) struct Records {
    /// The store's.
    dir: PathBuf,
    known: RwLock<HashMap<SessionId, Record>>,
    /// None: a write has failed.
    disk: Mutex<Option<Opened>>,
}

struct Opened {
    db: sled::Db,
    sessions: sled::Tree,
    /// The last field: dropped when the others are.
    _release: Release,
}

/// Dropped, it waits until the records of this store can be locked again.
struct Release(PathBuf);

impl Drop for Release {
    fn drop(&mut self) {
        for _ in 0..LOCK_LOOKS {
            if !are_in_use(&self.0) {
                return;
            }
            std::thread::sleep(LOCK_PAUSE);
        }
    }
}

/// A record that its checksum does not fit.
pub(super) struct DamagedRecord {
    /// As it lies in the records: a session's id, if that is whole.
    pub key: Vec<u8>,
    pub bytes: Vec<u8>,
    pub cause: String,
}

impl DamagedRecord {
    /// Blobs that it still names.
    pub fn names(&self) -> HashSet<BlobName> {
        names_in(&self.bytes)
    }
}

impl Records {
    /// Opens or creates them; older ones become those of this version. Damaged ones are not known.
    pub fn open(dir: &Path) -> Result<(Records, Vec<DamagedRecord>), Error> {
        let opened = Opened::open(dir)?;
        opened.check_version(dir)?;
        let (mut known, mut damaged) = (HashMap::new(), Vec::new());
        for entry in opened.sessions.iter() {
            let (key, value) = entry.map_err(|error| sled_error(dir, error))?;
            match decode(&key, &value) {
                Ok((session, record)) => drop(known.insert(session, record)),
                Err(cause) => {
                    let (key, bytes) = (key.to_vec(), value.to_vec());
                    damaged.push(DamagedRecord { key, bytes, cause });
                }
            }
        }
        let (known, disk) = (RwLock::new(known), Mutex::new(Some(opened)));
        Ok((Records { dir: dir.to_path_buf(), known, disk }, damaged))
    }

    /// Where they are.
    pub fn path(&self) -> PathBuf {
        self.dir.join("records")
    }

    pub fn get(&self, session: SessionId) -> Option<Record> {
        self.known().get(&session).cloned()
    }

    pub fn all(&self) -> Vec<(SessionId, Record)> {
        self.known().iter().map(|(&session, record)| (session, record.clone())).collect()
    }

    /// Looks at some without a copy.
    pub fn look_at(&self, sessions: &[SessionId], mut look: impl FnMut(SessionId, &Record)) {
        let known = self.known();
        for &session in sessions {
            if let Some(record) = known.get(&session) {
                look(session, record);
            }
        }
    }

    /// Looks at each with its session.
    pub fn each_with_id(&self, mut look: impl FnMut(SessionId, &Record)) {
        self.known().iter().for_each(|(&session, record)| look(session, record));
    }

    /// Looks at each without a copy.
    pub fn each(&self, look: impl FnMut(&Record)) {
        self.known().values().for_each(look);
    }

    /// Durable when it returns. After an error all goes on with the one before; a start that comes
    /// now may find either.
    pub fn put(&self, session: SessionId, record: Record) -> Result<(), Error> {
        let value = encode(session, &record).map_err(|error| Error::StoreRecords {
            path: self.dir.clone(),
            cause: format!("a session's record cannot be written: {error}"),
        })?;
        let key = session.to_string();
        self.change(value.len(), |disk| disk.sessions.insert(&key, value.as_slice()).map(drop))?;
        self.known.write().unwrap_or_else(PoisonError::into_inner).insert(session, record);
        Ok(())
    }

    /// Durable when it returns.
    pub fn remove(&self, session: SessionId) -> Result<(), Error> {
        self.change(0, |disk| disk.sessions.remove(session.to_string()).map(drop))?;
        self.known.write().unwrap_or_else(PoisonError::into_inner).remove(&session);
        Ok(())
    }

    /// Durable when it returns.
    pub fn remove_damaged(&self, damaged: &DamagedRecord) -> Result<(), Error> {
        self.change(0, |disk| disk.sessions.remove(&damaged.key).map(drop))
    }

    fn change(
        &self,
        n_bytes: usize,
        change: impl FnOnce(&Opened) -> sled::Result<()>,
    ) -> Result<(), Error> {
        let mut disk = self.disk();
        let changed = match &*disk {
            Some(opened) => change(opened).and_then(|()| opened.flush()),
            None => {
                let opened = Opened::open(&self.dir).map_err(|error| self.full(n_bytes, error))?;
                let agreed = opened.agree(&self.known());
                let changed = agreed.and_then(|()| change(&opened)).and_then(|()| opened.flush());
                if changed.is_ok() {
                    tracing::info!(path = %self.dir.display(), "records can be written again");
                }
                *disk = Some(opened);
                changed
            }
        };
        changed.map_err(|error| {
            // From now on it would refuse everything, whatever comes free.
            *disk = None;
            self.full(n_bytes, sled_error(&self.dir, error))
        })
    }

    /// Tells a full disk apart.
    fn full(&self, n_bytes: usize, error: Error) -> Error {
        match error {
            Error::StoreFile { source, .. } if is_full(&source) => {
                let (path, n_bytes) = (self.path(), n_bytes as u64);
                Error::DiskFull { path, n_bytes, source, retry_after: DISK_RETRY }
            }
            other => other,
        }
    }

    /// Gives up their lock. Nothing is written any more; what was read stays to be looked at.
    pub fn close(&self) {
        *self.disk() = None;
    }

    fn known(&self) -> RwLockReadGuard<'_, HashMap<SessionId, Record>> {
        // Each use is whole even if another thread panicked.
        self.known.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn disk(&self) -> MutexGuard<'_, Option<Opened>> {
        self.disk.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What only a damaged disk or another version does.
#[cfg(test)]
impl Records {
    fn on_disk<T>(&self, run: impl FnOnce(&Opened) -> sled::Result<T>) -> T {
        let disk = self.disk();
        let opened = disk.as_ref().unwrap();
        let done = run(opened).unwrap();
        opened.flush().unwrap();
        done
    }

    pub fn set_version(&self, version: &str) {
        self.on_disk(|opened| opened.db.insert(VERSION_KEY, version).map(drop));
    }

    /// Of records that cannot be opened.
    pub fn force_version(dir: &Path, version: &str) {
        Opened::open(dir).unwrap().db.insert(VERSION_KEY, version).unwrap();
    }

    pub fn put_raw(&self, key: &[u8], value: &[u8]) {
        self.on_disk(|opened| opened.sessions.insert(key, value).map(drop));
    }

    pub fn put_unflushed(&self, session: SessionId, record: &Record) {
        let value = encode(session, record).unwrap();
        let disk = self.disk();
        let opened = disk.as_ref().unwrap();
        opened.sessions.insert(session.to_string(), value.as_slice()).unwrap();
    }

    pub fn raw(&self, session: SessionId) -> Option<Vec<u8>> {
        self.on_disk(|opened| opened.sessions.get(session.to_string())).map(|v| v.to_vec())
    }

    /// From the disk only.
    pub fn remove_unknown(&self, session: SessionId) {
        self.on_disk(|opened| opened.sessions.remove(session.to_string()).map(drop));
    }

    /// As a write does that fails.
    pub fn fail(&self) {
        *self.disk() = None;
    }
}

impl Opened {
    fn open(dir: &Path) -> Result<Opened, Error> {
        let records = dir.join("records");
        // sled's own files are readable for everybody: this keeps others out.
        private_dir(&records).map_err(file_error(&records))?;
        remove_half_indexes(&records).map_err(file_error(&records))?;
        let db = sled::Config::new().path(records).open().map_err(|error| match error {
            sled::Error::Io(io) if is_lock(&io) => Error::StoreLocked { path: dir.to_path_buf() },
            other => sled_error(dir, other),
        })?;
        let sessions = db.open_tree("sessions").map_err(|error| sled_error(dir, error))?;
        Ok(Opened { db, sessions, _release: Release(dir.to_path_buf()) })
    }

    fn check_version(&self, dir: &Path) -> Result<(), Error> {
        let failed = |error| sled_error(dir, error);
        let found = self.db.get(VERSION_KEY).map_err(failed)?;
        let found = found.map(|found| String::from_utf8_lossy(&found).into_owned());
        match found.as_deref().map(|version| (version, version.parse())) {
            Some((_, Ok(FORMAT_VERSION))) => Ok(()),
            Some((_, Ok(OLDEST_READ))) => {
                let n_records = self.add_checksums().map_err(failed)?;
                self.set_version().map_err(failed)?;
                tracing::info!(
                    path = %dir.display(), records = n_records, from = OLDEST_READ,
                    to = FORMAT_VERSION, "the store has the new format"
                );
                Ok(())
            }
            Some((found, _)) => Err(Error::StoreVersion {
                path: dir.to_path_buf(),
                found: found.into(),
                expected: FORMAT_VERSION,
            }),
            None => self.set_version().map_err(failed),
        }
    }

    /// All at once. Whatever dies behind this and before the new version is written finds records
    /// that have theirs, and leaves them.
    fn add_checksums(&self) -> sled::Result<usize> {
        let (mut batch, mut n_records) = (sled::Batch::default(), 0);
        for entry in self.sessions.iter() {
            let (key, value) = entry?;
            let is_whole = serde_json::from_slice::<Record>(&value).is_ok();
            // One that cannot be read has no checksum now, and is found damaged.
            if is_whole {
                batch.insert(&key, with_checksum(&key, &value));
                n_records += 1;
            }
        }
        self.sessions.apply_batch(batch)?;
        self.flush()?;
        Ok(n_records)
    }

    /// A write that failed may or may not have come to the disk: makes it hold what is known. What
    /// is not known and not readable either is left.
    fn agree(&self, known: &HashMap<SessionId, Record>) -> sled::Result<()> {
        let (mut batch, mut there) = (sled::Batch::default(), HashSet::new());
        for entry in self.sessions.iter() {
            let (key, value) = entry?;
            let Ok((session, record)) = decode(&key, &value) else { continue };
            if known.get(&session) == Some(&record) {
                there.insert(session);
            } else {
                batch.remove(key);
            }
        }
        for (session, record) in known.iter().filter(|(session, _)| !there.contains(session)) {
            if let Ok(value) = encode(*session, record) {
                batch.insert(session.to_string().as_bytes(), value);
            }
        }
        self.sessions.apply_batch(batch)?;
        self.flush()
    }

    fn flush(&self) -> sled::Result<()> {
        self.db.flush().map(drop)
    }

    fn set_version(&self) -> sled::Result<()> {
        self.db.insert(VERSION_KEY, FORMAT_VERSION.to_string().as_bytes())?;
        self.flush()
    }
}

/// The mark, the checksum, the record as JSON.
fn encode(session: SessionId, record: &Record) -> serde_json::Result<Vec<u8>> {
    serde_json::to_vec(record).map(|json| with_checksum(session.to_string().as_bytes(), &json))
}

fn with_checksum(key: &[u8], json: &[u8]) -> Vec<u8> {
    [&[CHECKED], checksum(key, json).as_slice(), json].concat()
}

/// Of the key, too: a record under another session's id is damaged.
fn checksum(key: &[u8], json: &[u8]) -> [u8; CHECKSUM_BYTES] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(key).update(json);
    let mut checksum = [0; CHECKSUM_BYTES];
    checksum.copy_from_slice(&hasher.finalize().as_bytes()[..CHECKSUM_BYTES]);
    checksum
}

/// The record, or what is wrong with it.
fn decode(key: &[u8], value: &[u8]) -> Result<(SessionId, Record), String> {
    let parts = value.strip_prefix(&[CHECKED]);
    let Some((expected, json)) = parts.and_then(|rest| rest.split_at_checked(CHECKSUM_BYTES))
    else {
        return Err(format!("its {} bytes do not begin as a record does", value.len()));
    };
    if checksum(key, json) != *expected {
        return Err(format!("its {} bytes do not fit their checksum", value.len()));
    }
    let session = std::str::from_utf8(key).ok().and_then(SessionId::parse);
    let session = session.ok_or("it is under a name that is no session's")?;
    serde_json::from_slice(json).map(|record| (session, record)).map_err(|error| error.to_string())
}

/// Whether a process has them that holds no other lock: one of an older version.
pub(super) fn are_in_use(dir: &Path) -> bool {
    let Ok(db) = File::open(dir.join("records/db")) else { return false };
    let is_locked = matches!(db.try_lock(), Err(TryLockError::WouldBlock));
    // Closing it would leave the lock with a child that is just being forked.
    let _ = db.unlock();
    is_locked
}

/// A process that ended while sled wrote its index, killed or for want of room, leaves half of it. sled
/// would take that for the index itself, and all for damaged; what it was made from is still there.
fn remove_half_indexes(records: &Path) -> io::Result<()> {
    let Ok(db) = File::open(records.join("db")) else { return Ok(()) };
    // As sled locks it: whoever has it may be writing one.
    if db.try_lock().is_err() {
        return Ok(());
    }
    let removed = fs::read_dir(records).and_then(|mut entries| {
        entries.try_for_each(|entry| {
            let path = entry?.path();
            let is_half = path.extension().is_some_and(|extension| extension == "generating");
            if is_half { fs::remove_file(path) } else { Ok(()) }
        })
    });
    // Closing it would leave the lock with a child that is just being forked.
    db.unlock().and(removed)
}

fn is_lock(error: &io::Error) -> bool {
    // sled wraps the system's error; its text is the only mark.
    error.kind() == io::ErrorKind::WouldBlock
        || error.to_string().contains("could not acquire lock")
}

fn sled_error(dir: &Path, error: sled::Error) -> Error {
    match error {
        sled::Error::Io(source) => Error::StoreFile { path: dir.join("records"), source },
        other => Error::StoreRecords { path: dir.to_path_buf(), cause: other.to_string() },
    }
}
