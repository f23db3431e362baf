//! Bytes that come late, twice, or not at all.

use super::{Follower, PATIENCE, Progress, quick, undisturbed, until};
use offshoot_client::{Client, ClientOptions, Session};
use offshoot_tests::TestServer;
use offshoot_tests::proxy::Proxy;
use offshoot_tests::run::{Numbers, assert_same_adapter, train};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinHandle;

const RANK: u32 = 3;
const N_STEPS: u64 = 12;

/// Trains steps in the background, so that the connection can be disturbed meanwhile.
fn begin(session: &Arc<Session>, h: usize, steps: Range<u64>) -> JoinHandle<Vec<Numbers>> {
    let session = session.clone();
    tokio::spawn(async move { train(&session, h, steps).await.unwrap() })
}

/// Strands the connection that there is, or the next one if there is none just now.
async fn strand(proxy: &Proxy) {
    let n_stranded = proxy.n_stranded();
    let stranded = async || {
        proxy.strand();
        proxy.n_stranded() > n_stranded
    };
    until("a connection is stranded", stranded).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_that_are_held_back_cut_and_swallowed_at_random_change_nothing() {
    let expected = Arc::new(undisturbed(RANK, N_STEPS).await);
    let server = TestServer::start().await;
    let proxy = Proxy::start(server.address()).await.unwrap();
    let follower = Follower::new(&proxy, RANK, 4).await;
    let progress: Arc<Progress> = follower.progress.clone();
    let running = tokio::spawn(follower.train_all(expected.clone()));
    let mut rng = StdRng::seed_from_u64(2);
    let mut n_faults = 0;
    while progress.wait_for(rng.random_range(0..=1), &running).await && n_faults < 40 {
        let moment = Duration::from_micros(rng.random_range(0..5_000));
        match n_faults % 4 {
            0 => {
                proxy.hold(true);
                tokio::time::sleep(moment).await;
                proxy.hold(false);
            }
            1 => {
                proxy.cut_after([rng.random_range(50..20_000)]);
                proxy.cut();
            }
            2 => {
                proxy.mute(true);
                tokio::time::sleep(moment).await;
                proxy.cut();
                proxy.mute(false);
            }
            _ => {
                // What the old connection still had arrives beside the new one's first words.
                proxy.hold(true);
                tokio::time::sleep(moment).await;
                strand(&proxy).await;
                proxy.hold(false);
                proxy.deliver_late();
            }
        }
        n_faults += 1;
    }
    proxy.forget_plan();
    let session = running.await.unwrap();
    println!("{n_faults} faults, {} connections", proxy.connections());
    assert!(n_faults >= 8 && proxy.connections() >= 5, "the run was too quick to be disturbed");
    assert_same_adapter(&session.export().await.unwrap(), &expected.adapter);
    server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn frames_and_hellos_of_an_old_connection_that_come_late_change_nothing() {
    let expected = undisturbed(RANK, N_STEPS).await;
    let server = TestServer::start().await;
    let proxy = Proxy::start(server.address()).await.unwrap();
    let client = Client::connect_with(&proxy.endpoint(), quick()).await.unwrap();
    let h = client.describe().await.unwrap().hidden_size;
    let session = Arc::new(super::open(&client, RANK).await);
    let id = session.id().to_string();
    let (mut n_hellos, mut n_frames) = (0, 0);
    for step in 0..N_STEPS {
        // What the client says gets stuck on its way; first within a connection, then as a new one's
        // first words.
        proxy.hold(true);
        let running = begin(&session, h, step..step + 1);
        let wants_hello = step % 2 == 1;
        let mut enough = 1;
        if wants_hello {
            let connections = proxy.connections();
            proxy.cut();
            until("a new connection", async || proxy.connections() > connections).await;
            // Preface, settings and headers come first, and take less than twice the id.
            enough = 6 * id.len();
        }
        until("bytes of the client", async || proxy.n_held() >= enough).await;
        strand(&proxy).await;
        proxy.hold(false);
        // Over the next connection all is well.
        let numbers = running.await.unwrap();
        assert!(numbers[0] == expected.numbers[step as usize], "a number of step {step} differs");

        // And then they arrive.
        let (n_late, connections) = (proxy.n_late(), proxy.connections());
        proxy.deliver_late();
        until("they arrive", async || proxy.n_late() > n_late).await;
        let late = proxy.take_late();
        let names_session = late.windows(id.len()).any(|part| part == id.as_bytes());
        match (wants_hello, names_session) {
            (true, true) => {
                n_hellos += 1;
                let refused = async || proxy.has_late_answer(b"another stream attached");
                until("the old Hello is refused", refused).await;
            }
            _ => n_frames += usize::from(!late.is_empty()),
        }
        session.settle().await.unwrap();
        assert_eq!(proxy.connections(), connections, "the newer connection was pushed out");
    }
    println!("{n_hellos} Hellos and {n_frames} other parts of connections came late");
    assert!(n_hellos > 0 && n_frames > 0, "{n_hellos} {n_frames}");
    assert_same_adapter(&session.export().await.unwrap(), &expected.adapter);
    server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_half_open_connection_is_noticed_and_its_frames_count_once() {
    let expected = undisturbed(RANK, 4).await;
    let server = TestServer::start().await;
    let proxy = Proxy::start(server.address()).await.unwrap();
    let options = ClientOptions {
        keepalive_interval: Duration::from_millis(100),
        keepalive_timeout: Duration::from_millis(100),
        connect_timeout: Duration::from_millis(300),
        ..quick()
    };
    let client = Client::connect_with(&proxy.endpoint(), options).await.unwrap();
    let h = client.describe().await.unwrap().hidden_size;
    let session = Arc::new(super::open(&client, RANK).await);
    for step in 0..4 {
        session.settle().await.unwrap();
        // The server takes the frames, and nobody hears of it. Nothing is closed.
        proxy.mute(true);
        let connections = proxy.connections();
        let running = begin(&session, h, step..step + 1);
        until("another connection", async || proxy.connections() > connections).await;
        proxy.mute(false);
        let numbers = tokio::time::timeout(PATIENCE, running).await.unwrap().unwrap();
        assert!(numbers[0] == expected.numbers[step as usize], "a number of step {step} differs");
    }
    assert_same_adapter(&session.export().await.unwrap(), &expected.adapter);
    server.drain().await;
}
