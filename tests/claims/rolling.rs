//! A server is rolled without anyone losing a step: it ends and the next one begins, or the next one
//! waits beside it. Clients that train meanwhile end with the bits of a run that nobody disturbed, and go
//! back to nothing.
//!
//! How long they pause is measured by `benches/roll`. The same with the trainer is in `train_rolls.rs`.

#[path = "rolling/copies.rs"]
mod copies;

use offshoot_client::{Client, Session};
use offshoot_server::ServerConfig;
use offshoot_tests::child::{Child, Starting};
use offshoot_tests::follow::{Follower, PATIENCE, Progress, Undisturbed, quick, undisturbed};
use offshoot_tests::proxy::Proxy;
use offshoot_tests::run::{assert_same_adapter, input, open_request};
use offshoot_tests::server_config;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tokio::task::JoinHandle;
use tonic::transport::Endpoint;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

const RANK: u32 = 3;
/// Steps of each client around a roll: more than it takes before the server hears that it is to end.
const WORK: u64 = 15;

/// Not a claim: the server process that tests start and kill. See `offshoot_tests::child`.
#[test]
fn child_process() {
    offshoot_tests::child::serve_if_asked();
}

/// One that waits for the store of another.
fn successor(config: &ServerConfig) -> ServerConfig {
    let mut config = config.clone();
    config.store.wait_seconds = PATIENCE.as_secs_f64();
    config
}

/// Servers, one after the other, and clients that train on them.
struct Scene {
    config: ServerConfig,
    child: Option<Child>,
    proxy: Proxy,
    expected: Arc<Undisturbed>,
    clients: Vec<(Arc<Progress>, JoinHandle<Session>)>,
}

impl Scene {
    async fn new(store: &Path, n_clients: usize, n_steps: u64) -> Scene {
        let mut config = server_config(store);
        // What is not saved by the drain would have to be done again.
        config.session.snapshot_seconds = 0.0;
        let expected = Arc::new(undisturbed(RANK, n_steps).await);
        let child = Child::start_with(&config);
        let proxy = Proxy::start(child.address()).await.unwrap();
        let mut clients = Vec::new();
        for _ in 0..n_clients {
            let follower = Follower::new(&proxy, RANK, u64::MAX).await;
            let progress = follower.progress.clone();
            progress.allowed.send_replace(0);
            clients.push((progress, tokio::spawn(follower.train_all(expected.clone()))));
        }
        Scene { config, child: Some(child), proxy, expected, clients }
    }

    fn child(&self) -> &Child {
        self.child.as_ref().unwrap()
    }

    /// Lets each client take so many more steps.
    fn allow(&self, n: u64) {
        for (progress, _) in &self.clients {
            progress.allowed.send_modify(|allowed| *allowed = allowed.saturating_add(n));
        }
    }

