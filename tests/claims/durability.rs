//! A session is durable while it trains, and what is damaged or full on disk costs as little as it
//! can: snapshots that the server takes by itself, the way back to a whole one, a disk without room.

mod durability {
    pub mod damage;
    pub mod full_disk;
}

use offshoot_client::{
    Client, ClientError, ExportedAdapter, PendingStep, Session, SessionId, SessionInfo,
    SnapshotInfo, StepTaken,
};
use offshoot_server::ServerConfig;
use offshoot_tests::child::Child;
use offshoot_tests::raw::{RawStream, rpc};
use offshoot_tests::run::{assert_same_adapter, input, open_request};
use offshoot_tests::{TestServer, server_config};
use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;
use tokio::time::Instant;

const N_STEPS: u64 = 6;

/// Not a claim: the server process that tests start and kill. See `offshoot_tests::child`.
#[test]
fn child_process() {
    offshoot_tests::child::serve_if_asked();
}

/// With a snapshot at every so many steps, none by time, and all of them kept.
fn every_steps(store: &Path, snapshot_steps: u64) -> ServerConfig {
    let mut config = server_config(store);
    config.session.snapshot_seconds = 0.0;
    config.session.snapshot_steps = snapshot_steps;
    config.store.server_snapshots_kept = 100;
    config
}

async fn open(client: &Client) -> Session {
    client.open(open_request(client).await.unwrap()).await.unwrap()
}

/// Step `n`, counted from 0: two microbatches, and the optimizer step, which is not waited for.
async fn step(session: &Session, h: usize, n: u64) -> Result<PendingStep, ClientError> {
    for part in 0..2 {
        let (output, microbatch, _) = session.forward(input(2 * n + part, &[5, 2, 4], h)).await?;
        microbatch.backward(output).await?;
    }
    session.step(0.01, 0.7).await
}

/// The same, and what its answer says.
async fn step_taken(session: &Session, h: usize, n: u64) -> StepTaken {
    let mut pending = step(session, h, n).await.unwrap();
    session.settle().await.unwrap();
    pending.now().unwrap().unwrap()
}

async fn hidden_size(client: &Client) -> usize {
    client.describe().await.unwrap().hidden_size
}

/// The adapter after each number of steps from 0 on, of a run that nothing happens to. Its server
/// has the default settings, by which it takes no snapshot in so short a time.
async fn undisturbed() -> Vec<ExportedAdapter> {
    let server = TestServer::start().await;
    let client = Client::connect(&server.endpoint()).await.unwrap();
    let (session, h) = (open(&client).await, hidden_size(&client).await);
    let mut after = vec![session.export().await.unwrap()];
    for n in 0..N_STEPS {
        assert!(!step_taken(&session, h, n).await.snapshot, "nobody waited a minute");
        after.push(session.export().await.unwrap());
    }
    server.drain().await;
    after
}

async fn info(client: &Client, id: &SessionId) -> SessionInfo {
    let all = client.list_sessions().await.unwrap();
    all.into_iter().find(|info| info.id == *id).expect("it is listed")
}

