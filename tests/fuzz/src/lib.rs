//! What several targets need: one input as several files, and a folder for them.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// The input as `N` parts, each but the last behind its length in two bytes. The last is the rest.
pub fn parts<const N: usize>(mut bytes: &[u8]) -> Option<[&[u8]; N]> {
    let mut parts = [&[][..]; N];
    for part in &mut parts[..N - 1] {
        let (length, rest) = bytes.split_first_chunk::<2>()?;
        let length = usize::from(u16::from_le_bytes(*length)).min(rest.len());
        (*part, bytes) = rest.split_at(length);
    }
    parts[N - 1] = bytes;
    Some(parts)
}

/// The other way round.
pub fn join(parts: &[&[u8]]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (i, part) in parts.iter().enumerate() {
        if i + 1 < parts.len() {
            bytes.extend(u16::try_from(part.len()).expect("a small part").to_le_bytes());
        }
        bytes.extend_from_slice(part);
    }
    bytes
}

/// An empty folder of this process in the system's folder for temporary files, the same each time.
/// Whoever runs the targets removes it: a fuzzer does not end as other programs do.
pub fn empty_dir() -> &'static Path {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    let dir = DIR
        .get_or_init(|| std::env::temp_dir().join(format!("offshoot-fuzz-{}", std::process::id())));
    let _ = std::fs::remove_dir_all(dir);
    std::fs::create_dir_all(dir).expect("a folder for temporary files");
    dir
}

/// Writes one of the files.
pub fn write(path: &Path, bytes: &[u8]) {
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).expect("a folder for temporary files");
    }
    std::fs::write(path, bytes).expect("a file in the folder for temporary files");
}