    /// Until each client has so many of them left to take.
    async fn until_left(&self, n: u64) {
        let begun = Instant::now();
        for (progress, running) in &self.clients {
            while self.left(progress) > n {
                assert!(!running.is_finished(), "a client ended before the last roll");
                assert!(begun.elapsed() < PATIENCE, "no step in {PATIENCE:?}");
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
    }

    fn left(&self, progress: &Progress) -> u64 {
        let again = progress.replayed.load(Ordering::SeqCst);
        *progress.allowed.borrow() - (progress.taken() - again)
    }

    /// Each client takes so many more steps.
    async fn more_steps(&self, n: u64) {
        self.allow(n);
        self.until_left(0).await;
    }

    /// All clients are in the middle of their work.
    async fn work(&self) {
        self.allow(WORK);
        self.until_left(WORK - 1).await;
    }

    fn were_interrupted(&self) -> bool {
        self.clients.iter().all(|(progress, _)| self.left(progress) > 0)
    }

    fn serves(&mut self, child: Child) {
        self.proxy.set_upstream(Some(child.address()));
        self.child = Some(child);
    }

    /// The old one ends, then the new one starts.
    async fn restart(&mut self) {
        self.work().await;
        self.child.take().unwrap().drain();
        assert!(self.were_interrupted());
        let child = Child::start_with(&self.config);
        self.serves(child);
    }

    /// The new one waits beside the old one.
    async fn hand_over(&mut self) {
        let next = Starting::begin(&successor(&self.config));
        next.standby();
        self.work().await;
        let old = self.child.take().unwrap();
        old.terminate();
        let child = next.ready();
        assert!(self.were_interrupted());
        self.serves(child);
        assert!(old.ended().success(), "the old server could not save all");
    }

    /// All clients come to their end, which is the expected one. How often one went back, and how many
    /// steps were taken again.
    async fn ends_as_expected(self) -> (u64, u64) {
        let (mut went_back, mut replayed) = (0, 0);
        for (progress, running) in self.clients {
            progress.allowed.send_replace(u64::MAX);
            let session = tokio::time::timeout(2 * PATIENCE, running).await.unwrap().unwrap();
            assert_same_adapter(&session.export().await.unwrap(), &self.expected.adapter);
            went_back += progress.went_back.load(Ordering::SeqCst);
            replayed += progress.replayed.load(Ordering::SeqCst);
        }
        let client = Client::connect(&self.child.as_ref().unwrap().address().to_string()).await;
        let n_steps = self.expected.numbers.len() as u64;
        for session in client.unwrap().list_sessions().await.unwrap() {
            assert!([0, n_steps].contains(&session.step), "{session:?}");
        }
        self.child.unwrap().drain();
        (went_back, replayed)
    }
}

/// What the server's health says of it.
async fn is_serving(child: &Child) -> bool {
    let endpoint = Endpoint::from_shared(format!("http://{}", child.address())).unwrap();
    let mut health = HealthClient::new(endpoint.connect().await.unwrap());
    let answer = health.check(HealthCheckRequest::default()).await.unwrap().into_inner();
    answer.status() == ServingStatus::Serving
}

/// A client whose open microbatch keeps a drain waiting.
async fn holds_a_microbatch(proxy: &Proxy) -> (Session, offshoot_client::Microbatch) {
    let client = Client::connect_with(&proxy.endpoint(), quick()).await.unwrap();
    let h = client.describe().await.unwrap().hidden_size;
    let session = client.open(open_request(&client).await.unwrap()).await.unwrap();
    let (_, microbatch, _) = session.forward(input(1, &[3], h)).await.unwrap();
    (session, microbatch)
}

/// SIGTERM, and until the server drains.
async fn begins_to_drain(child: &Child) {
    child.terminate();
    let begun = Instant::now();
    while is_serving(child).await {
        assert!(begun.elapsed() < PATIENCE, "it never drained");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_train_through_rolls_and_no_step_is_taken_twice() {
    let store = tempfile::tempdir().unwrap();
    let mut scene = Scene::new(store.path(), 3, 6 * WORK + 2).await;
    for roll in 0..6 {
        match roll % 2 {
            0 => scene.restart().await,
            _ => scene.hand_over().await,
        }
        scene.until_left(0).await;
    }
    assert_eq!(scene.ends_as_expected().await, (0, 0), "times back, steps again");
}

/// As a service on one machine is rolled: the address stays the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_successor_takes_the_address_of_the_one_before() {
    let store = tempfile::tempdir().unwrap();
    let mut scene = Scene::new(store.path(), 1, WORK + 2).await;
    scene.config.listen.port = scene.child().address().port();
    scene.hand_over().await;
    assert_eq!(scene.child().address().port(), scene.config.listen.port);
    assert_eq!(scene.ends_as_expected().await, (0, 0), "times back, steps again");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_killed_while_it_drains_costs_its_clients_no_step() {
    let store = tempfile::tempdir().unwrap();
    let mut scene = Scene::new(store.path(), 2, WORK + 6).await;
    let next = Starting::begin(&successor(&scene.config));
    next.standby();
    scene.more_steps(3).await;
    // Some sessions are saved, this one is not, and the server waits for it.
    let held = holds_a_microbatch(&scene.proxy).await;
    scene.work().await;
    begins_to_drain(scene.child()).await;
    scene.child.take().unwrap().kill();
    let child = next.ready();
    scene.serves(child);
    drop(held);
    scene.ends_as_expected().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_successor_that_cannot_serve_leaves_the_old_one_serving() {
    let store = tempfile::tempdir().unwrap();
    let scene = Scene::new(store.path(), 1, 10).await;
    scene.more_steps(1).await;
    let connections = scene.proxy.connections();
    let mut no_model = successor(&scene.config);
    no_model.model.name = store.path().join("no model").display().to_string();
    let mut no_layers = successor(&scene.config);
    no_layers.model.split_point_2 = 100;
    let mut impatient = successor(&scene.config);
    impatient.store.wait_seconds = 0.05;
    for config in [&no_model, &no_layers, &impatient, &scene.config] {
        Starting::begin(config).fails();
        scene.more_steps(1).await;
    }
    // Nobody noticed.
    assert!(is_serving(scene.child()).await);
    assert_eq!(scene.proxy.connections(), connections);
    assert_eq!(scene.ends_as_expected().await, (0, 0), "times back, steps again");
}
