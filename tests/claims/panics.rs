//! A panic ends what it happened in, and nothing else.

use offshoot_client::{Client, ClientError, ClientOptions, ErrorCode, OpenSession, Retry, Session};
use offshoot_server::Fault;
use offshoot_tests::run::{Numbers, assert_same_adapter, input, open_request, train};
use offshoot_tests::{TestServer, server_config};
use std::time::Duration;

fn quick() -> ClientOptions {
    let retry = Retry {
        first_delay: Duration::from_millis(2),
        max_delay: Duration::from_millis(50),
        max_elapsed: Duration::from_secs(60),
    };
    ClientOptions { retry, ..ClientOptions::default() }
}

struct World {
    server: TestServer,
    client: Client,
    hidden_size: usize,
}

impl World {
    async fn start() -> World {
        World::of(TestServer::start().await).await
    }

    async fn of(server: TestServer) -> World {
        let client = Client::connect_with(&server.endpoint(), quick()).await.unwrap();
        let hidden_size = client.describe().await.unwrap().hidden_size;
        World { server, client, hidden_size }
    }

    async fn open(&self, seed: u64) -> Session {
        let request = OpenSession { seed, ..open_request(&self.client).await.unwrap() };
        self.client.open(request).await.unwrap()
    }

    async fn steps(&self, session: &Session, steps: std::ops::Range<u64>) -> Vec<Numbers> {
        train(session, self.hidden_size, steps).await.unwrap()
    }
}

fn is_internal<T>(result: Result<T, ClientError>, job: &str) {
    let error = result.err().expect("it panicked");
    let ClientError::Refused { code, ref message, .. } = error else { panic!("{error}") };
    assert_eq!(code, ErrorCode::Internal, "{error}");
    let expected = format!("the {job} failed inside the server, nothing was changed");
    assert!(message.contains(&expected), "{message}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_panic_in_a_job_is_that_jobs_answer() {
    let world = World::start().await;
    let h = world.hidden_size;
    let (quiet, quiet_twin) = (world.open(1).await, world.open(1).await);
    let (struck, struck_twin) = (world.open(2).await, world.open(2).await);
    let expected = world.steps(&quiet_twin, 0..3).await;
    world.steps(&struck_twin, 0..2).await;

    let mut numbers = world.steps(&quiet, 0..1).await;
    world.steps(&struck, 0..1).await;
    struck.settle().await.unwrap();
    // Each of its own jobs in turn; the neighbour has a microbatch open all the time.
    let (output, open, _) = quiet.forward(input(3, &[5, 2, 4], h)).await.unwrap();
    let faults = world.server.faults();
    faults.plan(Fault::Forward, 1);
    is_internal(struck.forward(input(77, &[4], h)).await, "Forward");
    let (lost_output, lost, _) = struck.forward(input(77, &[4], h)).await.unwrap();
    faults.plan(Fault::Backward, 1);
    is_internal(lost.backward(lost_output).await, "Backward");
    faults.plan(Fault::Step, 1);
    is_internal(struck.step(0.01, 1.0).await.unwrap().await, "Step");
    drop((output, open));

    // All three changed nothing: the same numbers as without them.
    world.steps(&struck, 1..2).await;
    numbers.extend(world.steps(&quiet, 1..3).await);
    assert!(numbers == expected, "the neighbour's numbers have changed");
    assert_same_adapter(&quiet.export().await.unwrap(), &quiet_twin.export().await.unwrap());
    assert_same_adapter(&struck.export().await.unwrap(), &struck_twin.export().await.unwrap());
    world.server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_panic_in_a_sessions_actor_ends_that_session_only() {
    let world = World::start().await;
    let (quiet, quiet_twin) = (world.open(1).await, world.open(1).await);
    let (struck, struck_twin) = (world.open(2).await, world.open(2).await);
    let expected = world.steps(&quiet_twin, 0..4).await;
    world.steps(&struck_twin, 0..4).await;

    let mut numbers = world.steps(&quiet, 0..2).await;
    let (output, open, _) = quiet.forward(input(6, &[5, 2, 4], world.hidden_size)).await.unwrap();
    world.steps(&struck, 0..2).await;
    let snapshot = struck.snapshot().await.unwrap();
    world.steps(&struck, 2..3).await;
    struck.settle().await.unwrap();
    world.server.faults().plan(Fault::Actor, 1);
    let error = train(&struck, world.hidden_size, 3..4).await.err().expect("its actor is gone");
    let ClientError::RolledBack { snapshots, .. } = &error else { panic!("{error}") };
    assert_eq!(snapshots.first(), Some(&snapshot));
    // From the last durable state on, as after every other loss.
    let restored = world.client.restore(struck.id(), None).await.unwrap().0;
    world.steps(&restored, 2..4).await;
    // The neighbour has not even lost its tape.
    open.backward(output).await.unwrap();
    drop(quiet.export().await.unwrap());

    let again = world.open(1).await;
    numbers.truncate(0);
    numbers.extend(world.steps(&again, 0..4).await);
    assert!(numbers == expected, "another session's numbers have changed");
    assert_same_adapter(&restored.export().await.unwrap(), &struck_twin.export().await.unwrap());
    let memory = world.client.describe().await.unwrap().memory;
    assert_eq!((memory.live_sessions, memory.sessions_on_device), (5, 5));
    world.server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tasks_of_the_server_go_on_after_a_panic() {
    let store = tempfile::tempdir().unwrap();
    let mut config = server_config(store.path());
    config.session.lease_seconds = 0.2;
    let world = World::of(TestServer::start_with(config).await).await;
    // The keeper of room fails at its next look, and still lets sessions in.
    let faults = world.server.faults();
    faults.plan(Fault::Keeper, 1);
    let (first, second) = (world.open(1).await, world.open(2).await);
    world.steps(&first, 0..1).await;
    // The first one to be parked meets a failure; both are parked in the end.
    faults.plan(Fault::Parking, 1);
    drop((first, second));
    let parked = async {
        loop {
            let sessions = world.client.list_sessions().await.unwrap();
            if sessions.iter().all(|s| s.state == offshoot_client::SessionState::Parked) {
                return sessions.len();
            }
        }
    };
    let parked = tokio::time::timeout(Duration::from_secs(60), parked).await;
    assert_eq!(parked.expect("sessions without a client are parked"), 2);
    world.server.drain().await;
}
