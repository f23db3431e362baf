//! For fuzz targets, behind the feature `fuzzing`: what comes over the wire or lies in the store
//! goes the way it goes in a server, and what is taken is held against what is promised of it. Not
//! part of the server.

use crate::config::ComputeDType;
use crate::engine::TrunkInfo;
use crate::error::Error;
use crate::grpc::decode::{self, FrameRules};
use crate::refusals::Refusals;
use crate::registry::{Copied, fits};
use crate::session::{SessionId, Work, state_model};
use crate::store::{Record, SnapshotRecord, StoredSnapshot};
use offshoot_adapters::Site;
use offshoot_proto::{HostTensor, WireDType, v1};

/// Errors travel in a header of the answer, which has room for some KiB.
const MAX_ERROR_BYTES: usize = 2048;

/// A frame of a stream of a session in the dtype with this index.
pub fn client_frame(frame: &v1::ClientFrame, dtype: usize) {
    let rules = FrameRules {
        hidden_size: 72,
        wire_dtype: WireDType::ALL[dtype % 4],
        max_tokens: 32,
        max_cache_tokens: 64,
    };
    let tensor_bytes = decode::tensor_bytes(frame);
    check(decode::hello(Some(frame.clone())).map(drop));
    let taken = match decode::frame(frame.clone(), &rules) {
        Ok(taken) => taken,
        Err(error) => return check(Err(error)),
    };
    let Ok(again) = decode::frame(frame.clone(), &rules) else { panic!("it was taken before") };
    assert_eq!(taken.head, again.head);
    assert_eq!(taken.head.effect, taken.work.effect());
    match taken.work {
        Work::Forward(forward) => {
            let n_tokens = rows(&forward.hidden, &rules, tensor_bytes);
            assert_eq!(forward.seq_lens.iter().sum::<usize>(), n_tokens);
            assert!(!forward.seq_lens.contains(&0));
            assert!(forward.position_ids.is_none_or(|ids| ids.len() == n_tokens));
        }
        Work::Backward(backward) => drop(rows(&backward.grad, &rules, tensor_bytes)),
        Work::Extend(extend) => {
            let n_tokens = rows(&extend.hidden, &rules, tensor_bytes) as u64;
            assert!(extend.start + n_tokens <= rules.max_cache_tokens as u64);
        }
        Work::Step(step) => {
            assert!(step.learning_rate.is_finite() && step.learning_rate >= 0.0);
            assert!((0.0..=1.0).contains(&step.clip_factor));
        }
        Work::Discard { .. } | Work::DropCache { .. } => {}
    }
}

/// What the engine gets: as many rows as are allowed, each of H numbers.
fn rows(tensor: &HostTensor, rules: &FrameRules, tensor_bytes: usize) -> usize {
    let &[n_tokens, width] = tensor.shape() else { panic!("{:?}", tensor.shape()) };
    assert!((1..=rules.max_tokens).contains(&n_tokens) && width == rules.hidden_size);
    assert_eq!(tensor.dtype(), rules.wire_dtype);
    assert_eq!(tensor.data().len(), tensor_bytes);
    assert!(tensor.to_f32().iter().all(|value| value.is_finite()));
    n_tokens
}

/// A request for a session.
pub fn opening(request: v1::OpenSessionRequest) {
    let limits = v1::Limits { max_rank: 64, ..Default::default() };
    let trunk = trunk();
    match decode::opening(request, &trunk, &limits, "".into()) {
        Ok(opening) => {
            let lora = &opening.settings.lora;
            assert!((1..=64).contains(&lora.r) && lora.scaling().is_finite());
            assert!(trunk.adapter_bytes(lora) < 1 << 20);
        }
        Err(error) => check(Err(error)),
    }
}

/// A session's record as it lies in the store.
pub fn record(bytes: &[u8]) {
    let Ok(mut record) = serde_json::from_slice::<Record>(bytes) else { return };
    let again: Record = match serde_json::to_vec(&record) {
        Ok(bytes) => serde_json::from_slice(&bytes).expect("it was written just now"),
        Err(_) => return,
    };
    assert_eq!(again, record);
    let trunk = TrunkInfo { fingerprint: record.fingerprint.clone(), ..trunk() };
    if let Some(head) = record.head().cloned() {
        let _ = fits(SessionId::new(), &record, &head, &trunk).map_err(|error| error.to_string());
    }
    record.lora.r = record.lora.r.min(64);
    let _ = trunk.adapter_bytes(&record.lora);
}

/// The tensors and the recorded answers of a snapshot, whatever their hashes.
pub fn snapshot(state: Vec<u8>, answers: Option<Vec<u8>>) {
    let record: SnapshotRecord = serde_json::from_str(
        r#"{"id": "1-step0", "step": 0, "sequence": 0, "origin": "server", "state": "",
            "answers": null, "bytes": 0}"#,
    )
    .expect("a snapshot's record");
    match Copied::decode(StoredSnapshot { record, state, answers }) {
        Ok(copied) => {
            let again = copied.adapters.to_safetensors();
            let again = offshoot_adapters::AdapterState::from_safetensors(&again);
            let again = again.expect("it was written just now");
            let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&again.parameters), bits(&copied.adapters.parameters));
            assert_eq!(again.n_steps, copied.adapters.n_steps);
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

/// The order of a session's frames, beside a model of it.
pub fn session(bytes: &[u8]) {
    state_model::run(bytes);
}

fn check(result: Result<(), Error>) {
    let Err(error) = result else { return };
    let text = error.to_string();
    assert!(text.len() <= MAX_ERROR_BYTES, "an error of {} bytes", text.len());
    let _ = Refusals::default().status("", None, error);
}

fn trunk() -> TrunkInfo {
    let site =
        |layer| Site::new(layer, "mlp.up_proj", &format!("layers.{layer}.mlp.up_proj"), 8, 16);
    TrunkInfo {
        model_name: "fuzz".into(),
        model_type: "llama".into(),
        fingerprint: "abc".into(),
        n_layers: 4,
        max_positions: 64,
        layers: 1..3,
        hidden_size: 8,
        compute_dtype: ComputeDType::F32,
        device: "cpu".into(),
        lora_modules: vec!["mlp.up_proj".into()],
        default_targets: vec!["up_proj".into()],
        weights_bytes: 0,
        parameters_per_rank: 48,
        sites: vec![site(1), site(2)],
    }
}
