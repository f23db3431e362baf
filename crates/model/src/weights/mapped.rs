//! A memory-mapped file.

use super::WeightsError;
use crate::host::FileMap;
use bytes::Bytes;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Ranges below this size are not given back to the system: the call costs more than they.
const RELEASE_FROM_BYTES: usize = 1 << 16;

/// How the files of a repository cloned without Git LFS begin.
const LFS_POINTER: &[u8] = b"version https://git-lfs.github.com/";

/// A file, mapped read-only.
pub(super) struct Mapped {
    pub(super) path: PathBuf,
    pub(super) format: &'static str,
    map: FileMap,
}

impl Mapped {
    /// Maps the file at `path`; `format` is its name in errors.
    pub(super) fn open(path: &Path, format: &'static str) -> Result<Mapped, WeightsError> {
        let io = |source| WeightsError::Io { path: path.to_path_buf(), source };
        let file = File::open(path).map_err(io)?;
        let map = FileMap::open(&file).map_err(io)?;
        let file = Mapped { path: path.to_path_buf(), format, map };
        if file.bytes().starts_with(LFS_POINTER) {
            return Err(file.bad("it is a Git LFS pointer; fetch the file itself: git lfs pull"));
        }
        Ok(file)
    }

    pub(super) fn bytes(&self) -> &[u8] {
        self.map.bytes()
    }

    /// A part of them that keeps the file mapped.
    pub(super) fn slice(&self, range: Range<usize>) -> Bytes {
        self.map.slice(range)
    }

    pub(super) fn bad(&self, reason: impl Into<String>) -> WeightsError {
        WeightsError::BadFile {
            file: self.path.clone(),
            format: self.format,
            reason: reason.into(),
        }
    }

    /// The error for a file that should have `needed` bytes.
    pub(super) fn truncated(&self, needed: u64) -> WeightsError {
        WeightsError::Truncated {
            file: self.path.clone(),
            needed,
            actual: self.bytes().len() as u64,
        }
    }

    /// Lets the system take the pages of `range` back, so that a model being loaded does not
    /// count twice in this process's resident memory.
    pub(super) fn release(&self, range: Range<usize>) {
        if range.len() < RELEASE_FROM_BYTES {
            return;
        }
        if let Err(error) = self.map.release(range) {
            tracing::debug!(file = %self.path.display(), %error, "pages not released");
        }
    }
}
