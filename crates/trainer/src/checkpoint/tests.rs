use super::*;
use crate::data::Place;
use crate::schedule::Scheduler;
use offshoot_adapters::LoraSpec;
use tch::{Device, Kind};

fn settings() -> RunSettings {
    RunSettings {
        model_name: "tiny".into(),
        fingerprint: "abc".into(),
        split_point_1: 0,
        split_point_2: 2,
        lora: LoraSpec { target_modules: vec!["q_proj".into()], ..LoraSpec::default() },
        seed: 1,
        data_fingerprint: "d".into(),
        batch_size: 4,
        gradient_accumulation_steps: 1,
        microbatches_in_flight: 2,
        n_steps: 10,
        learning_rate: 1e-4,
        min_learning_rate: 0.0,
        lr_scheduler: Default::default(),
        weight_decay: 0.01,
        warmup_steps: 1,
        max_grad_norm: 1.0,
        dtype: "f32".into(),
        wire_dtype: "f32".into(),
        ..RunSettings::default()
    }
}

fn state(step: u64, eval_loss: Option<f64>) -> TrainingState {
    let place = Place { epoch: 1, sample: 8 };
    let names = ("s".to_string(), format!("snapshot {step}"));
    let saved_at = Some("2026-11-22T20:00:00Z".to_string());
    let evaluations = vec![Best { step: 3, loss: 2.0 }];
    let state = TrainingState::new(step, place, names, settings());
    TrainingState { eval_loss, saved_at, evaluations, ..state }
}

fn client() -> ClientState {
    let values = vec![1.0, 2.5];
    let top = AdapterState {
        parameters: values.clone(),
        gradients: vec![0.0; 2],
        first_moments: values.clone(),
        second_moments: values,
        n_steps: 3,
    };
    ClientState { bottom: None, top: Some(top) }
}

fn save(dir: &Path, step: u64, eval_loss: Option<f64>) -> PathBuf {
    let name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight";
    let tensor = || (name.to_string(), Tensor::ones([8, 4], (Kind::Float, Device::Cpu)));
    let contents = Contents {
        state: &state(step, eval_loss),
        n_layers: 3,
        fan_in_fan_out: false,
        client: &client(),
        tensors: [vec![], vec![tensor()], vec![tensor()]],
    };
    write(dir, &contents).unwrap()
}

fn steps(dir: &Path) -> Vec<u64> {
    list(dir).unwrap().iter().map(|s| s.state.step).collect()
}

#[test]
fn a_checkpoint_comes_back_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let path = save(dir.path(), 7, Some(1.5));
    assert_eq!(path.file_name().unwrap(), "checkpoint_step_7");
    let saved = find("latest", dir.path()).unwrap();
    assert_eq!(saved.state, state(7, Some(1.5)));
    assert_eq!(saved.client_state().unwrap(), client());
    let adapter = peft::read_dir(&path.join("trunk/lora_adapters")).unwrap();
    assert_eq!(adapter.spec, settings().lora);
    assert!(!path.join("bottom/lora_adapters").exists());
    let metadata = fs::read_to_string(path.join("top/metadata.json")).unwrap();
    assert!(metadata.contains("\"first_layer\": 2") && metadata.contains("\"end_layer\": 3"));
    // Written again: the new one is there, nothing else is left behind.
    save(dir.path(), 7, None);
    assert_eq!(find("latest", dir.path()).unwrap().state, state(7, None));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn the_last_five_and_the_best_stay() {
    let dir = tempfile::tempdir().unwrap();
    for (step, loss) in [(10, 3.0), (20, 1.0), (30, 2.0), (100, 1.5), (110, 1.6), (120, 1.7)] {
        save(dir.path(), step, Some(loss));
    }
    save(dir.path(), 130, None);
    prune(dir.path(), 5).unwrap();
    assert_eq!(steps(dir.path()), [20, 30, 100, 110, 120, 130]);
    prune(dir.path(), 5).unwrap();
    assert_eq!(steps(dir.path()), [20, 30, 100, 110, 120, 130]);
    assert_eq!(best(&list(dir.path()).unwrap()).unwrap().state.step, 20);
}

#[test]
fn half_a_checkpoint_is_no_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    save(dir.path(), 3, None);
    fs::create_dir(dir.path().join("checkpoint_step_9")).unwrap();
    assert_eq!(steps(dir.path()), [3]);
    let nine = dir.path().join("checkpoint_step_9");
    assert!(
        find(nine.to_str().unwrap(), dir.path())
            .unwrap_err()
            .to_string()
            .contains("no checkpoint_step_N")
    );
    fs::write(nine.join(STATE_FILE), "{\"format\": 99}").unwrap();
    let error = find(nine.to_str().unwrap(), dir.path()).unwrap_err().to_string();
    assert!(error.contains("its format is 99"), "{error}");
}

