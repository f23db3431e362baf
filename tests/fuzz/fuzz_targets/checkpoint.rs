//! A checkpoint of the trainer, or of SplitLearn, whose parts count their layers from 0.
#![no_main]

use libfuzzer_sys::fuzz_target;
use offshoot_adapters::peft;
use offshoot_model::ModelConfig;
use offshoot_trainer::adapter::{Adapter, Step};
use offshoot_trainer::checkpoint::{self, Saved};
use std::sync::LazyLock;

static LLAMA: LazyLock<ModelConfig> = LazyLock::new(|| {
    let config = serde_json::json!({
        "model_type": "llama", "hidden_size": 8, "num_hidden_layers": 4, "num_attention_heads": 2,
        "num_key_value_heads": 1, "intermediate_size": 16, "vocab_size": 32,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    });
    ModelConfig::from_json(&config).expect("a small model's configuration")
});

fuzz_target!(|bytes: &[u8]| {
    let Some((&kind, bytes)) = bytes.split_first() else { return };
    let Some([state, metadata, config, optimizer, weights]) = offshoot_fuzz::parts(bytes) else {
        return;
    };
    let run = offshoot_fuzz::empty_dir();
    let dir = run.join("checkpoint_step_3");
    offshoot_fuzz::write(&dir.join("training_state.json"), state);
    for (part, bit) in [("bottom", 1), ("trunk", 2), ("top", 4)] {
        let part = dir.join(part);
        offshoot_fuzz::write(&part.join("metadata.json"), metadata);
        offshoot_fuzz::write(&part.join("optimizer.safetensors"), optimizer);
        if kind & bit == 0 {
            offshoot_fuzz::write(&part.join("lora_adapters").join(peft::CONFIG), config);
            offshoot_fuzz::write(&part.join("lora_adapters").join(peft::WEIGHTS), weights);
        }
    }
    if let Ok(saved) = Saved::read(&dir) {
        assert_eq!(checkpoint::list(run).expect("it can be listed").len(), 1);
        let _ = checkpoint::find("best", run);
        let _ = (saved.saved_at(), saved.client_state(), saved.n_bytes());
    }
    let _ = Adapter::read_step(run, Step::Best);
    if let Ok(adapter) = Adapter::read(run) {
        let _ = adapter.of_layers(1..3);
        let _ = adapter.fit(&LLAMA);
    }
});
