//! Microbatches of a number of tokens instead of a number of samples.

use super::{Place, assert_same_adapters, run};
use offshoot_tests::TestServer;
use offshoot_trainer::TrainOptions;
use offshoot_trainer::data::source::DataSpec;
use offshoot_trainer::data::{DataSet, Plan, PlanOptions};
use offshoot_trainer::tokenizer::Tokenizer;
use serde_json::Value;
use std::fs;

const BUDGET: usize = 70;

/// Two epochs of steps of two microbatches, with as many samples as fit.
fn packed(place: &Place, server: &TestServer, output: &str) -> TrainOptions {
    let mut options = place.options(server, output);
    options.steps.batch_size = None;
    options.steps.max_tokens_per_batch = Some(BUDGET);
    options.steps.max_steps = None;
    options.steps.num_epochs = 2;
    options
}

/// The plan that the run follows, made from the same files.
fn plan(options: &TrainOptions) -> (DataSet, Plan) {
    let model = std::path::Path::new(&options.model.name);
    let tokenizer = Tokenizer::from_dir(model, &Value::Null).unwrap();
    let spec = DataSpec::files(options.sources.train_files.clone());
    let data = DataSet::load(&spec.open().unwrap().train, &options.data, &tokenizer).unwrap();
    let plan = PlanOptions {
        size: options.steps.microbatch_size(),
        gradient_accumulation_steps: options.steps.gradient_accumulation_steps,
        server_max_tokens: 4096,
        seed: options.seed,
    };
    let plan = Plan::new(&data, plan).unwrap();
    (data, plan)
}

#[tokio::test(flavor = "multi_thread")]
async fn packed_resumed_equals_uninterrupted() {
    let place = Place::new();
    let server = TestServer::start_with(place.server()).await;
    let straight = run(packed(&place, &server, "straight")).await;

    // Two whole epochs: every sample twice, every microbatch within the budget.
    let options = packed(&place, &server, "straight");
    let (data, plan) = plan(&options);
    assert_eq!(straight.step, plan.n_steps(2));
    let metrics = fs::read_to_string(options.output.dir.join("metrics.jsonl")).unwrap();
    let events = metrics.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let steps: Vec<Value> = events.filter(|event| event["event"] == "step").collect();
    assert_eq!(steps.len() as u64, straight.step);
    let sum =
        |field: &str| steps.iter().map(|s| s[field].as_u64().unwrap() as usize).sum::<usize>();
    assert_eq!((sum("samples"), sum("tokens")), (2 * data.len(), 2 * data.n_tokens()));
    assert!(steps.iter().all(|s| s["tokens"].as_u64().unwrap() as usize <= 2 * BUDGET));
    // Better filled than with three samples each.
    assert!(steps.len() < 2 * data.len().div_ceil(6), "{} steps", steps.len());

    let mut options = packed(&place, &server, "branch");
    let four = straight.checkpoint.with_file_name("checkpoint_step_4");
    options.output.resume = Some(four.display().to_string());
    let resumed = run(options).await;
    println!("straight {:?}\nresumed {:?}", straight.losses, resumed.losses);
    assert_eq!(resumed.losses, straight.losses[4..]);
    assert_same_adapters(&resumed.adapter.unwrap(), &straight.adapter.unwrap());

    // How samples share microbatches changes no evaluation but by rounding.
    let by_samples = run(place.options(&server, "by_samples")).await;
    let (found, expected) = (straight.evaluations[0].loss, by_samples.evaluations[0].loss);
    println!("evaluation {found} by tokens, {expected} by samples");
    assert!((found - expected).abs() < 1e-6 * expected);
    server.drain().await;
}
