//! A disk without room: for the server process, no file can grow.

use crate::{N_STEPS, blobs, every_steps, hidden_size, info, open, step, step_taken, undisturbed};
use offshoot_client::{Client, ErrorCode};
use offshoot_tests::child::Child;
use offshoot_tests::run::{assert_same_adapter, open_request};

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_costs_snapshots_and_nothing_else() {
    let after = undisturbed().await;
    let store = tempfile::tempdir().unwrap();
    let config = every_steps(store.path(), 1);
    let child = Child::start_with(&config);
    let endpoint = child.address().to_string();
    let client = Client::connect(&endpoint).await.unwrap();
    let (session, h) = (open(&client).await, hidden_size(&client).await);
    step_taken(&session, h, 0).await;
    let first = session.snapshot().await.unwrap();

    child.fill_disk(Some(1));
    let before = blobs(store.path());
    let taken = step_taken(&session, h, 1).await;
    assert!(taken.snapshot, "it is tried");
    let error = session.try_snapshot(vec![]).await.err().unwrap();
    let text = error.to_string();
    println!("{text}");
    assert_eq!(error.code(), Some(ErrorCode::Exhausted), "{text}");
    for part in ["could not be written to", "blobs", "Make room", "try again in 10 s"] {
        assert!(text.contains(part), "{part} is not in {text}");
    }
    // The session trains on; half files are gone, and so is nothing that was there.
    step_taken(&session, h, 2).await;
    assert_eq!(blobs(store.path()), before);
    let snapshots = info(&client, session.id()).await.snapshots;
    assert_eq!(snapshots.last(), Some(&first));
    // The records cannot be written either. Who comes now is taken in all the same; a new session,
    // which would not be durable, is refused.
    let late = Client::connect(&endpoint).await.unwrap();
    let refused = late.open(open_request(&late).await.unwrap());
    let short = std::time::Duration::from_secs(1);
    assert!(!matches!(tokio::time::timeout(short, refused).await, Ok(Ok(_))));

    child.fill_disk(None);
    let back = session.snapshot().await.unwrap();
    assert_eq!(back.step, 3);
    let id = session.id().clone();
    child.kill();
    let child = Child::start_with(&config);
    let client = Client::connect(&child.address().to_string()).await.unwrap();
    let (session, restored) = client.restore(&id, None).await.unwrap();
    assert_eq!(restored.snapshot.step, 3);
    for n in 3..N_STEPS {
        step(&session, h, n).await.unwrap();
    }
    session.settle().await.unwrap();
    assert_same_adapter(&session.export().await.unwrap(), &after[N_STEPS as usize]);
}
