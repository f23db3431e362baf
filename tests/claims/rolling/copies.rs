//! A store can be copied while its server runs, and the copy serves on another machine.

use super::{RANK, server_config};
use offshoot_client::{Client, ClientError, Session, SessionInfo};
use offshoot_server::{ServerConfig, backup_store, check_store};
use offshoot_tests::child::Child;
use offshoot_tests::follow::{Undisturbed, go_back, open, quick, undisturbed};
use offshoot_tests::proxy::Proxy;
use offshoot_tests::run::{assert_same_adapter, train};
use std::fs;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

const N_STEPS: u64 = 14;

/// Saves sessions at every second step.
fn saving(store: &Path) -> ServerConfig {
    let mut config = server_config(store);
    (config.session.snapshot_steps, config.session.snapshot_seconds) = (2, 0.0);
    config
}

async fn train_on(
    client: &Client,
    session: &mut Session,
    (mut steps, expected): (Range<u64>, &Undisturbed),
) -> Vec<u64> {
    let h = client.describe().await.unwrap().hidden_size;
    let mut went_back_to = Vec::new();
    loop {
        let step = async || -> Result<(), ClientError> {
            if steps.is_empty() {
                return session.settle().await.map(drop);
            }
            let found = train(session, h, steps.start..steps.start + 1).await?;
            assert!(found[0] == expected.numbers[steps.start as usize], "step {}", steps.start);
            Ok(())
        };
        match step().await {
            Ok(()) if steps.is_empty() => return went_back_to,
            Ok(()) => steps.start += 1,
            Err(error) => {
                steps.start = go_back(client, session, error).await.step;
                went_back_to.push(steps.start);
            }
        }
    }
}

async fn sessions(child: &Child) -> Vec<SessionInfo> {
    let client = Client::connect(&child.address().to_string()).await.unwrap();
    client.list_sessions().await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_of_a_running_servers_store_serves_elsewhere() {
    let expected = Arc::new(undisturbed(RANK, N_STEPS).await);
    let dir = tempfile::tempdir().unwrap();
    let [store, copy, second] = ["store", "copy", "second"].map(|name| dir.path().join(name));
    let child = Child::start_with(&saving(&store));
    let proxy = Proxy::start(child.address()).await.unwrap();
    let client = Client::connect_with(&proxy.endpoint(), quick()).await.unwrap();
    let mut session = open(&client, RANK).await;
    // Another one trains all the time, and is saved while the store is copied.
    let busy = {
        let (client, expected) = (client.clone(), expected.clone());
        let mut session = open(&client, RANK).await;
        tokio::spawn(async move {
            let went_back = train_on(&client, &mut session, (0..N_STEPS, &expected)).await;
            (session.export().await.unwrap(), went_back)
        })
    };
    assert!(train_on(&client, &mut session, (0..6, &expected)).await.is_empty());
    let copied = {
        let (store, copy) = (store.clone(), copy.clone());
        tokio::task::spawn_blocking(move || backup_store(&store, &copy).unwrap()).await.unwrap()
    };
    println!("{copied:?}");
    assert_eq!((copied.n_sessions, &copied.damaged[..]), (2, &[][..]));
    assert_eq!(check_store(&copy).unwrap(), copied);
    // Nothing is copied over anything.
    assert!(backup_store(&store, &copy).is_err());
    let saved = check_store(&copy).unwrap();
    assert!(saved.n_snapshots >= 2 && saved.bytes > 0, "{saved:?}");

    // What is trained after the copy is lost with the machine, and done again.
    assert!(train_on(&client, &mut session, (6..9, &expected)).await.is_empty());
    proxy.set_upstream(None);
    child.kill();
    fs::rename(&copy, &second).unwrap();
    let child = Child::start_with(&saving(&second));
    for session in sessions(&child).await {
        assert!(session.snapshots.iter().all(|s| s.step <= N_STEPS), "{session:?}");
    }
    proxy.set_upstream(Some(child.address()));
    let went_back_to = train_on(&client, &mut session, (9..N_STEPS, &expected)).await;
    println!("back to {went_back_to:?}");
    assert!(went_back_to.len() == 1 && went_back_to[0] <= 6, "{went_back_to:?}");
    assert_same_adapter(&session.export().await.unwrap(), &expected.adapter);
    let (adapter, _) = busy.await.unwrap();
    assert_same_adapter(&adapter, &expected.adapter);
    child.drain();
}

/// A store that nobody has open, too; and what is damaged is said.
#[tokio::test(flavor = "multi_thread")]
async fn a_check_names_what_is_damaged_and_a_copy_leaves_it_out() {
    let dir = tempfile::tempdir().unwrap();
    let [store, copy] = ["store", "copy"].map(|name| dir.path().join(name));
    let child = Child::start_with(&saving(&store));
    let client = Client::connect(&child.address().to_string()).await.unwrap();
    let session = open(&client, RANK).await;
    let h = client.describe().await.unwrap().hidden_size;
    train(&session, h, 0..2).await.unwrap();
    let snapshot = session.snapshot().await.unwrap();
    child.drain();
    let before = check_store(&store).unwrap();
    assert!(before.damaged.is_empty() && before.n_snapshots >= 2, "{before:?}");
    let mut blobs: Vec<_> =
        fs::read_dir(store.join("blobs")).unwrap().map(|entry| entry.unwrap().path()).collect();
    blobs.sort_by_key(|path| fs::metadata(path).unwrap().modified().unwrap());
    let newest = blobs.last().unwrap();
    let mut bytes = fs::read(newest).unwrap();
    bytes[10] ^= 1;
    fs::write(newest, bytes).unwrap();
    let found = check_store(&store).unwrap();
    println!("{found:?}");
    assert!(!found.damaged.is_empty());
    assert!(found.damaged.iter().all(|line| line.contains(session.id().as_str())));
    assert!(found.damaged.iter().any(|line| line.contains(&snapshot.snapshot_id)));
    let copied = backup_store(&store, &copy).unwrap();
    assert_eq!(copied.damaged.len(), found.damaged.len());
    let left_out = copy.join("blobs").join(newest.file_name().unwrap());
    assert!(!left_out.exists() && copy.join("blobs").read_dir().unwrap().count() > 0);
    assert!(check_store(&dir.path().join("nothing")).is_err());
}
