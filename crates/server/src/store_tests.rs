use super::*;
use offshoot_adapters::{AdamW, LoraSpec};
use std::collections::BTreeSet;

fn record() -> Record {
    Record {
        tenant: String::new(),
        name: "team".into(),
        lora: LoraSpec::default(),
        adamw: AdamW::default(),
        seed: 7,
        wire_dtype: "f32".into(),
        fingerprint: "abc".into(),
        split_point_1: 0,
        split_point_2: 3,
        head: String::new(),
        snapshots: Vec::new(),
        n_snapshots: 0,
        kept: Vec::new(),
        epoch: 0,
        damaged: Vec::new(),
    }
}

/// One that a client asked for.
fn snapshot(step: u64) -> NewSnapshot {
    NewSnapshot {
        step,
        sequence: 3 * step,
        origin: Origin::Client,
        state: vec![step as u8; 1000],
        answers: Some(vec![step as u8; 10]),
    }
}

/// One that the server took by itself.
fn own(step: u64) -> NewSnapshot {
    NewSnapshot { origin: Origin::Server, ..snapshot(step) }
}

fn open(dir: &tempfile::TempDir, of_client: usize) -> Result<Store, Error> {
    Store::open(dir.path(), Kept { of_client, of_server: 1 })
}

fn kept(store: &Store, session: SessionId) -> Vec<u64> {
    store.record(session).unwrap().unwrap().snapshots.iter().map(|s| s.step).collect()
}

fn files(store: &Store) -> BTreeSet<String> {
    let entries = fs::read_dir(store.blobs.dir()).unwrap();
    entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
}

fn named(store: &Store) -> BTreeSet<String> {
    let records = store.records();
    records.iter().flat_map(|(_, record)| record.blobs().map(|blob| blob.0.clone())).collect()
}

#[test]
fn a_session_is_there_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let session = SessionId::new();
    let store = open(&dir, 3).unwrap();
    store.create(session, record(), snapshot(0)).unwrap();
    let taken = store.add_snapshot(session, snapshot(4)).unwrap();
    drop(store);

    let store = open(&dir, 3).unwrap();
    let found = store.record(session).unwrap().unwrap();
    assert_eq!(found.head().unwrap(), &taken);
    assert_eq!((taken.step, taken.sequence, taken.bytes), (4, 12, 1010));
    let read = store.read(session, &taken).unwrap();
    assert_eq!(read.state, vec![4; 1000]);
    assert_eq!(read.answers.unwrap(), vec![4; 10]);
}

#[test]
fn the_last_few_snapshots_are_kept_and_the_files_of_others_go() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, 2).unwrap();
    let (session, other) = (SessionId::new(), SessionId::new());
    store.create(session, record(), snapshot(0)).unwrap();
    // The same content, named twice.
    store.create(other, record(), snapshot(0)).unwrap();
    for step in 1..=3 {
        store.add_snapshot(session, snapshot(step)).unwrap();
    }
    assert_eq!(kept(&store, session), [2, 3]);
    assert_eq!(files(&store), named(&store));
    let first = store.record(other).unwrap().unwrap();
    store.read(other, first.head().unwrap()).unwrap();

    store.forget(session).unwrap();
    store.forget(other).unwrap();
    assert!(files(&store).is_empty());
    assert!(store.record(session).unwrap().is_none());
}

#[test]
fn what_the_client_still_names_is_kept_until_it_does_not() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, 2).unwrap();
    let session = SessionId::new();
    store.create(session, record(), own(0)).unwrap();
    let mut names: Vec<String> = Vec::new();
    for step in 1..=3 {
        let unknown = "99-step99".to_string();
        let keep: Vec<String> = std::iter::once(unknown).chain(names.clone()).collect();
        store.keep(session, &keep).unwrap();
        names.push(store.add_snapshot(session, snapshot(step)).unwrap().id);
    }
    assert_eq!(kept(&store, session), [0, 1, 2, 3]);
    // The first two of those named that are there, the last two, and what the server took itself.
    store.keep(session, &[names[0].clone(), names[0].clone(), names[1].clone()]).unwrap();
    for step in 4..=9 {
        store.add_snapshot(session, snapshot(step)).unwrap();
        store.add_snapshot(session, own(step + 10)).unwrap();
    }
    assert_eq!(kept(&store, session), [1, 2, 8, 9, 19]);
    drop(store);
    let store = open(&dir, 2).unwrap();
    store.keep(session, &names[1..2]).unwrap();
    store.add_snapshot(session, snapshot(20)).unwrap();
    assert_eq!(kept(&store, session), [2, 9, 19, 20]);
    assert_eq!(files(&store), named(&store));
    // Never more than as many as are kept of the last.
    let all: Vec<String> =
        store.record(session).unwrap().unwrap().snapshots.iter().map(|s| s.id.clone()).collect();
    store.keep(session, &all).unwrap();
    store.add_snapshot(session, snapshot(21)).unwrap();
    store.add_snapshot(session, snapshot(22)).unwrap();
    assert_eq!(kept(&store, session), [2, 9, 19, 21, 22]);
}

