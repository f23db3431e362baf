//! What a run tells of itself is what it did, also after it was taken up at an earlier step.

use super::{N_STEPS, Place, run};
use offshoot_tests::TestServer;
use offshoot_trainer::metrics::{End, RunLog};
use serde_json::Value;
use std::fs;

#[tokio::test(flavor = "multi_thread")]
async fn metrics_tell_every_step_once() {
    let place = Place::new();
    let server = TestServer::start_with(place.server()).await;
    let options = place.options(&server, "run");
    let dir = options.output.dir.clone();
    let straight = run(options.clone()).await;
    // As after a kill between the first checkpoint and the second.
    for step in [8, 10] {
        fs::remove_dir_all(dir.join(format!("checkpoint_step_{step}"))).unwrap();
    }
    let mut options = options;
    options.output.resume = Some("latest".into());
    let resumed = run(options).await;
    assert_eq!(resumed.losses, straight.losses[4..]);

    let text = fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
    let events: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let of = |kind: &'static str| events.iter().filter(move |event| event["event"] == kind);
    let numbers = |kind, field: &str| -> Vec<f64> {
        of(kind).map(|event| event[field].as_f64().unwrap()).collect()
    };
    assert_eq!(numbers("start", "step"), [0.0, 4.0]);
    let steps: Vec<f64> = (1..=N_STEPS).map(|step| step as f64).collect();
    assert_eq!(numbers("step", "step"), steps);
    assert_eq!(numbers("step", "loss"), straight.losses);
    assert_eq!(of("done").count(), 1);
    assert_eq!(events.last().unwrap()["event"], "done");

    // Epochs are counted in samples.
    let n_samples = numbers("start", "samples")[0];
    let mut seen = 0.0;
    for (samples, epoch) in numbers("step", "samples").iter().zip(numbers("step", "epoch")) {
        seen += samples;
        println!("{seen} of {n_samples} samples: epoch {epoch}");
        assert!((epoch - seen / n_samples).abs() < 1e-9);
    }
    let times: Vec<&str> = events.iter().map(|event| event["time"].as_str().unwrap()).collect();
    assert!(times.is_sorted(), "{times:?}");

    let log = RunLog::read(&dir).unwrap();
    assert_eq!((log.end, log.n_steps, log.n_unreadable), (End::Done, Some(N_STEPS), 0));
    assert_eq!(log.steps.len() as u64, N_STEPS);
    let best = straight.best.unwrap();
    assert_eq!(log.best().map(|best| (best.step, best.loss)), Some((best.step, best.loss)));
    // One for each process.
    assert_eq!(fs::read_dir(dir.join("tensorboard")).unwrap().count(), 2);
    server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_without_tensorboard_has_no_event_files() {
    let place = Place::new();
    let server = TestServer::start_with(place.server()).await;
    let mut options = place.options(&server, "run");
    options.output.tensorboard = false;
    options.steps.max_steps = Some(1);
    let dir = options.output.dir.clone();
    run(options).await;
    assert!(dir.join("metrics.jsonl").exists() && !dir.join("tensorboard").exists());
    server.drain().await;
}
