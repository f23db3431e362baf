//! Several microbatches of a step on their way at once: the run is the same, also when the
//! connection breaks meanwhile.

use super::{Place, assert_same_adapters, run};
use offshoot_adapters::{AdamW, LoraSpec};
use offshoot_client::Client;
use offshoot_model::weights::Checkpoint;
use offshoot_model::{ModelConfig, Part, PartSpec, SplitPoints, TapeSize, Work};
use offshoot_tests::proxy::Proxy;
use offshoot_tests::run::open_request;
use offshoot_tests::{TestServer, fixture};
use offshoot_trainer::data::{Batch, Sample};
use offshoot_trainer::loss::{CrossEntropy, Loss};
use offshoot_trainer::{
    Checkpointing, Microbatches, SplitModel, SplitOptions, Summary, TrainOptions,
};
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tch::{Device, Kind};

/// Five steps of four microbatches, and evaluations of two.
fn options(place: &Place, server: &TestServer, output: &str, in_flight: usize) -> TrainOptions {
    let mut options = place.options(server, output);
    (options.steps.batch_size, options.steps.gradient_accumulation_steps) = (Some(2), 4);
    options.steps.max_steps = Some(5);
    options.evaluation.interval = 2;
    options.steps.microbatches_in_flight = in_flight;
    options
}

/// Loss and gradient norm of each step.
fn steps(output: &Path) -> Vec<String> {
    let text = fs::read_to_string(output.join("metrics.jsonl")).unwrap();
    let steps = text.lines().filter_map(|line| {
        let event: serde_json::Value = serde_json::from_str(line).unwrap();
        (event["event"] == "step").then(|| format!("{} {}", event["loss"], event["grad_norm"]))
    });
    steps.collect()
}