/// Polls until the session looks so.
async fn until(client: &Client, id: &SessionId, mut is_so: impl FnMut(&SessionInfo) -> bool) {
    let begun = Instant::now();
    loop {
        let info = info(client, id).await;
        if is_so(&info) {
            return;
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "{info:?}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

fn points(snapshots: &[SnapshotInfo]) -> Vec<(u64, u64)> {
    snapshots.iter().map(|snapshot| (snapshot.step, snapshot.sequence)).collect()
}

/// Names of the files with the snapshots' content.
fn blobs(store: &Path) -> BTreeSet<String> {
    let entries = std::fs::read_dir(store.join("blobs")).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// Frames follow each Step at once, and nothing waits for the copy.
#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_by_steps_is_the_session_as_it_was_behind_that_step() {
    let after = undisturbed().await;
    let store = tempfile::tempdir().unwrap();
    let server = TestServer::start_with(every_steps(store.path(), 1)).await;
    let client = Client::connect(&server.endpoint()).await.unwrap();
    let (session, h) = (open(&client).await, hidden_size(&client).await);
    let mut steps = Vec::new();
    for n in 0..N_STEPS {
        if n == N_STEPS / 2 {
            // However slow the disk is, it takes another one behind the first.
            until(&client, session.id(), |info| info.snapshots.len() > 1).await;
        }
        steps.push(step(&session, h, n).await.unwrap());
    }
    session.settle().await.unwrap();
    let taken: Vec<StepTaken> = steps.iter_mut().map(|s| s.now().unwrap().unwrap()).collect();

    // What was promised is there, and nothing else is; the first one began with the session.
    let promised = taken.iter().filter(|taken| taken.snapshot);
    let promised: Vec<(u64, u64)> =
        [(0, 0)].into_iter().chain(promised.map(|taken| (taken.step, taken.sequence))).collect();
    assert!(promised.len() > 2, "{taken:?}");
    until(&client, session.id(), |info| info.snapshots.len() == promised.len()).await;
    let snapshots = info(&client, session.id()).await.snapshots;
    assert_eq!(points(&snapshots), promised);
    assert_same_adapter(&session.export().await.unwrap(), &after[N_STEPS as usize]);

    // A client that attaches is told of all, the newest first.
    let id = session.id().clone();
    let raw = RawStream::attach(&mut rpc(&server.endpoint()).await, id.as_str()).await.unwrap();
    assert!(raw.attached.snapshots.iter().rev().eq(&snapshots), "{:?}", raw.attached.snapshots);
    assert_eq!(raw.attached.durable.as_ref(), snapshots.last());

    for snapshot in &snapshots {
        let (session, _) = client.restore(&id, Some(&snapshot.snapshot_id)).await.unwrap();
        assert_same_adapter(&session.export().await.unwrap(), &after[snapshot.step as usize]);
    }
    // And the run goes on from one in the middle to the same end.
    let middle = &snapshots[1];
    let (session, _) = client.restore(&id, Some(&middle.snapshot_id)).await.unwrap();
    for n in middle.step..N_STEPS {
        step(&session, h, n).await.unwrap();
    }
    session.settle().await.unwrap();
    assert_same_adapter(&session.export().await.unwrap(), &after[N_STEPS as usize]);
    server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn by_time_the_last_few_of_the_servers_own_stay_beside_those_of_the_client() {
    let store = tempfile::tempdir().unwrap();
    let mut config = server_config(store.path());
    config.session.snapshot_seconds = 1e-6;
    config.store.snapshots_kept = 2;
    config.store.server_snapshots_kept = 2;
    let server = TestServer::start_with(config).await;
    let client = Client::connect(&server.endpoint()).await.unwrap();
    let (session, h) = (open(&client).await, hidden_size(&client).await);
    let mut asked = Vec::new();
    for n in 0..8 {
        let taken = step_taken(&session, h, n).await;
        assert!(taken.snapshot, "so much time has passed: {taken:?}");
        until(&client, session.id(), |info| info.snapshots.iter().any(|s| s.step == n + 1)).await;
        if [2, 3, 5].contains(&n) {
            // The server has just taken it: it becomes the client's, and is not written twice.
            let before = blobs(store.path());
            asked.push(session.snapshot().await.unwrap());
            assert!(blobs(store.path()).is_subset(&before));
        }
    }
    let kept = info(&client, session.id()).await.snapshots;
    assert_eq!(points(&kept), [&points(&asked)[1..], &points(&kept)[2..]].concat());
    assert_eq!(kept[2..].iter().map(|s| s.step).collect::<Vec<_>>(), [7, 8]);
    // Each is an adapter and recorded answers; files of others are gone.
    assert_eq!(blobs(store.path()).len(), 2 * kept.len());
    server.drain().await;
}

/// At most the work since the last snapshot is lost, and it is done again to the same bits.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_server_goes_on_from_what_it_had_made_durable_by_itself() {
    let after = undisturbed().await;
    let store = tempfile::tempdir().unwrap();
    let config = every_steps(store.path(), 2);
    let (mut id, mut done, mut n_back) = (None, 0, 0);
    for n_kills in 0.. {
        let child = Child::start_with(&config);
        let client = Client::connect(&child.address().to_string()).await.unwrap();
        let h = hidden_size(&client).await;
        let session = match &id {
            None => open(&client).await,
            Some(id) => {
                let (session, restored) = client.restore(id, None).await.unwrap();
                assert!(restored.snapshot.step <= done);
                n_back += u32::from(restored.snapshot.step < done);
                done = restored.snapshot.step;
                session
            }
        };
        id = Some(session.id().clone());
        // The second step from here is on disk and a third follows when the kill comes; or that
        // second one is just being written.
        while done < N_STEPS {
            let taken = step_taken(&session, h, done).await;
            done = taken.step;
            if taken.snapshot && done < N_STEPS {
                if n_kills % 2 == 0 {
                    let is_there = |i: &SessionInfo| i.snapshots.iter().any(|s| s.step == done);
                    until(&client, session.id(), is_there).await;
                    done = step_taken(&session, h, done).await.step;
                }
                break;
            }
        }
        if done == N_STEPS {
            assert_same_adapter(&session.export().await.unwrap(), &after[N_STEPS as usize]);
            break;
        }
        child.kill();
    }
    assert!(n_back > 0, "no kill cost anything");
}
