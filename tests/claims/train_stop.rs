//! Whoever asks a run to end while it waits for its server does not wait with it.

use super::Place;
use super::follow::{PATIENCE, begin, n_steps, until};
use offshoot_client::{Client, Retry};
use offshoot_tests::TestServer;
use offshoot_tests::proxy::Proxy;
use offshoot_tests::run::open_request;
use offshoot_trainer::options::TRAINING_RETRY;
use offshoot_trainer::{CancelToken, TrainError, TrainOptions};
use std::time::{Duration, Instant};

/// Far below what a run waits by itself, far above what the end of one takes.
const SOON: Duration = Duration::from_secs(30);

fn patient(place: &Place, endpoint: &str, output: &str) -> TrainOptions {
    let mut options = place.options_at(endpoint, output);
    options.model.client.retry = Retry { max_elapsed: 2 * PATIENCE, ..TRAINING_RETRY };
    options.model.client.connect_patience = 2 * PATIENCE;
    options.steps.max_steps = Some(10_000);
    options
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_finds_no_room_at_its_beginning_ends_when_asked() {
    let place = Place::new();
    let mut config = place.server();
    config.limits.max_live_sessions = 1;
    let server = TestServer::start_with(config).await;
    let client = Client::connect(&server.endpoint()).await.unwrap();
    let session = client.open(open_request(&client).await.unwrap()).await.unwrap();
    let options = patient(&place, &server.endpoint(), "full");
    let (dir, cancel) = (options.output.dir.clone(), CancelToken::default());
    // Before it begins, so that it comes as far as to the wait.
    cancel.cancel();
    let began = Instant::now();
    let error = begin(options, cancel).await.unwrap().unwrap_err();
    assert!(matches!(error, TrainError::StoppedAtStart), "{error}");
    assert!(began.elapsed() < SOON);
    assert!(!dir.exists(), "nothing is written before a run begins");
    drop(session);
    server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_whose_server_is_not_there_yet_ends_when_asked() {
    let place = Place::new();
    let server = TestServer::start_with(place.server()).await;
    let proxy = Proxy::start(server.address()).await.unwrap();
    proxy.mute(true);
    let cancel = CancelToken::default();
    let running = begin(patient(&place, &proxy.endpoint(), "early"), cancel.clone());
    until("a connection", async || proxy.connections() > 0).await;
    let began = Instant::now();
    cancel.cancel();
    let error = running.await.unwrap().unwrap_err();
    assert!(matches!(error, TrainError::StoppedAtStart), "{error}");
    assert!(began.elapsed() < SOON);
    server.drain().await;
}

/// With the usual keepalive, which notices it only after 40 seconds.
#[tokio::test(flavor = "multi_thread")]
async fn a_run_whose_server_falls_silent_ends_when_asked_or_when_it_has_waited_enough() {
    let place = Place::new();
    let server = TestServer::start_with(place.server()).await;
    for asked in [true, false] {
        let proxy = Proxy::start(server.address()).await.unwrap();
        let mut options = patient(&place, &proxy.endpoint(), &format!("silent-{asked}"));
        if !asked {
            options.model.client.retry.max_elapsed = Duration::from_secs(1);
        }
        let (dir, cancel) = (options.output.dir.clone(), CancelToken::default());
        let running = begin(options, cancel.clone());
        until("some steps", async || n_steps(&dir) >= 5).await;
        proxy.mute(true);
        let began = Instant::now();
        if asked {
            cancel.cancel();
        }
        let error = running.await.unwrap().unwrap_err();
        println!("{error}");
        assert!(began.elapsed() < SOON);
        match asked {
            true => assert!(matches!(error, TrainError::StoppedOffline { .. }), "{error}"),
            false => assert!(matches!(error, TrainError::Offline { .. }), "{error}"),
        }
        assert!(error.to_string().contains("checkpoint_step_"), "{error}");
    }
    server.drain().await;
}