pub(super) fn assert_same_runs(found: &Summary, expected: &Summary) {
    let output = |summary: &Summary| steps(summary.checkpoint.parent().unwrap());
    assert_eq!(output(found), output(expected));
    assert_eq!(found.evaluations, expected.evaluations);
    assert_same_adapters(found.adapter.as_ref().unwrap(), expected.adapter.as_ref().unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn overlap_changes_no_number() {
    // LoRA in bottom and top, in the top only, in the bottom only.
    for (split_point_1, split_point_2) in [(1, 3), (0, 3), (1, 4)] {
        let place = Place::new();
        let mut config = place.server();
        (config.model.split_point_1, config.model.split_point_2) = (split_point_1, split_point_2);
        let server = TestServer::start_with(config).await;
        let straight = run(options(&place, &server, "in-flight-1", 1)).await;
        for in_flight in [2, 4] {
            let output = format!("in-flight-{in_flight}");
            let overlapped = run(options(&place, &server, &output, in_flight)).await;
            println!("{split_point_1}..{split_point_2}, {in_flight}: {:?}", overlapped.losses);
            assert_same_runs(&overlapped, &straight);
        }
        server.drain().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn microbatches_that_share_a_batch_change_numbers_by_rounding_only() {
    let place = Place::new();
    let mut config = place.server();
    config.limits.max_tokens_per_batch = 16384;
    let server = TestServer::start_with(config).await;
    let straight = run(options(&place, &server, "in-flight-1", 1)).await;
    let overlapped = run(options(&place, &server, "in-flight-4", 4)).await;
    for (step, (one, four)) in straight.losses.iter().zip(&overlapped.losses).enumerate() {
        println!("step {step}: {one} {four}");
        assert!((one - four).abs() < 1e-5 * one);
    }
    server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn more_than_the_server_allows_is_lowered() {
    let place = Place::new();
    let mut config = place.server();
    config.limits.max_open_microbatches = 2;
    let server = TestServer::start_with(config).await;
    let straight = run(options(&place, &server, "one", 1)).await;
    // More open ones would be refused for good.
    assert_same_runs(&run(options(&place, &server, "many", 100)).await, &straight);
    server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cut_with_several_in_flight_goes_on() {
    let place = Place::new();
    let server = TestServer::start_with(place.server()).await;
    let straight = run(options(&place, &server, "straight", 1)).await;
    let proxy = Proxy::start(server.address()).await.unwrap();
    // The first connection lasts until the session is open. Then they end in the middle of
    // whatever it is.
    proxy.cut_after((0..60).map(|n: i64| 30_000 + n * n * 7919 % 9973));
    let mut cut = options(&place, &server, "cut", 3);
    cut.model.server = proxy.endpoint();
    assert_same_runs(&run(cut).await, &straight);
    println!("{} connections, {} cuts left", proxy.connections(), proxy.cuts_left());
    assert!(proxy.connections() > 10, "the cuts did not take place");
    server.drain().await;
}

/// Bottom and top of the tiny llama around layers 1 and 2.
fn bottom_and_top() -> SplitModel {
    let checkpoint = Checkpoint::open(&fixture("llama")).unwrap();
    let config = ModelConfig::from_json(checkpoint.config()).unwrap();
    let options = SplitOptions {
        split: SplitPoints::new(1, 3, config.n_layers).unwrap(),
        lora: LoraSpec { target_modules: config.default_targets(), ..LoraSpec::default() },
        adamw: AdamW::default(),
        seed: 1,
        kind: Kind::Float,
        checkpointing: Checkpointing::Auto,
        devices: vec![Device::Cpu],
    };
    SplitModel::load(&checkpoint, &config, &options).unwrap()
}

fn loss() -> Arc<dyn Loss> {
    Arc::new(CrossEntropy::default())
}

/// Microbatches of one sequence.
fn batches<const N: usize>(n_tokens: i64) -> [Batch; N] {
    std::array::from_fn(|i| {
        let ids: Vec<i64> = (0..n_tokens).map(|n| (n * 5 + i as i64) % 60).collect();
        let mut batch = Batch::default();
        batch.push(&Sample { learn: vec![true; ids.len()], ids });
        batch
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_step_that_is_given_up_leaves_nothing_behind() {
    let server = TestServer::start_limited(|limits| limits.max_tokens_per_batch = 1).await;
    let client = Client::connect(&server.endpoint()).await.unwrap();
    let batches = batches::<5>(9);
    let loss = &loss();
    let good = Microbatches { batches: &batches, loss, first_number: 0, scale: 0.1, in_flight: 4 };
    let mut runs = Vec::new();
    for disturbed in [false, true] {
        let session = client.open(open_request(&client).await.unwrap()).await.unwrap();
        let mut model = bottom_and_top();
        if disturbed {
            // The first gradient is refused, the other microbatches are on their way.
            let bad = Microbatches { scale: f64::NAN, ..good };
            println!("{}", model.accumulate(&session, bad).await.unwrap_err());
            // May say what became of those that nobody waits for any more.
            let _ = session.settle().await;
            let sessions = client.list_sessions().await.unwrap();
            let own = sessions.iter().find(|other| other.id == *session.id()).unwrap();
            assert!(own.last_applied >= 4 && own.tape_bytes == 0, "{own:?}");
            model.reset().unwrap();
        }
        let done = model.accumulate(&session, good).await.unwrap();
        model.step(&session, 0.01, 1.0).await.unwrap();
        let results = done.results.iter().map(|r| (r.loss.sum, r.trunk_norm_squared));
        runs.push((results.collect::<Vec<_>>(), session.export().await.unwrap()));
    }
    assert_eq!(runs[0].0, runs[1].0);
    assert!(runs[0].1 == runs[1].1, "the adapters differ");
    server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn so_many_are_in_flight_and_no_more() {
    let batches = batches::<5>(7);
    for in_flight in 1..=3 {
        let server = TestServer::start_limited(|limits| {
            limits.max_open_microbatches = in_flight;
            limits.max_tokens_per_batch = 1;
        })
        .await;
        let mut model = bottom_and_top();
        let proxy = Proxy::start(server.address()).await.unwrap();
        let client = Client::connect_with(&proxy.endpoint(), super::quick()).await.unwrap();
        let session = client.open(open_request(&client).await.unwrap()).await.unwrap();
        session.settle().await.unwrap();

        // Not one answer arrives until the server has as many as may be in flight. One more would be
        // refused for good.
        proxy.mute(true);
        let loss = &loss();
        let step = Microbatches { batches: &batches, loss, first_number: 0, scale: 0.1, in_flight };
        let training = model.accumulate(&session, step);
        let watcher = Client::connect(&server.endpoint()).await.unwrap();
        let watching = async {
            while watcher.list_sessions().await.unwrap()[0].last_applied < in_flight as u64 {}
            let before = proxy.connections();
            proxy.set_upstream(None);
            proxy.cut();
            // The client comes again only when the connection that lost bytes is gone.
            while proxy.connections() == before {
                tokio::task::yield_now().await;
            }
            proxy.mute(false);
            proxy.set_upstream(Some(server.address()));
        };
        let both = async { tokio::join!(training, watching) };
        let both = tokio::time::timeout(Duration::from_secs(60), both).await;
        let (done, ()) = both.expect("fewer than that are in flight");
        let done = done.unwrap();
        assert_eq!((done.results.len(), done.in_flight), (5, in_flight));
        assert_eq!(session.settle().await.unwrap(), 10);
        server.drain().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_without_room_for_two_tapes_gets_one_at_a_time() {
    const N_TOKENS: u64 = 200;
    let batches = batches::<5>(N_TOKENS as i64);
    let mut budget = None;
    let mut runs = Vec::new();
    for in_flight in [1, 4] {
        let server = TestServer::start_limited(|limits| {
            limits.memory_bytes = budget;
            limits.max_tokens_per_batch = 1;
        })
        .await;
        let client = Client::connect_with(&server.endpoint(), super::quick()).await.unwrap();
        let session = client.open(open_request(&client).await.unwrap()).await.unwrap();
        let mut model = bottom_and_top();
        let (batches, loss) = (&batches, &loss());
        let step = Microbatches { batches, loss, first_number: 0, scale: 1e-3, in_flight };
        let done = model.accumulate(&session, step).await.unwrap();
        assert_eq!(done.in_flight, 1, "the server had room for two");
        let results = done.results.iter().map(|r| (r.loss.sum, r.trunk_norm_squared));
        runs.push((results.collect::<Vec<_>>(), session.export_with_gradients().await.unwrap()));

        // For the second server: room for the smallest tape, half of another, and the work.
        let checkpoint = Checkpoint::open(&fixture("llama")).unwrap();
        let config = ModelConfig::from_json(checkpoint.config()).unwrap();
        let spec = PartSpec { layers: 1..3, embed: false, head: false };
        let trunk = Part::load(&checkpoint, &config, spec, Kind::Float, Device::Cpu).unwrap();
        let (forward, backward) = (Work::Forward, Work::Backward(TapeSize::Input));
        let work = [forward, backward].map(|work| trunk.workspace_bytes(N_TOKENS, work));
        let tape = trunk.tape_bytes(N_TOKENS, TapeSize::Input, None);
        let weights = client.describe().await.unwrap().memory.weights_bytes;
        let adapter = client.list_sessions().await.unwrap()[0].adapter_bytes;
        budget = Some(weights + adapter + work[0].max(work[1]) + tape + tape / 2);
        server.drain().await;
    }
    assert_eq!(runs[0].0, runs[1].0);
    assert!(runs[0].1 == runs[1].1, "the gradients differ");
}
