use crate::*;
use offshoot_model::weights::Checkpoint;

fn of(config: &Value, tensors: &[Named]) -> String {
    let dir = tempfile::tempdir().unwrap();
    write_model(dir.path(), config, tensors);
    Checkpoint::open(dir.path()).unwrap().fingerprint()
}

#[test]
fn path_sharding_and_prefix_do_not_change_it() {
    let tensors = tiny_tensors();
    let fingerprint = of(&tiny_config(), &tensors);
    assert_eq!(fingerprint.len(), 64);
    assert_eq!(of(&tiny_config(), &tensors), fingerprint);
    assert_eq!(of(&tiny_config(), &prefixed("model.", &tensors)), fingerprint);
    let dir = tempfile::tempdir().unwrap();
    write_sharded(dir.path(), &tiny_config(), &tensors, 2);
    assert_eq!(Checkpoint::open(dir.path()).unwrap().fingerprint(), fingerprint);
}

#[test]
fn what_only_describes_does_not_change_it() {
    let tensors = tiny_tensors();
    let fingerprint = of(&tiny_config(), &tensors);
    let mut described = tiny_config();
    for (key, value) in [
        ("transformers_version", json!("4.0")),
        ("dtype", json!("bfloat16")),
        ("_name_or_path", json!("/somewhere")),
        ("head_dim", Value::Null),
        ("rope_theta", json!(10000)),
    ] {
        described[key] = value;
    }
    assert_eq!(of(&described, &tensors), fingerprint);
    let transformers_5 = json!({
        "model_type": "llama", "hidden_size": 4, "num_hidden_layers": 2,
        "rope_parameters": { "rope_theta": 10000.0, "rope_type": "default" },
    });
    assert_eq!(of(&transformers_5, &tensors), fingerprint);
}

#[test]
fn what_changes_numbers_changes_it() {
    let tensors = tiny_tensors();
    let mut seen = vec![of(&tiny_config(), &tensors)];
    let mut add = |fingerprint: String| {
        assert!(!seen.contains(&fingerprint));
        seen.push(fingerprint);
    };
    for (key, value) in [
        ("hidden_act", json!("gelu")),
        ("rope_theta", json!(20000.0)),
        ("rope_scaling", json!({ "rope_type": "linear", "factor": 2.0 })),
        ("rope_scaling", json!({ "rope_type": "linear", "factor": 4.0 })),
    ] {
        let mut config = tiny_config();
        config[key] = value;
        add(of(&config, &tensors));
    }
    for at in [0, 600, 1199] {
        let mut tensors = tensors.clone();
        tensors[3].2[at] += 1.0;
        add(of(&tiny_config(), &tensors));
    }
    let mut reshaped = tensors.clone();
    reshaped[3].1 = vec![300, 4];
    add(of(&tiny_config(), &reshaped));
    add(of(&tiny_config(), &tensors[..5]));
}

#[test]
fn gguf_files_have_one_too() {
    let dir = tempfile::tempdir().unwrap();
    let copy = dir.path().join("renamed.gguf");
    std::fs::copy(fixture("llama.gguf"), &copy).unwrap();
    let of = |path: &Path| Checkpoint::open(path).unwrap().fingerprint();
    assert_eq!(of(&fixture("llama.gguf")), of(&copy));
    assert_ne!(of(&fixture("llama.gguf")), of(&fixture("qwen2.gguf")));
}
