//! What is damaged is kept for people, and stands in nobody's way: snapshots whose files do not fit
//! their hashes, records that do not fit their checksums.

use super::blobs::{self, Damage, file_error, names_in};
use super::records::DamagedRecord;
use super::{BlobName, Record, SnapshotRecord, Store, unknown};
use crate::error::Error;
use crate::session::SessionId;
use std::collections::HashSet;
use std::fs;
use std::io::{self, Write};
use std::path::PathBuf;

/// Of the files that hold records that were set aside.
const RECORD: &str = "record";

impl Store {
    /// The record of a session that begins again: its head was read and is whole. If it was not, the
    /// session has gone back to the newest snapshot that is. What an actor that has ended was still
    /// writing has landed, or does not any more.
    pub fn whole_head(&self, session: SessionId) -> Result<Record, Error> {
        let _open = self.still_open()?;
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
    pub(super) fn set_aside(&self, session: SessionId, id: &str) -> Result<Error, Error> {
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
            self.put(session, record)?;
            self.release(&mut references, damaged.blobs())?;
        }
        Ok(Error::SnapshotDamaged { session, snapshot: id.into(), cause, whole })
    }

    /// Into a file; then it stands in nobody's way.
    pub(super) fn set_record_aside(&self, damaged: &DamagedRecord) -> Result<(), Error> {
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
    pub(super) fn names_set_aside(&self) -> Result<Option<HashSet<BlobName>>, Error> {
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

    pub(super) fn aside(&self, name: &str) -> PathBuf {
        self.blobs.damaged_dir().join(name).with_extension(RECORD)
    }
}
