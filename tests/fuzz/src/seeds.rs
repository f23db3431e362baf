//! Writes the corpora that the fuzz targets begin with: a few small inputs of each kind that are
//! taken as they are. `cargo run --bin seeds DIR` makes `DIR/TARGET/NAME`.

use offshoot_fuzz::join;
use offshoot_proto::v1::{self, client_frame, server_frame};
use offshoot_proto::{HostTensor, WireDType};
use prost::Message;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::PathBuf;

/// H of the server that the target `client_frame` plays.
const HIDDEN: usize = 72;
const TENANTS: &str = r#"
[[tenants]]
name = "blue"
weight = 2
[[tenants.tokens]]
id = "t3f9"
sha256 = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff"
expires = 2026-12-31T00:00:00Z
[tenants.quotas]
sessions = 8
adapter_bytes = "2GiB"
tokens_per_second = 20000
[[tenants]]
name = "green"
"#;
const PEFT_LAYERS: &str = "base_model.model.model.layers";

fn main() -> std::io::Result<()> {
    let dir = std::env::args().nth(1).expect("the corpora's directory as the only argument");
    let seeds = Seeds(PathBuf::from(dir));
    tensors(&seeds)?;
    server_frames(&seeds)?;
    client_frames(&seeds)?;
    actions(&seeds)?;
    stored(&seeds)?;
    files(&seeds)?;
    seeds.write("tenants", "two", TENANTS.into())?;
    seeds.write("gguf", "small", gguf("llama"))?;
    seeds.write("gguf", "qwen2", gguf("qwen2"))
}

struct Seeds(PathBuf);

impl Seeds {
    fn write(&self, target: &str, name: &str, bytes: Vec<u8>) -> std::io::Result<()> {
        let dir = self.0.join(target);
        std::fs::create_dir_all(&dir)?;
        std::fs::write(dir.join(format!("seed-{name}")), bytes)
    }
}

fn tensor(shape: &[usize], dtype: WireDType) -> v1::Tensor {
    let n = shape.iter().product();
    let values: Vec<f32> = (0..n).map(|i| (i as f32 * 0.7).sin() * 3.0).collect();
    HostTensor::from_f32(&values, shape.to_vec(), dtype).into_proto()
}

fn tensors(seeds: &Seeds) -> std::io::Result<()> {
    for dtype in WireDType::ALL {
        let name = dtype.name();
        seeds.write("host_tensor", name, tensor(&[2, 70], dtype).encode_to_vec())?;
    }
    seeds.write("host_tensor", "cube", tensor(&[2, 3, 2], WireDType::F16).encode_to_vec())
}

fn server_frames(seeds: &Seeds) -> std::io::Result<()> {
    use server_frame::Body;
    let hidden = Some(tensor(&[2, 8], WireDType::Int8));
    let limits = v1::Limits { max_frames_in_flight: 4, ..Default::default() };
    let error = v1::FrameError {
        message: "full".into(),
        retry_after_millis: 9,
        code: 4,
        request_id: "3f2a91c0".into(),
        ..Default::default()
    };
    let attached = v1::Attached {
        last_applied: 3,
        open_microbatches: vec![1, 2],
        limits: Some(limits),
        ..Default::default()
    };
    for (name, body) in [
        (
            "forward",
            Body::Forward(v1::ForwardDone { hidden: hidden.clone(), ..Default::default() }),
        ),
        ("backward", Body::Backward(v1::BackwardDone { grad: hidden, ..Default::default() })),
        ("step", Body::Step(v1::StepDone { step: 3, ..Default::default() })),
        ("error", Body::Error(error)),
        ("attached", Body::Attached(attached)),
    ] {
        let frame = v1::ServerFrame { sequence: 5, body: Some(body) };
        seeds.write("server_frame", name, [vec![1], frame.encode_to_vec()].concat())?;
    }
    let value = Some(tensor(&[2, 3], WireDType::F32));
    let exported = v1::ExportAdapterResponse {
        tensors: vec![v1::NamedTensor { name: "a".into(), tensor: value }],
        lora: Some(v1::LoraConfig::default()),
        ..Default::default()
    };
    seeds.write("server_frame", "exported", [vec![0], exported.encode_to_vec()].concat())
}

