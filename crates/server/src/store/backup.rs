//! Copies of a store, also of one that a server has open.
//!
//! Files of snapshots never change, and a record names them only when they are whole: so a copy of the
//! records as they are at one moment, and then of all files that it names, is what a server would find
//! that was killed at that moment. While the records are copied nothing may write to them; if
//! something did, or a file is not needed any more and gone, it is done again.

use super::blobs::{self, Blobs, file_error, private_dir, private_file};
use super::records::Records;
use super::{BlobName, Record};
use crate::error::Error;
use crate::session::SessionId;
use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

/// File systems tell the time of a write no more exactly than this.
const TICK: Duration = Duration::from_millis(20);
const PAUSE: Duration = Duration::from_millis(3);
/// For a moment without a write to the records.
const PATIENCE: Duration = Duration::from_secs(60);
/// Copies of the records whose files were gone before they were copied, too.
const MAX_ROUNDS: usize = 20;

/// What a copy holds, or a look found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StoreContent {
    pub n_sessions: usize,
    pub n_snapshots: usize,
    /// Of all snapshots' files.
    pub bytes: u64,
    /// What is damaged, for people.
    pub damaged: Vec<String>,
}

/// Copies a store into a new folder, which a server can be started with. A server may have the store
/// open meanwhile. What is damaged is left out and named.
pub fn backup(store: &Path, to: &Path) -> Result<StoreContent, Error> {
    is_store(store)?;
    if to.exists() {
        let source =
            io::Error::new(io::ErrorKind::AlreadyExists, "a backup goes into a new folder");
        return Err(file_error(to)(source));
    }
    let half = half_name(to);
    remove(&half)?;
    let copied = copy_all(store, &half);
    if copied.is_err() {
        // Half of it helps nobody.
        let _ = remove(&half);
    }
    let content = copied?;
    fs::rename(&half, to).map_err(file_error(to))?;
    sync_dir(to.parent().filter(|dir| *dir != Path::new("")).unwrap_or(Path::new(".")))?;
    Ok(content)
}

/// Reads all of a store and compares it with its checksums; changes nothing. A server may have it open.
pub fn check(store: &Path) -> Result<StoreContent, Error> {
    is_store(store)?;
    let dir = tempfile::tempdir().map_err(file_error(&std::env::temp_dir()))?;
    let blobs = Blobs::at(store);
    for round in 1.. {
        let records = dir.path().join(round.to_string());
        let (known, mut content) = copy_records(store, &records)?;
        let mut gone = false;
        for (session, record) in &known {
            for snapshot in &record.snapshots {
                for name in snapshot.blobs() {
                    if let Some(damage) = blobs.check(name)? {
                        gone |= damage.is_missing();
                        content.damaged.push(format!(
                            "snapshot {} of session {session}: {damage}",
                            snapshot.id
                        ));
                    }
                }
            }
        }
        // A server that has it open deletes what it no longer needs.
        if !gone || round == MAX_ROUNDS || copied_twice_the_same(store, &records)? {
            return Ok(content);
        }
    }
    unreachable!("the rounds have an end")
}

/// Whether this build can open a store that another process has open, without touching it.
pub fn peek(store: &Path) -> Result<(), Error> {
    let dir = tempfile::tempdir().map_err(file_error(&std::env::temp_dir()))?;
    match copy_records(store, dir.path()) {
        Err(error @ Error::StoreVersion { .. }) => Err(error),
        // It will be seen when it is open.
        Err(error) => {
            tracing::debug!(%error, "the store could not be looked at");
            Ok(())
        }
        Ok(_) => Ok(()),
    }
}

fn is_store(store: &Path) -> Result<(), Error> {
    let db = store.join("records/db");
    fs::metadata(&db).map(drop).map_err(|source| {
        let source = io::Error::new(source.kind(), format!("no store is there: {source}"));
        file_error(&db)(source)
    })
}

