//! A GGUF file: its header, its metadata as a configuration and as a tokenizer, its tensors.
#![no_main]

use libfuzzer_sys::fuzz_target;
use offshoot_model::ModelConfig;
use offshoot_model::weights::Checkpoint;
use offshoot_trainer::tokenizer::Tokenizer;
use tch::{Device, Kind};

fuzz_target!(|bytes: &[u8]| {
    let path = offshoot_fuzz::empty_dir().join("model.gguf");
    offshoot_fuzz::write(&path, bytes);
    let Ok(checkpoint) = Checkpoint::open(&path) else { return };
    assert_eq!(checkpoint.fingerprint().len(), 64);
    let _ = ModelConfig::from_json(checkpoint.config());
    for name in checkpoint.names() {
        let _ = checkpoint.tensor(name, Kind::Float, Device::Cpu);
    }
    if let Some(metadata) = checkpoint.gguf_tokenizer() {
        let _ = Tokenizer::from_gguf(metadata, "model.gguf");
    }
});