fn client_frames(seeds: &Seeds) -> std::io::Result<()> {
    use client_frame::Body;
    for (i, dtype) in WireDType::ALL.into_iter().enumerate() {
        let hidden = Some(tensor(&[3, HIDDEN], dtype));
        let forward = v1::Forward {
            microbatch: 1,
            hidden: hidden.clone(),
            seq_lens: vec![2, 1],
            position_ids: vec![0, 1, 0],
            mode: v1::Mode::Train as i32,
            ..Default::default()
        };
        for (name, body) in [
            ("forward", Body::Forward(forward)),
            ("backward", Body::Backward(v1::Backward { microbatch: 1, grad: hidden.clone() })),
            ("extend", Body::Extend(v1::Extend { cache: 1, start: 2, hidden })),
            (
                "step",
                Body::Step(v1::Step { learning_rate: 1e-4, clip_factor: 0.5, shared_loss: None }),
            ),
            ("discard", Body::Discard(v1::Discard { microbatch: 1 })),
        ] {
            let frame = v1::ClientFrame {
                sequence: 2,
                acknowledged: 1,
                body: Some(body),
                traceparent: "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".into(),
                tracestate: "vendor=1".into(),
            };
            let bytes = [vec![i as u8], frame.encode_to_vec()].concat();
            seeds.write("client_frame", &format!("{name}-{}", dtype.name()), bytes)?;
        }
    }
    let session_id = "0123456789abcdef0123456789abcdef".into();
    let hello = Body::Hello(v1::Hello { session_id, ..Default::default() });
    let frame = v1::ClientFrame { body: Some(hello), ..Default::default() };
    seeds.write("client_frame", "hello", [vec![0], frame.encode_to_vec()].concat())?;
    let initial =
        v1::NamedTensor { name: "a".into(), tensor: Some(tensor(&[2, 3], WireDType::F32)) };
    let request = v1::OpenSessionRequest {
        name: "team".into(),
        fingerprint: "abc".into(),
        split_point_1: 1,
        split_point_2: 3,
        lora: Some(v1::LoraConfig {
            r: 4,
            lora_alpha: 8.0,
            target_modules: vec!["up_proj".into()],
            ..Default::default()
        }),
        adamw: Some(v1::AdamWConfig { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 }),
        wire_dtype: 2,
        initial_adapter: vec![initial],
        ..Default::default()
    };
    seeds.write("client_frame", "open", [vec![7], request.encode_to_vec()].concat())
}

/// Two bytes for each action; what they mean is in the targets.
fn actions(seeds: &Seeds) -> std::io::Result<()> {
    let session = [0, 1, 10, 0, 2, 1, 10, 0, 3, 0, 10, 0, 15, 0, 0, 2, 12, 0, 15, 1, 6, 0];
    seeds.write("session", "step", session.to_vec())?;
    seeds.write("session", "refused", vec![0, 1, 2, 1, 3, 0, 13, 1, 12, 0, 2, 1, 12, 0])?;
    let window = [0, 1, 6, 0, 7, 1, 1, 0, 6, 0, 7, 1, 2, 0, 6, 0, 10, 0, 6, 0, 7, 1];
    seeds.write("window", "step", window.to_vec())?;
    seeds.write("window", "retry", vec![0, 1, 2, 0, 6, 0, 8, 1, 8, 130, 9, 0, 6, 0, 7, 1])
}

fn safetensors_file(tensors: &[(String, Vec<usize>)], metadata: &[(&str, &str)]) -> Vec<u8> {
    let bytes: Vec<u8> = (0..=255).collect();
    let views = tensors.iter().map(|(name, shape)| {
        let length = 4 * shape.iter().product::<usize>();
        let view = TensorView::new(Dtype::F32, shape.clone(), &bytes[..length]);
        (name.clone(), view.expect("as many bytes as the shape says"))
    });
    let metadata = metadata.iter().map(|(k, v)| (k.to_string(), v.to_string()));
    let metadata: HashMap<String, String> = metadata.collect();
    safetensors::serialize(views, Some(metadata)).expect("small tensors")
}

fn adapter_state() -> Vec<u8> {
    let names = ["parameters", "gradients", "first_moments", "second_moments"];
    let tensors = names.map(|name| (name.to_string(), vec![3]));
    safetensors_file(&tensors, &[("n_steps", "2")])
}

fn lora_pair(layers: &str, layer: usize) -> [(String, Vec<usize>); 2] {
    let path = format!("{layers}.{layer}.mlp.up_proj");
    [(format!("{path}.lora_A.weight"), vec![1, 8]), (format!("{path}.lora_B.weight"), vec![16, 1])]
}