#[test]
fn sessions_are_written_at_once_and_no_file_is_lost_or_left() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, 2).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let session = SessionId::new();
                store.create(session, record(), snapshot(0)).unwrap();
                for step in 1..12 {
                    // All have the same content at the same step: they name each other's files.
                    let taken = store.add_snapshot(session, snapshot(step)).unwrap();
                    assert_eq!(store.read(session, &taken).unwrap().state, vec![step as u8; 1000]);
                }
                if kept(&store, session) != [10, 11] {
                    panic!("{:?}", kept(&store, session));
                }
            });
        }
    });
    assert_eq!(files(&store), named(&store));
    assert_eq!(files(&store).len(), 4);
}

#[test]
fn what_the_server_takes_by_itself_pushes_out_nothing_that_was_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, 2).unwrap();
    let session = SessionId::new();
    store.create(session, record(), own(0)).unwrap();
    store.add_snapshot(session, snapshot(1)).unwrap();
    for step in 2..=5 {
        store.add_snapshot(session, own(step)).unwrap();
    }
    assert_eq!(kept(&store, session), [1, 5]);
    for step in 6..=8 {
        store.add_snapshot(session, snapshot(step)).unwrap();
    }
    assert_eq!(kept(&store, session), [5, 7, 8]);
    // A session that was set back to one of the server's goes on from there.
    let oldest = store.record(session).unwrap().unwrap().snapshots[0].clone();
    store.set_head(session, &oldest.id, 0).unwrap();
    assert_eq!(store.record(session).unwrap().unwrap().head().unwrap().step, 5);
    store.add_snapshot(session, own(9)).unwrap();
    assert_eq!(kept(&store, session), [7, 8, 9]);
    assert_eq!(files(&store), named(&store));
}

#[test]
fn a_snapshot_of_the_server_can_become_one_that_was_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, 2).unwrap();
    let session = SessionId::new();
    store.create(session, record(), own(0)).unwrap();
    store.add_snapshot(session, snapshot(1)).unwrap();
    // At the same point, as after a drain; and while it is parked.
    let drained = store.add_snapshot(session, own(2)).unwrap();
    assert_eq!(drained.origin, Origin::Server);
    let asked = store.add_snapshot(session, snapshot(2)).unwrap();
    assert_eq!((&asked.id, asked.origin), (&drained.id, Origin::Client));
    assert_eq!(store.add_snapshot(session, own(2)).unwrap(), asked);
    let parked = store.add_snapshot(session, own(3)).unwrap();
    assert_eq!(store.claim_head(session).unwrap().id, parked.id);
    for step in 4..=6 {
        store.add_snapshot(session, own(step)).unwrap();
    }
    assert_eq!(kept(&store, session), [2, 3, 6]);

    // Set back and asked for again: the newest of its kind, and the one before goes first.
    store.set_head(session, &asked.id, 0).unwrap();
    store.add_snapshot(session, snapshot(2)).unwrap();
    store.add_snapshot(session, snapshot(7)).unwrap();
    assert_eq!(kept(&store, session), [6, 2, 7]);
    assert_eq!(files(&store), named(&store));
    store.forget(session).unwrap();
    assert!(files(&store).is_empty());
}

#[test]
fn a_snapshot_asked_for_twice_is_one() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, 3).unwrap();
    let session = SessionId::new();
    store.create(session, record(), snapshot(0)).unwrap();
    let first = store.add_snapshot(session, snapshot(1)).unwrap();
    assert_eq!(store.add_snapshot(session, snapshot(1)).unwrap(), first);
    assert_eq!(store.record(session).unwrap().unwrap().snapshots.len(), 2);
}

