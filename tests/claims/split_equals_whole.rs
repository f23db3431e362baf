//! Cutting a model changes no number: through a real server on a real socket, in float32, for every
//! family and several split points, against the uncut model and against Transformers and PEFT.

use offshoot_adapters::{AdamW, AdapterSet, peft};
use offshoot_client::{AdamWConfig, Client, HostTensor, LoraConfig, OpenSession, WireDType};
use offshoot_model::weights::Checkpoint;
use offshoot_model::{ModelConfig, SplitPoints};
use offshoot_tests::{TestServer, fixture, server_config};
use offshoot_trainer::data::{Batch, Sample};
use offshoot_trainer::verify::{self, Comparison, Reference, Subject};
use offshoot_trainer::{Checkpointing, SplitModel, SplitOptions, clip_factor};
use safetensors::SafeTensors;
use serde_json::Value;
use std::path::Path;
use tch::{Device, Kind, Tensor};

const FAMILIES: [&str; 5] = ["gpt2", "llama", "qwen2", "qwen3", "gemma"];

fn subject(family: &str, s1: usize, s2: usize) -> Subject {
    let dir = fixture(family);
    let checkpoint = Checkpoint::open(&dir).unwrap();
    let config = ModelConfig::from_json(checkpoint.config()).unwrap();
    Subject {
        split: SplitPoints::new(s1, s2, config.n_layers).unwrap(),
        adapter: peft::read_dir(&dir.join("adapter")).unwrap(),
        sequences: verify::read_case(&dir.join("case.json")).unwrap(),
        checkpoint,
        config,
    }
}

/// A server with the trunk of a subject, and a client of it.
async fn serve(family: &str, split: SplitPoints, store: &Path) -> (TestServer, Client) {
    let mut config = server_config(store);
    config.model.name = fixture(family).display().to_string();
    config.model.split_point_1 = split.s1;
    config.model.split_point_2 = split.s2;
    let server = TestServer::start_with(config).await;
    let client = Client::connect(&server.endpoint()).await.unwrap();
    (server, client)
}

