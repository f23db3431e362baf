//! Runs that end early, keep what is best, go on from there, and begin with an adapter that exists.

use super::{Place, assert_same_adapters, run};
use offshoot_adapters::peft;
use offshoot_client::Client;
use offshoot_model::SplitPoints;
use offshoot_model::weights::Checkpoint;
use offshoot_tests::{TestServer, fixture};
use offshoot_trainer::adapter::{Adapter, ImportOptions};
use offshoot_trainer::checkpoint::{self, Best};
use offshoot_trainer::options::AdapterChoice;
use offshoot_trainer::{CancelToken, Schedule, Scheduler, TrainOptions, Warmup, dry_run, train};
use std::fs;
use std::path::{Path, PathBuf};

/// So fast that the evaluation loss soon gets worse; an evaluation after every other step.
fn too_fast(place: &Place, server: &TestServer, output: &str) -> TrainOptions {
    let mut options = place.options(server, output);
    (options.steps.max_steps, options.optimizer.learning_rate) = (Some(24), 0.3);
    options.evaluation.interval = 2;
    options.output.save_interval = 1000;
    options
}

async fn server_with(place: &Place, snapshots_kept: usize) -> TestServer {
    let mut config = place.server();
    config.store.snapshots_kept = snapshots_kept;
    TestServer::start_with(config).await
}

fn lowest(evaluations: &[Best]) -> Best {
    let trained = evaluations.iter().filter(|e| e.step > 0 && e.loss.is_finite());
    *trained.min_by(|a, b| a.loss.total_cmp(&b.loss)).unwrap()
}

fn steps(output: &Path) -> Vec<u64> {
    checkpoint::list(output).unwrap().iter().map(|saved| saved.state.step).collect()
}

fn at_step(output: &Path, step: u64) -> PathBuf {
    output.join(format!("checkpoint_step_{step}"))
}

