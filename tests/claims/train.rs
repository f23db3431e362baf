//! What `offshoot train` promises, with the real trainer against a real server: a run that is
//! stopped and resumed, on either side, gives the losses of one that was not.

#[path = "train_client.rs"]
mod client;
#[path = "train_follow.rs"]
mod follow;
#[path = "train_losses.rs"]
mod losses;
#[path = "train_noise.rs"]
mod noise;
#[path = "train_overlap.rs"]
mod overlap;
#[path = "train_packing.rs"]
mod packing;
#[path = "train_report.rs"]
mod report;
#[path = "train_rolls.rs"]
mod rolls;
#[path = "train_runs.rs"]
mod runs;
#[path = "train_sources.rs"]
mod sources;
#[path = "train_stop.rs"]
mod stop;
#[path = "train_wire.rs"]
mod wire;

use offshoot_adapters::peft;
use offshoot_client::{ClientOptions, Retry, WireDType};
use offshoot_server::ServerConfig;
use offshoot_tests::{TestServer, fixture, server_config};
use offshoot_trainer::{CancelToken, Summary, TrainError, TrainOptions, train};
use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::time::Duration;
use tempfile::TempDir;

const N_STEPS: u64 = 10;

/// Texts, a store and an output directory.
struct Place {
    dir: TempDir,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut text = String::new();
        for i in 0..23 {
            let words = "the trunk holds every branch and each branch holds its leaves ";
            writeln!(text, "Sentence {}\n", &words.repeat(3)[i..(i * 5 + 20).min(120)]).unwrap();
        }
        fs::write(dir.path().join("train.txt"), &text).unwrap();
        let held_out = "{\"prompt\": \"What holds leaves?\", \"completion\": \"A branch.\"}\n";
        fs::write(dir.path().join("eval.jsonl"), held_out.repeat(3)).unwrap();
        Place { dir }
    }

    /// Layers 1 and 2 of the tiny text model. Each job runs alone: which microbatches wait together
    /// is a matter of time, products of more rows are rounded in another way, and these tests compare
    /// bits.
    fn server(&self) -> ServerConfig {
        let mut config = server_config(&self.dir.path().join("store"));
        config.model.name = fixture("tiny_text").display().to_string();
        config.store.snapshots_kept = 10;
        config.limits.max_tokens_per_batch = 1;
        config
    }

    /// Ten steps of two microbatches with dropout, LoRA in bottom, trunk and top.
    fn options(&self, server: &TestServer, output: &str) -> TrainOptions {
        self.options_at(&server.endpoint(), output)
    }

    fn options_at(&self, endpoint: &str, output: &str) -> TrainOptions {
        let model = fixture("tiny_text").display().to_string();
        let path = |name: &str| self.dir.path().join(name);
        let mut options = TrainOptions::new(&model, endpoint, path("train.txt"), path(output));
        options.sources.eval_files = vec![path("eval.jsonl")];
        options.data.max_seq_length = 24;
        options.steps.batch_size = Some(3);
        options.steps.gradient_accumulation_steps = 2;
        options.optimizer.learning_rate = 5e-3;
        options.steps.max_steps = Some(N_STEPS);
        options.output.save_interval = 4;
        options.evaluation.interval = 3;
        options.compute.wire_dtype = WireDType::F32;
        options.model.client = quick();
        options.output.quiet = true;
        options
    }
}

#[test]
fn child_process() {
    offshoot_tests::child::serve_if_asked();
}

fn quick() -> ClientOptions {
    let retry = Retry {
        first_delay: Duration::from_millis(2),
        max_delay: Duration::from_millis(50),
        max_elapsed: Duration::from_secs(60),
    };
    ClientOptions { retry, ..ClientOptions::default() }
}

async fn run(options: TrainOptions) -> Summary {
    train(options, CancelToken::default()).await.unwrap_or_else(|error| panic!("{error}"))
}

