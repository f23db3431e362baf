mod telemetry;
mod validate;

pub use telemetry::{OtlpProtocol, TelemetryConfig};
pub use validate::{Mistake, Mistakes};

use crate::access::AccessConfig;
use crate::build_info::Build;
use crate::http::HttpConfig;
use crate::session::SnapshotEvery;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::time::Duration;

/// Everything an operator can choose. Each part is moved into its owner at start.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ServerConfig {
    pub listen: ListenConfig,
    pub http: HttpConfig,
    pub tls: TlsConfig,
    pub access: AccessConfig,
    pub model: TrunkConfig,
    pub limits: LimitsConfig,
    pub session: SessionConfig,
    pub store: StoreConfig,
    pub drain: DrainConfig,
    pub telemetry: TelemetryConfig,
    /// Nothing to choose: which program starts the server.
    #[serde(skip)]
    pub build: Build,
}

/// Where clients connect.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ListenConfig {
    /// An IP address, or `localhost`.
    pub host: String,
    /// 0: a free one.
    pub port: u16,
    /// True allows a host other than loopback without both a tenants file and TLS: whoever reaches
    /// the server could do everything, or read tokens on their way. It says that the network around
    /// it keeps strangers out.
    pub allow_insecure_network: bool,
}

impl Default for ListenConfig {
    fn default() -> Self {
        ListenConfig { host: "127.0.0.1".into(), port: 50051, allow_insecure_network: false }
    }
}

/// TLS from PEM files, which are read again when they change.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TlsConfig {
    /// The server's certificate, those of its issuers behind it. With [`TlsConfig::key`]: TLS is on.
    pub cert: Option<PathBuf>,
    /// Its private key.
    pub key: Option<PathBuf>,
    /// Mutual TLS: who connects must show a certificate of one of these issuers.
    pub client_ca: Option<PathBuf>,
}

impl TlsConfig {
    /// Whether connections are encrypted.
    pub fn is_on(&self) -> bool {
        self.cert.is_some()
    }
}

/// What the server holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrunkConfig {
    /// A Hugging Face directory, a GGUF file, or a hub name. Required.
    pub name: String,
    /// The trunk is the layers `[split_point_1, split_point_2)`.
    pub split_point_1: usize,
    /// Required.
    pub split_point_2: usize,
    /// `cpu`, `cuda` or `cuda:N`.
    pub device: String,
    pub dtype: ComputeDType,
    /// Threads of one product on the CPU; none: libtorch's choice.
    pub n_threads: Option<u16>,
    /// How the LoRA of several sessions in one batch is computed.
    pub lora_batching: LoraBatching,
}

/// How the LoRA of several sessions in one batch is computed; the results agree up to rounding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LoraBatching {
    /// Whichever is expected to be quicker for the shapes of the batch.
    #[default]
    Auto,
    /// All adapters stacked, in a few products for everybody.
    Stacked,
    /// Session by session.
    Loop,
}

impl Default for TrunkConfig {
    fn default() -> Self {
        TrunkConfig {
            name: String::new(),
            split_point_1: 0,
            split_point_2: 0,
            device: "cpu".into(),
            dtype: ComputeDType::F32,
            n_threads: None,
            lora_batching: LoraBatching::Auto,
        }
    }
}

/// dtype of the trunk's weights and products. Adapters and optimizers are always float32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ComputeDType {
    F32,
    Bf16,
    F16,
}

impl ComputeDType {
    /// As the protocol names it.
    pub fn name(self) -> &'static str {
        match self {
            ComputeDType::F32 => "f32",
            ComputeDType::Bf16 => "bf16",
            ComputeDType::F16 => "f16",
        }
    }
}

/// What clients may ask for, one by one and all together.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LimitsConfig {
    pub max_tokens_per_microbatch: usize,
    /// Frames sent and not answered; as many answers are recorded.
    pub max_frames_in_flight: usize,
    pub max_open_microbatches: usize,
    /// Key/value caches of one session: sequences that it generates at a time.
    pub max_open_caches: usize,
    /// Tokens of one cache, those of the prompt included; at most what the model was made for.
    pub max_cache_tokens: usize,
    pub max_rank: usize,
    /// Frames of all sessions that wait for the device.
    pub max_queued_jobs: usize,
    /// Tokens that one batch may hold.
    pub max_tokens_per_batch: usize,
    /// How long a job may be kept waiting for others to share its batch. 0: whatever waits when the
    /// device is free runs at once, which is best for everybody's latency.
    pub batch_wait_seconds: f64,
    /// What weights, adapters, tapes, caches and workspace may take of the device together, as a number or
    /// as "8GiB". None: on the CPU 0.8 of what is available when the server starts, within its
    /// container's limit; on other devices no limit.
    #[serde(with = "byte_size")]
    pub memory_bytes: Option<u64>,
    /// What idle sessions that left an accelerator may take of the host's memory; behind it they go
    /// to disk. On the CPU it is the same memory, so they go to disk at once. None: half of what is
    /// available when the server starts.
    #[serde(with = "byte_size")]
    pub host_memory_bytes: Option<u64>,
    /// How long a session waits for room on the device before it is refused.
    pub admission_wait_seconds: f64,
    /// Sessions that clients have open or may come back to within their leases, wherever their
    /// adapters are.
    pub max_live_sessions: usize,
    /// Connections at a time. The one that has been idle for longest makes room for a new one.
    pub max_connections: usize,
}

