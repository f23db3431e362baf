use crate::ClientError;
use offshoot_proto::{HostTensor, WireDType, v1};
use std::time::Duration;

pub use v1::{
    AdamWConfig, ErrorCode, Limits, LoraConfig, MemoryReport, QuotaViolation, Residency,
    SessionState, SnapshotInfo, WireError,
};

/// PyTorch's defaults for AdamW.
pub const ADAMW_DEFAULTS: AdamWConfig =
    AdamWConfig { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 };

/// Names a session on its server; survives restarts of both sides.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionId(String);

impl SessionId {
    /// As the server wrote it.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl<T: Into<String>> From<T> for SessionId {
    fn from(id: T) -> Self {
        SessionId(id.into())
    }
}

impl std::fmt::Display for SessionId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a server holds.
#[derive(Debug, Clone, PartialEq)]
pub struct ServerDescription {
    /// What the operator named: a path's last part or a hub name.
    pub model_name: String,
    /// "gpt2", "llama", "qwen2", "qwen3" or "gemma".
    pub model_type: String,
    /// Hex hash of the base model's configuration and weights.
    pub fingerprint: String,
    /// Layers of the whole model.
    pub n_layers: u32,
    /// First layer of the trunk.
    pub split_point_1: u32,
    /// First layer behind the trunk.
    pub split_point_2: u32,
    /// H.
    pub hidden_size: usize,
    /// dtype of the trunk's weights and products: "f32", "bf16" or "f16".
    pub compute_dtype: String,
    /// "cpu", "cuda:0", ...
    pub device: String,
    /// dtypes for hidden states that both this client and the server speak.
    pub wire_dtypes: Vec<WireDType>,
    /// What one session may ask for.
    pub limits: Limits,
    /// Version of the server program.
    pub server_version: String,
    /// Linear layers of a trunk block that can carry LoRA.
    pub lora_modules: Vec<String>,
    /// Targets that the server takes when a session names none.
    pub default_target_modules: Vec<String>,
    /// Bytes, at the time of the call.
    pub memory: MemoryReport,
}

impl ServerDescription {
    pub(crate) fn from_proto(d: v1::DescribeResponse) -> Result<Self, ClientError> {
        let limits = d.limits.ok_or_else(|| missing("Describe", "limits"))?;
        Ok(ServerDescription {
            model_name: d.model_name,
            model_type: d.model_type,
            fingerprint: d.fingerprint,
            n_layers: d.n_layers,
            split_point_1: d.split_point_1,
            split_point_2: d.split_point_2,
            hidden_size: d.hidden_size as usize,
            compute_dtype: d.compute_dtype,
            device: d.device,
            // A newer server may speak more than this client.
            wire_dtypes: d
                .wire_dtypes
                .into_iter()
                .filter_map(|n| WireDType::from_proto(n).ok())
                .collect(),
            limits,
            server_version: d.server_version,
            lora_modules: d.lora_modules,
            default_target_modules: d.default_target_modules,
            memory: d.memory.unwrap_or_default(),
        })
    }
}

/// What a new session is to be.
#[derive(Debug, Clone, PartialEq)]
pub struct OpenSession {
    /// For people: shown in lists and logs. May be empty.
    pub name: String,
    /// What the client's own layers were built from; the server refuses another model's.
    pub fingerprint: String,
    /// First layer of the trunk, as the client has cut it.
    pub split_point_1: u32,
    /// First layer behind the trunk, as the client has cut it.
    pub split_point_2: u32,
    /// The adapter.
    pub lora: LoraConfig,
    /// The optimizer; [`ADAMW_DEFAULTS`] are PyTorch's.
    pub adamw: AdamWConfig,
    /// Seeds adapter initialisation and dropout.
    pub seed: u64,
    /// dtype of hidden states and gradients on the stream, both ways.
    pub wire_dtype: WireDType,
    /// Initial values, float32, under PEFT's names. Empty: PEFT's initialisation.
    pub initial_adapter: Vec<(String, HostTensor)>,
}

impl OpenSession {
    pub(crate) fn into_proto(self) -> v1::OpenSessionRequest {
        v1::OpenSessionRequest {
            name: self.name,
            fingerprint: self.fingerprint,
            split_point_1: self.split_point_1,
            split_point_2: self.split_point_2,
            lora: Some(self.lora),
            adamw: Some(self.adamw),
            seed: self.seed,
            wire_dtype: self.wire_dtype.to_proto() as i32,
            initial_adapter: self
                .initial_adapter
                .into_iter()
                .map(|(name, t)| v1::NamedTensor { name, tensor: Some(t.into_proto()) })
                .collect(),
        }
    }
}

/// What came back with a restored session.
#[derive(Debug, Clone, PartialEq)]
pub struct Restored {
    /// Where the session stands now.
    pub snapshot: SnapshotInfo,
    /// The adapter's settings.
    pub lora: LoraConfig,
    /// dtype of hidden states and gradients on the stream.
    pub wire_dtype: WireDType,
    /// Trainable numbers in the trunk.
    pub adapter_parameters: u64,
    /// Adapter, gradient and optimizer bytes on the device.
    pub adapter_bytes: u64,
}

