//! A store that goes from one process to the next, and from one build to another.

use super::*;
use crate::error::Class;
use serde::Deserialize;
use std::time::Duration;

#[test]
fn a_closed_store_is_another_processs_and_changes_nothing_any_more() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, 3).unwrap();
    let session = SessionId::new();
    let first = store.create(session, record(), snapshot(1)).unwrap();
    let mut closed = store.closed();
    assert!(StoreLock::try_take(dir.path()).unwrap().is_none());
    store.close();
    assert!(closed.try_recv().is_err(), "told");

    let next = open(&dir, 3).unwrap();
    let before = (files(&next), next.record(session).unwrap());
    let late = [
        store.add_snapshot(session, snapshot(2)).unwrap_err(),
        store.claim_head(session).unwrap_err(),
        store.set_epoch(session, u64::MAX).unwrap_err(),
        store.set_head(session, &first.id, 1).unwrap_err(),
        store.read(session, &first).unwrap_err(),
        store.whole_head(session).unwrap_err(),
        store.forget(session).unwrap_err(),
    ];
    for error in late {
        assert_eq!(error.class(), Class::Draining, "{error}");
    }
    // What it knew can still be looked at.
    assert_eq!(store.record(session).unwrap(), before.1);
    drop(store);
    assert_eq!((files(&next), next.record(session).unwrap()), before);
    assert!(StoreLock::try_take(dir.path()).unwrap().is_none(), "the next one still has it");
}

/// sled lets go of its lock then, and opens it again at the next write.
#[test]
fn a_write_that_failed_gives_the_store_to_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, 3).unwrap();
    store.records.fail();
    assert!(StoreLock::try_take(dir.path()).unwrap().is_none());
    store.create(SessionId::new(), record(), snapshot(1)).unwrap();
}

/// One that an older build has open has no lock but that of its records.
#[test]
fn a_store_of_an_older_build_is_waited_for_as_well() {
    let dir = tempfile::tempdir().unwrap();
    drop(open(&dir, 3).unwrap());
    let (records, _) = Records::open(dir.path()).unwrap();
    assert!(StoreLock::try_take(dir.path()).unwrap().is_none());
    drop(records);
    assert!(StoreLock::try_take(dir.path()).unwrap().is_some());
}

#[tokio::test]
async fn whoever_waits_gets_the_store_when_it_is_free_or_says_for_how_long_it_was_not() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, 3).unwrap();
    let error = StoreLock::wait(dir.path(), Duration::from_millis(50)).await.unwrap_err();
    assert!(
        matches!(error, Error::StoreWait { .. }) && error.to_string().contains("0.05"),
        "{error}"
    );
    let path = dir.path().to_path_buf();
    let waits = tokio::spawn(async move { StoreLock::wait(&path, Duration::from_secs(60)).await });
    tokio::task::yield_now().await;
    store.close();
    let lock = waits.await.unwrap().unwrap();
    Store::open_locked(lock, Kept { of_client: 3, of_server: 1 }).unwrap();
}

/// As the first build with format version 3 wrote it.
const OF_THE_FIRST_BUILD: &str = r#"{"tenant":"","name":"team","lora":LORA,"adamw":ADAMW,"seed":7,
    "wire_dtype":"f32","fingerprint":"abc","split_point_1":0,"split_point_2":3,"head":"2-step1",
    "snapshots":[{"id":"1-step0","step":0,"sequence":0,"origin":"server","state":"STATE",
    "answers":null,"bytes":3},{"id":"2-step1","step":1,"sequence":3,"origin":"client",
    "state":"STATE","answers":"STATE","bytes":6}],"n_snapshots":2,"kept":["2-step1"],"epoch":9,
    "damaged":[]}"#;

/// What that build cannot do without.
#[derive(Deserialize)]
#[expect(dead_code, reason = "what is read must only be there")]
struct OfTheFirstBuild {
    name: String,
    lora: LoraSpec,
    adamw: AdamW,
    seed: u64,
    wire_dtype: String,
    fingerprint: String,
    split_point_1: usize,
    split_point_2: usize,
    head: String,
    snapshots: Vec<SnapshotOfTheFirstBuild>,
    n_snapshots: u64,
}

#[derive(Deserialize)]
#[expect(dead_code, reason = "what is read must only be there")]
struct SnapshotOfTheFirstBuild {
    id: String,
    step: u64,
    sequence: u64,
    origin: Origin,
    state: BlobName,
    answers: Option<BlobName>,
    bytes: u64,
}

/// A roll to a newer build, and back to the older one.
#[test]
fn builds_of_one_format_version_read_each_others_records() {
    let json = |value: serde_json::Result<String>| value.unwrap();
    let older = OF_THE_FIRST_BUILD
        .replace("LORA", &json(serde_json::to_string(&LoraSpec::default())))
        .replace("ADAMW", &json(serde_json::to_string(&AdamW::default())))
        .replace("STATE", &BlobName::of(b"abc").0);
    let record: Record = serde_json::from_str(&older).unwrap();
    assert_eq!((record.epoch, record.head().unwrap().sequence), (9, 3));

    let newer = json(serde_json::to_string(&record));
    let back: OfTheFirstBuild = serde_json::from_str(&newer).unwrap();
    assert_eq!((back.snapshots.len(), back.n_snapshots), (2, 2));

    // And this build reads what a later one adds.
    let later = newer.replacen('{', r#"{"of a later build":[1,2],"#, 1);
    let later = later.replace(r#"{"id":"#, r#"{"of a later build":true,"id":"#);
    assert_eq!(serde_json::from_str::<Record>(&later).unwrap(), record);
}
