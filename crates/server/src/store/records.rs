//! The sessions' records in sled, each with a checksum. The only file that names sled.
//!
//! sled gives up for good when a write fails, as on a full disk; then it is opened again, and what
//! stands on the disk counts.

use super::blobs::{is_full, names_in};
use super::record::{BlobName, Record};
use crate::error::{DISK_RETRY, Error};
use crate::session::SessionId;
use std::collections::HashSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock, RwLockReadGuard};

/// Of the records and the blobs. Older ones from [`OLDEST_READ`] on are made new, others refused.
const FORMAT_VERSION: u32 = 3;
/// Records without a checksum.
const OLDEST_READ: u32 = 2;
const VERSION_KEY: &[u8] = b"format_version";

/// First byte of a record of version 3. One of version 2 is bare JSON and begins with a brace.
const CHECKED: u8 = 3;
const CHECKSUM_BYTES: usize = 16;

/// The records on disk.
pub(super) struct Records {
    /// The store's.
    dir: PathBuf,
    open: RwLock<Option<Opened>>,
}

struct Opened {
    db: sled::Db,
    sessions: sled::Tree,
}

/// An entry as it is found.
pub(super) enum Entry {
    Whole(Box<Record>),
    Damaged(DamagedRecord),
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
    /// Opens or creates them; older ones become those of this version.
    pub fn open(dir: &Path) -> Result<Records, Error> {
        let opened = Opened::open(dir)?;
        opened.check_version(dir)?;
        Ok(Records { dir: dir.to_path_buf(), open: RwLock::new(Some(opened)) })
    }

    /// Where they are.
    pub fn path(&self) -> PathBuf {
        self.dir.join("records")
    }

    pub fn get(&self, session: SessionId) -> Result<Option<Entry>, Error> {
        let key = session.to_string();
        let value = self.with(|opened| opened.sessions.get(&key))?;
        Ok(value.map(|value| decode(key.as_bytes(), &value)))
    }

    /// Everything that is there.
    pub fn all(&self) -> Result<Vec<(Option<SessionId>, Entry)>, Error> {
        self.with(|opened| {
            let decoded = |(key, value): (sled::IVec, sled::IVec)| {
                let session = std::str::from_utf8(&key).ok().and_then(SessionId::parse);
                (session, decode(&key, &value))
            };
            opened.sessions.iter().map(|entry| entry.map(decoded)).collect()
        })
    }

    /// Durable when it returns. After an error the record on disk is the one before or this one.
    pub fn put(&self, session: SessionId, record: &Record) -> Result<(), Error> {
        let key = session.to_string();
        let value = encode(key.as_bytes(), record).map_err(|error| Error::StoreRecords {
            path: self.dir.clone(),
            cause: format!("a session's record cannot be written: {error}"),
        })?;
        let n_bytes = value.len();
        self.change(n_bytes, |opened| opened.sessions.insert(&key, value.as_slice()).map(drop))
    }

    /// Durable when it returns.
    pub fn remove(&self, key: &[u8]) -> Result<(), Error> {
        self.change(0, |opened| opened.sessions.remove(key).map(drop))
    }

    fn change(
        &self,
        n_bytes: usize,
        change: impl FnOnce(&Opened) -> sled::Result<()>,
    ) -> Result<(), Error> {
        let done = self.with(|opened| change(opened).and_then(|()| opened.db.flush()).map(drop));
        done.map_err(|error| match error {
            Error::StoreFile { source, .. } if is_full(&source) => {
                let path = self.path();
                let n_bytes = n_bytes as u64;
                Error::DiskFull { path, n_bytes, source, retry_after: DISK_RETRY }
            }
            other => other,
        })
    }

    fn with<T>(&self, run: impl FnOnce(&Opened) -> sled::Result<T>) -> Result<T, Error> {
        let result = {
            let open = self.opened()?;
            let opened = open.as_ref().ok_or_else(|| closed(&self.dir))?;
            run(opened)
        };
        result.map_err(|error| {
            if matches!(error, sled::Error::Io(_)) {
                // From now on it would refuse everything, whatever comes free.
                *self.open.write().unwrap_or_else(PoisonError::into_inner) = None;
            }
            sled_error(&self.dir, error)
        })
    }

