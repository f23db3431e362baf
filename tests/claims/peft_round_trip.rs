//! An adapter goes from us to PEFT, is trained on there, and comes back: at each hand-over both
//! sides compute the same logits and losses, and the steps after it are the same steps.
//!
//! PEFT's side is recorded in `fixtures/round_trip`; it was made, with the real PEFT and the real
//! binary in turn, by
//!
//! ```text
//! python benches/peft_round_trip.py tests/fixtures/tiny_text --split 1..3 \
//!     --record tests/fixtures/round_trip
//! ```
//!
//! `ours` is what `offshoot train` and `offshoot export` wrote, `peft` what PEFT saved after going on
//! from it, and `end` are the logits after PEFT went on from there once more.

use offshoot_client::{Client, WireDType};
use offshoot_model::weights::Checkpoint;
use offshoot_model::{ModelConfig, SplitPoints};
use offshoot_tests::{TestServer, fixture, server_config};
use offshoot_trainer::adapter::{Adapter, ExportOptions, ImportOptions, Step, Visit, VisitOptions};
use offshoot_trainer::data::source::DataSpec;
use offshoot_trainer::data::{Batch, DataOptions, DataSet, Sample};
use offshoot_trainer::evaluate::{self, Subject, Through, Uncut};
use offshoot_trainer::merge::{MergeOptions, merge};
use offshoot_trainer::noise::PrivacyOptions;
use offshoot_trainer::tokenizer::Tokenizer;
use offshoot_trainer::{CancelToken, Scheduler, TrainOptions, Warmup, train};
use safetensors::SafeTensors;
use serde_json::Value;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor};

/// Of logits and losses, as the promise says it.
const BOUND: f64 = 1e-4;

/// What the script recorded.
struct Recorded {
    case: Value,
    tensors: HashMap<String, Tensor>,
}

impl Recorded {
    fn read() -> Self {
        let dir = fixture("round_trip");
        let text = std::fs::read_to_string(dir.join("case.json")).unwrap();
        let bytes = std::fs::read(dir.join("reference.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let tensors = file.iter().map(|(name, view)| {
            let shape: Vec<i64> = view.shape().iter().map(|&n| n as i64).collect();
            (name.to_string(), Tensor::from_data_size(view.data(), &shape, Kind::Float))
        });
        Recorded { case: serde_json::from_str(&text).unwrap(), tensors: tensors.collect() }
    }

    fn ids(&self) -> Vec<Vec<i64>> {
        serde_json::from_value(self.case["input_ids"].clone()).unwrap()
    }

    fn number(&self, field: &str) -> f64 {
        self.case[field].as_f64().unwrap()
    }

    fn losses(&self, name: &str) -> Vec<f64> {
        Vec::<f32>::try_from(&self.tensors[name]).unwrap().into_iter().map(f64::from).collect()
    }

    /// Packed logits `[N, V]` of all sequences.
    fn logits(&self, name: &str) -> Tensor {
        let n = self.ids().len();
        let each: Vec<&Tensor> = (0..n).map(|i| &self.tensors[&format!("{name}.{i}")]).collect();
        Tensor::cat(&each, 0)
    }
}

/// The model, its data, and a server of layers 1 and 2.
struct Place {
    dir: tempfile::TempDir,
    server: TestServer,
    client: Client,
    checkpoint: Checkpoint,
    config: ModelConfig,
    recorded: Recorded,
}