#[track_caller]
fn assert_passes(what: &str, rows: Vec<Comparison>) {
    assert!(rows.len() > 30, "{what}: only {} comparisons", rows.len());
    let failed: Vec<&Comparison> = rows.iter().filter(|row| !row.passes()).collect();
    assert!(failed.is_empty(), "{what}: {failed:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn split_equals_whole() {
    for family in FAMILIES {
        let reference = Reference::read(&fixture(family).join("reference.safetensors")).unwrap();
        // From the first layer; LoRA in all three parts; up to the last layer.
        for (s1, s2) in [(0, 2), (1, 3), (2, 4)] {
            let mut subject = subject(family, s1, s2);
            let store = tempfile::tempdir().unwrap();
            let (server, client) = serve(family, subject.split, store.path()).await;
            let split = subject.split(&client).await.unwrap();
            let what = format!("{family} cut at {s1} and {s2}");
            assert_passes(&what, split.compare(&subject.uncut().unwrap()));
            assert_passes(&format!("{what}, PEFT"), split.compare_recorded(&reference));
            // Masks are drawn by name, so that they are the same on both sides of a cut.
            subject.adapter.spec.lora_dropout = 0.2;
            let dropped = subject.split(&client).await.unwrap();
            assert!((dropped.loss - split.loss).abs() > 1e-4, "{what}: dropout does nothing");
            assert_passes(&format!("{what}, dropout"), dropped.compare(&subject.uncut().unwrap()));
            server.drain().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn five_clipped_split_steps_match_peft() {
    for family in FAMILIES {
        let subject = subject(family, 1, 3);
        let store = tempfile::tempdir().unwrap();
        let (server, client) = serve(family, subject.split, store.path()).await;
        train_and_compare(family, &subject, &client).await;
        server.drain().await;
    }
}

async fn train_and_compare(family: &str, subject: &Subject, client: &Client) {
    let dir = fixture(family);
    let case: Value =
        serde_json::from_str(&std::fs::read_to_string(dir.join("case.json")).unwrap()).unwrap();
    let number = |value: &Value| value.as_f64().unwrap();
    let adamw = AdamW {
        beta1: number(&case["betas"][0]),
        beta2: number(&case["betas"][1]),
        eps: number(&case["eps"]),
        weight_decay: number(&case["weight_decay"]),
    };
    let lora = subject.adapter.spec.clone();
    let options = SplitOptions {
        split: subject.split,
        lora: lora.clone(),
        adamw: adamw.clone(),
        seed: 0,
        kind: Kind::Float,
        checkpointing: Checkpointing::Auto,
        devices: vec![Device::Cpu],
    };
    let mut model = SplitModel::load(&subject.checkpoint, &subject.config, &options).unwrap();
    model.load_adapter(&subject.adapter.tensors).unwrap();
    let session = client
        .open(OpenSession {
            name: family.into(),
            fingerprint: subject.checkpoint.fingerprint(),
            split_point_1: subject.split.s1 as u32,
            split_point_2: subject.split.s2 as u32,
            lora: LoraConfig {
                r: lora.r as u32,
                lora_alpha: lora.lora_alpha,
                lora_dropout: 0.0,
                use_rslora: lora.use_rslora,
                target_modules: lora.target_modules,
            },
            adamw: AdamWConfig {
                beta1: adamw.beta1,
                beta2: adamw.beta2,
                eps: adamw.eps,
                weight_decay: adamw.weight_decay,
            },
            seed: 0,
            wire_dtype: WireDType::F32,
            initial_adapter: subject
                .adapter
                .tensors
                .iter()
                .filter(|(name, _)| name.contains(".1.") || name.contains(".2."))
                .map(|(name, tensor)| (name.clone(), to_host(tensor)))
                .collect(),
        })
        .await
        .unwrap();

    let mut batch = Batch::default();
    for ids in &subject.sequences {
        batch.push(&Sample { ids: ids.clone(), learn: vec![true; ids.len()] });
    }
    let n_predicted = batch.labels.iter().filter(|&&label| label >= 0).count() as f64;
    let bytes = std::fs::read(dir.join("reference.safetensors")).unwrap();
    let reference = SafeTensors::deserialize(&bytes).unwrap();
    let expected = |name: &str| {
        let view = reference.tensor(name).unwrap();
        let shape: Vec<i64> = view.shape().iter().map(|&n| n as i64).collect();
        Tensor::from_data_size(view.data(), &shape, Kind::Float)
    };
    for step in 0..case["n_steps"].as_u64().unwrap() {
        let result = model.microbatch(&session, &batch, step, 1.0 / n_predicted).await.unwrap();
        let norm = model.grad_norm(result.trunk_norm_squared);
        for (name, ours) in [("loss", result.loss.sum / n_predicted), ("norm", norm)] {
            let theirs = expected(&format!("{name}_step.{step}")).double_value(&[]);
            let error = (ours - theirs).abs() / theirs;
            assert!(error < 1e-4, "{family}, {name} of step {step}: {ours}, PEFT {theirs}");
        }
        let clip = clip_factor(norm, number(&case["max_grad_norm"]));
        model.step(&session, number(&case["lr"]), clip).await.unwrap();
    }
    let own = model.adapters().into_iter().flatten().flat_map(AdapterSet::named_tensors);
    let trunk = session.export().await.unwrap().tensors;
    let trunk = trunk.into_iter().map(|(name, tensor)| {
        let shape: Vec<i64> = tensor.shape().iter().map(|&n| n as i64).collect();
        (name, Tensor::from_slice(&tensor.to_f32()).view(shape.as_slice()))
    });
    let mut compared = 0;
    for (name, ours) in own.chain(trunk) {
        let theirs = expected(&format!("after.{}", name.replace(".weight", ".default.weight")));
        let norm = |t: &Tensor| t.norm().double_value(&[]);
        let error = norm(&(&ours - &theirs)) / norm(&theirs);
        assert!(error < 1e-4, "{family}, {name} after five steps: relative error {error:.1e}");
        compared += 1;
    }
    assert_eq!(compared, subject.adapter.tensors.len());
}

fn to_host(tensor: &Tensor) -> HostTensor {
    let shape = tensor.size().into_iter().map(|n| n as usize).collect();
    let values = Vec::<f32>::try_from(tensor.flatten(0, -1)).unwrap();
    HostTensor::from_f32(&values, shape, WireDType::F32)
}
