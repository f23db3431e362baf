//! The engine's thread dies, with all that was on the device: the server says so, starts it again, and
//! nobody's numbers change.

use offshoot_client::{
    Client, ClientError, ClientOptions, ExportedAdapter, MemoryReport, Retry, Session,
};
use offshoot_server::{Error, Fault};
use offshoot_tests::TestServer;
use offshoot_tests::memory::until_memory;
use offshoot_tests::run::{Numbers, assert_same_adapter, open_request, train};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Barrier;
use tonic::transport::Channel;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

const N_STEPS: u64 = 6;

/// Comes back quickly and does not give up before the test does.
fn quick() -> ClientOptions {
    let retry = Retry {
        first_delay: Duration::from_millis(2),
        max_delay: Duration::from_millis(50),
        max_elapsed: Duration::from_secs(60),
    };
    ClientOptions { retry, ..ClientOptions::default() }
}

async fn open(server: &TestServer, seed: u64) -> (Client, Session) {
    let client = Client::connect_with(&server.endpoint(), quick()).await.unwrap();
    let request = offshoot_client::OpenSession { seed, ..open_request(&client).await.unwrap() };
    let session = client.open(request).await.unwrap();
    (client, session)
}

/// What a run saw: its numbers, step by step, its adapter, and how often it was set back.
struct Seen {
    numbers: Vec<Numbers>,
    adapter: ExportedAdapter,
    n_rollbacks: usize,
}

/// A step of which no snapshot has what was done just before it.
const MIDDLE: u64 = 3;

/// Trains all steps with a snapshot after every second one; goes on from the last one if it must. Before
/// it begins [`MIDDLE`] for the first time, it waits for `middle`.
async fn run((client, mut session): (Client, Session), middle: impl Future<Output = ()>) -> Seen {
    let mut middle = Some(Box::pin(middle));
    let h = client.describe().await.unwrap().hidden_size;
    let (id, mut numbers, mut n_rollbacks) = (session.id().clone(), Vec::new(), 0);
    let mut last = session.snapshot().await.unwrap();
    loop {
        let step = numbers.len() as u64;
        if let Some(middle) = middle.take_if(|_| step == MIDDLE) {
            middle.await;
        }
        let next = async {
            if step == N_STEPS {
                return Ok((None, Some(session.export().await?)));
            }
            let more = train(&session, h, step..step + 1).await?;
            if step % 2 == 1 {
                last = session.snapshot().await?;
            }
            Ok::<_, ClientError>((Some(more), None))
        };
        match next.await {
            Ok((Some(more), _)) => numbers.extend(more),
            Ok((None, adapter)) => {
                let adapter = adapter.unwrap();
                return Seen { numbers, adapter, n_rollbacks };
            }
            Err(error) => {
                println!("at step {step}: {error}");
                n_rollbacks += 1;
                numbers.truncate(last.step as usize);
                session = client.restore(&id, Some(&last.snapshot_id)).await.unwrap().0;
            }
        }
    }
}

/// All that health says of this service, in its order.
async fn watch(
    server: &TestServer,
    service: &str,
) -> tonic::Streaming<tonic_health::pb::HealthCheckResponse> {
    let address = format!("http://{}", server.endpoint());
    let channel = Channel::from_shared(address).unwrap().connect().await.unwrap();
    let mut health = HealthClient::new(channel);
    let service = service.to_string();
    health.watch(HealthCheckRequest { service }).await.unwrap().into_inner()
}

async fn reaches(
    health: &mut tonic::Streaming<tonic_health::pb::HealthCheckResponse>,
    status: ServingStatus,
) {
    let wait =
        async { while health.message().await.unwrap().expect("a status").status() != status {} };
    let waited = tokio::time::timeout(Duration::from_secs(60), wait).await;
    waited.unwrap_or_else(|_| panic!("health never says {status:?}"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_death_changes_no_numbers() {
    let server = TestServer::start().await;
    let mut expected = Vec::new();
    for seed in [1, 2] {
        expected.push(run(open(&server, seed).await, async {}).await);
    }
    server.drain().await;

    let server = TestServer::start().await;
    let service = "offshoot.v1.TrunkService";
    let mut health = [watch(&server, "").await, watch(&server, service).await];
    for health in &mut health {
        reaches(health, ServingStatus::Serving).await;
    }
    let players = [open(&server, 1).await, open(&server, 2).await];
    let (watcher, ids) = (players[0].0.clone(), [0, 1].map(|i| players[i].1.id().clone()));
    let before = watcher.describe().await.unwrap().memory;
    // In the middle of both runs; and the first two starts after it fail.
    let both = Arc::new(Barrier::new(players.len() + 1));
    let running = players.map(|player| {
        let both = both.clone();
        let middle = async move {
            both.wait().await;
            both.wait().await;
        };
        tokio::spawn(run(player, middle))
    });
    both.wait().await;
    server.faults().plan(Fault::Load, 1);
    server.faults().plan(Fault::Load, 2);
    server.faults().plan(Fault::Engine, 4);
    both.wait().await;
    for health in &mut health {
        reaches(health, ServingStatus::NotServing).await;
        reaches(health, ServingStatus::Serving).await;
    }
    for (running, expected) in running.into_iter().zip(&expected) {
        let seen = running.await.unwrap();
        assert!(seen.n_rollbacks > 0, "nothing happened to it");
        assert!(seen.numbers == expected.numbers, "a number differs from the uninterrupted run's");
        assert_same_adapter(&seen.adapter, &expected.adapter);
    }
    // Nothing of what died is still counted.
    let held = |m: &MemoryReport| (m.adapter_bytes, m.tape_bytes, m.workspace_bytes, m.cache_bytes);
    let as_before = |m: &MemoryReport| held(m) == (before.adapter_bytes, 0, 0, 0);
    let after = until_memory(&watcher, "as before", as_before).await;
    assert_eq!(after.weights_bytes, before.weights_bytes);
    assert_eq!((after.live_sessions, after.sessions_on_device), (2, 2));
    for id in &ids {
        watcher.close_session(id, true).await.unwrap();
    }
    until_memory(&watcher, "empty", |m| (m.adapter_bytes, m.live_sessions) == (0, 0)).await;
    server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_that_dies_again_and_again_ends_the_server() {
    let mut server = TestServer::start().await;
    let (_client, session) = open(&server, 1).await;
    for nth in 1..=4 {
        server.faults().plan(Fault::Load, nth);
    }
    server.faults().plan(Fault::Engine, 1);
    session.step(0.01, 1.0).await.unwrap();
    let failed = tokio::time::timeout(Duration::from_secs(60), server.failed()).await;
    let error = failed.expect("the server gives up");
    assert!(matches!(error, Error::EngineLost { n_times: 5, minutes: 10, .. }), "{error}");
    assert_eq!(error.label(), "engine_lost");
    // Calls say so, and what needs no engine goes on: nothing that was durable is lost.
    let retry = Retry { max_elapsed: Duration::ZERO, ..quick().retry };
    let hasty = ClientOptions { retry, ..ClientOptions::default() };
    let hasty = Client::connect_with(&server.endpoint(), hasty).await.unwrap();
    let sessions = hasty.list_sessions().await.unwrap();
    assert_eq!((sessions.len(), sessions[0].step), (1, 0));
    let request = open_request(&hasty).await.unwrap();
    let error = hasty.open(request).await.expect_err("there is no engine").to_string();
    assert!(error.contains("the server's engine failed and is starting again"), "{error}");
    server.drain().await;
}
