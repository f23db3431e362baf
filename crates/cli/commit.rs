//! Which commit a source tree is of; part of the build script, with a test in tests/version.rs.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Of a tree that does not say.
pub const UNKNOWN: &str = "unknown";

/// What goes into the program: changes elsewhere make it no other one.
const SOURCES: [&str; 5] = ["crates", "proto", ".cargo", "Cargo.toml", "Cargo.lock"];

/// A commit, and the files whose change may make it another one.
pub struct Found {
    /// 12 hex digits, with `-dirty` if the sources have changed since; or [`UNKNOWN`].
    pub name: String,
    pub depends_on: Vec<PathBuf>,
}

/// The commit of the tree at `root`: from git, or from what git wrote into an archive.
pub fn find(root: &Path, archived: &Path) -> Found {
    let git = |arguments: &[&str]| {
        let output = Command::new("git").arg("-C").arg(root).args(arguments).output().ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        output.status.success().then(|| text.trim_end().to_string())
    };
    // An archive that was unpacked inside of somebody else's repository is not of that one.
    let is_ours = git(&["rev-parse", "--show-toplevel"])
        .and_then(|top| Some(Path::new(&top).canonicalize().ok()? == root.canonicalize().ok()?));
    let head = git(&["rev-parse", "--short=12", "HEAD"]).filter(|_| is_ours == Some(true));
    let Some(head) = head else {
        let text = std::fs::read_to_string(archived).unwrap_or_default();
        // git replaces the whole line, which begins with a dollar sign until then.
        let written = text.get(..12).filter(|text| text.bytes().all(|b| b.is_ascii_hexdigit()));
        return Found { name: written.unwrap_or(UNKNOWN).into(), depends_on: vec![] };
    };
    let mut status = vec!["status", "--porcelain", "--"];
    status.extend(SOURCES);
    let is_dirty = git(&status).is_none_or(|changes| !changes.is_empty());
    let mut depends_on: Vec<_> = SOURCES.iter().map(|source| root.join(source)).collect();
    // Where HEAD and what it names stand: in a worktree not below .git.
    let branch = git(&["symbolic-ref", "--quiet", "HEAD"]);
    for name in ["HEAD", "packed-refs"].into_iter().chain(branch.as_deref()) {
        depends_on.extend(git(&["rev-parse", "--git-path", name]).map(|path| root.join(path)));
    }
    depends_on.retain(|path| path.exists());
    let name = if is_dirty { format!("{head}-dirty") } else { head };
    Found { name, depends_on }
}