    /// Opens what a failure closed.
    fn opened(&self) -> Result<RwLockReadGuard<'_, Option<Opened>>, Error> {
        let open = self.open.read().unwrap_or_else(PoisonError::into_inner);
        if open.is_some() {
            return Ok(open);
        }
        drop(open);
        let mut open = self.open.write().unwrap_or_else(PoisonError::into_inner);
        if open.is_none() {
            *open = Some(Opened::open(&self.dir)?);
            tracing::info!(path = %self.dir.display(), "the store's records are open again");
        }
        drop(open);
        Ok(self.open.read().unwrap_or_else(PoisonError::into_inner))
    }
}

/// What only a damaged disk or another version does.
#[cfg(test)]
impl Records {
    pub fn set_version(&self, version: &str) {
        self.with(|opened| opened.db.insert(VERSION_KEY, version).map(drop)).unwrap();
    }

    /// Of records that cannot be opened.
    pub fn force_version(dir: &Path, version: &str) {
        Opened::open(dir).unwrap().db.insert(VERSION_KEY, version).unwrap();
    }

    pub fn put_raw(&self, key: &[u8], value: &[u8]) {
        let put = |opened: &Opened| {
            opened.sessions.insert(key, value)?;
            opened.db.flush().map(drop)
        };
        self.with(put).unwrap();
    }

    pub fn put_unflushed(&self, session: SessionId, record: &Record) {
        let key = session.to_string();
        let value = encode(key.as_bytes(), record).unwrap();
        self.with(|opened| opened.sessions.insert(&key, value.as_slice()).map(drop)).unwrap();
    }

    pub fn raw(&self, session: SessionId) -> Option<Vec<u8>> {
        self.with(|opened| opened.sessions.get(session.to_string())).unwrap().map(|v| v.to_vec())
    }
}

impl Opened {
    fn open(dir: &Path) -> Result<Opened, Error> {
        let db = sled::Config::new().path(dir.join("records")).open();
        let db = db.map_err(|error| match error {
            sled::Error::Io(io) if is_lock(&io) => Error::StoreLocked { path: dir.to_path_buf() },
            other => sled_error(dir, other),
        })?;
        let sessions = db.open_tree("sessions").map_err(|error| sled_error(dir, error))?;
        Ok(Opened { db, sessions })
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
        self.db.flush()?;
        Ok(n_records)
    }

    fn set_version(&self) -> sled::Result<()> {
        self.db.insert(VERSION_KEY, FORMAT_VERSION.to_string().as_bytes())?;
        self.db.flush().map(drop)
    }
}

/// The mark, the checksum, the record as JSON.
fn encode(key: &[u8], record: &Record) -> serde_json::Result<Vec<u8>> {
    serde_json::to_vec(record).map(|json| with_checksum(key, &json))
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

fn decode(key: &[u8], value: &[u8]) -> Entry {
    let damaged = |cause: String| {
        Entry::Damaged(DamagedRecord { key: key.to_vec(), bytes: value.to_vec(), cause })
    };
    let parts = value.strip_prefix(&[CHECKED]);
    let Some((expected, json)) = parts.and_then(|rest| rest.split_at_checked(CHECKSUM_BYTES))
    else {
        return damaged(format!("its {} bytes do not begin as a record does", value.len()));
    };
    if checksum(key, json) != *expected {
        return damaged(format!("its {} bytes do not fit their checksum", value.len()));
    }
    match serde_json::from_slice(json) {
        Ok(record) => Entry::Whole(Box::new(record)),
        Err(error) => damaged(error.to_string()),
    }
}

fn is_lock(error: &io::Error) -> bool {
    // sled wraps the system's error; its text is the only mark.
    error.kind() == io::ErrorKind::WouldBlock
        || error.to_string().contains("could not acquire lock")
}

fn closed(dir: &Path) -> Error {
    let cause = "they were closed by a failure and are being opened again".into();
    Error::StoreRecords { path: dir.to_path_buf(), cause }
}

fn sled_error(dir: &Path, error: sled::Error) -> Error {
    match error {
        sled::Error::Io(source) => Error::StoreFile { path: dir.join("records"), source },
        other => Error::StoreRecords { path: dir.to_path_buf(), cause: other.to_string() },
    }
}
