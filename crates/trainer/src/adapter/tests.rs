use super::*;
use offshoot_adapters::peft::{PeftConfig, read_dir, write_dir};
use serde_json::{Value, json};
use std::fs;
use tch::{Device, Kind};

fn fixture(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures").join(family)
}

fn config(family: &str) -> ModelConfig {
    let text = fs::read_to_string(fixture(family).join("config.json")).unwrap();
    ModelConfig::from_json(&serde_json::from_str(&text).unwrap()).unwrap()
}

fn of(family: &str) -> Adapter {
    Adapter::read(&fixture(family).join("adapter")).unwrap()
}

fn write(dir: &Path, adapter: &Adapter) {
    let config = PeftConfig { spec: &adapter.spec, base_model: "tiny", fan_in_fan_out: false };
    write_dir(dir, &config, &adapter.tensors).unwrap();
}

/// Changes a field of a written adapter's settings.
fn set(dir: &Path, field: &str, value: Value) {
    let path = dir.join(peft::CONFIG);
    let mut config: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    config[field] = value;
    fs::write(path, config.to_string()).unwrap();
}

fn refusal(adapter: Adapter, family: &str) -> String {
    adapter.fit(&config(family)).unwrap_err().to_string()
}

#[test]
fn pefts_adapters_fit_their_models() {
    for family in ["gpt2", "llama", "qwen2", "qwen3", "gemma"] {
        let read = of(family);
        let (spec, n) = (read.spec.clone(), read.tensors.len());
        let adapter = read.fit(&config(family)).unwrap();
        assert_eq!(adapter.spec, spec, "{family}");
        assert_eq!(adapter.tensors.len(), n);
        assert_eq!(adapter.base_model.as_deref(), Some(&*format!("tests/fixtures/{family}")));
        let (n, of_trunk) = (n / 4, adapter.trunk(SplitPoints { s1: 1, s2: 3 }));
        assert_eq!(of_trunk.len(), 2 * n, "{family}: two of four layers");
    }
}

#[test]
fn what_does_not_fit_is_named_with_the_likely_cause() {
    let error = refusal(of("llama"), "qwen3");
    assert!(error.contains(". 56 tensors of another shape (\""), "{error}");
    assert!(
        error.contains(
            "was it made for another model? It names tests/fixtures/llama as its base model"
        ),
        "{error}"
    );

    let error = refusal(of("llama"), "gpt2");
    assert!(error.contains("mean no linear layer of a gpt2 block"), "{error}");

    let mut fewer = of("llama");
    fewer.tensors = fewer.of_layers(0..3);
    let error = refusal(fewer, "llama");
    assert!(error.contains("14 tensors missing"), "{error}");
    assert!(
        error.contains("it has layers 0 to 2, the model has 4: was it made for another model? "),
        "{error}"
    );

    let mut rank = of("llama");
    rank.spec.r = 4;
    let error = refusal(rank, "llama");
    assert!(error.contains("its settings say r = 4 and its tensors have rank 5"), "{error}");

    let mut more = of("llama");
    let head = "base_model.model.lm_head.lora_A.weight";
    more.tensors.push((head.into(), Tensor::zeros([5, 40], (Kind::Float, Device::Cpu))));
    let error = refusal(more, "llama");
    assert!(error.contains("1 tensor of no linear layer") && error.contains(head), "{error}");

    let mut diverged = of("llama");
    let _ = diverged.tensors[3].1.fill_(f64::NAN);
    let error = refusal(diverged, "llama");
    assert!(error.contains("1 tensor not finite") && error.contains("diverged"), "{error}");
}

#[test]
fn some_layers_only_become_targets_by_path() {
    let dir = tempfile::tempdir().unwrap();
    let mut adapter = of("llama");
    adapter.tensors = adapter.of_layers(1..2);
    write(dir.path(), &adapter);
    set(dir.path(), "layers_to_transform", json!([1]));
    let read = Adapter::read(dir.path()).unwrap().fit(&config("llama")).unwrap();
    assert_eq!(read.spec.target_modules.len(), 7);
    assert_eq!(read.spec.target_modules[0], "model.layers.1.mlp.down_proj");

    // One of two modules with the same last part.
    let mut adapter = of("gpt2");
    adapter.tensors.retain(|(name, _)| name.contains(".attn.c_proj."));
    write(dir.path(), &adapter);
    set(dir.path(), "target_modules", json!(".*attn\\.c_proj"));
    let read = Adapter::read(dir.path()).unwrap().fit(&config("gpt2")).unwrap();
    assert_eq!(read.spec.target_modules, ["attn.c_proj"]);
}

/// A checkpoint as our trainer lays it out, of a whole adapter.
fn write_parts(dir: &Path, adapter: &Adapter, cuts: [usize; 4]) {
    for (part, cut) in ["bottom", "trunk", "top"].iter().zip(cuts.windows(2)) {
        let tensors = adapter.of_layers(cut[0]..cut[1]);
        let dir = dir.join(part);
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("metadata.json"), json!({"n_lora_tensors": tensors.len()}).to_string())
            .unwrap();
        if !tensors.is_empty() {
            let config =
                PeftConfig { spec: &adapter.spec, base_model: "tiny", fan_in_fan_out: false };
            write_dir(&dir.join("lora_adapters"), &config, &tensors).unwrap();
        }
    }
}

fn assert_same(read: &Adapter, expected: &Adapter) {
    assert_eq!(read.spec, expected.spec);
    let sorted = |adapter: &Adapter| {
        let mut names: Vec<String> = adapter.tensors.iter().map(|(n, _)| n.clone()).collect();
        names.sort();
        names
    };
    assert_eq!(sorted(read), sorted(expected));
    for (name, tensor) in &expected.tensors {
        let (_, ours) = read.tensors.iter().find(|(other, _)| other == name).unwrap();
        assert!(ours.equal(tensor), "{name}");
    }
}