impl Place {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut config = server_config(&dir.path().join("store"));
        config.model.name = model();
        let server = TestServer::start_with(config).await;
        let client = Client::connect(&server.endpoint()).await.unwrap();
        let checkpoint = Checkpoint::open(&fixture("tiny_text")).unwrap();
        let config = ModelConfig::from_json(checkpoint.config()).unwrap();
        Place { dir, server, client, checkpoint, config, recorded: Recorded::read() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// What the script asked the binary for.
    fn options(&self, output: &str) -> TrainOptions {
        let text = fixture("round_trip/texts.txt");
        let endpoint = self.server.endpoint();
        let mut options = TrainOptions::new(&model(), &endpoint, text, self.path(output));
        options.data = self.data_options();
        options.steps.batch_size = Some(self.recorded.ids().len());
        options.steps.max_steps = Some(self.recorded.number("steps") as u64);
        options.optimizer.learning_rate = self.recorded.number("learning_rate");
        options.optimizer.scheduler = Scheduler::Constant;
        options.optimizer.warmup = Warmup::Steps(0);
        options.optimizer.max_grad_norm = self.recorded.number("max_grad_norm");
        options.lora.lora_dropout = Some(0.0);
        options.compute.wire_dtype = WireDType::F32;
        options
    }

    fn data_options(&self) -> DataOptions {
        let max_seq_length = self.recorded.number("max_seq_length") as usize;
        DataOptions { max_seq_length, ..DataOptions::default() }
    }

    /// The samples of the texts in one batch; their tokens are those that PEFT's side had.
    fn batch(&self) -> Batch {
        let tokenizer = Tokenizer::load(&self.checkpoint).unwrap();
        let sources = DataSpec::files(vec![fixture("round_trip/texts.txt")]).open().unwrap();
        let data = DataSet::load(&sources.train, &self.data_options(), &tokenizer).unwrap();
        let mut batch = Batch::default();
        for (i, ids) in self.recorded.ids().iter().enumerate() {
            let sample: Sample = data.sample(i);
            assert_eq!(sample.ids, *ids, "sample {i}");
            batch.push(&sample);
        }
        batch
    }

    fn subject(&self) -> Subject<'_> {
        let (checkpoint, config) = (&self.checkpoint, &self.config);
        Subject { checkpoint, config, kind: Kind::Float, device: Device::Cpu }
    }

    /// Logits `[N, V]` through bottom, the server's trunk and top.
    async fn logits(&self, adapter: &Adapter) -> Tensor {
        let visit = Visit::begin(VisitOptions {
            client: &self.client,
            checkpoint: &self.checkpoint,
            config: &self.config,
            adapter: Some(adapter),
            name: "round trip",
            wire_dtype: WireDType::F32,
            kind: Kind::Float,
            device: Device::Cpu,
        });
        let visit = visit.await.unwrap();
        let logits = visit.model.logits(&visit.session, &self.batch()).await;
        let logits = visit.end(logits).await.unwrap();
        assert!(self.client.list_sessions().await.unwrap().iter().all(|s| s.name != "round trip"));
        logits
    }

    /// The loss uncut, through the split and merged.
    async fn losses(&self, adapter: &Path) -> [f64; 3] {
        let read = || Adapter::read(adapter).unwrap().fit(&self.config).unwrap();
        let batches = [self.batch()];
        let uncut = Uncut::load(&self.subject()).unwrap();
        let uncut = uncut.evaluate(Some(&read()), &batches).unwrap();
        let adapter = read();
        let subject = self.subject();
        let (wire_dtype, privacy) = (WireDType::F32, &PrivacyOptions::default());
        let through = Through { client: &self.client, wire_dtype, privacy };
        let split = evaluate::split(&subject, &through, Some(&adapter), &batches);
        let split = split.await.unwrap();
        assert_eq!((split.samples, split.tokens), (batches[0].seq_lens.len(), uncut.tokens));

        let merged = tempfile::tempdir().unwrap();
        let output_dir = merged.path().join("model");
        let options = MergeOptions { output_dir, kind: None, max_shard_bytes: 20_000 };
        merge(&self.checkpoint, read(), &options).unwrap();
        let checkpoint = Checkpoint::open(&options.output_dir).unwrap();
        let merged = Subject { checkpoint: &checkpoint, ..self.subject() };
        let merged = Uncut::load(&merged).unwrap().evaluate(None, &batches).unwrap();
        [uncut.loss, split.loss, merged.loss]
    }
}

fn model() -> String {
    fixture("tiny_text").display().to_string()
}

#[track_caller]
fn assert_same_logits(what: &str, ours: &Tensor, theirs: &Tensor) {
    assert_eq!(ours.size(), theirs.size());
    let far = (ours - theirs).abs().max().double_value(&[]);
    println!("{what}: logits differ by up to {far:.1e}");
    assert!(far < BOUND, "{what}: logits differ by up to {far:e}");
}

