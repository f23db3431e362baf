use super::*;

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
    // In no blob's name: what is named can still be read.
    let place = bytes.windows(6).position(|word| word == b"\"seed\"").unwrap() + 1;
    bytes[place] ^= 1;
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