fn assert_same_adapters(found: &Path, expected: &Path) {
    let [found, expected] = [found, expected].map(|dir| {
        let mut adapter = peft::read_dir(dir).unwrap();
        adapter.tensors.sort_by(|(a, _), (b, _)| a.cmp(b));
        adapter
    });
    assert_eq!(found.spec, expected.spec);
    assert_eq!(found.tensors.len(), expected.tensors.len());
    for ((name, found), (expected_name, expected)) in found.tensors.iter().zip(&expected.tensors) {
        assert_eq!(name, expected_name);
        let far = (found - expected).abs().max().double_value(&[]);
        assert!(found.equal(expected), "{name} differs by up to {far:e}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn resumed_equals_uninterrupted() {
    let place = Place::new();
    let server = TestServer::start_with(place.server()).await;
    let straight = run(place.options(&server, "straight")).await;
    assert_eq!((straight.step, straight.losses.len()), (N_STEPS, N_STEPS as usize));
    let adapter = straight.adapter.clone().unwrap();

    // Asked to end before the first step: a checkpoint at step 0.
    let stopped = CancelToken::default();
    stopped.cancel();
    let summary = train(place.options(&server, "stopped"), stopped).await.unwrap();
    assert!(summary.interrupted && summary.losses.is_empty() && summary.adapter.is_none());
    assert!(summary.checkpoint.ends_with("checkpoint_step_0"));
    let mut options = place.options(&server, "stopped");
    options.output.resume = Some("latest".into());
    let resumed = run(options).await;
    assert_eq!(resumed.losses, straight.losses);
    assert_eq!(resumed.evaluations, straight.evaluations[1..]);
    assert_same_adapters(&resumed.adapter.unwrap(), &adapter);

    // From the middle, in another folder, through another server with the same store.
    server.drain().await;
    let server = TestServer::start_with(place.server()).await;
    let mut options = place.options(&server, "branch");
    let four = straight.checkpoint.with_file_name("checkpoint_step_4");
    options.output.resume = Some(four.display().to_string());
    let resumed = run(options).await;
    println!("straight {:?}\nresumed {:?}", straight.losses, resumed.losses);
    assert_eq!(resumed.losses, straight.losses[4..]);
    assert_eq!(resumed.best, straight.best);
    assert_same_adapters(&resumed.adapter.unwrap(), &adapter);
    server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn loss_falls_and_files_are_there() {
    let place = Place::new();
    let server = TestServer::start_with(place.server()).await;
    let mut options = place.options(&server, "run");
    options.steps.max_steps = Some(30);
    options.optimizer.learning_rate = 2e-2;
    options.output.save_interval = 3;
    options.samples.prompts = vec!["The trunk".into()];
    options.samples.options.max_new_tokens = 5;
    let summary = run(options).await;
    let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
    let (first, last) = (mean(&summary.losses[..3]), mean(&summary.losses[27..]));
    println!("loss {first} -> {last}; evaluations {:?}", summary.evaluations);
    assert!(last < 0.8 * first);

    let dir = place.dir.path().join("run");
    let mut names: Vec<String> = fs::read_dir(&dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    let best = summary.best.unwrap().step;
    let mut expected: Vec<u64> = vec![18, 21, 24, 27, 30];
    expected.retain(|step| *step != best);
    expected.push(best);
    let checkpoint = |step: u64| format!("checkpoint_step_{step}");
    assert!(expected.iter().all(|step| names.contains(&checkpoint(*step))), "{names:?}");
    assert!(!names.contains(&checkpoint(3)) || best == 3, "{names:?}");

    // One adapter for all four layers: two matrices for each of seven modules.
    let adapter = peft::read_dir(&dir.join("adapter")).unwrap();
    assert_eq!(adapter.tensors.len(), 4 * 7 * 2);
    let metrics = fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
    let count = |event: &str| metrics.matches(&format!("{{\"event\":\"{event}\"")).count();
    assert_eq!((count("step"), count("sample"), count("done")), (30, 2, 1));
    assert_eq!(count("eval"), 1 + 10);
    server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_best_checkpoint_can_be_resumed_however_old_it_is() {
    let place = Place::new();
    let mut config = place.server();
    config.store.snapshots_kept = 2;
    let server = TestServer::start_with(config).await;
    let mut options = place.options(&server, "run");
    // So fast that it soon gets worse.
    (options.steps.max_steps, options.optimizer.learning_rate) = (Some(24), 0.3);
    (options.output.save_interval, options.evaluation.interval) = (2, 2);
    let summary = run(options.clone()).await;
    let saved: Vec<_> =
        summary.evaluations.iter().filter(|e| e.step > 0 && e.loss.is_finite()).collect();
    let best = saved.iter().min_by(|a, b| a.loss.total_cmp(&b.loss)).unwrap().step;
    println!("best {best}: {saved:?}");
    assert!(best < 20, "the best one is too young for this test");

    options.output.dir = place.dir.path().join("branch");
    let path = summary.checkpoint.with_file_name(format!("checkpoint_step_{best}"));
    options.output.resume = Some(path.display().to_string());
    assert_eq!(run(options).await.losses, summary.losses[best as usize..]);
    server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_without_layers_trains_the_trunk() {
    let place = Place::new();
    let mut config = place.server();
    (config.model.split_point_1, config.model.split_point_2) = (0, 4);
    let server = TestServer::start_with(config).await;
    let mut options = place.options(&server, "straight");
    options.lora.target_modules = vec!["all-linear".into()];
    let straight = run(options.clone()).await;
    let adapter = peft::read_dir(&straight.adapter.clone().unwrap()).unwrap();
    assert_eq!(adapter.tensors.len(), 4 * 7 * 2);
    // PEFT takes names of modules, not the word.
    assert_eq!(adapter.spec.target_modules.len(), 7);
    options.output.dir = place.dir.path().join("branch");
    let eight = straight.checkpoint.with_file_name("checkpoint_step_8");
    options.output.resume = Some(eight.display().to_string());
    assert_eq!(run(options).await.losses, straight.losses[8..]);
    server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_step_in_small_pieces_is_the_same_step() {
    let place = Place::new();
    let mut losses = Vec::new();
    for limit in [8192, 40] {
        let mut config = place.server();
        config.store.dir = place.dir.path().join(format!("store-{limit}"));
        config.limits.max_tokens_per_microbatch = limit;
        let server = TestServer::start_with(config).await;
        let mut options = place.options(&server, &format!("pieces-{limit}"));
        options.lora.lora_dropout = Some(0.0);
        losses.push(run(options).await.losses);
        server.drain().await;
    }
    for (step, (whole, pieces)) in losses[0].iter().zip(&losses[1]).enumerate() {
        println!("step {step}: {whole} {pieces}");
        assert!((whole - pieces).abs() < 1e-4 * whole);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_fit_is_refused_with_both_sides() {
    let place = Place::new();
    let server = TestServer::start_with(place.server()).await;
    let refused = async |change: fn(&mut TrainOptions)| -> String {
        let mut options = place.options(&server, "refused");
        change(&mut options);
        match train(options, CancelToken::default()).await {
            Err(error) => error.to_string(),
            Ok(_) => panic!("it ran"),
        }
    };
    let assert_says = |text: String, words: &[&str]| {
        assert!(words.iter().all(|word| text.contains(word)), "{text}");
    };
    let other = |o: &mut TrainOptions| o.model.name = fixture("llama").display().to_string();
    assert_says(refused(other).await, &["The server holds tiny_text", "this client loaded"]);
    let text = refused(|o| o.model.split_point_2 = Some(2)).await;
    assert_says(text, &["--split-point-2 is 2 here and 3 at the server"]);
    let text = refused(|o| o.model.model_type = Some("gpt2".into())).await;
    assert_says(text, &["--model-type = gpt2", "llama"]);
    let text = refused(|o| o.data.max_seq_length = 9000).await;
    assert_says(text, &["--max-seq-length = 9000", "8192"]);
    let text = refused(|o| o.lora.target_modules = vec!["q_prj".into()]).await;
    assert_says(text, &["q_prj", "q_proj"]);
    let text = refused(|o| o.output.resume = Some("latest".into())).await;
    assert_says(text, &["no checkpoint_step_N"]);
    server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn another_runs_folder_is_not_written_over() {
    let place = Place::new();
    let server = TestServer::start_with(place.server()).await;
    let first = run(place.options(&server, "run")).await;
    let again = train(place.options(&server, "run"), CancelToken::default()).await;
    assert!(matches!(again, Err(TrainError::Option { option: "output-dir", .. })), "{again:?}");
    // A branch from the middle must not mix with what came after it.
    let mut options = place.options(&server, "run");
    options.output.resume =
        Some(first.checkpoint.with_file_name("checkpoint_step_4").display().to_string());
    let branch = train(options, CancelToken::default()).await;
    assert!(matches!(branch, Err(TrainError::Option { option: "output-dir", .. })), "{branch:?}");
    let mut options = place.options(&server, "run");
    options.output.resume = Some("latest".into());
    options.lora.r = Some(4);
    let error = train(options, CancelToken::default()).await.unwrap_err().to_string();
    assert!(error.contains("another model, cut or adapter: lora.r was 8, is 4;"), "{error}");
    server.drain().await;
}