fn half_name(to: &Path) -> PathBuf {
    let mut name = to.file_name().unwrap_or_default().to_os_string();
    name.push(".partial");
    to.with_file_name(name)
}

fn remove(dir: &Path) -> Result<(), Error> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other.map_err(file_error(dir)),
    }
}

fn copy_all(store: &Path, to: &Path) -> Result<StoreContent, Error> {
    let (from, blobs) = (Blobs::at(store), to.join("blobs"));
    private_dir(&blobs).map_err(file_error(&blobs))?;
    for round in 1.. {
        let (known, mut content) = copy_records(store, to)?;
        let set_aside = copy_damaged(store, to)?;
        let mut named: HashSet<BlobName> = set_aside;
        known.iter().for_each(|(_, record)| named.extend(record.blobs().cloned()));
        let mut missing = Vec::new();
        for name in &named {
            if let Some(damage) = copy_blob(&from, name, &blobs)? {
                missing.push((name.clone(), damage));
            }
        }
        let gone = missing.iter().any(|(_, damage)| damage.is_missing());
        if gone && round < MAX_ROUNDS && !copied_twice_the_same(store, to)? {
            continue;
        }
        for (name, damage) in missing {
            let of = known.iter().flat_map(|(session, record)| {
                let has = |s: &&super::SnapshotRecord| s.blobs().any(|blob| *blob == name);
                record.snapshots.iter().filter(has).map(move |s| (session, &s.id))
            });
            let lines =
                of.map(|(session, id)| format!("snapshot {id} of session {session}: {damage}"));
            content.damaged.extend(lines);
        }
        forget_others(&blobs, &named)?;
        sync_dir(&blobs)?;
        sync_dir(to)?;
        return Ok(content);
    }
    unreachable!("the rounds have an end")
}

/// Nothing has changed since the copy was made: what is missing is missing.
fn copied_twice_the_same(store: &Path, copy: &Path) -> Result<bool, Error> {
    let again = tempfile::tempdir().map_err(file_error(&std::env::temp_dir()))?;
    let (now, _) = copy_records(store, again.path())?;
    let (then, _) = read_records(copy)?;
    let by_id = |records: Vec<(SessionId, Record)>| {
        let named = records.into_iter().map(|(id, record)| (id.to_string(), record));
        named.collect::<BTreeMap<_, _>>()
    };
    Ok(by_id(now) == by_id(then))
}

/// The records as they are at one moment, in `to`, and what they say.
fn copy_records(
    store: &Path,
    to: &Path,
) -> Result<(Vec<(SessionId, Record)>, StoreContent), Error> {
    let (from, into) = (store.join("records"), to.join("records"));
    let begun = Instant::now();
    loop {
        let before = stamps(&from)?;
        let recent = before.values().any(Stamp::is_recent);
        if !recent {
            remove(&into)?;
            let copied = copy_tree(&from, &into);
            if stamps(&from)? == before {
                copied?;
                break;
            }
        }
        if begun.elapsed() > PATIENCE {
            return Err(Error::StoreRecords {
                path: store.to_path_buf(),
                cause: format!(
                    "in {} s there was no moment without a write to copy them in; copy a snapshot of the \
                     file system instead, or try again when fewer sessions are saved",
                    PATIENCE.as_secs()
                ),
            });
        }
        std::thread::sleep(PAUSE);
    }
    read_records(to)
}

fn read_records(dir: &Path) -> Result<(Vec<(SessionId, Record)>, StoreContent), Error> {
    let (records, damaged) = Records::open(dir)?;
    let all = records.all();
    let snapshots = || all.iter().flat_map(|(_, record)| &record.snapshots);
    let content = StoreContent {
        n_sessions: all.len(),
        n_snapshots: snapshots().count(),
        bytes: snapshots().map(|snapshot| snapshot.bytes).sum(),
        damaged: damaged
            .iter()
            .map(|record| {
                let key = String::from_utf8_lossy(&record.key);
                format!("the record of session {key}: {}", record.cause)
            })
            .collect(),
    };
    Ok((all, content))
}