/// A process that dies between blob and record leaves files that nothing names, and never a record
/// that names a missing file.
#[test]
fn what_a_killed_process_left_half_done_is_collected() {
    let dir = tempfile::tempdir().unwrap();
    let session = SessionId::new();
    let store = open(&dir, 3).unwrap();
    let first = store.create(session, record(), snapshot(0)).unwrap();
    // As far as `add_snapshot` comes before its record is flushed.
    let orphan = BlobName::of(&[9; 500]);
    store.blobs.write(&orphan, &[9; 500]).unwrap();
    fs::write(store.blobs.dir().join("abc.half"), [1; 3]).unwrap();
    assert_eq!(store.record(session).unwrap().unwrap().head().unwrap(), &first);
    drop(store);

    let store = open(&dir, 3).unwrap();
    assert!(store.blobs.check(&orphan).unwrap().is_some());
    assert_eq!(files(&store), named(&store));
    assert_eq!(store.read(session, &first).unwrap().state, vec![0; 1000]);
}

/// The record of a snapshot whose blob cannot be written is not changed.
#[test]
fn no_record_without_its_blob() {
    let dir = tempfile::tempdir().unwrap();
    let session = SessionId::new();
    let store = open(&dir, 3).unwrap();
    let first = store.create(session, record(), snapshot(0)).unwrap();
    // A folder stands where the file has to go.
    let name = blake3::hash(&[1; 1000]).to_hex().to_string();
    fs::create_dir_all(store.blobs.dir().join(name).join("x")).unwrap();
    assert!(matches!(store.add_snapshot(session, snapshot(1)), Err(Error::StoreFile { .. })));
    assert_eq!(store.record(session).unwrap().unwrap().head().unwrap(), &first);
}

#[test]
fn a_second_process_is_told_that_the_store_is_in_use() {
    let dir = tempfile::tempdir().unwrap();
    let _store = open(&dir, 3).unwrap();
    let error = open(&dir, 3).err().unwrap();
    assert!(matches!(error, Error::StoreLocked { .. }), "{error}");
}

#[test]
fn another_format_version_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    for version in ["99", "1", "later"] {
        let store = open(&dir, 3).unwrap();
        store.records.set_version(version);
        drop(store);
        let error = open(&dir, 3).err().unwrap();
        assert!(matches!(error, Error::StoreVersion { .. }), "{error}");
        let text = error.to_string();
        assert!(text.contains(version) && text.contains("reads version"), "{text}");
        Records::force_version(dir.path(), "3");
    }
    open(&dir, 3).unwrap();
}

/// A file's content changes, its end is cut off, or it is gone.
#[test]
fn a_damaged_snapshot_is_named_and_kept_and_the_one_before_is_offered() {
    type Harm = fn(&Path);
    let harms: [(&str, Harm); 3] = [
        ("hash to", |file| fs::write(file, [9; 1000]).unwrap()),
        ("its 3 bytes", |file| fs::write(file, [1; 3]).unwrap()),
        ("is missing", |file| fs::remove_file(file).unwrap()),
    ];
    for (says, harm) in harms {
        for hurt_answers in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            let store = open(&dir, 3).unwrap();
            let session = SessionId::new();
            let first = store.create(session, record(), snapshot(0)).unwrap();
            let before = store.add_snapshot(session, snapshot(1)).unwrap();
            let taken = store.add_snapshot(session, snapshot(2)).unwrap();
            let hurt =
                if hurt_answers { taken.answers.clone().unwrap() } else { taken.state.clone() };
            let file = store.blobs.path(&hurt);
            harm(&file);
            let left = fs::read(&file).ok();

            let error = store.read(session, &taken).unwrap_err();
            let text = error.to_string();
            for part in [&taken.id, says, &hurt.0, &format!("{} is whole", before.id)] {
                assert!(text.contains(part), "{part} is not in {text}");
            }
            // The session goes on from there; the file is kept, and nobody names it any more.
            let found = store.record(session).unwrap().unwrap();
            assert_eq!(found.head().unwrap(), &before);
            assert_eq!(found.newest_first().cloned().collect::<Vec<_>>(), [before.clone(), first]);
            assert_eq!(fs::read(store.blobs.damaged_dir().join(&hurt.0)).ok(), left);
            assert_eq!(files(&store), named(&store));
            assert_eq!(found.no_such(session, &taken.id).to_string(), text);
            let unknown = found.no_such(session, "77-step9").to_string();
            assert!(unknown.contains(&before.id) && unknown.contains("77-step9"), "{unknown}");

            // Taken again at the same point, it is whole again.
            let again = store.add_snapshot(session, snapshot(2)).unwrap();
            assert_eq!(store.read(session, &again).unwrap().state, vec![2; 1000]);
            drop(store);
            let store = open(&dir, 3).unwrap();
            assert_eq!(store.whole_head(session).unwrap().head().unwrap(), &again);
            assert_eq!(fs::read(store.blobs.damaged_dir().join(&hurt.0)).ok(), left);
        }
    }
}

