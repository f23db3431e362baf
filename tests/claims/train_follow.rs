//! A run follows its server by itself: through `kill -9`, a full disk, and long absences.

use super::{Place, assert_same_adapters, quick, run};
use offshoot_client::{Client, Retry};
use offshoot_server::ServerConfig;
use offshoot_tests::TestServer;
use offshoot_tests::child::Child;
use offshoot_tests::proxy::Proxy;
use offshoot_trainer::{CancelToken, Summary, TrainError, TrainOptions, checkpoint, train};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tokio::task::JoinHandle;

/// Longer than any of this takes.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);

/// Polls until `is_so`.
pub(super) async fn until(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let began = Instant::now();
    while !is_so().await {
        assert!(began.elapsed() < PATIENCE, "{what}: it never came to that");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Events of a kind in a run's metrics.
fn events(dir: &Path, kind: &str) -> Vec<Value> {
    let text = fs::read_to_string(dir.join("metrics.jsonl")).unwrap_or_default();
    let events = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    events.filter(|event| event["event"] == kind).collect()
}

/// Steps that a run has written down.
pub(super) fn n_steps(dir: &Path) -> u64 {
    events(dir, "step").last().map_or(0, |event| event["step"].as_u64().unwrap())
}

/// Every number of two runs but times and speeds.
fn assert_same_metrics(found: &Path, expected: &Path) {
    for (kind, fields) in [
        ("step", &["step", "epoch", "loss", "learning_rate", "grad_norm", "samples"][..]),
        ("eval", &["step", "loss", "best", "best_step"]),
        ("checkpoint", &["step", "name"]),
    ] {
        let of = |dir| -> Vec<Vec<Value>> {
            let of_event = |e: Value| fields.iter().map(|field| e[field].clone()).collect();
            events(dir, kind).into_iter().map(of_event).collect()
        };
        assert_eq!(of(found), of(expected), "{kind}");
    }
}

fn assert_same_runs(found: &Summary, expected: &Summary) {
    assert_eq!(found.losses, expected.losses);
    assert_eq!(found.evaluations, expected.evaluations);
    assert_eq!(found.best, expected.best);
    assert_same_adapters(found.adapter.as_ref().unwrap(), expected.adapter.as_ref().unwrap());
}

/// Many steps, one checkpoint at the end.
fn long(place: &Place, endpoint: &str, output: &str) -> TrainOptions {
    let mut options = place.options_at(endpoint, output);
    options.steps.max_steps = Some(60);
    (options.output.save_interval, options.evaluation.interval) = (1000, 7);
    options
}

/// Snapshots every third step.
fn server(place: &Place) -> ServerConfig {
    let mut config = place.server();
    (config.session.snapshot_steps, config.session.snapshot_seconds) = (3, 0.0);
    config
}

/// With a store of its own.
async fn undisturbed(place: &Place) -> TestServer {
    let mut config = place.server();
    config.store.dir = place.dir.path().join("undisturbed");
    TestServer::start_with(config).await
}

/// The newest step of which the server has a snapshot.
async fn durable(child: &Child) -> u64 {
    let client = Client::connect(&child.address().to_string()).await.unwrap();
    let sessions = client.list_sessions().await.unwrap();
    let snapshots = sessions.iter().flat_map(|session| &session.snapshots);
    snapshots.map(|snapshot| snapshot.step).max().unwrap_or_default()
}

/// A run through a proxy, in a thread of its own, since it computes between its awaits.
pub(super) fn begin(
    options: TrainOptions,
    cancel: CancelToken,
) -> JoinHandle<Result<Summary, TrainError>> {
    let runtime = tokio::runtime::Handle::current();
    tokio::task::spawn_blocking(move || runtime.block_on(train(options, cancel)))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_servers_run_goes_back_to_a_step_in_memory_and_ends_the_same() {
    let place = Place::new();
    let other = undisturbed(&place).await;
    let straight = run(long(&place, &other.endpoint(), "straight")).await;
    assert!(straight.rollbacks.is_empty());

    let config = server(&place);
    let mut child = Child::start_with(&config);
    let proxy = Proxy::start(child.address()).await.unwrap();
    let options = long(&place, &proxy.endpoint(), "followed");
    let dir = options.output.dir.clone();
    let running = begin(options, CancelToken::default());
    for nth in 1..=4 {
        let mut least = 0;
        until("a step behind a snapshot", async || {
            least = durable(&child).await;
            least >= 3 * nth && n_steps(&dir) > least
        })
        .await;
        proxy.set_upstream(None);
        child.kill();
        println!("kill {nth} behind the snapshot of step {least}, at step {}", n_steps(&dir));
        child = Child::start_with(&config);
        proxy.set_upstream(Some(child.address()));
    }
    let followed = running.await.unwrap().unwrap();
    println!("{:?}", followed.rollbacks);
    // Without the copies in memory every one would have led to step 0.
    assert!(followed.rollbacks.iter().any(|rollback| rollback.step > 0), "{followed:?}");
    assert!(followed.rollbacks.iter().all(|rollback| rollback.step > 0 || rollback.was < 6));
    assert_same_runs(&followed, &straight);
    assert_same_metrics(&dir, straight.checkpoint.parent().unwrap());
}

/// A run that saves every fourth step, and has its first checkpoint.
struct Saving {
    place: Place,
    /// The same run, undisturbed.
    straight: Summary,
    child: Child,
    dir: PathBuf,
    running: JoinHandle<Result<Summary, TrainError>>,
}

impl Saving {
    async fn begin() -> Saving {
        let place = Place::new();
        let other = undisturbed(&place).await;
        let mut options = long(&place, &other.endpoint(), "straight");
        options.output.save_interval = 4;
        let straight = run(options.clone()).await;

        let mut config = place.server();
        config.session.snapshot_seconds = 0.0;
        let child = Child::start_with(&config);
        options.model.server = child.address().to_string();
        options.output.dir = place.dir.path().join("disturbed");
        options.output.keep_last = 100;
        let dir = options.output.dir.clone();
        let running = begin(options, CancelToken::default());
        until("the first checkpoint", async || n_steps(&dir) >= 5).await;
        Saving { place, straight, child, dir, running }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_costs_checkpoints_and_not_the_run() {
    let Saving { place: _place, straight, child, dir, running } = Saving::begin().await;
    child.fill_disk(Some(4096));
    let full = n_steps(&dir);
    until("steps without room", async || n_steps(&dir) >= full + 10).await;
    child.fill_disk(None);
    let found = running.await.unwrap().unwrap();
    let saved: Vec<u64> =
        checkpoint::list(&dir).unwrap().into_iter().map(|saved| saved.state.step).collect();
    println!("full from step {full} on, checkpoints {saved:?}");
    assert!(saved.contains(&4) && saved.contains(&60) && saved.len() < 15, "{saved:?}");
    assert_same_runs(&found, &straight);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_whose_last_snapshot_finds_no_room_says_what_is_left_of_it() {
    let place = Place::new();
    let mut config = place.server();
    config.session.snapshot_seconds = 0.0;
    let child = Child::start_with(&config);
    let mut options = place.options_at(&child.address().to_string(), "run");
    let retry = Retry { max_elapsed: Duration::from_millis(100), ..quick().retry };
    options.model.client.retry = retry;
    let dir = options.output.dir.clone();
    let running = begin(options, CancelToken::default());
    until("a checkpoint", async || dir.join("checkpoint_step_4").exists()).await;
    child.fill_disk(Some(4096));
    match running.await.unwrap() {
        Err(error @ TrainError::NoLastSnapshot { step: 10, .. }) => {
            let text = error.to_string();
            println!("{text}");
            assert_says_where_it_stands(&text);
            // The training is done, and its result is there.
            assert!(text.contains("only the checkpoint of step 10 is missing"), "{text}");
            assert!(dir.join("adapter/adapter_model.safetensors").is_file(), "{text}");
        }
        // It had come to its end before the disk was full.
        ended => assert!(dir.join("checkpoint_step_10").exists(), "{ended:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_is_away_costs_checkpoints_and_not_the_run() {
    let Saving { place, straight, child: _child, dir, running } = Saving::begin().await;
    let store = place.server().store.dir;
    let (blobs, elsewhere) = (store.join("blobs"), store.join("elsewhere"));
    fs::rename(&blobs, &elsewhere).unwrap();
    let gone = n_steps(&dir);
    until("steps without a store", async || n_steps(&dir) >= (gone + 10).min(60)).await;
    fs::rename(&elsewhere, &blobs).unwrap();
    let found = running.await.unwrap().unwrap();
    let saved = checkpoint::list(&dir).unwrap();
    println!("away from step {gone} on, {} checkpoints", saved.len());
    assert!(saved.len() < 15, "{saved:?}");
    assert_eq!(saved.last().unwrap().state.step, 60);
    assert_same_runs(&found, &straight);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_whose_session_is_taken_from_it_says_where_it_stands() {
    let place = Place::new();
    let server = TestServer::start_with(place.server()).await;
    for forget in [false, true] {
        let mut options = long(&place, &server.endpoint(), &format!("forget-{forget}"));
        (options.steps.max_steps, options.output.save_interval) = (Some(10_000), 4);
        let dir = options.output.dir.clone();
        let running = begin(options, CancelToken::default());
        until("a checkpoint", async || dir.join("checkpoint_step_4").exists()).await;
        let client = Client::connect(&server.endpoint()).await.unwrap();
        for session in client.list_sessions().await.unwrap() {
            client.close_session(&session.id, forget).await.unwrap();
        }
        let error = running.await.unwrap().unwrap_err();
        println!("{error}");
        assert!(matches!(error, TrainError::Ended { .. }), "{error}");
        assert_says_where_it_stands(&error.to_string());
    }
    server.drain().await;
}

/// Once.
fn assert_says_where_it_stands(text: &str) {
    assert!(text.contains("the newest checkpoint is "), "{text}");
    assert!(text.contains("checkpoint_step_"), "{text}");
    assert_eq!(text.matches("--resume latest").count(), 1, "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_absence_has_an_end_and_the_run_can_go_on_from_its_checkpoint() {
    let place = Place::new();
    let server = TestServer::start_with(place.server()).await;
    let straight = run(place.options(&server, "straight")).await;
    let proxy = Proxy::start(server.address()).await.unwrap();
    for (output, asked) in [("waited", false), ("asked", true)] {
        let mut options = place.options_at(&proxy.endpoint(), output);
        let max_elapsed = if asked { PATIENCE } else { Duration::from_millis(300) };
        options.model.client.retry = Retry { max_elapsed, ..quick().retry };
        let (dir, cancel) = (options.output.dir.clone(), CancelToken::default());
        let running = begin(options.clone(), cancel.clone());
        // In the middle of a step: asked to end right behind a checkpoint, it has nothing to wait for.
        until("a step behind a checkpoint", async || n_steps(&dir) >= 5).await;
        proxy.set_upstream(None);
        proxy.cut();
        if asked {
            cancel.cancel();
        }
        let began = Instant::now();
        let ended = running.await.unwrap();
        let too_quick = dir.join("checkpoint_step_10").exists();
        if let Some(error) = ended.err().filter(|_| !too_quick) {
            println!("{output}: {error}");
            match asked {
                true => {
                    assert!(matches!(error, TrainError::StoppedOffline { .. }), "{error}");
                    assert!(began.elapsed() < PATIENCE / 2);
                }
                false => assert!(matches!(error, TrainError::Offline { .. }), "{error}"),
            }
            assert_says_where_it_stands(&error.to_string());
        } else {
            println!("{output}: the last answer that it needed was there before the cut");
        }
        proxy.set_upstream(Some(server.address()));
        options.output.resume = Some("latest".into());
        options.model.client = quick();
        let resumed = run(options).await;
        let n = resumed.losses.len();
        assert_eq!(resumed.losses, straight.losses[10 - n..]);
        assert_same_adapters(&resumed.adapter.unwrap(), straight.adapter.as_ref().unwrap());
    }
    server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_falls_silent_is_left() {
    let place = Place::new();
    let server = TestServer::start_with(place.server()).await;
    let straight = run(place.options(&server, "straight")).await;
    let proxy = Proxy::start(server.address()).await.unwrap();
    let mut options = place.options_at(&proxy.endpoint(), "silence");
    let client = &mut options.model.client;
    client.keepalive_interval = Duration::from_millis(200);
    client.keepalive_timeout = Duration::from_millis(200);
    client.connect_timeout = Duration::from_millis(400);
    let dir = options.output.dir.clone();
    let running = begin(options, CancelToken::default());
    until("some steps", async || n_steps(&dir) >= 2).await;
    // Nothing is closed: only keepalive can tell.
    proxy.mute(true);
    let connections = proxy.connections();
    until("another connection", async || proxy.connections() > connections).await;
    proxy.mute(false);
    let found = running.await.unwrap().unwrap();
    assert_eq!(found.losses, straight.losses);
    server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_snapshot_costs_the_steps_since_the_one_before() {
    let place = Place::new();
    let server = TestServer::start_with(place.server()).await;
    let mut options = place.options(&server, "run");
    let straight = run(options.clone()).await;
    server.drain().await;
    let dir = options.output.dir.clone();
    let written = |path: &Path| fs::metadata(path).unwrap().modified().unwrap();
    let eight = written(&dir.join("checkpoint_step_8/training_state.json"));
    let blobs = fs::read_dir(place.dir.path().join("store/blobs")).unwrap();
    let mut n_damaged = 0;
    for blob in blobs.map(|entry| entry.unwrap().path()).filter(|blob| written(blob) > eight) {
        let mut bytes = fs::read(&blob).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(&blob, bytes).unwrap();
        n_damaged += 1;
    }
    assert!(n_damaged > 0);

    let server = TestServer::start_with(place.server()).await;
    options.model.server = server.endpoint();
    // The one that is named is the one that is meant.
    options.output.resume = Some(dir.join("checkpoint_step_10").display().to_string());
    let error = train(options.clone(), CancelToken::default()).await.unwrap_err();
    println!("{error}");
    assert!(matches!(error, TrainError::Damaged { .. }), "{error}");
    let text = error.to_string();
    assert!(text.contains("--resume") && text.contains("checkpoint_step_8"), "{text}");
    options.output.resume = Some("latest".into());
    let resumed = run(options.clone()).await;
    assert_eq!(resumed.losses, straight.losses[8..]);
    assert_same_adapters(resumed.adapter.as_ref().unwrap(), straight.adapter.as_ref().unwrap());
    server.drain().await;

    // Without any that is whole, the newest adapter is what is left.
    for blob in fs::read_dir(place.dir.path().join("store/blobs")).unwrap() {
        fs::write(blob.unwrap().path(), "damaged").unwrap();
    }
    let server = TestServer::start_with(place.server()).await;
    options.model.server = server.endpoint();
    let text = train(options, CancelToken::default()).await.unwrap_err().to_string();
    println!("{text}");
    let newest = dir.join("checkpoint_step_10");
    assert!(text.contains(&format!("--init-adapter {}", newest.display())), "{text}");
    assert!(text.contains("those of the older checkpoints are damaged, too (step 8"), "{text}");
    server.drain().await;
}