#[test]
fn another_model_is_refused_and_other_settings_are_named() {
    let was = settings();
    let mut now = RunSettings { model_name: "elsewhere/tiny".into(), ..settings() };
    assert_eq!(was.differences(&now), Ok(vec![]));
    // Of a checkpoint from before there was a choice.
    let mut old = serde_json::to_value(&was).unwrap();
    old.as_object_mut().unwrap().remove("microbatches_in_flight");
    let old: RunSettings = serde_json::from_value(old).unwrap();
    assert_eq!(old.microbatches_in_flight, 1);
    assert_eq!(old.differences(&now), Ok(vec![]));
    now.batch_size = 8;
    assert_eq!(was.differences(&now), Ok(vec!["--batch-size was 4, is 8".to_string()]));
    assert!(!now.sends_more_than(&was));
    let noisy = RunSettings { hidden_noise: 0.3, ..was.clone() };
    assert!(now.sends_more_than(&noisy) && !noisy.sends_more_than(&was));
    now.split_point_2 = 1;
    assert_eq!(was.differences(&now), Err(vec!["split_point_2 was 2, is 1".to_string()]));
    // Of LoRA only what differs.
    let mut other_rank = was.clone();
    other_rank.lora.r += 1;
    let lora = Err(vec![format!("lora.r was {}, is {}", was.lora.r, was.lora.r + 1)]);
    assert_eq!(was.differences(&other_rank), lora);
}

#[test]
fn checkpoints_of_the_first_release_are_read() {
    let settings = r#"{"model_name": "m", "fingerprint": "f", "split_point_1": 1, "split_point_2": 3,
        "lora": {"r": 8, "lora_alpha": 16.0, "lora_dropout": 0.1, "use_rslora": false,
            "target_modules": ["q_proj"]},
        "seed": 42, "data_fingerprint": "d", "batch_size": 4, "gradient_accumulation_steps": 1,
        "n_steps": 100, "learning_rate": 0.0001, "weight_decay": 0.01, "warmup_steps": 10,
        "max_grad_norm": 1.0, "dtype": "f32", "wire_dtype": "bf16"}"#;
    let text = format!(
        r#"{{"format": 1, "step": 50, "epoch": 1, "sample": 8, "eval_loss": 2.5,
            "best": {{"step": 50, "loss": 2.5}}, "session_id": "s", "snapshot_id": "n",
            "settings": {settings}}}"#
    );
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("checkpoint_step_50");
    fs::create_dir(&path).unwrap();
    fs::write(path.join(STATE_FILE), text).unwrap();
    let saved = Saved::read(&path).unwrap();
    assert_eq!(saved.state.snapshot(), Some(("s", "n")));
    assert_eq!((saved.state.best.unwrap().loss, saved.state.evaluations.len()), (2.5, 0));
    assert!(saved.saved_at().is_some_and(|time| time.ends_with('Z')), "{:?}", saved.saved_at());
    // What there was no choice of then is as it is now without one.
    let was = &saved.state.settings;
    assert_eq!((was.lr_scheduler, was.min_learning_rate), (Scheduler::Cosine, 0.0));
    assert_eq!((was.max_tokens_per_batch, was.microbatches_in_flight), (None, 1));
    let now = crate::options::LossOptions::default().to_string();
    assert_eq!(was.loss, now);
}

#[test]
fn an_imported_adapter_has_no_session_and_a_loss_may_be_nan() {
    let nan = Best { step: 2, loss: f64::NAN };
    let state = TrainingState {
        evaluations: vec![Best { step: 1, loss: 0.1 }, nan],
        ..TrainingState::without_session(settings())
    };
    let text = serde_json::to_string(&state).unwrap();
    let read: TrainingState = serde_json::from_str(&text).unwrap();
    assert_eq!(read.snapshot(), None);
    assert_eq!(read.evaluations[0], state.evaluations[0]);
    assert!(read.evaluations[1].loss.is_nan());
    let empty = text.replace("\"session_id\":null", "\"session_id\":\"\"");
    assert_ne!(empty, text);
    assert_eq!(serde_json::from_str::<TrainingState>(&empty).unwrap().session_id, None);
}