#[test]
fn a_session_goes_back_to_its_newest_whole_snapshot() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, 5).unwrap();
    let session = SessionId::new();
    store.create(session, record(), snapshot(0)).unwrap();
    let taken: Vec<SnapshotRecord> =
        (1..=4).map(|step| store.add_snapshot(session, snapshot(step)).unwrap()).collect();
    for damaged in &taken[2..] {
        fs::write(store.blobs.path(&damaged.state), "x").unwrap();
    }
    let found = store.whole_head(session).unwrap();
    assert_eq!(found.head().unwrap(), &taken[1]);
    // The last of those that are found on the way was not damaged when it was looked at; now it is.
    let steps: Vec<u64> = found.damaged.iter().map(|damaged| damaged.step).collect();
    assert_eq!(steps, [4]);
    assert!(store.read(session, &taken[2]).is_err());
    assert_eq!(kept(&store, session), [0, 1, 2]);
    // Nothing whole is left: all stays as it is, and that is said.
    for step in kept(&store, session) {
        fs::remove_file(store.blobs.path(&BlobName::of(&[step as u8; 1000]))).unwrap();
    }
    let text = store.whole_head(session).unwrap_err().to_string();
    assert!(text.contains("No other snapshot"), "{text}");
    assert_eq!(kept(&store, session), [0, 1, 2]);
    // The files come back, as from a copy.
    for step in [0, 1, 2] {
        let content = [step; 1000];
        store.blobs.write(&BlobName::of(&content), &content).unwrap();
    }
    assert_eq!(store.whole_head(session).unwrap().head().unwrap(), &taken[1]);
}

/// Of the same length, so that only its content tells: a new snapshot of the same content must not
/// name it.
#[test]
fn a_damaged_file_is_not_taken_for_a_new_snapshots_own() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, 3).unwrap();
    let (session, other) = (SessionId::new(), SessionId::new());
    let taken = store.create(session, record(), snapshot(7)).unwrap();
    fs::write(store.blobs.path(&taken.state), [1; 1000]).unwrap();
    let same = store.create(other, record(), snapshot(7)).unwrap();
    assert_eq!(same.state, taken.state);
    assert_eq!(store.read(other, &same).unwrap().state, vec![7; 1000]);
    assert_eq!(store.read(session, &taken).unwrap().state, vec![7; 1000]);
}

#[test]
fn a_damaged_record_harms_nobody_else_and_its_files_stay() {
    let dir = tempfile::tempdir().unwrap();
    let (hurt, other, forgotten) = (SessionId::new(), SessionId::new(), SessionId::new());
    let store = open(&dir, 3).unwrap();
    store.create(hurt, record(), snapshot(1)).unwrap();
    let fine = store.create(other, record(), snapshot(2)).unwrap();
    // The same content as the damaged one's.
    store.create(forgotten, record(), snapshot(1)).unwrap();
    let mut bytes = store.records.raw(hurt).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    store.records.put_raw(hurt.to_string().as_bytes(), &bytes);
    let before = files(&store);
    drop(store);

    for _ in 0..2 {
        let store = open(&dir, 3).unwrap();
        assert_eq!(files(&store), before);
        let error = store.record(hurt).unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, Error::RecordDamaged { .. }), "{text}");
        assert!(text.contains(&hurt.to_string()) && text.contains("checksum"), "{text}");
        let aside = store.aside(&hurt.to_string());
        assert_eq!(fs::read(&aside).unwrap(), bytes);
        assert!(text.contains(&aside.display().to_string()), "{text}");
        assert!(store.records().iter().all(|(session, _)| *session != hurt));
        assert_eq!(store.read(other, &fine).unwrap().state, vec![2; 1000]);
        assert!(store.add_snapshot(hurt, snapshot(3)).is_err());
        assert!(store.whole_head(hurt).is_err());
    }
    // Who shares its files may go; they stay.
    let store = open(&dir, 3).unwrap();
    store.forget(forgotten).unwrap();
    store.add_snapshot(other, snapshot(5)).unwrap();
    assert!(before.is_subset(&files(&store)));
    // Once a person has taken it away, its files go.
    fs::remove_file(store.aside(&hurt.to_string())).unwrap();
    drop(store);
    let store = open(&dir, 3).unwrap();
    assert_eq!(files(&store), named(&store));
    assert!(store.record(hurt).unwrap().is_none());
}

