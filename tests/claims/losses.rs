//! Losses other than the plain cross-entropy: what PyTorch computes for them with the uncut model,
//! through a real server (tests/fixtures/make_losses.py), and whole runs.

use offshoot_adapters::{AdamW, AdapterSet};
use offshoot_client::{AdamWConfig, Client, LoraConfig, OpenSession, Session, WireDType};
use offshoot_model::weights::Checkpoint;
use offshoot_model::{ModelConfig, SplitPoints};
use offshoot_tests::{TestServer, fixture};
use offshoot_trainer::adapter::Adapter;
use offshoot_trainer::data::{Batch, Sample};
use offshoot_trainer::loss::{CrossEntropy, Dpo, DpoOptions, FromLogits, Loss};
use offshoot_trainer::{
    Checkpointing, Microbatches, SplitModel, SplitOptions, clip_factor, verify,
};
use safetensors::SafeTensors;
use serde_json::Value;
use std::sync::Arc;
use tch::{Device, Kind, Tensor};

/// Numbers of `losses/NAME.safetensors`.
struct Recorded(Vec<u8>);

impl Recorded {
    fn read(name: &str) -> Self {
        Recorded(std::fs::read(fixture("losses").join(format!("{name}.safetensors"))).unwrap())
    }

    fn tensor(&self, name: &str) -> Tensor {
        let file = SafeTensors::deserialize(&self.0).unwrap();
        let view = file.tensor(name).unwrap_or_else(|error| panic!("{name}: {error}"));
        let shape: Vec<i64> = view.shape().iter().map(|&n| n as i64).collect();
        Tensor::from_data_size(view.data(), &shape, Kind::Float)
    }

    /// Within a relative error of `bound`, or of `small` where it is near 0.
    fn check(&self, name: &str, ours: f64, bound: f64) {
        let theirs = self.tensor(name).double_value(&[]);
        println!("{name}: {ours}, PyTorch {theirs}");
        assert!((ours - theirs).abs() <= bound * theirs.abs().max(1e-2), "{name}: {ours} {theirs}");
    }

    /// Tensors whose name here is what `of` makes of ours, each within a relative error of 1e-4.
    fn check_all(&self, ours: Vec<(String, Tensor)>, of: impl Fn(&str) -> String) {
        let norm = |t: &Tensor| t.norm().double_value(&[]);
        for (name, ours) in &ours {
            let theirs = self.tensor(&of(name));
            let error = norm(&(ours - &theirs)) / norm(&theirs);
            assert!(error < 1e-4, "{name}: relative error {error:.1e}");
        }
        assert_eq!(ours.len(), 56, "LoRA on seven layers of four blocks");
    }
}

fn case() -> Value {
    serde_json::from_slice(&std::fs::read(fixture("losses").join("case.json")).unwrap()).unwrap()
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap()
}

fn adamw() -> AdamW {
    let case = case();
    AdamW {
        beta1: number(&case["betas"][0]),
        beta2: number(&case["betas"][1]),
        eps: number(&case["eps"]),
        weight_decay: number(&case["weight_decay"]),
    }
}

/// The tiny llama with its adapter around layers 1 and 2, on so many devices.
async fn begin(server: &TestServer, n_devices: usize) -> (SplitModel, Session) {
    let checkpoint = Checkpoint::open(&fixture("llama")).unwrap();
    let config = ModelConfig::from_json(checkpoint.config()).unwrap();
    let adapter = Adapter::read(&fixture("llama").join("adapter")).unwrap().fit(&config).unwrap();
    let split = SplitPoints::new(1, 3, config.n_layers).unwrap();
    let options = SplitOptions {
        split,
        lora: adapter.spec.clone(),
        adamw: adamw(),
        seed: 0,
        kind: Kind::Float,
        checkpointing: Checkpointing::Auto,
        devices: vec![Device::Cpu; n_devices],
    };
    let mut model = SplitModel::load(&checkpoint, &config, &options).unwrap();
    model.load_adapter(&adapter.tensors).unwrap();
    let client = Client::connect(&server.endpoint()).await.unwrap();
    let adamw = adamw();
    let session = client.open(OpenSession {
        name: "losses".into(),
        fingerprint: checkpoint.fingerprint(),
        split_point_1: 1,
        split_point_2: 3,
        lora: LoraConfig { lora_dropout: 0.0, ..adapter.lora_config() },
        adamw: AdamWConfig {
            beta1: adamw.beta1,
            beta2: adamw.beta2,
            eps: adamw.eps,
            weight_decay: adamw.weight_decay,
        },
        seed: 0,
        wire_dtype: WireDType::F32,
        initial_adapter: adapter.trunk(split),
    });
    (model, session.await.unwrap())
}

