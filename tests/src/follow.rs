//! Clients that go back with their server, as the trainer does, and compare every number with a run that
//! nobody disturbed.

use crate::TestServer;
use crate::proxy::Proxy;
use crate::run::{Numbers, open_request, train};
use offshoot_client::{
    Client, ClientError, ClientOptions, ExportedAdapter, Retry, Session, SnapshotInfo,
};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// Longer than anything takes that a test waits for.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Comes back quickly, notices silence quickly, and does not give up before the test does.
pub fn quick() -> ClientOptions {
    let retry = Retry {
        first_delay: Duration::from_millis(2),
        max_delay: Duration::from_millis(50),
        max_elapsed: PATIENCE,
    };
    ClientOptions { retry, connect_timeout: Duration::from_secs(2), ..ClientOptions::default() }
}

/// A session whose adapter has this rank.
pub async fn open(client: &Client, rank: u32) -> Session {
    let mut request = open_request(client).await.expect("the server describes itself");
    request.lora.r = rank;
    client.open(request).await.expect("the server has room")
}

/// What a run of so many steps sees and ends with if nothing happens to it.
pub struct Undisturbed {
    pub numbers: Vec<Numbers>,
    pub adapter: ExportedAdapter,
}

/// Such a run.
pub async fn undisturbed(rank: u32, n_steps: u64) -> Undisturbed {
    let server = TestServer::start().await;
    let client = Client::connect(&server.endpoint()).await.expect("it serves");
    let h = client.describe().await.expect("it serves").hidden_size;
    let session = open(&client, rank).await;
    let numbers = train(&session, h, 0..n_steps).await.expect("nothing disturbs it");
    let adapter = session.export().await.expect("it serves");
    server.drain().await;
    Undisturbed { numbers, adapter }
}

/// How far a [`Follower`] is, for those who disturb it.
pub struct Progress {
    /// Steps taken, replayed ones included.
    pub taken: AtomicU64,
    /// Of those, how many were taken again.
    pub replayed: AtomicU64,
    /// Times that it had to go back to a snapshot.
    pub went_back: AtomicU64,
    /// Whoever holds it keeps the follower between two steps, where no microbatch is open.
    pub gate: tokio::sync::Mutex<()>,
    /// It takes no step behind this one; at first as many as it likes.
    pub allowed: watch::Sender<u64>,
}

impl Default for Progress {
    fn default() -> Self {
        Progress {
            taken: AtomicU64::default(),
            replayed: AtomicU64::default(),
            went_back: AtomicU64::default(),
            gate: tokio::sync::Mutex::default(),
            allowed: watch::channel(u64::MAX).0,
        }
    }
}

impl Progress {
    /// Steps taken, replayed ones included.
    pub fn taken(&self) -> u64 {
        self.taken.load(Ordering::SeqCst)
    }

    /// Until so many more steps are taken; false if the run ends before.
    pub async fn wait_for(&self, more: u64, running: &tokio::task::JoinHandle<Session>) -> bool {
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
pub struct Follower {
    pub client: Client,
    pub session: Session,
    pub h: usize,
    pub progress: Arc<Progress>,
    /// Steps between snapshots that it asks for.
    pub snapshot_every: u64,
}

impl Follower {
    /// With a session whose adapter has this rank.
    pub async fn new(proxy: &Proxy, rank: u32, snapshot_every: u64) -> Follower {
        let client = Client::connect_with(&proxy.endpoint(), quick()).await.expect("it serves");
        let h = client.describe().await.expect("it serves").hidden_size;
        let session = open(&client, rank).await;
        Follower { client, session, h, progress: Arc::default(), snapshot_every }
    }

    /// Takes all steps of `expected`, each until it has happened; the numbers of every attempt must be
    /// right.
    pub async fn train_all(mut self, expected: Arc<Undisturbed>) -> Session {
        let (mut step, mut furthest) = (0, 0);
        loop {
            let gate = self.progress.gate.lock().await;
            drop(gate);
            // The sender is in here.
            let _ = self.progress.allowed.subscribe().wait_for(|allowed| step < *allowed).await;
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
                    let snapshot = go_back(&self.client, &mut self.session, error).await;
                    self.progress.went_back.fetch_add(1, Ordering::SeqCst);
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
}

/// Sets a session back to the newest snapshot that the server has, which is all that may have happened
/// to it.
pub async fn go_back(
    client: &Client,
    session: &mut Session,
    mut error: ClientError,
) -> SnapshotInfo {
    loop {
        let ClientError::RolledBack { snapshots, .. } = error else {
            panic!("only a fall back to a snapshot may happen, not: {error}");
        };
        let newest = snapshots.first().expect("a session has a snapshot from its beginning on");
        match client.restore(session.id(), Some(&newest.snapshot_id)).await {
            Ok((again, restored)) => {
                assert_eq!(restored.snapshot, *newest);
                *session = again;
                return restored.snapshot;
            }
            Err(again) => error = again,
        }
    }
}
