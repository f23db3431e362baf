use crate::*;
use offshoot_model::weights::Checkpoint;
use std::collections::HashMap;

fn expected(name: &str) -> HashMap<String, Tensor> {
    Tensor::read_safetensors(fixture(&format!("{name}.expected.safetensors")))
        .unwrap()
        .into_iter()
        .collect()
}

/// Every supported type, both architectures: the tensors that Transformers makes with gguf-py.
#[test]
fn gguf_equals_gguf_py() {
    for name in ["llama", "qwen2"] {
        let checkpoint = Checkpoint::open(&fixture(&format!("{name}.gguf"))).unwrap();
        for (key, expected) in expected(name).iter().filter(|(key, _)| *key != "factors") {
            let tensor = checkpoint.tensor(key, Kind::Float, Device::Cpu).unwrap();
            assert_eq!(tensor.size(), expected.size(), "{key}");
            let difference = (&tensor - expected).abs().max().double_value(&[]);
            let largest = expected.abs().max().double_value(&[]);
            println!("{name} {key}: largest {largest:.3e}, difference {difference:.3e}");
            assert!(difference <= 1e-6 * largest, "{name} {key}: {difference} of {largest}");
        }
        assert_eq!(checkpoint.contains("lm_head.weight"), name == "qwen2");
        assert!(!checkpoint.contains("rope_freqs.weight"));
    }
}

/// Converting to a smaller type chunk by chunk is converting at the end.
#[test]
fn gguf_converts_like_f32() {
    let checkpoint = Checkpoint::open(&fixture("llama.gguf")).unwrap();
    for (key, expected) in expected("llama").iter().filter(|(key, _)| *key != "factors") {
        for kind in [Kind::BFloat16, Kind::Half] {
            let tensor = checkpoint.tensor(key, kind, Device::Cpu).unwrap();
            assert_eq!(tensor.kind(), kind);
            assert_eq!(floats(&tensor), floats(&expected.to_kind(kind)), "{key}");
        }
    }
}

#[test]
fn gguf_metadata_becomes_a_hugging_face_config() {
    let llama = Checkpoint::open(&fixture("llama.gguf")).unwrap();
    let config = llama.config();
    let factors: Vec<f64> =
        floats(&expected("llama")["factors"]).iter().map(|&f| f.into()).collect();
    assert!(factors[0] == 1.0 && factors[3] == 8.0, "{factors:?}");
    for (key, value) in [
        ("model_type", json!("llama")),
        ("architectures", json!(["LlamaForCausalLM"])),
        ("hidden_size", json!(256)),
        ("num_hidden_layers", json!(2)),
        ("num_attention_heads", json!(4)),
        ("num_key_value_heads", json!(2)),
        ("head_dim", json!(8)),
        ("intermediate_size", json!(32)),
        ("vocab_size", json!(272)),
        ("max_position_embeddings", json!(128)),
        ("rms_norm_eps", json!(f64::from(1e-5f32))),
        ("rope_theta", json!(50000.0)),
        ("rope_scaling", json!({ "rope_type": "factors", "factors": factors })),
        ("tie_word_embeddings", json!(true)),
        ("hidden_act", json!("silu")),
        ("attention_bias", json!(false)),
        ("mlp_bias", json!(false)),
        ("bos_token_id", json!(1)),
        ("eos_token_id", json!(2)),
    ] {
        assert_eq!(config[key], value, "{key}");
    }
    let qwen2 = Checkpoint::open(&fixture("qwen2.gguf")).unwrap();
    assert_eq!(qwen2.config()["model_type"], "qwen2");
    assert_eq!(qwen2.config()["tie_word_embeddings"], false);
    assert_eq!(qwen2.config()["head_dim"], 16);
    assert_eq!(qwen2.config()["rope_scaling"], json!({ "rope_type": "linear", "factor": 4.0 }));
}

#[test]
fn gguf_metadata_holds_the_tokenizer() {
    let checkpoint = Checkpoint::open(&fixture("llama.gguf")).unwrap();
    let tokenizer = checkpoint.gguf_tokenizer().unwrap();
    assert_eq!((tokenizer.model.as_str(), tokenizer.pre.as_str()), ("gpt2", "smollm"));
    assert_eq!((tokenizer.tokens.len(), tokenizer.token_types.len()), (272, 272));
    assert_eq!(tokenizer.tokens[1], "<|im_start|>");
    assert_eq!(tokenizer.token_types[..4], [3, 3, 3, 1]);
    assert_eq!(tokenizer.merges[0], "\u{120} t");
    assert_eq!(tokenizer.tokens[259], "\u{120}t");
    assert_eq!((tokenizer.bos_token_id, tokenizer.eos_token_id), (Some(1), Some(2)));
    assert!(!tokenizer.add_bos_token && tokenizer.scores.is_empty());
    assert!(tokenizer.chat_template.as_ref().unwrap().contains("<|im_start|>"));
}

#[test]
fn directory_with_one_gguf_is_that_file() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("tiny.gguf");
    std::fs::copy(fixture("qwen2.gguf"), &file).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.path(), file);
    assert!(checkpoint.contains("model.layers.1.self_attn.k_proj.bias"));
}