#[test]
fn a_checkpoint_is_stitched_and_a_run_means_its_adapter_or_its_newest_checkpoint() {
    let run = tempfile::tempdir().unwrap();
    let adapter = of("gpt2");
    let of_step = |step: &str| run.path().join(format!("checkpoint_step_{step}"));
    write_parts(&of_step("100"), &adapter, [0, 0, 2, 4]);
    write_parts(&of_step("20"), &of("llama"), [0, 1, 3, 4]);
    fs::create_dir(of_step("300")).unwrap();
    assert_same(&Adapter::read(&of_step("100")).unwrap(), &adapter);
    assert_same(&Adapter::read(run.path()).unwrap(), &adapter);
    assert_same(&Adapter::read_step(run.path(), Step::Latest).unwrap(), &adapter);
    assert_same(&Adapter::read_step(run.path(), Step::At(20)).unwrap(), &of("llama"));
    let error = Adapter::read_step(run.path(), Step::At(30)).unwrap_err().to_string();
    assert!(error.contains("no checkpoint of step 30; there are those of 20, 100"), "{error}");
    let error = Adapter::read_step(run.path(), Step::Best).unwrap_err().to_string();
    assert!(error.contains("no checkpoint of it was evaluated"), "{error}");

    write(&run.path().join("adapter"), &of("qwen2"));
    assert_same(&Adapter::read(run.path()).unwrap(), &of("qwen2"));
}

#[test]
fn splitlearns_parts_get_the_names_of_the_whole_model() {
    let dir = tempfile::tempdir().unwrap();
    for (family, list, local) in
        [("gpt2", "transformer.h.", "h."), ("qwen2", "model.layers.", "layers.")]
    {
        let adapter = of(family);
        let path = dir.path().join(family).join("checkpoint_step_7");
        for (name, cut) in ["bottom", "trunk", "top"].iter().zip([0, 1, 3, 4].windows(2)) {
            let tensors = adapter.of_layers(cut[0]..cut[1]).into_iter().map(|(name, tensor)| {
                let layer = layer_of(&name).unwrap();
                let from = format!("{list}{layer}.");
                (name.replace(&from, &format!("{local}{}.", layer - cut[0])), tensor)
            });
            let part = Adapter {
                tensors: tensors.collect(),
                spec: adapter.spec.clone(),
                base_model: None,
                origin: PathBuf::new(),
            };
            write(&path.join(name).join("lora_adapters"), &part);
        }
        let read = Adapter::read(&path).unwrap();
        assert_same(&read, &adapter);
        read.fit(&config(family)).unwrap();

        // SplitLearn itself leaves the trunk out.
        fs::remove_dir_all(path.join("trunk")).unwrap();
        let error = Adapter::read(&path).unwrap_err().to_string();
        assert!(error.contains("no trunk/lora_adapters"), "{error}");
    }
}

#[test]
fn parts_of_two_runs_are_no_adapter() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("checkpoint_step_1");
    write_parts(&path, &of("llama"), [0, 1, 3, 4]);
    set(&path.join("top/lora_adapters"), "lora_alpha", json!(9));
    let error = Adapter::read(&path).unwrap_err().to_string();
    assert!(error.contains("lora_alpha is 9 in its top and 8 in another part"), "{error}");
}

#[test]
fn half_written_and_other_files_say_what_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let read = |path: &Path| Adapter::read(path).unwrap_err().to_string();
    write(dir.path(), &of("llama"));
    let weights = dir.path().join(peft::WEIGHTS);
    let bytes = fs::read(&weights).unwrap();
    fs::write(&weights, &bytes[..bytes.len() / 2]).unwrap();
    let error = read(dir.path());
    assert!(error.contains("adapter_model.safetensors: not a safetensors file"), "{error}");
    assert!(error.contains("was it cut off?"), "{error}");

    fs::remove_file(&weights).unwrap();
    fs::write(dir.path().join("adapter_model.bin"), "pickle").unwrap();
    let error = read(dir.path());
    assert!(error.contains("it is a pickle file") && error.contains("save it again"), "{error}");

    let model = tempfile::tempdir().unwrap();
    fs::copy(fixture("llama/config.json"), model.path().join("config.json")).unwrap();
    assert!(read(model.path()).contains("it holds a model, not an adapter"));
    assert!(read(Path::new("/nowhere")).contains("there is no such directory"));
    assert!(read(&fixture("llama").join("config.json")).contains("it is a file"));
}

#[test]
fn kinds_of_adapter_that_do_not_train_here_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &of("llama"));
    for (field, on) in [
        ("use_dora", json!(true)),
        ("modules_to_save", json!(["lm_head"])),
        ("rank_pattern", json!({"q_proj": 4})),
        ("alpha_pattern", json!({"q_proj": 4})),
        ("bias", json!("all")),
        ("peft_type", json!("IA3")),
        ("trainable_token_indices", json!([3])),
        ("target_parameters", json!(["experts.w1"])),
    ] {
        read_dir(dir.path()).unwrap();
        let before = fs::read_to_string(dir.path().join(peft::CONFIG)).unwrap();
        set(dir.path(), field, on);
        let error = Adapter::read(dir.path()).unwrap_err().to_string();
        assert!(error.contains(&format!("{field} is ")) && error.contains("expected"), "{error}");
        fs::write(dir.path().join(peft::CONFIG), before).unwrap();
    }
    set(dir.path(), "init_lora_weights", json!("pissa_niter_4"));
    let error = Adapter::read(dir.path()).unwrap_err().to_string();
    assert!(error.contains("path_initial_model_for_weight_conversion"), "{error}");
}
