//! What we write is what PEFT writes: the same tensors, and the settings that PEFT reads.

use offshoot_adapters::peft::{self, PeftConfig};
use safetensors::SafeTensors;
use serde_json::Value;
use std::path::Path;

fn json(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn written_equals_pefts() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures");
    for family in ["gpt2", "llama", "qwen2", "qwen3", "gemma"] {
        let theirs = fixtures.join(family).join("adapter");
        let adapter = peft::read_dir(&theirs).unwrap();
        let ours = tempfile::tempdir().unwrap();
        let config = PeftConfig {
            spec: &adapter.spec,
            base_model: &format!("tests/fixtures/{family}"),
            fan_in_fan_out: family == "gpt2",
        };
        peft::write_dir(ours.path(), &config, &adapter.tensors).unwrap();

        let (their_config, our_config) = (
            json(&theirs.join("adapter_config.json")),
            json(&ours.path().join("adapter_config.json")),
        );
        for (field, value) in our_config.as_object().unwrap() {
            assert_eq!(*value, their_config[field], "{family}: {field}");
        }
        let read = |dir: &Path| std::fs::read(dir.join("adapter_model.safetensors")).unwrap();
        let (their_bytes, our_bytes) = (read(&theirs), read(ours.path()));
        let theirs = SafeTensors::deserialize(&their_bytes).unwrap();
        let ours = SafeTensors::deserialize(&our_bytes).unwrap();
        assert_eq!(theirs.len(), ours.len(), "{family}");
        for (name, tensor) in theirs.iter() {
            assert_eq!(tensor, ours.tensor(name).unwrap(), "{family}: {name}");
        }
    }
}