/// What is damaged is kept for people. The files that records named which were set aside are theirs,
/// too.
fn copy_damaged(store: &Path, to: &Path) -> Result<HashSet<BlobName>, Error> {
    let (from, into) = (store.join("damaged"), to.join("damaged"));
    if !from.is_dir() {
        return Ok(HashSet::new());
    }
    remove(&into)?;
    copy_tree(&from, &into)?;
    let mut named = HashSet::new();
    for entry in fs::read_dir(&into).map_err(file_error(&into))? {
        let path = entry.map_err(file_error(&into))?.path();
        if path.extension().is_some_and(|extension| extension == "record") {
            named.extend(blobs::names_in(&fs::read(&path).map_err(file_error(&path))?));
        }
    }
    Ok(named)
}

/// What is wrong with it, if it is not copied.
fn copy_blob(from: &Blobs, name: &BlobName, to: &Path) -> Result<Option<blobs::Damage>, Error> {
    let path = to.join(name.as_str());
    if path.exists() {
        return Ok(None);
    }
    let bytes = match from.read(name)? {
        Ok(bytes) => bytes,
        Err(damage) => return Ok(Some(damage)),
    };
    let write = || {
        let mut file = private_file(&path)?;
        file.write_all(&bytes)?;
        file.sync_all()
    };
    write().map(|()| None).map_err(|error| blobs::write_error(&path, bytes.len(), error))
}

/// Those of records that were copied before.
fn forget_others(blobs: &Path, named: &HashSet<BlobName>) -> Result<(), Error> {
    for entry in fs::read_dir(blobs).map_err(file_error(blobs))? {
        let entry = entry.map_err(file_error(blobs))?;
        let is_named = named.iter().any(|name| entry.file_name() == name.as_str());
        if !is_named {
            fs::remove_file(entry.path()).map_err(file_error(&entry.path()))?;
        }
    }
    Ok(())
}

/// What changes with each write to a file.
#[derive(PartialEq, Eq)]
struct Stamp {
    n_bytes: u64,
    modified: SystemTime,
}

impl Stamp {
    /// Another write could have the same time.
    fn is_recent(&self) -> bool {
        SystemTime::now().duration_since(self.modified).is_ok_and(|age| age < TICK)
    }
}

fn stamps(dir: &Path) -> Result<BTreeMap<PathBuf, Stamp>, Error> {
    let (mut all, mut dirs) = (BTreeMap::new(), vec![dir.to_path_buf()]);
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(&dir).map_err(file_error(&dir))? {
            let path = entry.map_err(file_error(&dir))?.path();
            let about = match fs::metadata(&path) {
                // Renamed or removed meanwhile: another look sees that.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                other => other.map_err(file_error(&path))?,
            };
            if about.is_dir() {
                dirs.push(path);
                continue;
            }
            let modified = about.modified().map_err(file_error(&path))?;
            all.insert(path, Stamp { n_bytes: about.len(), modified });
        }
    }
    Ok(all)
}

fn copy_tree(from: &Path, to: &Path) -> Result<(), Error> {
    private_dir(to).map_err(file_error(to))?;
    for entry in fs::read_dir(from).map_err(file_error(from))? {
        let path = entry.map_err(file_error(from))?.path();
        let target = to.join(path.file_name().unwrap_or_default());
        if path.is_dir() {
            copy_tree(&path, &target)?;
            continue;
        }
        let copy = || {
            let mut file = private_file(&target)?;
            io::copy(&mut File::open(&path)?, &mut file)?;
            file.sync_all()
        };
        copy().map_err(|error| blobs::write_error(&target, 0, error))?;
    }
    sync_dir(to)
}

fn sync_dir(dir: &Path) -> Result<(), Error> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(file_error(dir))
}