/// As version 2 wrote it: bare JSON.
#[test]
fn a_store_of_version_2_becomes_one_of_version_3_whenever_that_was_interrupted() {
    let dir = tempfile::tempdir().unwrap();
    let sessions: Vec<SessionId> = (0..5).map(|_| SessionId::new()).collect();
    let store = open(&dir, 3).unwrap();
    let mut expected = Vec::new();
    for (n, &session) in sessions.iter().enumerate() {
        store.create(session, record(), snapshot(n as u64)).unwrap();
        let known = store.record(session).unwrap().unwrap();
        let mut json = serde_json::to_value(&known).unwrap();
        // They were not there then.
        for later in ["tenant", "epoch", "damaged"] {
            json.as_object_mut().unwrap().remove(later);
        }
        // The process died behind the records and before the version: the first has its checksum.
        if n > 0 {
            let old = serde_json::to_vec(&json).unwrap();
            store.records.put_raw(session.to_string().as_bytes(), &old);
        }
        expected.push((session, known));
    }
    store.records.put_raw(b"0123", b"{\"name\": \"cut");
    store.records.set_version("2");
    drop(store);

    for _ in 0..2 {
        let store = open(&dir, 3).unwrap();
        for (session, known) in &expected {
            assert_eq!(store.record(*session).unwrap().as_ref(), Some(known));
            store.read(*session, known.head().unwrap()).unwrap();
        }
        assert_eq!(store.records().len(), expected.len());
        assert_eq!(fs::read(store.aside("0123")).unwrap(), b"{\"name\": \"cut");
    }
}

/// sled refuses everything once a write has failed, and nobody knows how far that one came.
#[test]
fn records_go_on_after_a_write_that_failed() {
    let dir = tempfile::tempdir().unwrap();
    let [kept_one, lost, forgotten] = [SessionId::new(), SessionId::new(), SessionId::new()];
    let store = open(&dir, 3).unwrap();
    store.create(kept_one, record(), snapshot(0)).unwrap();
    let one = store.record(kept_one).unwrap().unwrap();
    // On the disk, but told as failed: another head, a session that was never made; and one that is
    // gone there.
    let mut other = one.clone();
    other.head = "99-step99".into();
    store.records.put_unflushed(kept_one, &other);
    store.records.put_unflushed(lost, &one);
    store.create(forgotten, record(), snapshot(1)).unwrap();
    store.records.remove_unknown(forgotten);
    store.records.fail();
    assert_eq!(store.record(kept_one).unwrap().as_ref(), Some(&one));
    store.add_snapshot(kept_one, snapshot(2)).unwrap();
    let expected = store.record(kept_one).unwrap();
    drop(store);
    let store = open(&dir, 3).unwrap();
    assert_eq!(store.record(kept_one).unwrap(), expected);
    assert!(store.record(lost).unwrap().is_none());
    assert!(store.record(forgotten).unwrap().is_some());
    assert_eq!(files(&store), named(&store));
}

#[test]
fn an_earlier_point_that_lands_late_is_kept_and_is_no_head() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), Kept { of_client: 3, of_server: 2 }).unwrap();
    let session = SessionId::new();
    store.create(session, record(), own(0)).unwrap();
    let newer = store.add_snapshot(session, snapshot(4)).unwrap();
    store.add_snapshot(session, own(3)).unwrap();
    let found = store.record(session).unwrap().unwrap();
    assert_eq!(found.head().unwrap(), &newer);
    assert_eq!(kept(&store, session), [0, 3, 4]);
    store.add_snapshot(session, own(5)).unwrap();
    assert_eq!(kept(&store, session), [3, 4, 5]);
}

#[test]
fn what_an_actor_that_ended_was_writing_does_not_land() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, 3).unwrap();
    let session = SessionId::new();
    let first = store.create(session, record(), own(0)).unwrap();
    let ended = AtomicBool::new(false);
    let second = store.add_snapshot_unless(&ended, session, own(1)).unwrap();
    ended.store(true, Ordering::Release);
    let late = store.add_snapshot_unless(&ended, session, own(2));
    assert!(matches!(late, Err(Error::Ended)));
    assert_eq!(store.record(session).unwrap().unwrap().head().unwrap(), &second);
    assert_ne!(first.id, second.id);
    assert_eq!(files(&store), named(&store));
}