/// Writes a checkpoint's adapter as one PEFT directory.
fn stitched(checkpoint: &Path, to: PathBuf) -> PathBuf {
    let Adapter { spec, tensors, .. } = Adapter::read(checkpoint).unwrap();
    let config = peft::PeftConfig { spec: &spec, base_model: "tiny", fan_in_fan_out: false };
    peft::write_dir(&to, &config, &tensors).unwrap();
    to
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_gets_worse_ends_with_its_best_adapter() {
    let place = Place::new();
    let server = server_with(&place, 30).await;
    let dir = |name: &str| place.dir.path().join(name);
    // The same run to its end, with a checkpoint after each step.
    let mut options = too_fast(&place, &server, "whole");
    (options.output.save_interval, options.output.keep_last) = (1, 100);
    let whole = run(options).await;
    assert!(!whole.stopped_early && whole.adapter_step == Some(24));

    let patience = 3;
    let mut options = too_fast(&place, &server, "early");
    options.evaluation.patience = Some(patience);
    options.output.adapter = AdapterChoice::Best;
    let early = run(options.clone()).await;
    println!("stopped at {}: {:?}", early.step, early.evaluations);
    assert!(early.stopped_early && !early.interrupted && early.step < 24);
    assert_eq!(early.losses, whole.losses[..early.step as usize]);
    assert_eq!(early.evaluations, whole.evaluations[..early.evaluations.len()]);
    let best = lowest(&early.evaluations);
    assert_eq!(best.step + 2 * patience as u64, early.step);
    // No save interval came, but the best one is there and is what is exported.
    assert_eq!(early.adapter_step, Some(best.step));
    assert!(steps(&dir("early")).contains(&best.step));
    let expected = stitched(&at_step(&dir("whole"), best.step), dir("stitched"));
    assert_same_adapters(&early.adapter.clone().unwrap(), &expected);

    // From before the stop, elsewhere: it stops at the same step.
    let mut resumed = options.clone();
    resumed.output.dir = dir("branch");
    let before = at_step(&dir("whole"), early.step - 3);
    resumed.output.resume = Some(before.display().to_string());
    let resumed = run(resumed).await;
    assert!(resumed.stopped_early);
    assert_eq!(resumed.losses, early.losses[early.losses.len() - 3..]);

    // Once more: nothing is left to do. With more patience it goes on as if it had not stopped.
    options.output.resume = Some("latest".into());
    let again = run(options.clone()).await;
    assert!(again.stopped_early && again.losses.is_empty() && again.evaluations.is_empty());
    assert_same_adapters(&again.adapter.unwrap(), &expected);
    options.evaluation.patience = Some(100);
    let rest = run(options).await;
    assert!(!rest.stopped_early);
    assert_eq!(rest.losses, whole.losses[early.step as usize..]);
    server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn resume_best_sets_the_later_checkpoints_aside() {
    let place = Place::new();
    let server = server_with(&place, 30).await;
    let mut options = too_fast(&place, &server, "run");
    (options.output.save_interval, options.output.keep_last) = (2, 4);
    let whole = run(options.clone()).await;
    let dir = options.output.dir.clone();
    let best = lowest(&whole.evaluations).step;
    assert!(best < 18, "the best one is too young for this test");
    assert_eq!(steps(&dir), [best, 18, 20, 22, 24]);

    options.output.resume = Some("best".into());
    let resumed = run(options.clone()).await;
    assert_eq!(resumed.losses, whole.losses[best as usize..]);
    assert_same_adapters(&resumed.adapter.unwrap(), &whole.adapter.unwrap());
    assert_eq!(steps(&dir.join(format!("after_step_{best}"))), [18, 20, 22, 24]);
    // The best of another run, into a folder of its own.
    options.output.resume = Some(dir.join("best").display().to_string());
    options.output.dir = place.dir.path().join("branch");
    assert_eq!(run(options).await.losses, whole.losses[best as usize..]);
    server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn more_checkpoints_than_the_server_has_snapshots_still_have_their_adapters() {
    let place = Place::new();
    let server = server_with(&place, 2).await;
    let mut options = too_fast(&place, &server, "run");
    (options.output.save_interval, options.output.keep_last) = (2, 8);
    run(options.clone()).await;
    let dir = options.output.dir.clone();
    let kept = steps(&dir);
    assert!(kept.ends_with(&[10, 12, 14, 16, 18, 20, 22, 24]), "{kept:?}");
    let old = at_step(&dir, 10);
    let saved = checkpoint::list(&dir).unwrap().into_iter().find(|s| s.path == old).unwrap();
    assert_ne!(checkpoint::best(&checkpoint::list(&dir).unwrap()).unwrap().state.step, 10);

    options.output.dir = place.dir.path().join("branch");
    options.output.resume = Some(old.display().to_string());
    let error = train(options.clone(), CancelToken::default()).await.unwrap_err().to_string();
    println!("{error}");
    assert!(error.contains("cannot restore snapshot"), "{error}");
    assert!(error.contains(&format!("--init-adapter {}", old.display())), "{error}");
    assert!(!options.output.dir.exists(), "a run that cannot begin leaves nothing");

    options.output.resume = None;
    options.lora.init_adapter = Some(old);
    options.steps.max_steps = Some(2);
    let branch = run(options).await;
    assert_eq!(Some(branch.evaluations[0].loss), saved.state.eval_loss);
    server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_begins_with_an_adapter_goes_on_where_it_was() {
    let place = Place::new();
    let server = server_with(&place, 5).await;
    let mut options = place.options(&server, "first");
    (options.lora.r, options.lora.lora_alpha) = (Some(3), Some(9.0));
    options.lora.target_modules = vec!["q_proj".into(), "down_proj".into()];
    let first = run(options).await;
    let adapter = first.adapter.clone().unwrap();
    // A run goes on with the adapter that it has, also where the options do not repeat what it is.
    let mut options = place.options(&server, "longer");
    options.output.resume = Some(first.checkpoint.display().to_string());
    options.steps.max_steps = Some(11);
    let longer = run(options).await.adapter.unwrap();
    assert_eq!(peft::read_dir(&longer).unwrap().spec, peft::read_dir(&adapter).unwrap().spec);

    let mut options = place.options(&server, "second");
    options.lora.init_adapter = Some(adapter.clone());
    let second = run(options.clone()).await;
    // The model is the same one; the optimizer is fresh.
    assert_eq!(second.evaluations[0].loss, first.evaluations.last().unwrap().loss);
    assert_eq!(second.step, 10);
    let spec = peft::read_dir(&second.adapter.clone().unwrap()).unwrap().spec;
    assert_eq!((spec.r, spec.lora_alpha, spec.lora_dropout), (3, 9.0, 0.1));
    assert_eq!(spec.target_modules, ["down_proj", "q_proj"]);

    // Imported into a folder, it is the same run.
    let model = fixture("tiny_text");
    let imported = place.dir.path().join("imported");
    let checkpoint = Checkpoint::open(&model).unwrap();
    let import = ImportOptions {
        output_dir: &imported,
        model_name: model.to_str().unwrap(),
        checkpoint: &checkpoint,
        split: SplitPoints::new(1, 3, 4).unwrap(),
    };
    Adapter::read(&adapter).unwrap().import(&import).unwrap();
    let mut resumed = place.options(&server, "imported");
    resumed.output.resume = Some("latest".into());
    let resumed = run(resumed).await;
    assert_eq!(resumed.losses, second.losses);
    assert_eq!(resumed.evaluations, second.evaluations);
    assert_same_adapters(&resumed.adapter.unwrap(), &second.adapter.unwrap());

    // Options that the adapter does not have.
    options.output.dir = place.dir.path().join("refused");
    options.lora.r = Some(4);
    let error = train(options.clone(), CancelToken::default()).await.unwrap_err().to_string();
    assert!(
        error.contains("--lora-rank = 4: the adapter in") && error.contains("has 3"),
        "{error}"
    );
    options.lora.r = Some(3);
    options.lora.target_modules = vec!["q_proj".into()];
    let error = train(options, CancelToken::default()).await.unwrap_err().to_string();
    assert!(error.contains("--target-modules = q_proj: the adapter in"), "{error}");
    server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_step_learns_at_the_rate_of_its_schedule() {
    let place = Place::new();
    let server = server_with(&place, 5).await;
    let mut all_losses = Vec::new();
    for scheduler in [Scheduler::Constant, Scheduler::Linear, Scheduler::Cosine] {
        let name = format!("{scheduler:?}");
        let mut options = place.options(&server, &name);
        options.optimizer.scheduler = scheduler;
        options.optimizer.warmup = Warmup::Ratio(0.21);
        if scheduler != Scheduler::Constant {
            options.optimizer.min_learning_rate = 1e-3;
        }
        options.output.config = Some("seed = 42\n".into());
        let schedule = Schedule {
            scheduler,
            base: 5e-3,
            lowest: options.optimizer.min_learning_rate,
            n_warmup: 3,
            n_steps: 10,
        };
        let dir = options.output.dir.clone();
        all_losses.push(run(options).await.losses);
        let text = fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
        let events = text.lines().map(|line| serde_json::from_str(line).unwrap());
        let rates: Vec<f64> = events
            .filter(|event: &serde_json::Value| event["event"] == "step")
            .map(|event| event["learning_rate"].as_f64().unwrap())
            .collect();
        assert_eq!(rates.len(), 10);
        for (step, rate) in (0..).zip(rates) {
            let expected = schedule.learning_rate(step);
            assert!((rate - expected).abs() < 1e-12 * expected, "{step}: {rate}, not {expected}");
        }
        assert_eq!(fs::read_to_string(dir.join("config.toml")).unwrap(), "seed = 42\n");
    }
    // The server was told as well: the losses part as soon as the rates do.
    assert_eq!(all_losses[0][..4], all_losses[1][..4]);
    assert!(all_losses[0][6..] != all_losses[1][6..] && all_losses[1][6..] != all_losses[2][6..]);
    server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dry_run_checks_all_and_leaves_nothing() {
    let place = Place::new();
    let mut config = place.server();
    (config.model.split_point_1, config.model.split_point_2) = (0, 4);
    let server = TestServer::start_with(config).await;
    let mut options = place.options(&server, "run");
    let lines = dry_run(&options).await.unwrap().join("\n");
    println!("{lines}");
    for expected in [
        "trunk [0, 4)",
        "10 steps, 1 of warm-up",
        "a step: 2.0 microbatches",
        "what leaves this machine are token embeddings",
        "the server can read every label",
        "no session was opened",
    ] {
        assert!(lines.contains(expected), "{expected}");
    }
    assert!(!options.output.dir.exists());
    let client = Client::connect(&server.endpoint()).await.unwrap();
    assert!(client.list_sessions().await.unwrap().is_empty());

    // What a run would be refused for.
    options.evaluation.patience = Some(2);
    options.sources.eval_files.clear();
    let error = dry_run(&options).await.unwrap_err().to_string();
    assert!(error.contains("--early-stopping-patience = 2: it needs evaluation data"), "{error}");
    let mut options = place.options(&server, "run");
    options.lora.r = Some(1000);
    let error = dry_run(&options).await.unwrap_err().to_string();
    assert!(error.contains("--lora-rank = 1000: the server takes at most 256"), "{error}");
    let mut options = place.options(&server, "run");
    run(options.clone()).await;
    let error = dry_run(&options).await.unwrap_err().to_string();
    assert!(error.contains("it holds checkpoints of another run"), "{error}");
    options.output.resume = Some("latest".into());
    (options.steps.batch_size, options.optimizer.max_grad_norm) = (Some(2), 0.5);
    let lines = dry_run(&options).await.unwrap().join("\n");
    assert!(lines.contains("goes on at step 10"), "{lines}");
    assert!(lines.contains("not the run as it began: --max-grad-norm was 1.0, is 0.5"), "{lines}");
    server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_takes_one_run_at_a_time() {
    let place = Place::new();
    let server = server_with(&place, 30).await;
    let options = place.options(&server, "run");
    fs::create_dir_all(&options.output.dir).unwrap();
    // As a run that goes on holds it.
    let folder = fs::File::open(&options.output.dir).unwrap();
    folder.lock().unwrap();
    let error = train(options.clone(), CancelToken::default()).await.unwrap_err().to_string();
    assert!(error.contains("another run writes there now"), "{error}");
    assert_eq!(fs::read_dir(&options.output.dir).unwrap().count(), 0);
    drop(folder);
    run(options).await;
}
