//! The large parts of snapshots, as files named by their hash.

use super::record::BlobName;
use crate::error::{DISK_RETRY, Error};
use std::collections::HashSet;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// The folder with the files, and the one for those that are damaged.
pub(super) struct Blobs {
    dir: PathBuf,
    damaged: PathBuf,
    /// Names files that are not whole yet.
    n_written: AtomicU64,
}

/// What is wrong with a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Damage {
    pub file: PathBuf,
    pub found: Found,
}

/// Instead of the content that the name says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Found {
    Nothing,
    Other { hash: String, n_bytes: usize },
}

impl Damage {
    pub fn is_missing(&self) -> bool {
        self.found == Found::Nothing
    }
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Damage { file, found } = self;
        match found {
            Found::Nothing => write!(f, "its file {} is missing", file.display()),
            Found::Other { hash, n_bytes } => write!(
                f,
                "its file {} should have the hash that it is named by, but its {n_bytes} bytes hash to {hash}",
                file.display()
            ),
        }
    }
}

impl Blobs {
    /// In the store's folder, made if need be.
    pub fn open(store: &Path) -> Result<Blobs, Error> {
        let (dir, damaged) = (store.join("blobs"), store.join("damaged"));
        private_dir(&dir).map_err(file_error(&dir))?;
        if [store, &dir].into_iter().all(is_open_to_others) {
            tracing::warn!(
                path = %store.display(),
                "other users of this machine can read the store, with adapters and activations in it: \
                 chmod -R go= keeps them out"
            );
        }
        Ok(Blobs { dir, damaged, n_written: AtomicU64::new(0) })
    }

    /// Of a store that is only read.
    pub fn at(store: &Path) -> Blobs {
        let (dir, damaged) = (store.join("blobs"), store.join("damaged"));
        Blobs { dir, damaged, n_written: AtomicU64::new(0) }
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where damaged things are kept for people.
    pub fn damaged_dir(&self) -> &Path {
        &self.damaged
    }

    pub fn path(&self, name: &BlobName) -> PathBuf {
        self.dir.join(&name.0)
    }

    /// Durable when it returns. A failure leaves nothing behind.
    pub fn write_all<'a>(
        &self,
        blobs: impl IntoIterator<Item = (&'a BlobName, &'a [u8])>,
    ) -> Result<(), Error> {
        for (name, bytes) in blobs {
            self.write(name, bytes)?;
        }
        // Also for files that were there: whoever wrote them may not have come so far.
        File::open(&self.dir).and_then(|dir| dir.sync_all()).map_err(file_error(&self.dir))
    }

    /// Written under another name first: a file under a hash is whole, as far as this process and
    /// those before it could help.
    pub fn write(&self, name: &BlobName, bytes: &[u8]) -> Result<(), Error> {
        let path = self.path(name);
        // Its length alone would let a new snapshot name a damaged file.
        let is_there = fs::metadata(&path).is_ok_and(|there| there.len() == bytes.len() as u64);
        if is_there && self.check(name)?.is_none() {
            return Ok(());
        }
        let half = path.with_extension(self.n_written.fetch_add(1, Ordering::Relaxed).to_string());
        let write = || {
            let mut file = private_file(&half)?;
            file.write_all(bytes)?;
            file.sync_all()?;
            fs::rename(&half, &path)
        };
        write().map_err(|source| {
            // On a full disk its bytes are needed. What cannot be deleted is collected at a start.
            let _ = fs::remove_file(&half);
            write_error(&path, bytes.len(), source)
        })
    }