#[track_caller]
fn assert_same_losses(what: &str, ours: &[f64], theirs: &[f64]) {
    println!("{what}: ours {ours:?}, PEFT's {theirs:?}");
    assert_eq!(ours.len(), theirs.len(), "{what}");
    for (a, b) in ours.iter().zip(theirs) {
        assert!((a - b).abs() < BOUND, "{what}: ours {ours:?}, PEFT's {theirs:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_we_train_is_what_peft_goes_on_with() {
    let place = Place::new().await;
    let mut options = place.options("run");
    let recorded = &place.recorded;
    options.lora.r = Some(recorded.number("r") as usize);
    options.lora.lora_alpha = Some(recorded.number("lora_alpha"));
    options.lora.target_modules =
        serde_json::from_value(recorded.case["target_modules"].clone()).unwrap();
    train(options, CancelToken::default()).await.unwrap();

    // Trained here and now: PEFT had the adapter of an earlier run, with the same numbers.
    let base_model = model();
    let exported = place.path("exported");
    let options =
        ExportOptions { output_dir: &exported, base_model: &base_model, kind: Kind::Float };
    Adapter::read(&place.path("run")).unwrap().export(&options).unwrap();
    let adapter = Adapter::read(&exported).unwrap().fit(&place.config).unwrap();
    assert_eq!(adapter.spec.r, 4);
    assert_eq!(adapter.spec.lora_alpha, 6.0);
    let logits = place.logits(&adapter).await;
    assert_same_logits("ours against PEFT with ours", &logits, &recorded.logits("ours"));

    // The very file that PEFT read.
    let ours = fixture("round_trip/ours");
    let read = Adapter::read(&ours).unwrap().fit(&place.config).unwrap();
    assert_eq!(read.spec, adapter.spec);
    let logits = place.logits(&read).await;
    assert_same_logits("the file that PEFT read", &logits, &recorded.logits("ours"));
    let first = recorded.losses("middle_losses")[0];
    assert_same_losses("uncut, split, merged", &place.losses(&ours).await, &[first; 3]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_peft_trained_goes_on_here_as_it_does_there() {
    let place = Place::new().await;
    let recorded = &place.recorded;
    let pefts = fixture("round_trip/peft");
    let import = |output: &str| {
        let adapter = Adapter::read(&pefts).unwrap();
        let split = SplitPoints::new(1, 3, place.config.n_layers).unwrap();
        let output_dir = place.path(output);
        let options = ImportOptions {
            output_dir: &output_dir,
            model_name: &model(),
            checkpoint: &place.checkpoint,
            split,
        };
        adapter.import(&options)
    };
    let checkpoint = import("run").unwrap();
    assert!(checkpoint.ends_with("run/checkpoint_step_0"));
    let error = import("run").unwrap_err().to_string();
    assert!(error.contains("it holds checkpoints of another run, up to step 0"), "{error}");

    // Stitched from what the import wrote.
    let imported = Adapter::read(&place.path("run")).unwrap().fit(&place.config).unwrap();
    let logits = place.logits(&imported).await;
    assert_same_logits("imported", &logits, &recorded.logits("peft"));
    let expected = recorded.losses("end_losses");
    let losses = place.losses(&pefts).await;
    assert_same_losses("uncut, split, merged", &losses, &[expected[0]; 3]);

    // Rank, alpha and targets are the adapter's, without being asked for.
    let mut options = place.options("run");
    options.output.resume = Some("latest".into());
    let summary = train(options, CancelToken::default()).await.unwrap();
    assert_same_losses("the next steps", &summary.losses, &expected);
    let end = Adapter::read(&summary.adapter.unwrap()).unwrap().fit(&place.config).unwrap();
    assert_eq!(end.spec.target_modules, imported.spec.target_modules);
    let logits = place.logits(&end).await;
    assert_same_logits("after them", &logits, &recorded.logits("end"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_on_the_server_is_exported_with_the_clients_checkpoint() {
    let place = Place::new().await;
    let mut options = place.options("run");
    options.lora.r = Some(2);
    options.output.save_interval = 1;
    let summary = train(options, CancelToken::default()).await.unwrap();
    let written = Adapter::read(&summary.adapter.unwrap()).unwrap();

    // Parked by now.
    let run = place.path("run");
    let exported = Adapter::of_session(&place.client, &run, Step::Latest).await.unwrap();
    assert_eq!(exported.spec, written.spec);
    assert_eq!(exported.tensors.len(), written.tensors.len());
    for (name, tensor) in &exported.tensors {
        let (_, expected) = written.tensors.iter().find(|(other, _)| other == name).unwrap();
        assert!(tensor.equal(expected), "{name}");
    }
    exported.fit(&place.config).unwrap();

    // The client's layers of one step and the trunk of another are no adapter.
    let error = Adapter::of_session(&place.client, &run, Step::At(1)).await.unwrap_err();
    let error = error.to_string();
    assert!(error.contains("it is of step 1, and the session"), "{error}");
    assert!(error.contains("is at step 3 on the server"), "{error}");
    let trunk = Adapter::of_trunk(&place.client, &summary.session).await.unwrap();
    let error = trunk.fit(&place.config).unwrap_err().to_string();
    assert!(error.contains("28 tensors missing") && error.contains("layers.0."), "{error}");
}