#[test]
fn a_client_that_was_taken_over_from_stays_so_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let session = SessionId::new();
    let store = open(&dir, 3).unwrap();
    let first = store.create(session, record(), own(0)).unwrap();
    store.set_epoch(session, 7).unwrap();
    store.set_epoch(session, 5).unwrap();
    store.set_head(session, &first.id, 6).unwrap();
    drop(store);
    let store = open(&dir, 3).unwrap();
    assert_eq!(store.whole_head(session).unwrap().epoch, 7);
}

#[test]
fn a_store_of_a_thousand_sessions_opens_with_all_of_them_and_without_what_is_left_over() {
    const N_SESSIONS: usize = 1000;
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), Kept { of_client: 8, of_server: 2 }).unwrap();
    let sessions: Vec<SessionId> = (0..N_SESSIONS).map(|_| SessionId::new()).collect();
    // Ten snapshots each, written as one process after another would leave them, without waiting
    // for the disk each time.
    for (n, session) in sessions.iter().enumerate() {
        let mut known = record();
        for step in 0..10u64 {
            let content = format!("session {n} step {step}");
            let state = BlobName::of(content.as_bytes());
            fs::write(store.blobs.path(&state), &content).unwrap();
            let origin = if step < 2 { Origin::Server } else { Origin::Client };
            let (id, bytes) = (format!("{}-step{step}", step + 1), content.len() as u64);
            known.push(SnapshotRecord {
                id,
                step,
                sequence: step,
                origin,
                state,
                answers: None,
                bytes,
            });
        }
        store.records.put_unflushed(*session, &known);
    }
    fs::write(store.blobs.path(&BlobName::of(b"nobody's")), "nobody's").unwrap();
    fs::write(store.blobs.dir().join("abc.7"), "half").unwrap();
    drop(store);

    let store = Store::open(dir.path(), Kept { of_client: 8, of_server: 2 }).unwrap();
    assert_eq!(store.records().len(), N_SESSIONS);
    let there = files(&store);
    assert_eq!(there.len(), 10 * N_SESSIONS);
    assert_eq!(there, named(&store));
    for (n, session) in sessions.iter().enumerate().step_by(97) {
        let known = store.whole_head(*session).unwrap();
        let read = store.read(*session, known.head().unwrap()).unwrap();
        assert_eq!(read.state, format!("session {n} step 9").into_bytes());
    }
    let taken = store.add_snapshot(sessions[500], snapshot(99)).unwrap();
    assert_eq!(kept(&store, sessions[500]).len(), 10);
    assert_eq!(taken.id, "11-step99");
}

#[test]
fn others_on_the_machine_cannot_read_the_store() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("new").join("store");
    let store = Store::open(&path, Kept { of_client: 3, of_server: 2 }).unwrap();
    store.create(SessionId::new(), record(), snapshot(0)).unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    for folder in ["", "blobs", "records"] {
        assert_eq!(mode(&path.join(folder)), 0o700, "{folder}");
    }
    assert_eq!(mode(&path.join("reserve")), 0o600);
    let files = files(&store);
    assert_eq!(files.len(), 2);
    for file in files {
        assert_eq!(mode(&path.join("blobs").join(&file)), 0o600, "{file}");
    }
}

#[test]
fn room_is_kept_for_the_next_start_before_anything_large_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("reserve");
    let is_whole = || fs::metadata(&path).is_ok_and(|file| file.len() == RESERVE_BYTES as u64);
    let store = open(&dir, 3).unwrap();
    assert!(is_whole());
    assert!(store.reserve.give_up());
    assert!(!path.exists() && !store.reserve.give_up());
    store.create(SessionId::new(), record(), snapshot(0)).unwrap();
    assert!(is_whole());
    drop(store);
    // Cut off, as by a crash.
    fs::write(&path, "half").unwrap();
    drop(open(&dir, 3).unwrap());
    assert!(is_whole());
}

#[test]
fn a_half_written_index_harms_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let session = SessionId::new();
    let store = open(&dir, 3).unwrap();
    store.create(session, record(), snapshot(0)).unwrap();
    // Beside a server that runs, it stays: it may be the one that is being written.
    let half = store.records.path().join("snap.FFFFFFFFFFFFFFFF.generating");
    fs::write(&half, "").unwrap();
    assert!(matches!(open(&dir, 3), Err(Error::StoreLocked { .. })));
    assert!(half.exists());
    drop(store);
    let store = open(&dir, 3).unwrap();
    assert!(store.record(session).unwrap().is_some());
}
