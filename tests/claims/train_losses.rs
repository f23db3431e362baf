//! Whole runs with other losses: they learn, go on after a stop as if there had been none, and say
//! what is missing.

use super::{Place, assert_same_adapters, quick, run};
use offshoot_client::WireDType;
use offshoot_tests::{TestServer, fixture};
use offshoot_trainer::loss::{CrossEntropy, DpoOptions, FromLogits};
use offshoot_trainer::options::LossOptions;
use offshoot_trainer::{CancelToken, TrainOptions, train};
use safetensors::SafeTensors;
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use tch::Tensor;

/// Pairs in which the chosen answer names a tree and the rejected one a stone.
fn pairs(n: usize, first: usize) -> String {
    let pair = |i: usize| {
        let (tree, stone) = (["oak", "elm", "ash"][i % 3], ["flint", "slate", "chalk"][i % 3]);
        let prompt = format!("What is number {i}? ");
        serde_json::json!({
            "prompt": prompt,
            "chosen": format!("An {tree} with leaves."),
            "rejected": format!("A piece of {stone}, {} years old.", i * 7),
        })
        .to_string()
            + "\n"
    };
    (first..first + n).map(pair).collect()
}

/// Ten steps of two microbatches of two pairs, with dropout.
fn options(place: &Place, server: &TestServer, output: &str) -> TrainOptions {
    let path = |name: &str| place.dir.path().join(name);
    fs::write(path("pairs.jsonl"), pairs(11, 0)).unwrap();
    fs::write(path("eval-pairs.jsonl"), pairs(3, 20)).unwrap();
    let model = fixture("tiny_text").display().to_string();
    let mut options =
        TrainOptions::new(&model, &server.endpoint(), path("pairs.jsonl"), path(output));
    options.sources.eval_files = vec![path("eval-pairs.jsonl")];
    options.loss = LossOptions::Dpo(DpoOptions { beta: 0.3, label_smoothing: 0.0 });
    options.steps.batch_size = Some(2);
    options.steps.gradient_accumulation_steps = 2;
    options.steps.max_steps = Some(10);
    options.optimizer.learning_rate = 5e-3;
    options.output.save_interval = 4;
    options.evaluation.interval = 3;
    options.compute.wire_dtype = WireDType::F32;
    options.model.client = quick();
    options
}

fn events(output: &Path, kind: &str) -> Vec<Value> {
    let text = fs::read_to_string(output.join("metrics.jsonl")).unwrap();
    let events = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    events.filter(|event| event["event"] == kind).collect()
}

/// The tensors of a safetensors file, with their names.
fn values(path: &Path) -> Vec<(String, Vec<u8>)> {
    let bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    assert!(!file.is_empty());
    let values = file.iter().map(|(name, view)| (name.to_string(), view.data().to_vec()));
    let mut values: Vec<_> = values.collect();
    // The file has them in any order.
    values.sort();
    values
}

async fn refused(options: TrainOptions) -> String {
    train(options, CancelToken::default()).await.unwrap_err().to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn dpo_learns_preferences_and_goes_on_as_if_not_stopped() {
    let place = Place::new();
    let server = TestServer::start_with(place.server()).await;
    let straight = run(options(&place, &server, "straight")).await;
    let output = place.dir.path().join("straight");
    let evaluations = events(&output, "eval");
    // Before the first step nothing differs from the reference.
    let [first, last] = [&evaluations[0], evaluations.last().unwrap()];
    println!("{first}\n{last}");
    assert!((first["loss"].as_f64().unwrap() - 2f64.ln()).abs() < 1e-6);
    assert_eq!(first["extra"]["rewards/margins"].as_f64().unwrap(), 0.0);
    assert!(last["loss"].as_f64().unwrap() < 0.5);
    assert_eq!(last["extra"]["rewards/accuracies"].as_f64().unwrap(), 1.0);
    assert!(
        events(&output, "step").last().unwrap()["extra"]["rewards/margins"].as_f64().unwrap() > 0.5
    );

    // In another folder: what it compares with is that of the model as the run began.
    let four = straight.checkpoint.with_file_name("checkpoint_step_4").display().to_string();
    let mut resumed = options(&place, &server, "branch");
    resumed.output.resume = Some(four.clone());
    let resumed = run(resumed).await;
    assert_eq!(resumed.losses, straight.losses[4..]);
    assert_same_adapters(&resumed.adapter.unwrap(), straight.adapter.as_ref().unwrap());
    let reference = output.join("dpo_reference.safetensors");
    let copied = place.dir.path().join("branch/dpo_reference.safetensors");
    assert_eq!(values(&copied), values(&reference));

    // Other pairs were not compared; and trained weights cannot be the reference.
    let mut other = options(&place, &server, "other");
    other.output.resume = Some(four.clone());
    fs::write(place.dir.path().join("pairs.jsonl"), pairs(11, 1)).unwrap();
    let error = refused(other).await;
    assert!(error.contains("another training data"), "{error}");
    let mut without = options(&place, &server, "without");
    without.output.resume = Some(four);
    fs::remove_file(&reference).unwrap();
    let error = refused(without).await;
    assert!(error.contains("dpo_reference.safetensors: the log-probabilities"), "{error}");
    server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn data_of_another_loss_are_refused() {
    let place = Place::new();
    let server = TestServer::start_with(place.server()).await;
    let mut texts = place.options(&server, "texts");
    texts.loss = LossOptions::Dpo(DpoOptions::default());
    let error = refused(texts).await;
    assert!(
        error.starts_with("--loss = dpo: the training data have no chosen and rejected answers"),
        "{error}"
    );
    let mut only_eval = options(&place, &server, "eval");
    only_eval.sources.eval_files = vec![place.dir.path().join("eval.jsonl")];
    let error = refused(only_eval).await;
    assert!(error.contains("the evaluation data have no chosen"), "{error}");
    for (loss, option) in [
        (LossOptions::CrossEntropy(CrossEntropy { label_smoothing: 1.0 }), "--label-smoothing = 1"),
        (LossOptions::Dpo(DpoOptions { beta: 0.0, label_smoothing: 0.0 }), "--dpo-beta = 0"),
        (LossOptions::Dpo(DpoOptions { beta: 1.0, label_smoothing: 0.5 }), "--dpo-label-smoothing"),
    ] {
        let mut options = options(&place, &server, "wrong");
        options.loss = loss;
        let error = refused(options).await;
        assert!(error.starts_with(option), "{error}");
    }
    server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_loss_of_ones_own_trains() {
    let place = Place::new();
    let server = TestServer::start_with(place.server()).await;
    let usual = run(place.options(&server, "usual")).await;
    let mut own = place.options(&server, "own");
    own.loss = LossOptions::Custom(Arc::new(FromLogits::new("own", |logits: &Tensor, labels| {
        let of_labels = logits.gather(1, &labels.unsqueeze(1), false).squeeze_dim(1);
        logits.logsumexp(&[-1i64][..], false) - of_labels
    })));
    let own = run(own).await;
    println!("usual {:?}\nown {:?}", usual.losses, own.losses);
    assert_eq!(own.losses.len(), usual.losses.len());
    for (own, usual) in own.losses.iter().zip(&usual.losses) {
        assert!((own / usual - 1.0).abs() < 1e-4, "{own} {usual}");
    }
    server.drain().await;
}