fn stored(seeds: &Seeds) -> std::io::Result<()> {
    let snapshot = json!({
        "id": "1-step0", "step": 0, "sequence": 0, "origin": "client", "state": "00",
        "answers": "11", "bytes": 10,
    });
    let record = json!({
        "tenant": "blue", "name": "n", "seed": 1, "wire_dtype": "bf16", "fingerprint": "abc",
        "lora": {"r": 2, "lora_alpha": 4.0, "lora_dropout": 0.0, "use_rslora": false,
                 "target_modules": ["up_proj"]},
        "adamw": {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01},
        "split_point_1": 1, "split_point_2": 3, "head": "1-step0", "snapshots": [snapshot],
        "n_snapshots": 1, "kept": ["1-step0"], "epoch": 1, "damaged": [],
    });
    seeds.write("stored", "record", [vec![0], record.to_string().into_bytes()].concat())?;
    let step = server_frame::Body::Step(v1::StepDone { step: 1, ..Default::default() });
    let answer = v1::ServerFrame { sequence: 3, body: Some(step) };
    let answers = [vec![7; 32], answer.encode_length_delimited_to_vec()].concat();
    let both = join(&[&adapter_state(), &answers]);
    seeds.write("stored", "answers", [vec![1], both].concat())?;
    seeds.write("stored", "state", [vec![2], adapter_state()].concat())
}

fn peft_config(targets: Value) -> Vec<u8> {
    let config = json!({
        "peft_type": "LORA", "base_model_name_or_path": "tiny", "r": 1, "lora_alpha": 8,
        "lora_dropout": 0.0, "use_rslora": false, "target_modules": targets, "bias": "none",
        "rank_pattern": {}, "use_dora": false, "init_lora_weights": true,
    });
    config.to_string().into_bytes()
}

fn model_config() -> Value {
    json!({
        "model_type": "llama", "hidden_size": 8, "num_hidden_layers": 4, "num_attention_heads": 2,
        "num_key_value_heads": 1, "intermediate_size": 16, "vocab_size": 32,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0,
            "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 64},
    })
}

fn files(seeds: &Seeds) -> std::io::Result<()> {
    let weights = safetensors_file(&lora_pair(PEFT_LAYERS, 1), &[("format", "pt")]);
    let config = peft_config(json!(["up_proj"]));
    seeds.write("peft", "names", join(&[&config, &weights]))?;
    seeds.write("peft", "pattern", join(&[&peft_config(json!(".*up_proj")), &weights]))?;

    let lora = json!({"r": 1, "lora_alpha": 8.0, "lora_dropout": 0.0, "use_rslora": false,
        "target_modules": ["up_proj"]});
    let settings = json!({
        "model_name": "tiny", "fingerprint": "abc", "split_point_1": 1, "split_point_2": 3,
        "lora": lora, "seed": 1, "data_fingerprint": "d", "batch_size": 2,
        "gradient_accumulation_steps": 1, "n_steps": 9, "learning_rate": 1e-4,
        "weight_decay": 0.0, "warmup_steps": 0, "max_grad_norm": 1.0, "dtype": "f32",
        "wire_dtype": "bf16",
    });
    let state = json!({
        "format": 1, "step": 3, "epoch": 0, "sample": 4, "eval_loss": 2.5,
        "best": {"step": 3, "loss": 2.5}, "evaluations": [{"step": 3, "loss": null}],
        "saved_at": "2026-11-23T00:00:00Z", "session_id": "s", "snapshot_id": "x",
        "settings": settings,
    });
    let (state, metadata) = (state.to_string(), json!({"n_lora_tensors": 2}).to_string());
    let checkpoint = |kind: u8, layers: &str| {
        let weights = safetensors_file(&lora_pair(layers, 0), &[]);
        let parts = [state.as_bytes(), metadata.as_bytes(), &config, &adapter_state(), &weights];
        [vec![kind], join(&parts)].concat()
    };
    seeds.write("checkpoint", "trunk", checkpoint(5, PEFT_LAYERS))?;
    seeds.write("checkpoint", "splitlearn", checkpoint(0, "base_model.model.layers"))?;
    seeds.write("checkpoint", "gpt2", checkpoint(0, "base_model.model.h"))?;

    let tensors =
        [("model.embed_tokens.weight".to_string(), vec![4, 8]), ("x".to_string(), vec![])];
    let weights = safetensors_file(&tensors, &[]);
    let config = model_config().to_string();
    seeds.write("weights", "alone", join(&[config.as_bytes(), b"", &weights]))?;
    let index = json!({"weight_map": {"x": "model-1.safetensors"}}).to_string();
    seeds.write("weights", "indexed", join(&[config.as_bytes(), index.as_bytes(), &weights]))?;
    let gpt2 = json!({"model_type": "gpt2", "n_embd": 8, "n_head": 2, "n_layer": 2,
        "vocab_size": 32, "n_positions": 64, "activation_function": "gelu_new"})
    .to_string();
    seeds.write("weights", "gpt2", join(&[gpt2.as_bytes(), b"", &weights]))
}

