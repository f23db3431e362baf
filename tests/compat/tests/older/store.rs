//! A store that a server of an earlier release wrote, and what stands in it.
//!
//! `stores/RELEASE` was made by `examples/freeze.rs` with that release's program: one session, two steps
//! of `offshoot_tests::run::train`, a snapshot, a drain. Its adapter stands beside it.

use offshoot_client::{Client, ExportedAdapter, SessionState};
use offshoot_tests::run::{open_request, train};
use offshoot_tests::{TestServer, server_config};
use std::path::{Path, PathBuf};

/// Steps in the stores.
const STEPS: u64 = 2;

fn stores() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("stores");
    let mut all: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_dir())
        .collect();
    all.sort();
    assert!(!all.is_empty(), "no store is kept");
    all
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().map(Result::unwrap) {
        let target = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy(&entry.path(), &target),
            false => drop(std::fs::copy(entry.path(), target).unwrap()),
        }
    }
}

fn values(adapter: &ExportedAdapter) -> Vec<(String, Vec<f32>)> {
    let mut tensors: Vec<_> =
        adapter.tensors.iter().map(|(name, tensor)| (name.clone(), tensor.to_f32())).collect();
    tensors.sort_by(|(a, _), (b, _)| a.cmp(b));
    tensors
}

/// The store's machine may round products otherwise than this one.
fn assert_close(found: &ExportedAdapter, expected: &ExportedAdapter) {
    assert_eq!(found.step, expected.step);
    let (found, expected) = (values(found), values(expected));
    assert_eq!(found.len(), expected.len());
    for ((name, a), (other, b)) in found.iter().zip(&expected) {
        assert_eq!(name, other);
        let far = a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0f32, f32::max);
        let size = b.iter().map(|b| b.abs()).fold(0.0f32, f32::max);
        println!("{name}: {far:e} of {size:e}");
        assert!(far <= 1e-3 * size + 1e-6, "{name} differs by {far:e} of {size:e}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn stores_of_earlier_releases_open_and_their_sessions_go_on() {
    for kept in stores() {
        println!("{}", kept.display());
        let folder = tempfile::tempdir().unwrap();
        copy(&kept, folder.path());
        let server = TestServer::start_with(server_config(folder.path())).await;
        let client = Client::connect(&server.endpoint()).await.unwrap();
        let h = client.describe().await.unwrap().hidden_size;

        let sessions = client.list_sessions().await.unwrap();
        let [stored] = &sessions[..] else { panic!("one session, not {sessions:?}") };
        assert_eq!((stored.state, stored.step), (SessionState::Parked, STEPS));
        assert_eq!(stored.name, "claim");
        assert!(!stored.snapshots.is_empty());
        let (session, restored) = client.restore(&stored.id, None).await.unwrap();
        assert_eq!(restored.snapshot.step, STEPS);
        assert_eq!(restored.lora.r, 3);

        // The same run from its beginning on today's server, as far as the store and a step further.
        let whole = client.open(open_request(&client).await.unwrap()).await.unwrap();
        train(&whole, h, 0..STEPS).await.unwrap();
        whole.settle().await.unwrap();
        assert_close(&session.export().await.unwrap(), &whole.export().await.unwrap());
        for each in [&session, &whole] {
            train(each, h, STEPS..STEPS + 1).await.unwrap();
            each.settle().await.unwrap();
        }
        // With its optimizer's moments: without them the third step would be another one.
        assert_close(&session.export().await.unwrap(), &whole.export().await.unwrap());
        session.snapshot().await.unwrap();
        for each in [session, whole] {
            each.close(false).await.unwrap();
        }
        server.drain().await;
    }
}
