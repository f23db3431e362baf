//! Nothing is lost and nothing is doubled, whatever happens to the server, to the connection and to
//! what is under way between them: every number that a disturbed run saw, and the adapter that it
//! ends with, are bit for bit those of a run that nobody disturbed.
//!
//! Faults come at random moments from fixed seeds. The longer loop, with the trainer's process as
//! well, is `benches/kill_loop`.

#[path = "exactly_once/connections.rs"]
mod connections;
#[path = "exactly_once/kills.rs"]
mod kills;

use offshoot_client::{
    Client, ClientError, ClientOptions, ExportedAdapter, Retry, Session, SessionInfo, SnapshotInfo,
};
use offshoot_server::ServerConfig;
use offshoot_tests::proxy::Proxy;
use offshoot_tests::run::{Numbers, open_request, train};
use offshoot_tests::{TestServer, server_config};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Longer than any of this takes.
const PATIENCE: Duration = Duration::from_secs(60);

/// Not a claim: the server process that tests start and kill. See `offshoot_tests::child`.
#[test]
fn child_process() {
    offshoot_tests::child::serve_if_asked();
}

/// With snapshots of the server's own at every second step.
fn every_second_step(store: &Path) -> ServerConfig {
    let mut config = server_config(store);
    (config.session.snapshot_steps, config.session.snapshot_seconds) = (2, 0.0);
    config
}

/// Comes back quickly, notices silence quickly, and does not give up before the test does.
fn quick() -> ClientOptions {
    let retry = Retry {
        first_delay: Duration::from_millis(2),
        max_delay: Duration::from_millis(50),
        max_elapsed: PATIENCE,
    };
    ClientOptions { retry, connect_timeout: Duration::from_secs(2), ..ClientOptions::default() }
}

/// A session whose adapter has this rank.
async fn open(client: &Client, rank: u32) -> Session {
    let mut request = open_request(client).await.unwrap();
    request.lora.r = rank;
    client.open(request).await.unwrap()
}

/// What a run of so many steps sees and ends with if nothing happens to it.
struct Undisturbed {
    numbers: Vec<Numbers>,
    adapter: ExportedAdapter,
}

async fn undisturbed(rank: u32, n_steps: u64) -> Undisturbed {
    let server = TestServer::start().await;
    let client = Client::connect(&server.endpoint()).await.unwrap();
    let h = client.describe().await.unwrap().hidden_size;
    let session = open(&client, rank).await;
    let numbers = train(&session, h, 0..n_steps).await.unwrap();
    let adapter = session.export().await.unwrap();
    server.drain().await;
    Undisturbed { numbers, adapter }
}

/// How far a [`Follower`] is, for those who disturb it.
#[derive(Default)]
struct Progress {
    /// Steps taken, replayed ones included.
    taken: AtomicU64,
    /// Of those, how many were taken again.
    replayed: AtomicU64,
    /// Whoever holds it keeps the follower between two steps, where no microbatch is open.
    gate: tokio::sync::Mutex<()>,
}

impl Progress {
    fn taken(&self) -> u64 {
        self.taken.load(Ordering::SeqCst)
    }

    /// Until so many more steps are taken; false if the run ends before.
    async fn wait_for(&self, more: u64, running: &tokio::task::JoinHandle<Session>) -> bool {
        let (wanted, begun) = (self.taken() + more, Instant::now());
        while self.taken() < wanted {
            if running.is_finished() {
                return false;
            }
            assert!(begun.elapsed() < PATIENCE, "no step in {PATIENCE:?}");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        true
    }
}

/// A client that goes back with its server, as the trainer does. Its steps are functions of their
/// numbers, so it has no state of its own to go back with.
struct Follower {
    client: Client,
    session: Session,
    h: usize,
    progress: Arc<Progress>,
    /// Steps between snapshots that it asks for.
    snapshot_every: u64,
}

impl Follower {
    async fn new(proxy: &Proxy, rank: u32, snapshot_every: u64) -> Follower {
        let client = Client::connect_with(&proxy.endpoint(), quick()).await.unwrap();
        let h = client.describe().await.unwrap().hidden_size;
        let session = open(&client, rank).await;
        Follower { client, session, h, progress: Arc::default(), snapshot_every }
    }

    /// Takes all steps of `expected`, each until it has happened; the numbers of every attempt must be
    /// right.
    async fn train_all(mut self, expected: Arc<Undisturbed>) -> Session {
        let (mut step, mut furthest) = (0, 0);
        loop {
            let gate = self.progress.gate.lock().await;
            drop(gate);
            match self.advance(step, &expected).await {
                Ok(()) if step == expected.numbers.len() as u64 => return self.session,
                Ok(()) => {
                    step += 1;
                    self.progress.taken.fetch_add(1, Ordering::SeqCst);
                    let again = u64::from(step <= furthest);
                    self.progress.replayed.fetch_add(again, Ordering::SeqCst);
                    furthest = furthest.max(step);
                }
                Err(error) => {
                    let snapshot = self.go_back(error).await;
                    println!("back to step {} of {furthest}", snapshot.step);
                    step = snapshot.step;
                }
            }
        }
    }

    /// One step, or what is left to do behind the last one.
    async fn advance(&self, step: u64, expected: &Undisturbed) -> Result<(), ClientError> {
        let Some(numbers) = expected.numbers.get(step as usize) else {
            return self.session.settle().await.map(drop);
        };
        let found = train(&self.session, self.h, step..step + 1).await?;
        assert!(found[0] == *numbers, "a number of step {step} differs");
        if (step + 1).is_multiple_of(self.snapshot_every) {
            let snapshot = self.session.snapshot().await?;
            assert_eq!(snapshot.step, step + 1);
        }
        Ok(())
    }

    /// To the newest snapshot that the server has.
    async fn go_back(&mut self, mut error: ClientError) -> SnapshotInfo {
        loop {
            let ClientError::RolledBack { snapshots, .. } = error else {
                panic!("only a fall back to a snapshot may happen, not: {error}");
            };
            let newest = snapshots.first().expect("a session has a snapshot from its beginning on");
            let id = self.session.id().clone();
            match self.client.restore(&id, Some(&newest.snapshot_id)).await {
                Ok((session, restored)) => {
                    assert_eq!(restored.snapshot, *newest);
                    self.session = session;
                    return restored.snapshot;
                }
                Err(again) => error = again,
            }
        }
    }
}

/// Polls until `is_so`.
async fn until(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let begun = Instant::now();
    while !is_so().await {
        assert!(begun.elapsed() < PATIENCE, "{what}: it never came to that");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// The only session of a server, asked without a proxy.
async fn only_session(endpoint: &str) -> SessionInfo {
    let client = Client::connect(endpoint).await.unwrap();
    let mut sessions = client.list_sessions().await.unwrap();
    assert_eq!(sessions.len(), 1);
    sessions.remove(0)
}
