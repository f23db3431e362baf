//! What is said: requests, frames, and nonsense of each kind.

use offshoot_benches::normal;
use offshoot_proto::v1::{self, client_frame::Body};
use offshoot_proto::{HostTensor, WireDType};

pub(super) fn request(server: &v1::DescribeResponse) -> v1::OpenSessionRequest {
    v1::OpenSessionRequest {
        name: "mallory".into(),
        fingerprint: server.fingerprint.clone(),
        split_point_1: server.split_point_1,
        split_point_2: server.split_point_2,
        lora: Some(v1::LoraConfig { r: 4, lora_alpha: 8.0, ..Default::default() }),
        adamw: Some(v1::AdamWConfig { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 }),
        seed: 1,
        wire_dtype: WireDType::F32.to_proto() as i32,
        initial_adapter: vec![],
    }
}

pub(super) fn junk(n_bytes: usize) -> Vec<v1::NamedTensor> {
    let tensor = v1::Tensor {
        dtype: WireDType::F32.to_proto() as i32,
        shape: vec![1, (n_bytes / 4) as u32],
        data: vec![7; n_bytes].into(),
        ..Default::default()
    };
    vec![v1::NamedTensor { name: "junk".into(), tensor: Some(tensor) }]
}

pub(super) fn frame(sequence: u64, body: Body) -> v1::ClientFrame {
    v1::ClientFrame { sequence, body: Some(body), ..Default::default() }
}

pub(super) fn forward(hidden_size: usize, n_tokens: usize, microbatch: u64) -> v1::Forward {
    v1::Forward {
        microbatch,
        hidden: Some(normal(n_tokens, hidden_size, WireDType::F32, 3).into_proto()),
        seq_lens: vec![n_tokens as u32],
        position_ids: vec![],
        mode: v1::Mode::Train as i32,
        want_input_grad: true,
        dropout_key: 0,
    }
}

/// One of each kind of nonsense.
pub(super) fn bad_bodies(h: usize, round: u64) -> Vec<Body> {
    let n = 16;
    let with = |bad: f32| {
        let mut values = vec![0.5; n * h];
        values[round as usize % (n * h)] = bad;
        HostTensor::from_f32(&values, vec![n, h], WireDType::F32).into_proto()
    };
    let good = || forward(h, n, round);
    let step = || v1::Step { learning_rate: 1e-3, clip_factor: 1.0, shared_loss: None };
    let shaped = |shape: Vec<u32>| v1::Tensor { shape, ..with(0.5) };
    vec![
        Body::Forward(v1::Forward { hidden: Some(with(f32::NAN)), ..good() }),
        Body::Forward(v1::Forward { hidden: Some(with(f32::INFINITY)), ..good() }),
        Body::Forward(v1::Forward { hidden: Some(shaped(vec![u32::MAX, u32::MAX])), ..good() }),
        Body::Forward(v1::Forward { hidden: Some(shaped(vec![h as u32, n as u32])), ..good() }),
        Body::Forward(v1::Forward { hidden: Some(shaped(vec![1; 64])), ..good() }),
        Body::Forward(v1::Forward { hidden: None, ..good() }),
        Body::Forward(v1::Forward { seq_lens: vec![u32::MAX, 1], ..good() }),
        Body::Forward(v1::Forward { seq_lens: vec![0; 10_000], ..good() }),
        Body::Forward(v1::Forward { position_ids: vec![1; 3], ..good() }),
        Body::Forward(v1::Forward { mode: 77, ..good() }),
        Body::Backward(v1::Backward { microbatch: u64::MAX, grad: Some(with(f32::NEG_INFINITY)) }),
        Body::Backward(v1::Backward { microbatch: u64::MAX, grad: Some(with(0.5)) }),
        Body::Step(v1::Step { learning_rate: f64::NAN, ..step() }),
        Body::Step(v1::Step { clip_factor: f64::INFINITY, ..step() }),
        Body::Step(v1::Step { shared_loss: Some(f64::NAN), ..step() }),
    ]
}
