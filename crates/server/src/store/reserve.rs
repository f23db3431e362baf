//! Room that is kept for the next start. Opening the records takes some, also when nothing is written
//! to them; without it a server that ended on a full disk would not start again, and all that it has
//! stored would be out of reach. The reserve is a file that is given up then.

use super::blobs::{self, is_full};
use crate::error::Error;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// Several times what the records take to open: a segment of their log is 512 KiB.
pub(super) const RESERVE_BYTES: usize = 4 << 20;

/// The file, which is there or not.
pub(super) struct Reserve {
    path: PathBuf,
    is_whole: Mutex<bool>,
}

impl Reserve {
    /// Of the store in this folder; nothing is written yet.
    pub fn of(store: &Path) -> Reserve {
        let path = store.join("reserve");
        let is_whole = fs::metadata(&path).is_ok_and(|file| file.len() == RESERVE_BYTES as u64);
        Reserve { path, is_whole: Mutex::new(is_whole) }
    }

    /// Frees its room. Whether there was any.
    pub fn give_up(&self) -> bool {
        *self.whole() = false;
        fs::remove_file(&self.path).is_ok()
    }

    /// Takes the room if it is not taken. Until then nothing large is written: it would take what the
    /// records need.
    pub fn take(&self) -> Result<(), Error> {
        let mut is_whole = self.whole();
        if *is_whole {
            return Ok(());
        }
        match self.write() {
            Ok(()) => *is_whole = true,
            Err(error) => {
                // Half of it helps nobody.
                let _ = fs::remove_file(&self.path);
                let is_disk = error.kind() != io::ErrorKind::FileTooLarge;
                if is_full(&error) && is_disk {
                    return Err(blobs::write_error(&self.path, RESERVE_BYTES, error));
                }
                tracing::warn!(path = %self.path.display(), %error, "no room is kept for the next start");
            }
        }
        Ok(())
    }

    /// Bytes that no file system makes smaller.
    fn write(&self) -> io::Result<()> {
        let mut bytes = vec![0; RESERVE_BYTES];
        blake3::Hasher::new().finalize_xof().fill(&mut bytes);
        let mut file = blobs::private_file(&self.path)?;
        file.write_all(&bytes)?;
        file.sync_all()
    }

    fn whole(&self) -> std::sync::MutexGuard<'_, bool> {
        // Whole even if another thread panicked: at worst it is written once more.
        self.is_whole.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}