impl LimitsConfig {
    /// How long a job waits for company.
    pub fn batch_wait(&self) -> Duration {
        Duration::from_secs_f64(self.batch_wait_seconds)
    }

    /// How long a session waits for room.
    pub fn admission_wait(&self) -> Duration {
        Duration::from_secs_f64(self.admission_wait_seconds)
    }
}

/// Bytes as a number or as people write them.
mod byte_size {
    use bytesize::ByteSize;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub fn serialize<S: Serializer>(bytes: &Option<u64>, to: S) -> Result<S::Ok, S::Error> {
        bytes.serialize(to)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u64>, D::Error> {
        Ok(Option::<ByteSize>::deserialize(from)?.map(|size| size.as_u64()))
    }
}

impl Default for LimitsConfig {
    fn default() -> Self {
        LimitsConfig {
            max_tokens_per_microbatch: 8192,
            max_frames_in_flight: 4,
            max_open_microbatches: 4,
            max_open_caches: 8,
            max_cache_tokens: 8192,
            max_rank: 256,
            max_queued_jobs: 1024,
            max_tokens_per_batch: 16384,
            batch_wait_seconds: 0.0,
            memory_bytes: None,
            host_memory_bytes: None,
            admission_wait_seconds: 30.0,
            max_live_sessions: 10_000,
            max_connections: 4096,
        }
    }
}

/// How sessions live.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SessionConfig {
    /// A session without a stream for so long is snapshotted and leaves the device.
    pub lease_seconds: f64,
    /// A session without a frame for so long leaves the device, even if nobody needs its room. It
    /// comes back with its next frame.
    pub idle_seconds: f64,
    /// If more sessions train than the device holds, each keeps its place at least so long between
    /// its microbatches: coming and going costs more than a short turn is worth.
    pub turn_seconds: f64,
    /// While a session trains, the server makes it durable by itself at the first Step after so long
    /// since its last snapshot: that much work is the most that a crash costs. 0: never by time.
    pub snapshot_seconds: f64,
    /// The same at every so many Steps. 0: never by steps.
    pub snapshot_steps: u64,
    /// Threads that run session actors; they wait, decide and record, and compute nothing.
    pub n_actor_threads: usize,
}

impl SessionConfig {
    /// The lease.
    pub fn lease(&self) -> Duration {
        Duration::from_secs_f64(self.lease_seconds)
    }

    /// After what time without a frame a session leaves the device.
    pub fn idle(&self) -> Duration {
        Duration::from_secs_f64(self.idle_seconds)
    }

    /// The shortest stay of a session that others wait for.
    pub fn turn(&self) -> Duration {
        Duration::from_secs_f64(self.turn_seconds)
    }

    /// How often the server makes a session durable by itself.
    pub fn snapshot_every(&self) -> SnapshotEvery {
        let seconds = Some(self.snapshot_seconds).filter(|&seconds| seconds > 0.0);
        let time = seconds.map(Duration::from_secs_f64);
        SnapshotEvery { time, steps: Some(self.snapshot_steps).filter(|&steps| steps > 0) }
    }
}

impl Default for SessionConfig {
    fn default() -> Self {
        SessionConfig {
            lease_seconds: 300.0,
            idle_seconds: 60.0,
            turn_seconds: 1.0,
            snapshot_seconds: 60.0,
            snapshot_steps: 0,
            n_actor_threads: 2,
        }
    }
}

/// Where sessions survive.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StoreConfig {
    pub dir: PathBuf,
    /// Snapshots of one session that its client asked for; older ones are deleted, except those
    /// that the client still names, at most as many. The trainer keeps its last five checkpoints and
    /// the best one.
    pub snapshots_kept: usize,
    /// Snapshots of one session that the server took by itself: while it trained, or when it left
    /// the device. The last so many stay.
    pub server_snapshots_kept: usize,
    /// How long a start waits for another server to leave the store, with the trunk loaded and
    /// before it listens. 0: not at all, a store that is in use is an error.
    pub wait_seconds: f64,
}

impl StoreConfig {
    /// How long the store is waited for, if at all.
    pub fn wait(&self) -> Option<Duration> {
        Some(self.wait_seconds).filter(|&wait| wait > 0.0).map(Duration::from_secs_f64)
    }
}

impl Default for StoreConfig {
    fn default() -> Self {
        StoreConfig {
            dir: "offshoot-store".into(),
            snapshots_kept: 8,
            server_snapshots_kept: 2,
            wait_seconds: 0.0,
        }
    }
}

/// How the server ends.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DrainConfig {
    /// From the signal to the end, open microbatches and snapshots included.
    pub timeout_seconds: f64,
}

impl DrainConfig {
    /// The bound.
    pub fn timeout(&self) -> Duration {
        Duration::from_secs_f64(self.timeout_seconds)
    }
}

impl Default for DrainConfig {
    fn default() -> Self {
        DrainConfig { timeout_seconds: 20.0 }
    }
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