    /// A blob's content, or what is wrong with it. An error is the system's and says nothing about
    /// the file.
    pub fn read(&self, name: &BlobName) -> Result<Result<Vec<u8>, Damage>, Error> {
        let file = self.path(name);
        let bytes = match fs::read(&file) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(Err(Damage { file, found: Found::Nothing }));
            }
            Err(error) => return Err(file_error(&file)(error)),
        };
        let found = BlobName::of(&bytes);
        if found == *name {
            return Ok(Ok(bytes));
        }
        let found = Found::Other { hash: found.0, n_bytes: bytes.len() };
        Ok(Err(Damage { file, found }))
    }

    /// What is wrong with a blob, if anything.
    pub fn check(&self, name: &BlobName) -> Result<Option<Damage>, Error> {
        Ok(self.read(name)?.err())
    }

    /// Takes a damaged file out of the way of a whole one, and keeps it for people.
    pub fn set_aside(&self, name: &BlobName) -> Result<(), Error> {
        private_dir(&self.damaged).map_err(file_error(&self.damaged))?;
        let from = self.path(name);
        match fs::rename(&from, self.damaged.join(&name.0)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other.map_err(file_error(&from)),
        }
    }

    pub fn delete(&self, name: &BlobName) -> Result<(), Error> {
        let path = self.path(name);
        match fs::remove_file(&path) {
            // It could not be written, or was set aside.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other.map_err(file_error(&path)),
        }
    }

    /// Deletes files that are not whole and, unless `keep_all`, those that nobody names.
    pub fn collect(
        &self,
        is_named: impl Fn(&BlobName) -> bool,
        keep_all: bool,
    ) -> Result<(), Error> {
        for entry in fs::read_dir(&self.dir).map_err(file_error(&self.dir))? {
            let entry = entry.map_err(file_error(&self.dir))?;
            let name = BlobName(entry.file_name().to_string_lossy().into_owned());
            let stays = is_named(&name) || keep_all && name.is_hash();
            if !stays {
                fs::remove_file(entry.path()).map_err(file_error(&entry.path()))?;
            }
        }
        Ok(())
    }
}

/// A folder that only its owner can look into, with those above it that are missing. One that is
/// there stays as it is.
pub(super) fn private_dir(dir: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)
}

/// As older versions made them.
fn is_open_to_others(dir: &Path) -> bool {
    fs::metadata(dir).is_ok_and(|dir| dir.permissions().mode() & 0o077 != 0)
}

/// A new or emptied file that only its owner can read.
pub(super) fn private_file(path: &Path) -> io::Result<File> {
    File::options().write(true).create(true).truncate(true).mode(0o600).open(path)
}

/// Every name of a blob that stands in these bytes, whatever else they are.
pub(super) fn names_in(bytes: &[u8]) -> HashSet<BlobName> {
    let words = bytes.split(|byte| !byte.is_ascii_hexdigit());
    let names = words.filter_map(|word| std::str::from_utf8(word).ok());
    names.map(|word| BlobName(word.into())).filter(BlobName::is_hash).collect()
}

/// A file could not be written.
pub(super) fn write_error(path: &Path, n_bytes: usize, source: io::Error) -> Error {
    if is_full(&source) {
        let (path, retry_after) = (path.to_path_buf(), DISK_RETRY);
        return Error::DiskFull { path, n_bytes: n_bytes as u64, source, retry_after };
    }
    file_error(path)(source)
}

/// Whether a write failed for want of room: on the disk, in a quota, or within the process's limit.
pub(super) fn is_full(error: &io::Error) -> bool {
    use io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
    matches!(error.kind(), StorageFull | QuotaExceeded | FileTooLarge)
}

pub(super) fn file_error(path: &Path) -> impl Fn(io::Error) -> Error + '_ {
    |source| Error::StoreFile { path: path.to_path_buf(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_found_in_whatever_is_left_of_a_record() {
        let [one, two] = [BlobName::of(b"one"), BlobName::of(b"two")];
        let text = format!("{{\"state\":\"{}\",\"answers\":\"{}", one.0, two.0);
        assert_eq!(names_in(text.as_bytes()), HashSet::from([one.clone(), two]));
        let cut = &text.as_bytes()[..text.len() - 1];
        assert_eq!(names_in(cut), HashSet::from([one]));
        assert!(names_in(&[0xff; 100]).is_empty());
    }
}
