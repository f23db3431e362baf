use super::*;

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
                reason: String::new(),
                taken_millis: 0,
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
