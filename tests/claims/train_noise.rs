//! Clipped and noisy messages: nothing at all where nothing is asked for, the same bytes whenever a
//! step is sent again, and runs that resume as if they had not been stopped.

use super::overlap::assert_same_runs;
use super::{Place, assert_same_adapters, run};
use offshoot_client::{Client, WireDType};
use offshoot_model::ModelConfig;
use offshoot_model::weights::Checkpoint;
use offshoot_tests::proxy::Proxy;
use offshoot_tests::{TestServer, fixture};
use offshoot_trainer::adapter::{Visit, VisitOptions};
use offshoot_trainer::generate::{Decoder, GenerateOptions, Request, Sampling};
use offshoot_trainer::noise::{NoiseKey, Perturbation, PrivacyOptions};
use offshoot_trainer::options::LossOptions;
use offshoot_trainer::{CancelToken, TrainOptions, dry_run, train};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use tch::{Device, Kind};

fn noisy() -> PrivacyOptions {
    PrivacyOptions {
        hidden: Perturbation { clip_norm: Some(1.0), noise: 0.3 },
        gradients: Perturbation { clip_norm: Some(0.05), noise: 0.3 },
        noise_key: None,
    }
}

fn with(privacy: PrivacyOptions, mut options: TrainOptions) -> TrainOptions {
    options.privacy = privacy;
    options
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clip_that_nothing_reaches_changes_no_bit_and_noise_does() {
    let place = Place::new();
    let server = TestServer::start_with(place.server()).await;
    let plain = run(place.options(&server, "plain")).await;
    let clip = Perturbation { clip_norm: Some(1e9), noise: 0.0 };
    let privacy = PrivacyOptions { hidden: clip, gradients: clip, noise_key: None };
    assert_same_runs(&run(with(privacy, place.options(&server, "clipped"))).await, &plain);
    assert!(!place.dir.path().join("clipped/noise_key").exists(), "without noise there is no key");

    let noisy_run = run(with(noisy(), place.options(&server, "noisy"))).await;
    println!("plain {:?}\nnoisy {:?}", plain.losses, noisy_run.losses);
    // Evaluations send as training does: the first one is before any step.
    assert_ne!(noisy_run.evaluations[0].loss, plain.evaluations[0].loss);
    assert!(noisy_run.losses.iter().zip(&plain.losses).all(|(noisy, plain)| noisy != plain));
    assert!(noisy_run.losses[9] < noisy_run.losses[0], "it learns nevertheless");
    server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn noise_is_the_same_in_a_resumed_run_and_on_a_broken_connection() {
    let place = Place::new();
    let server = TestServer::start_with(place.server()).await;
    let straight = run(with(noisy(), place.options(&server, "straight"))).await;
    let path = place.dir.path().join("straight/noise_key");
    let mode = fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o077, 0, "the key is for nobody else");

    // From the middle, in another folder: the key is found beside the checkpoint, and taken along.
    let mut options = with(noisy(), place.options(&server, "branch"));
    let four = straight.checkpoint.with_file_name("checkpoint_step_4");
    options.output.resume = Some(four.display().to_string());
    let resumed = run(options).await;
    assert_eq!(resumed.losses, straight.losses[4..]);
    assert_eq!(resumed.best, straight.best);
    assert_same_adapters(&resumed.adapter.unwrap(), straight.adapter.as_ref().unwrap());
    let taken = place.dir.path().join("branch/noise_key");
    assert_eq!(fs::read(&taken).unwrap(), fs::read(&path).unwrap());

    // Repeated frames are compared by the server: other noise would be refused.
    let key = NoiseKey::of([5; 32]);
    let keyed = |output: &str| {
        let privacy = PrivacyOptions { noise_key: Some(key.clone()), ..noisy() };
        with(privacy, place.options(&server, output))
    };
    let expected = run(keyed("whole")).await;
    let proxy = Proxy::start(server.address()).await.unwrap();
    proxy.cut_after((0..40).map(|n: i64| 30_000 + n * n * 7919 % 9973));
    let mut cut = keyed("cut");
    cut.model.server = proxy.endpoint();
    assert_same_runs(&run(cut).await, &expected);
    assert!(proxy.connections() > 5, "the cuts did not take place");

    // Nor do company and devices matter.
    let mut several = keyed("several");
    several.steps.microbatches_in_flight = 4;
    several.compute.devices = vec![Device::Cpu; 2];
    assert_same_runs(&run(several).await, &expected);
    server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn preferences_and_bottoms_without_layers_take_noise() {
    // LoRA in the top only, and no layer in the top.
    for (split_point_1, split_point_2) in [(0, 3), (1, 4)] {
        let place = Place::new();
        let mut config = place.server();
        (config.model.split_point_1, config.model.split_point_2) = (split_point_1, split_point_2);
        let server = TestServer::start_with(config).await;
        let pairs: String = (0..9)
            .map(|i| format!("{{\"prompt\": \"What is {i}?\", \"chosen\": \"An oak.\", \"rejected\": \"A stone, {i}.\"}}\n"))
            .collect();
        let file = place.dir.path().join("pairs.jsonl");
        fs::write(&file, pairs).unwrap();
        let options = |output: &str| {
            let privacy = PrivacyOptions { noise_key: Some(NoiseKey::of([6; 32])), ..noisy() };
            let mut options = with(privacy, place.options(&server, output));
            options.sources.train_files = vec![file.clone()];
            options.sources.eval_files = Vec::new();
            options.loss = LossOptions::Dpo(Default::default());
            options
        };
        let (first, again) = (run(options("first")).await, run(options("again")).await);
        assert_same_runs(&again, &first);
        assert!(first.losses.iter().all(|loss| loss.is_finite()), "{:?}", first.losses);
        server.drain().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_says_what_it_sends_and_what_has_changed() {
    let place = Place::new();
    let server = TestServer::start_with(place.server()).await;
    let lines = dry_run(&with(noisy(), place.options(&server, "run"))).await.unwrap().join("\n");
    let expected = "sent are hidden states clipped to norm 1 with noise 0.3 times as long and gradients clipped to norm 0.05 with noise 0.3 times as long; offshoot leak";
    assert!(lines.contains(expected), "{lines}");
    let lines = dry_run(&place.options(&server, "run")).await.unwrap().join("\n");
    assert!(!lines.contains("sent are"), "{lines}");

    let mut options = place.options(&server, "run");
    options.steps.max_steps = Some(4);
    run(options).await;
    let mut options = with(noisy(), place.options(&server, "run"));
    options.output.resume = Some("latest".into());
    let lines = dry_run(&options).await.unwrap().join("\n");
    for change in ["--hidden-noise was 0.0, is 0.3", "--gradient-clip-norm was none, is 0.05"] {
        assert!(lines.contains(&format!("not the run as it began: {change}")), "{lines}");
    }

    let mut options = place.options(&server, "wrong");
    options.privacy.hidden.noise = 0.5;
    let error = train(options, CancelToken::default()).await.unwrap_err().to_string();
    assert!(error.contains("in units of --hidden-clip-norm, which is missing"), "{error}");
    server.drain().await;
}

/// Each token that is generated sends a row: with noise it is another text, and with the same key the
/// same other text.
#[tokio::test(flavor = "multi_thread")]
async fn generated_tokens_send_noise_too() {
    let place = Place::new();
    let server = TestServer::start_with(place.server()).await;
    let client = Client::connect(&server.endpoint()).await.unwrap();
    let checkpoint = Checkpoint::open(&fixture("tiny_text")).unwrap();
    let config = ModelConfig::from_json(checkpoint.config()).unwrap();
    let mut texts = Vec::new();
    for noise in [0.0, 50.0, 50.0] {
        let mut visit = Visit::begin(VisitOptions {
            client: &client,
            checkpoint: &checkpoint,
            config: &config,
            adapter: None,
            name: "noise",
            wire_dtype: WireDType::F32,
            kind: Kind::Float,
            device: Device::Cpu,
        })
        .await
        .unwrap();
        let hidden = Perturbation { clip_norm: Some(1e3), noise };
        let noise_key = Some(NoiseKey::of([9; 32]));
        let privacy = PrivacyOptions { hidden, noise_key, ..PrivacyOptions::default() };
        visit.model.perturb(&privacy).unwrap();
        let sampling = Sampling { temperature: 0.0, ..Sampling::default() };
        let options =
            GenerateOptions { max_new_tokens: 12, sampling, ..GenerateOptions::default() };
        let request =
            Request { prompt: &[3, 5, 8], options: &options, end_ids: &[], tokenizer: None };
        let mut decoder = Decoder::visiting(&visit.model, &mut visit.session, &client);
        texts.push(decoder.generate(&request, &mut |_| {}).await.unwrap().ids);
        decoder.close().await.unwrap();
        visit.end(Ok(())).await.unwrap();
    }
    println!("{texts:?}");
    assert_ne!(texts[1], texts[0]);
    assert_eq!(texts[2], texts[1]);
    server.drain().await;
}
