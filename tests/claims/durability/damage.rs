//! What is damaged on disk.

use crate::{
    N_STEPS, blobs, every_steps, hidden_size, info, open, step, step_taken, undisturbed, until,
};
use offshoot_client::{Client, ErrorCode, Residency};
use offshoot_proto::v1::{Mode, client_frame, server_frame};
use offshoot_tests::TestServer;
use offshoot_tests::raw::{RawStream, forward, frame, rpc};
use offshoot_tests::run::{assert_same_adapter, input};
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// Turns one bit in the middle of the largest of these files; gives its name.
fn damage(store: &Path, names: &BTreeSet<String>) -> String {
    let path = |name: &String| store.join("blobs").join(name);
    let largest = names.iter().max_by_key(|name| fs::metadata(path(name)).unwrap().len());
    let name = largest.expect("there is one").clone();
    let mut bytes = fs::read(path(&name)).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(path(&name), bytes).unwrap();
    name
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_whose_head_is_damaged_comes_back_one_snapshot_earlier() {
    let after = undisturbed().await;
    let store = tempfile::tempdir().unwrap();
    let server = TestServer::start_with(every_steps(store.path(), 0)).await;
    let client = Client::connect(&server.endpoint()).await.unwrap();
    let (session, h) = (open(&client).await, hidden_size(&client).await);
    step_taken(&session, h, 0).await;
    let whole = session.snapshot().await.unwrap();
    step_taken(&session, h, 1).await;
    let before = blobs(store.path());
    let hurt = session.snapshot().await.unwrap();
    let id = session.id().clone();
    server.drain().await;
    let file = damage(store.path(), &(&blobs(store.path()) - &before));

    // It is found when the session is asked for, not when the server starts.
    let server = TestServer::start_with(every_steps(store.path(), 0)).await;
    let mut raw_client = rpc(&server.endpoint()).await;
    let raw = RawStream::attach(&mut raw_client, id.as_str()).await.unwrap();
    let attached = &raw.attached;
    assert_eq!((attached.last_applied, attached.step), (whole.sequence, whole.step));
    assert_eq!(attached.durable.as_ref(), Some(&whole));
    assert!(attached.snapshots.iter().all(|s| s.snapshot_id != hurt.snapshot_id));

    // Who names the damaged one is told what is wrong and which one to take.
    let client = Client::connect(&server.endpoint()).await.unwrap();
    let error = client.restore(&id, Some(&hurt.snapshot_id)).await.err().unwrap();
    let text = error.to_string();
    println!("{text}");
    for part in [&hurt.snapshot_id, &file, &format!("{} is whole", whole.snapshot_id)] {
        assert!(text.contains(part), "{part} is not in {text}");
    }
    assert!(store.path().join("damaged").join(&file).is_file(), "it is kept");
    let (session, restored) = client.restore(&id, None).await.unwrap();
    assert_eq!(restored.snapshot, whole);
    for n in whole.step..N_STEPS {
        step(&session, h, n).await.unwrap();
    }
    session.settle().await.unwrap();
    assert_same_adapter(&session.export().await.unwrap(), &after[N_STEPS as usize]);
    server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_finds_damage_and_leaves_the_live_session_as_it_is() {
    let store = tempfile::tempdir().unwrap();
    let server = TestServer::start_with(every_steps(store.path(), 0)).await;
    let client = Client::connect(&server.endpoint()).await.unwrap();
    let (session, h) = (open(&client).await, hidden_size(&client).await);
    step_taken(&session, h, 0).await;
    let before = blobs(store.path());
    let hurt = session.snapshot().await.unwrap();
    damage(store.path(), &(&blobs(store.path()) - &before));
    let error = client.restore(session.id(), None).await.err().unwrap();
    let text = error.to_string();
    assert!(text.contains(&hurt.snapshot_id) && text.contains("1-step0 is whole"), "{text}");
    // The session on the device was not touched, and is made durable anew.
    let trained = session.export().await.unwrap();
    let again = session.snapshot().await.unwrap();
    assert_eq!((again.step, again.sequence), (hurt.step, hurt.sequence));
    let id = session.id().clone();
    server.drain().await;
    let server = TestServer::start_with(every_steps(store.path(), 0)).await;
    let client = Client::connect(&server.endpoint()).await.unwrap();
    let (session, restored) = client.restore(&id, None).await.unwrap();
    assert_eq!(restored.snapshot, again);
    assert_same_adapter(&session.export().await.unwrap(), &trained);
    server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_is_away_on_disk_when_that_is_damaged_goes_back_with_its_next_frame() {
    let after = undisturbed().await;
    let store = tempfile::tempdir().unwrap();
    let mut config = every_steps(store.path(), 0);
    config.session.idle_seconds = 0.05;
    let server = TestServer::start_with(config).await;
    let client = Client::connect(&server.endpoint()).await.unwrap();
    let (session, h) = (open(&client).await, hidden_size(&client).await);
    step_taken(&session, h, 0).await;
    let whole = session.snapshot().await.unwrap();
    let before = blobs(store.path());
    step_taken(&session, h, 1).await;
    let id = session.id().clone();
    until(&client, &id, |info| info.residency == Residency::Disk && info.snapshots.len() == 3)
        .await;
    damage(store.path(), &(&blobs(store.path()) - &before));

    // It is live, so a stream finds it where it was; its adapter is asked for by the first frame.
    let mut raw_client = rpc(&server.endpoint()).await;
    let mut raw = RawStream::attach(&mut raw_client, id.as_str()).await.unwrap();
    assert_eq!(raw.attached.step, 2);
    let forward = forward(input(4, &[3], h), 99, Mode::Eval);
    raw.send(frame(raw.next, client_frame::Body::Forward(forward))).await;
    let last = raw.answer().await;
    let Some(server_frame::Body::Error(error)) = last.body else { panic!("{last:?}") };
    println!("{}", error.message);
    assert_eq!((last.sequence, error.code()), (0, ErrorCode::Draining), "{}", error.message);
    assert!(error.message.contains(&whole.snapshot_id), "{}", error.message);
    let again = RawStream::attach(&mut raw_client, id.as_str()).await.unwrap();
    assert_eq!(again.attached.last_applied, whole.sequence);

    let (session, _) = client.restore(&id, None).await.unwrap();
    for n in whole.step..N_STEPS {
        step(&session, h, n).await.unwrap();
    }
    session.settle().await.unwrap();
    assert_same_adapter(&session.export().await.unwrap(), &after[N_STEPS as usize]);
    assert_eq!(info(&client, &id).await.step, N_STEPS);
    server.drain().await;
}
