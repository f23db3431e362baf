//! `kill -9` of the server, its drain, and sessions that leave it.

use super::{Follower, Undisturbed, every_second_step, only_session, undisturbed, until};
use offshoot_client::{Residency, SessionState};
use offshoot_server::ServerConfig;
use offshoot_tests::child::Child;
use offshoot_tests::proxy::Proxy;
use offshoot_tests::run::assert_same_adapter;
use offshoot_tests::watch::FolderWatch;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

const RANK: u32 = 3;

/// A server, a follower of it on its way, and what must come of it.
struct Scene {
    config: ServerConfig,
    child: Option<Child>,
    proxy: Proxy,
    expected: Arc<Undisturbed>,
}

impl Scene {
    async fn new(config: ServerConfig, rank: u32, n_steps: u64) -> Scene {
        let expected = Arc::new(undisturbed(rank, n_steps).await);
        let child = Child::start_with(&config);
        let proxy = Proxy::start(child.address()).await.unwrap();
        Scene { config, child: Some(child), proxy, expected }
    }

    fn child(&self) -> &Child {
        self.child.as_ref().unwrap()
    }

    fn kill(&mut self) {
        self.proxy.set_upstream(None);
        self.child.take().unwrap().kill();
    }

    fn start(&mut self) {
        let child = Child::start_with(&self.config);
        self.proxy.set_upstream(Some(child.address()));
        self.child = Some(child);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_killed_at_random_moments_loses_and_doubles_nothing() {
    let store = tempfile::tempdir().unwrap();
    let mut scene = Scene::new(every_second_step(store.path()), RANK, 24).await;
    let follower = Follower::new(&scene.proxy, RANK, 5).await;
    let progress = follower.progress.clone();
    let running = tokio::spawn(follower.train_all(scene.expected.clone()));
    let mut rng = StdRng::seed_from_u64(1);
    let mut n_kills = 0;
    while progress.wait_for(rng.random_range(0..=4), &running).await && n_kills < 7 {
        // Anywhere within the frames of a step.
        tokio::time::sleep(Duration::from_micros(rng.random_range(0..15_000))).await;
        scene.kill();
        scene.start();
        n_kills += 1;
    }
    let session = running.await.unwrap();
    println!("{n_kills} kills, {} steps replayed", progress.replayed.load(Ordering::SeqCst));
    assert!(n_kills >= 4, "the run was too quick to be disturbed");
    assert!(progress.replayed.load(Ordering::SeqCst) > 0);
    assert_same_adapter(&session.export().await.unwrap(), &scene.expected.adapter);
}

/// Files that are not whole: a whole one is named by its hash alone.
fn n_half_written(blobs: &Path) -> usize {
    let entries = std::fs::read_dir(blobs).unwrap();
    entries.filter(|entry| entry.as_ref().unwrap().file_name().len() != 64).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_killed_while_it_writes_a_snapshot_has_the_one_before() {
    // Large enough that writing takes its time.
    let rank = 256;
    let store = tempfile::tempdir().unwrap();
    let mut scene = Scene::new(every_second_step(store.path()), rank, 24).await;
    let follower = Follower::new(&scene.proxy, rank, 3).await;
    let running = tokio::spawn(follower.train_all(scene.expected.clone()));
    let blobs = store.path().join("blobs");
    let (mut n_within, mut n_kills) = (0, 0);
    // A strike may come too late to find a file half written; then the run is two steps further.
    while (n_within < 2 || n_kills < 5) && !running.is_finished() {
        // Sometimes as soon as a file is begun, sometimes as soon as it has its name.
        let wants_renamed = n_kills % 2 == 1;
        let (folder, child) = (blobs.clone(), scene.child.take().unwrap());
        let struck = tokio::task::spawn_blocking(move || {
            let mut watch = FolderWatch::new(&folder).unwrap();
            while let Some(seen) = watch.next(Duration::from_secs(5)).unwrap() {
                if seen.renamed == wants_renamed {
                    child.kill();
                    return None;
                }
            }
            Some(child)
        });
        scene.child = struck.await.unwrap();
        if scene.child.is_some() {
            break;
        }
        n_kills += 1;
        n_within += usize::from(n_half_written(&blobs) > 0);
        scene.start();
        assert_eq!(n_half_written(&blobs), 0, "what was left half written is collected");
    }
    let session = running.await.unwrap();
    println!("{n_kills} kills, {n_within} of them within the writing of a file");
    assert!(n_within >= 2 && n_kills >= 5, "{n_kills} kills, {n_within} within a file");
    assert_same_adapter(&session.export().await.unwrap(), &scene.expected.adapter);
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_that_leave_by_lease_idleness_and_drain_and_come_back_are_whole() {
    let store = tempfile::tempdir().unwrap();
    let mut config = every_second_step(store.path());
    (config.session.lease_seconds, config.session.idle_seconds) = (0.1, 0.1);
    let mut scene = Scene::new(config, RANK, 30).await;
    let follower = Follower::new(&scene.proxy, RANK, 7).await;
    let progress = follower.progress.clone();
    let running = tokio::spawn(follower.train_all(scene.expected.clone()));
    for round in 0..2 {
        assert!(progress.wait_for(2, &running).await);
        // It says nothing until its session has left the device.
        let pause = progress.gate.lock().await;
        let server = scene.child().address().to_string();
        let left = async || only_session(&server).await.residency != Residency::Device;
        until("the session leaves the device", left).await;
        drop(pause);

        assert!(progress.wait_for(2, &running).await);
        // It cannot come back until it is parked.
        scene.proxy.set_upstream(None);
        scene.proxy.cut();
        let parked = async || only_session(&server).await.state == SessionState::Parked;
        until("the session is parked", parked).await;
        if round == 1 {
            scene.kill();
            scene.start();
        } else {
            scene.proxy.set_upstream(Some(scene.child().address()));
        }

        assert!(progress.wait_for(2, &running).await);
        scene.child.take().unwrap().drain();
        scene.proxy.set_upstream(None);
        scene.start();
    }
    let session = running.await.unwrap();
    assert_same_adapter(&session.export().await.unwrap(), &scene.expected.adapter);
}