/// A session in [`Client::list_sessions`](crate::Client::list_sessions).
#[derive(Debug, Clone, PartialEq)]
pub struct SessionInfo {
    /// Its id.
    pub id: SessionId,
    /// As given when it was opened.
    pub name: String,
    /// Attached, detached or parked.
    pub state: SessionState,
    /// Optimizer steps taken.
    pub step: u64,
    /// The last frame applied.
    pub last_applied: u64,
    /// The adapter's settings.
    pub lora: LoraConfig,
    /// Where its adapter is. One that is not on the device comes back with its next frame.
    pub residency: Residency,
    /// Adapter, gradient and optimizer bytes in that memory; 0 on disk.
    pub adapter_bytes: u64,
    /// Bytes of its open microbatches.
    pub tape_bytes: u64,
    /// Bytes of its key/value caches.
    pub cache_bytes: u64,
    /// What it can be restored to.
    pub snapshots: Vec<SnapshotInfo>,
    /// Relative error of what the server has sent, by rounding to the wire dtype; none for parked
    /// sessions. For what this side has sent see
    /// [`Session::wire_error`](crate::Session::wire_error).
    pub wire_error: Option<WireError>,
}

impl SessionInfo {
    pub(crate) fn from_proto(s: v1::SessionInfo) -> Self {
        SessionInfo {
            state: s.state(),
            residency: s.residency(),
            id: SessionId(s.session_id),
            name: s.name,
            step: s.step,
            last_applied: s.last_applied,
            lora: s.lora.unwrap_or_default(),
            adapter_bytes: s.adapter_bytes,
            tape_bytes: s.tape_bytes,
            cache_bytes: s.cache_bytes,
            snapshots: s.snapshots,
            wire_error: s.wire_error,
        }
    }
}

/// A session's adapter, as float32 tensors under PEFT's names for the whole model.
#[derive(Debug, Clone, PartialEq)]
pub struct ExportedAdapter {
    /// The adapter's settings.
    pub lora: LoraConfig,
    /// PEFT name and value.
    pub tensors: Vec<(String, HostTensor)>,
    /// Accumulated gradients under the same names; empty unless asked for.
    pub gradients: Vec<(String, HostTensor)>,
    /// Optimizer steps taken.
    pub step: u64,
}

impl ExportedAdapter {
    pub(crate) fn from_proto(e: v1::ExportAdapterResponse) -> Result<Self, ClientError> {
        let checked = |tensors: Vec<v1::NamedTensor>| {
            let wrong = |source| ClientError::Tensor { call: "ExportAdapter", source };
            let named =
                |t: v1::NamedTensor| Ok((t.name, HostTensor::from_proto(t.tensor).map_err(wrong)?));
            tensors.into_iter().map(named).collect::<Result<_, ClientError>>()
        };
        Ok(ExportedAdapter {
            lora: e.lora.ok_or_else(|| missing("ExportAdapter", "lora"))?,
            tensors: checked(e.tensors)?,
            gradients: checked(e.gradients)?,
            step: e.step,
        })
    }
}

/// Where the time of one frame went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FrameReport {
    /// From handing the frame to the stream to its answer, retries included.
    pub round_trip: Duration,
    /// Waiting for the device, on the server.
    pub queue: Duration,
    /// Running, on the server.
    pub execute: Duration,
    /// Frames of any sessions that ran together on the server, this one included.
    pub batch_jobs: u32,
    /// Packed tokens of those frames.
    pub batch_tokens: u32,
    /// What the open microbatch holds on the device until its backward; 0 for other frames.
    pub tape_bytes: u64,
    /// What the cache that was extended holds on the device; 0 for other frames.
    pub cache_bytes: u64,
    /// How often the server was too full for the frame and asked to send it again later.
    pub retries: u32,
}

impl FrameReport {
    pub(crate) fn new(round_trip: Duration, timing: Option<v1::Timing>, tape_bytes: u64) -> Self {
        let timing = timing.unwrap_or_default();
        FrameReport {
            round_trip,
            queue: Duration::from_micros(timing.queue_micros),
            execute: Duration::from_micros(timing.execute_micros),
            batch_jobs: timing.batch_jobs,
            batch_tokens: timing.batch_tokens,
            tape_bytes,
            cache_bytes: 0,
            retries: 0,
        }
    }

    /// What neither queue nor device explain: network, encoding, waiting for the stream.
    pub fn wire(&self) -> Duration {
        self.round_trip.saturating_sub(self.queue + self.execute)
    }
}

pub(crate) fn missing(call: &'static str, field: &'static str) -> ClientError {
    ClientError::Protocol { what: format!("{call}'s answer has no {field}") }
}