/// The sequences of the llama's case in one batch.
fn texts() -> Batch {
    let mut batch = Batch::default();
    for ids in verify::read_case(&fixture("llama").join("case.json")).unwrap() {
        batch.push(&Sample { learn: vec![true; ids.len()], ids });
    }
    batch
}

/// Every gradient of the model after one microbatch, and its loss.
async fn gradients(
    model: &mut SplitModel,
    session: &Session,
    loss: Arc<dyn Loss>,
) -> (f64, Vec<(String, Tensor)>) {
    let batches = [texts()];
    let scale = 1.0 / loss.weight(&batches[0]);
    let (batches, loss) = (&batches, &loss);
    let step = Microbatches { batches, loss, first_number: 0, scale, in_flight: 1 };
    let done = model.accumulate(session, step).await.unwrap();
    let trunk = session.export_with_gradients().await.unwrap().gradients;
    let own = model.adapters().into_iter().flatten().flat_map(AdapterSet::named_gradients);
    (done.results[0].loss.sum * scale, own.chain(host(trunk)).collect())
}

fn host(
    tensors: Vec<(String, offshoot_client::HostTensor)>,
) -> impl Iterator<Item = (String, Tensor)> {
    tensors.into_iter().map(|(name, tensor)| {
        let shape: Vec<i64> = tensor.shape().iter().map(|&n| n as i64).collect();
        (name, Tensor::from_slice(&tensor.to_f32()).view(shape.as_slice()))
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn label_smoothing_matches_pytorch() {
    let server = TestServer::start().await;
    let (mut model, session) = begin(&server, 1).await;
    let plain = model.evaluate(&session, &CrossEntropy::default(), &[texts()], 1).await.unwrap();
    let label_smoothing = number(&case()["label_smoothing"]);
    let smoothed = CrossEntropy { label_smoothing };
    // Evaluation is without it.
    let evaluated = model.evaluate(&session, &smoothed, &[texts()], 1).await.unwrap();
    assert_eq!(evaluated, plain);

    let (loss, gradients) = gradients(&mut model, &session, Arc::new(smoothed)).await;
    let recorded = Recorded::read("smoothed");
    recorded.check("loss", loss, 1e-5);
    assert!((loss - plain.0.sum / plain.1).abs() > 1e-3, "smoothing does nothing");
    let name = |ours: &str| format!("grad.{}", ours.replace(".weight", ".default.weight"));
    recorded.check_all(gradients, name);
    server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_loss_of_logits_with_autograd_matches_the_written_out_one() {
    let server = TestServer::start().await;
    let cross_entropy = FromLogits::new("by autograd", |logits: &Tensor, labels: &Tensor| {
        let of_labels = logits.gather(1, &labels.unsqueeze(1), false).squeeze_dim(1);
        logits.logsumexp(&[-1i64][..], false) - of_labels
    });
    let losses: [Arc<dyn Loss>; 2] = [Arc::new(CrossEntropy::default()), Arc::new(cross_entropy)];
    let mut found = Vec::new();
    for loss in losses {
        let (mut model, session) = begin(&server, 1).await;
        let (sum, weight) = model.evaluate(&session, &*loss, &[texts()], 1).await.unwrap();
        let (trained, gradients) = gradients(&mut model, &session, loss).await;
        assert!((sum.sum / weight - trained).abs() < 1e-5);
        found.push((trained, gradients));
    }
    let [(expected, by_hand), (loss, by_autograd)] = found.try_into().unwrap();
    assert!((loss - expected).abs() < 1e-5, "{loss} {expected}");
    for ((name, a), (_, b)) in by_hand.iter().zip(&by_autograd) {
        assert!(a.norm().double_value(&[]) > 0.0);
        assert!(a.allclose(b, 1e-4, 1e-6, false), "{name}");
    }
    server.drain().await;
}

/// The pairs of the case: prompt with chosen answer, prompt with rejected answer, and so on.
fn pairs() -> Vec<Sample> {
    let case = case();
    let ids = |value: &Value| -> Vec<i64> { serde_json::from_value(value.clone()).unwrap() };
    let pairs = case["pairs"].as_array().unwrap().iter().flat_map(|pair| {
        ["chosen", "rejected"].map(|which| {
            let (prompt, answer) = (ids(&pair["prompt"]), ids(&pair[which]));
            let mut learn = vec![false; prompt.len()];
            learn.resize(prompt.len() + answer.len(), true);
            Sample { ids: [prompt, answer].concat(), learn }
        })
    });
    pairs.collect()
}

/// Sequences of these samples, side by side.
fn batch(samples: &[usize]) -> Batch {
    let all = pairs();
    let mut batch = Batch::default();
    samples.iter().for_each(|&sample| batch.push(&all[sample]));
    batch.samples = samples.to_vec();
    batch
}

#[tokio::test(flavor = "multi_thread")]
async fn dpo_steps_match_pytorch() {
    let server = TestServer::start().await;
    let case = case();
    for (recorded, label_smoothing) in
        [("dpo", 0.0), ("dpo_smoothed", number(&case["label_smoothing"]))]
    {
        let recorded = Recorded::read(recorded);
        // The pairs in another order than the recorded one's, in microbatches of unequal size, on
        // two devices: the mean over pairs is the same.
        let batches = [batch(&[4, 5, 0, 1]), batch(&[2, 3])];
        let (mut model, session) = begin(&server, 2).await;
        let dpo = Dpo::new(DpoOptions { beta: number(&case["beta"]), label_smoothing });
        let mut references = vec![0.0; 6];
        let log_probs = model.log_probs(&session, &batches, 2).await.unwrap();
        for (batch, log_probs) in batches.iter().zip(log_probs) {
            for (&sample, log_prob) in batch.samples.iter().zip(log_probs) {
                references[sample] = log_prob;
            }
        }
        dpo.set_references(references);
        let loss: Arc<dyn Loss> = Arc::new(dpo);
        let scale = 1.0 / batches.iter().map(|batch| loss.weight(batch)).sum::<f64>();
        assert_eq!(scale, 1.0 / 3.0);
        for i in 0..case["n_steps"].as_u64().unwrap() {
            let (batches, loss) = (&batches, &loss);
            let (sum, weight) = model.evaluate(&session, &**loss, batches, 1).await.unwrap();
            recorded.check(&format!("loss_step.{i}"), sum.sum / weight, 1e-4);
            let step = Microbatches { batches, loss, first_number: i, scale, in_flight: 2 };
            let done = model.accumulate(&session, step).await.unwrap();
            let (loss, extra) = done.mean_loss(scale);
            let norm = model.grad_norm(done.results[1].trunk_norm_squared);
            recorded.check(&format!("loss_step.{i}"), loss, 1e-4);
            recorded.check(&format!("norm_step.{i}"), norm, 1e-4);
            recorded.check(&format!("chosen_step.{i}"), extra["rewards/chosen"], 1e-4);
            recorded.check(&format!("rejected_step.{i}"), extra["rewards/rejected"], 1e-4);
            let margin = extra["rewards/chosen"] - extra["rewards/rejected"];
            assert!((extra["rewards/margins"] - margin).abs() < 1e-9);
            assert_eq!(extra["rewards/accuracies"], if i == 0 { 0.0 } else { 1.0 });
            let clip = clip_factor(norm, number(&case["max_grad_norm"]));
            model.step(&session, number(&case["lr"]), clip).await.unwrap();
        }
        let own = model.adapters().into_iter().flatten().flat_map(AdapterSet::named_tensors);
        let trunk = session.export().await.unwrap().tensors;
        let name = |ours: &str| format!("after.{}", ours.replace(".weight", ".default.weight"));
        recorded.check_all(own.chain(host(trunk)).collect(), name);
    }
    server.drain().await;
}
