//! Room that is kept for the next start. Opening the records takes some, also when nothing is written
//! to them; without it a server that ended on a full disk would not start again, and all that it has
//! stored would be out of reach. The reserve is a file that is given up then.

use super::blobs::{self, is_full};
use crate::error::{DISK_RETRY, Error};
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};
use std::time::Instant;

/// Several times what the records take to open: a segment of their log is 512 KiB.
pub(super) const RESERVE_BYTES: usize = 4 << 20;

/// The file, which is there or not.
pub(super) struct Reserve {
    path: PathBuf,
    room: Mutex<Room>,
}

#[derive(Clone, Copy)]
enum Room {
    Kept,
    Free,
    /// It did not fit.
    Missing(Instant),
    /// It cannot be, whatever comes free: not before the next start.
    Without,
}

impl Reserve {
    /// Of the store in this folder; nothing is written yet.
    pub fn of(store: &Path) -> Reserve {
        let path = store.join("reserve");
        let is_whole = fs::metadata(&path).is_ok_and(|file| file.len() == RESERVE_BYTES as u64);
        Reserve { path, room: Mutex::new(if is_whole { Room::Kept } else { Room::Free }) }
    }

    /// Frees its room. Whether there was any.
    pub fn give_up(&self) -> bool {
        *self.room() = Room::Free;
        fs::remove_file(&self.path).is_ok()
    }

    /// Takes the room if it is not taken. Until then nothing large is written: it would take what the
    /// records need.
    pub fn take(&self) -> Result<(), Error> {
        let mut room = self.room();
        let error = match *room {
            Room::Kept | Room::Without => return Ok(()),
            // Each try takes for a moment what the records need.
            Room::Missing(since) if since.elapsed() < DISK_RETRY => {
                return Err(self.refused(io::ErrorKind::StorageFull.into()));
            }
            Room::Missing(_) | Room::Free => match self.write() {
                Ok(()) => {
                    *room = Room::Kept;
                    return Ok(());
                }
                Err(error) => error,
            },
        };
        if is_full(&error) && error.kind() != io::ErrorKind::FileTooLarge {
            *room = Room::Missing(Instant::now());
            return Err(self.refused(error));
        }
        *room = Room::Without;
        tracing::warn!(path = %self.path.display(), %error, "no room is kept for the next start");
        Ok(())
    }

    fn refused(&self, error: io::Error) -> Error {
        blobs::write_error(&self.path, RESERVE_BYTES, error)
    }

    /// Bytes that no file system makes smaller.
    fn write(&self) -> io::Result<()> {
        let mut bytes = vec![0; RESERVE_BYTES];
        blake3::Hasher::new().finalize_xof().fill(&mut bytes);
        let mut file = blobs::private_file(&self.path)?;
        let written = file.write_all(&bytes).and_then(|()| file.sync_all());
        // Half of it helps nobody.
        written.inspect_err(|_| drop(fs::remove_file(&self.path)))
    }

    fn room(&self) -> MutexGuard<'_, Room> {
        // True even if another thread panicked: at worst it is written once more.
        self.room.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}
