//! A Hugging Face directory: `config.json`, and safetensors alone or with an index. Every tensor that
//! is listed can be asked for.
#![no_main]

use libfuzzer_sys::fuzz_target;
use offshoot_model::ModelConfig;
use offshoot_model::weights::Checkpoint;
use tch::{Device, Kind};

fuzz_target!(|bytes: &[u8]| {
    let Some([config, index, weights]) = offshoot_fuzz::parts(bytes) else { return };
    let dir = offshoot_fuzz::empty_dir();
    offshoot_fuzz::write(&dir.join("config.json"), config);
    if !index.is_empty() {
        offshoot_fuzz::write(&dir.join("model.safetensors.index.json"), index);
    }
    let file = if index.is_empty() { "model.safetensors" } else { "model-1.safetensors" };
    offshoot_fuzz::write(&dir.join(file), weights);
    let Ok(checkpoint) = Checkpoint::open(dir) else { return };
    assert_eq!(checkpoint.fingerprint().len(), 64);
    let _ = ModelConfig::from_json(checkpoint.config());
    for name in checkpoint.names() {
        assert!(checkpoint.contains(name));
        let _ = checkpoint.tensor(name, Kind::Float, Device::Cpu);
    }
    assert!(checkpoint.tensor("no such tensor", Kind::Float, Device::Cpu).is_err());
});
