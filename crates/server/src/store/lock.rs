//! One process has a store. The lock is a file of its own, held for as long as the store is open: the
//! records' own lock is given up for a moment when they are opened again after a failed write, and a
//! server that waits for its turn must not take that for the end.

use super::blobs::{file_error, private_dir};
use super::records;
use crate::error::Error;
use std::fs::{File, TryLockError};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Between two looks at a store that another process has.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// The right to open a store. Dropping it gives it up.
#[derive(Debug)]
pub struct StoreLock {
    dir: PathBuf,
    file: File,
}

impl StoreLock {
    /// Takes the lock of the store in this folder, which is made if need be; none: another process has
    /// it, be it of an older version, which has the records' lock only.
    pub fn try_take(dir: &Path) -> Result<Option<StoreLock>, Error> {
        private_dir(dir).map_err(file_error(dir))?;
        let path = dir.join("lock");
        let file = File::options().create(true).truncate(false).write(true).mode(0o600).open(&path);
        let file = file.map_err(file_error(&path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Ok(None),
            Err(TryLockError::Error(source)) => return Err(file_error(&path)(source)),
        }
        let lock = StoreLock { dir: dir.to_path_buf(), file };
        Ok((!records::are_in_use(dir)).then_some(lock))
    }

    /// The same at once, or an error.
    pub fn take(dir: &Path) -> Result<StoreLock, Error> {
        StoreLock::try_take(dir)?.ok_or_else(|| Error::StoreLocked { path: dir.to_path_buf() })
    }

    /// Waits for whoever has it.
    pub async fn wait(dir: &Path, patience: Duration) -> Result<StoreLock, Error> {
        let begun = Instant::now();
        while begun.elapsed() < patience {
            tokio::time::sleep(LOOK_EVERY).await;
            if let Some(lock) = StoreLock::try_take(dir)? {
                return Ok(lock);
            }
        }
        Err(Error::StoreWait { path: dir.to_path_buf(), seconds: patience.as_secs_f64() })
    }

    /// Whose lock it is.
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

impl Drop for StoreLock {
    fn drop(&mut self) {
        // Closing it would leave the lock with a child that is just being forked.
        let _ = self.file.unlock();
    }
}