/// A whole GGUF file, version 3, of one layer: numbers, a tokenizer, plain and quantised tensors.
fn gguf(architecture: &str) -> Vec<u8> {
    let mut file = Gguf::default();
    file.text("general.architecture", architecture);
    file.number("general.alignment", 32);
    for (key, value) in [
        ("embedding_length", 32),
        ("block_count", 1),
        ("attention.head_count", 2),
        ("attention.head_count_kv", 1),
        ("feed_forward_length", 32),
        ("context_length", 64),
        ("rope.dimension_count", 16),
    ] {
        file.number(&format!("{architecture}.{key}"), value);
    }
    let float = 1e-5f32.to_le_bytes();
    file.field(&format!("{architecture}.attention.layer_norm_rms_epsilon"), 6, &float);
    file.text("tokenizer.ggml.model", "gpt2");
    file.text("tokenizer.ggml.pre", architecture.replace("llama", "llama-bpe").as_str());
    file.texts("tokenizer.ggml.tokens", &["a", "b", "ab", "<s>"]);
    file.texts("tokenizer.ggml.merges", &["a b"]);
    // An array of four i32.
    let mut kinds = [5u32.to_le_bytes().to_vec(), 4u64.to_le_bytes().to_vec()].concat();
    kinds.extend([1u32, 1, 1, 3].iter().flat_map(|kind| kind.to_le_bytes()));
    file.field("tokenizer.ggml.token_type", 9, &kinds);
    file.number("tokenizer.ggml.bos_token_id", 3);
    file.text("tokenizer.chat_template", "{{ messages[0]['content'] }}");
    file.tensor("token_embd.weight", &[32, 4], 2, 4 * 18);
    file.tensor("blk.0.attn_q.weight", &[32, 32], 8, 32 * 34);
    file.tensor("blk.0.attn_norm.weight", &[32], 0, 128);
    file.tensor("rope_freqs.weight", &[8], 0, 32);
    file.finish()
}

#[derive(Default)]
struct Gguf {
    n_fields: u64,
    fields: Vec<u8>,
    n_tensors: u64,
    infos: Vec<u8>,
    data: Vec<u8>,
}

impl Gguf {
    fn string(text: &str) -> Vec<u8> {
        [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
    }

    fn field(&mut self, key: &str, kind: u32, value: &[u8]) {
        self.n_fields += 1;
        self.fields.extend(Gguf::string(key));
        self.fields.extend(kind.to_le_bytes());
        self.fields.extend(value);
    }

    fn number(&mut self, key: &str, value: u32) {
        self.field(key, 4, &value.to_le_bytes());
    }

    fn text(&mut self, key: &str, value: &str) {
        self.field(key, 8, &Gguf::string(value));
    }

    fn texts(&mut self, key: &str, values: &[&str]) {
        let mut bytes = 8u32.to_le_bytes().to_vec();
        bytes.extend((values.len() as u64).to_le_bytes());
        bytes.extend(values.iter().flat_map(|text| Gguf::string(text)));
        self.field(key, 9, &bytes);
    }

    /// Dimensions with the fastest first, as GGUF has them.
    fn tensor(&mut self, name: &str, dims: &[u64], kind: u32, n_bytes: usize) {
        self.n_tensors += 1;
        self.infos.extend(Gguf::string(name));
        self.infos.extend((dims.len() as u32).to_le_bytes());
        self.infos.extend(dims.iter().flat_map(|dim| dim.to_le_bytes()));
        self.infos.extend(kind.to_le_bytes());
        self.infos.extend((self.data.len() as u64).to_le_bytes());
        self.data.resize((self.data.len() + n_bytes).next_multiple_of(32), 1);
    }

    fn finish(self) -> Vec<u8> {
        let counts = [self.n_tensors.to_le_bytes(), self.n_fields.to_le_bytes()].concat();
        let mut file =
            [&b"GGUF"[..], &3u32.to_le_bytes(), &counts, &self.fields, &self.infos].concat();
        file.resize(file.len().next_multiple_of(32), 0);
        file.extend(self.data);
        file
    }
}
