mod class;
mod told;
mod wire;

pub use class::Class;

use crate::config::Mistakes;
use crate::ledger::{BytesKind, Shortage};
use crate::quota::Excess;
use crate::session::SessionId;
use crate::tls::TlsError;
use offshoot_adapters::AdapterError;
use offshoot_model::ModelError;
use offshoot_proto::TensorError;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// Everything that can go wrong in the server. Each variant has a [`Class`], which decides the gRPC
/// status and the code of a `FrameError`, and a stable label for metrics.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    // Starting.
    #[error("{0}")]
    Config(Mistakes),
    #[error("cannot listen on {address}: {source}; is another server running there?")]
    Bind { address: String, source: io::Error },
    #[error("thread {name} could not be started: {source}")]
    Thread { name: &'static str, source: io::Error },
    #[error(
        "device \"{device}\" is not available: {cause}; use device \"cpu\" or a libtorch with CUDA"
    )]
    Device { device: String, cause: &'static str },
    #[error(
        "the trunk's weights take {weights} bytes, but limits.memory_bytes allows {budget}; allow \
         more, hold fewer layers, or compute in a narrower dtype"
    )]
    TrunkTooLarge { weights: u64, budget: u64 },
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error("gRPC server on {address}: {source}")]
    Transport { address: SocketAddr, source: tonic::transport::Error },
    #[error("gRPC reflection: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(transparent)]
    Adapter(#[from] AdapterError),

    // The store.
    #[error(
        "the store in {path} is in use by another process; give each server its own store directory"
    )]
    StoreLocked { path: PathBuf },
    #[error(
        "the store in {path} was in use by another process for {seconds} s (store.wait_seconds); did the \
         server before this one not end? Its log says what it waits for"
    )]
    StoreWait { path: PathBuf, seconds: f64 },
    #[error(
        "the store in {path} has format version {found}, this server reads version {expected}; use \
         the server version that wrote it, or another store directory"
    )]
    StoreVersion { path: PathBuf, found: String, expected: u32 },
    #[error("store file {path}: {source}")]
    StoreFile { path: PathBuf, source: io::Error },
    #[error(
        "store records in {path}: {cause}; if this stays, bring the folder back from a copy, or move it \
         away to begin with an empty store"
    )]
    StoreRecords { path: PathBuf, cause: String },
    #[error("snapshot {snapshot} of session {session} is damaged: {cause}. {}", go_back_to(whole))]
    SnapshotDamaged {
        session: SessionId,
        snapshot: String,
        cause: String,
        /// The newest one that is whole, if there is any.
        whole: Option<String>,
    },
    #[error(
        "session {session} stood behind a snapshot that is damaged; it goes on from {snapshot}, at \
         step {step}: reconnect and go back to there"
    )]
    SetBack { session: SessionId, snapshot: String, step: u64 },
    #[error(
        "the record of session {session} did not fit its checksum when the server started. It is kept in \
         {path}, its snapshots in {blobs}; bring the store back from a copy, or begin a new session from the newest checkpoint's \
         or export's adapter"
    )]
    RecordDamaged { session: SessionId, path: PathBuf, blobs: PathBuf },
    #[error(
        "{n_bytes} bytes could not be written to {path}: {source}. Nothing is lost and nothing was \
         changed: sessions stay as they are, in memory and in their last snapshots. {}; try again in {} s",
        make_room(source), retry_after.as_secs_f64()
    )]
    DiskFull { path: PathBuf, n_bytes: u64, source: io::Error, retry_after: Duration },
    #[error(
        "the store in {path} cannot be opened: {source}. Nothing in it is lost. {} until {} MiB are free \
         on the disk of that folder, and start again; never by deleting files in it, except those in its \
         folder damaged/",
        make_room(source), n_bytes >> 20
    )]
    StoreNoRoom { path: PathBuf, n_bytes: u64, source: io::Error },

    // Who gets in.
    #[error("tenants file {path}: {cause}")]
    TenantsFile { path: PathBuf, cause: String },
    #[error("audit log {path}: {source}")]
    AuditLog { path: PathBuf, source: io::Error },
    #[error(
        "metering log {path}: {source}. Its folder has to be there, and writable for the server's user"
    )]
    MeteringLog { path: PathBuf, source: io::Error },
    #[error("metrics cannot be collected: {cause}")]
    Telemetry { cause: String },
    #[error(
        "this server wants a token that is valid (\"authorization: Bearer TOKEN\" in the call's metadata)"
    )]
    Unauthenticated,

    // A request.
    #[error(transparent)]
    Tensor(#[from] TensorError),
    #[error("{field} is missing")]
    Missing { field: &'static str },
    #[error("{field} is {found}, expected {expected}")]
    Setting { field: &'static str, found: String, expected: String },
    #[error("{field} has shape {found:?}, expected {expected}")]
    Shape { field: &'static str, found: Vec<usize>, expected: String },
    #[error(
        "{field} came in {found}, but this session was opened with wire dtype {expected}; open a \
         new session to change it"
    )]
    WireDType { field: &'static str, found: &'static str, expected: &'static str },
    #[error("seq_lens add up to {sum} tokens, but hidden has {n_tokens} rows")]
    SequenceLengths { sum: u64, n_tokens: usize },
    #[error("sequence {index} of seq_lens has length 0; leave empty sequences out")]
    EmptySequence { index: usize },
    #[error("position_ids has {found} entries, expected none or one for each of {n_tokens} tokens")]
    PositionIds { found: usize, n_tokens: usize },
    #[error(
        "a microbatch of {found} tokens is over the limit of {limit}; split it into smaller ones"
    )]
    TooManyTokens { found: usize, limit: usize },
    #[error(
        "{field} has a value that is not finite at index {index}; the client's numbers overflowed"
    )]
    NotFinite { field: &'static str, index: usize },
    #[error(
        "the trunk's {what} is not finite, nothing was changed; lower the learning rate or compute \
         in a wider dtype"
    )]
    Overflow { what: &'static str },
    #[error(
        "the base models differ: this server holds {server_model} with fingerprint {server}, the \
         client has {client}; load the same checkpoint on both sides"
    )]
    Fingerprint { server_model: String, server: String, client: String },
    #[error(
        "the split points differ: this server holds layers {server:?}, the client asked for \
         {client:?}; start the client with the server's split points"
    )]
    Split { server: std::ops::Range<usize>, client: std::ops::Range<usize> },
    #[error(
        "snapshot {snapshot} of session {session} does not fit this server: its {what} is {theirs}, \
         the server's is {ours}"
    )]
    SnapshotMismatch {
        session: SessionId,
        snapshot: String,
        what: &'static str,
        theirs: String,
        ours: String,
    },

    // Order.
    #[error(
        "the first frame of a stream must be Hello with sequence 0, and only the first; {found} came"
    )]
    Hello { found: String },
    #[error("no Hello came within {seconds} s")]
    HelloTimeout { seconds: u64 },
    #[error(
        "frame {found} came where {expected} was expected; an earlier frame was refused or is \
         missing, send again from {expected}"
    )]
    Gap { found: u64, expected: u64 },
    #[error(
        "frame {sequence} came before with another payload; a number may be repeated only unchanged"
    )]
    Payload { sequence: u64 },
    #[error(
        "frame {sequence} was applied and its answer is forgotten; the last applied frame is {applied}"
    )]
    Forgotten { sequence: u64, applied: u64 },
    #[error("answers up to {found} were acknowledged, but only {applied} frames were applied")]
    Acknowledged { found: u64, applied: u64 },
    #[error(
        "the session stands after frame {server}, the client after frame {client}; wait for the \
         answers of all frames that were sent, then ask again"
    )]
    Point { server: u64, client: u64 },
    #[error(
        "microbatch {microbatch} has no tape: it was never opened, is used already, or was dropped \
         while the client was away; run its Forward again under a new frame"
    )]
    NoTape { microbatch: u64 },
    #[error(
        "microbatch {microbatch} is open already; choose a new number for every training Forward"
    )]
    OpenTape { microbatch: u64 },
    #[error(
        "Step while microbatch {microbatch} is open: its Backward would meet other weights than its \
         Forward did; send the Backward first"
    )]
    StepWithOpen { microbatch: u64 },

    #[error(
        "cache {cache} holds nothing: it was never begun, or was dropped by a Step, for want of room, or \
         when the session left the device or the server started again; begin again with start = 0 and \
         all tokens of the sequence"
    )]
    NoCache { cache: u64 },
    #[error(
        "cache {cache} holds {held} tokens, fewer than the {start} behind which these were to stand; go \
         on from there, or begin again with start = 0 and all tokens of the sequence"
    )]
    CacheStart { cache: u64, start: u64, held: u64 },

    // Limits.
    #[error("{limit} frames are in flight already, the limit; wait for an answer")]
    InFlight { limit: usize },
    #[error("{limit} microbatches are open already, the limit; send a Backward first")]
    OpenMicrobatches { limit: usize },
    #[error("{limit} caches are open already, the limit; drop one whose sequence is at its end")]
    OpenCaches { limit: usize },
    #[error(
        "the sequence would have {found} tokens, over the limit of {limit} for a cache, which is \
         limits.max_cache_tokens or what the model was made for; shorten the prompt or generate less"
    )]
    CacheTokens { found: u64, limit: usize },
    #[error("{0}")]
    Quota(Excess),
    #[error("{limit} large requests are coming in already, the limit; try again later")]
    LargeRequests { limit: usize },
    #[error(
        "the request came too slowly, {bytes} bytes so far; is the connection that slow? Send it again"
    )]
    SlowRequest { bytes: usize },
    #[error("{limit} jobs are waiting for the device, the limit; try again later")]
    QueueFull { limit: usize },
    #[error(
        "{limit} sessions are live already, the limit; close one that is done, or try again later"
    )]
    LiveSessions { limit: usize },
    #[error(
        "{limit} sessions are waiting for room on the device already, the limit; try again later"
    )]
    WaitingForRoom { limit: usize },
    #[error("no room on the device: {shortage}, the limit; {}", try_again(shortage.kind, *.retry_after))]
    NoRoom { shortage: Shortage, retry_after: Option<Duration> },

    #[error("the server is full; try again in {} s", retry_after.as_secs_f64())]
    Full { retry_after: Duration },
    #[error(
        "this never fits on the server: take a lower rank, fewer targets or shorter sequences, or a \
         server with more"
    )]
    NeverFits,

    // Life and death of a session.
    #[error("session {0} is not known here; it was forgotten, or it lives on another server")]
    UnknownSession(String),
    #[error("session {session} has no snapshot \"{snapshot}\"; it has {known}")]
    UnknownSnapshot { session: SessionId, snapshot: String, known: String },
    #[error(
        "snapshot {snapshot} is the one that session {session} goes on from; take a newer one first, or \
         delete the session"
    )]
    HeadSnapshot { session: SessionId, snapshot: String },
    #[error(
        "session {session} has an open microbatch and had one for {seconds} s, so that it stays on the \
         device: its client may be gone in the middle of a step. Try again, or wait for its lease to end"
    )]
    StaysBusy { session: SessionId, seconds: u64 },
    #[error("session {session} is pinned to the device; unpin it first")]
    Pinned { session: SessionId },
    #[error(
        "session {session} is parked, and a pin lasts only while a session is live; its client has to come \
         back first"
    )]
    PinParked { session: SessionId },
    #[error(
        "with this session pinned ones would take {value} bytes of the device, at most {limit} are {share}; \
         unpin another, or let this one come and go by itself: nothing of it is lost by that"
    )]
    PinRoom { value: u64, limit: u64, share: &'static str },
    #[error(
        "no more sessions can be pinned now; let this one come and go by itself: nothing of it is lost by \
         that"
    )]
    PinFull,
    #[error("another stream attached to this session; this one ends")]
    TakenOver,
    #[error("the server is draining and makes its sessions durable; reconnect and go on")]
    Draining { retry_after: Duration },
    #[error(
        "the server's engine failed and is starting again; what is not in a session's last snapshot is \
         lost there: reconnect, and go on from that snapshot"
    )]
    EngineDown { retry_after: Duration },
    #[error(
        "another client has taken this session over: it closed it, or set it back to a snapshot; this \
         stream ends"
    )]
    Ended,
    #[error("the session is in use again")]
    Busy,

    // Our fault.
    #[error("the {job} failed inside the server, nothing was changed: {panic}")]
    Panic { job: &'static str, panic: String },
    #[error(
        "the device ran out of memory in this {job}, also alone; nothing was changed by it. Send \
         fewer tokens, or ask the operator for a lower limits.memory_bytes than the device has"
    )]
    OutOfMemory { job: &'static str },
    #[error(
        "an earlier failure left this session's adapter in an unknown state; restore it to a snapshot"
    )]
    Poisoned,
    #[error("the server's {part} is gone")]
    Gone { part: &'static str },
    #[error(
        "the model's files have changed: the trunk that was loaded had fingerprint {was}, now it is \
         {found}; put the old files back, or start the server anew to serve the new ones"
    )]
    TrunkChanged { was: String, found: String },
    #[error(
        "the engine failed {n_times} times within {minutes} minutes, last with: {cause}. The server ends; \
         every session is at its last snapshot. If it happens again after a start, look at the device \
         and its driver"
    )]
    EngineLost { n_times: usize, minutes: u64, cause: String },
    #[error("the server stopped listening: {cause}")]
    Deaf { cause: String },
}

/// When a full disk is tried again.
pub(crate) const DISK_RETRY: Duration = Duration::from_secs(10);

fn go_back_to(whole: &Option<String>) -> String {
    match whole {
        Some(whole) => format!(
            "The damaged file is kept in the store's folder damaged/. {whole} is whole: restore that"
        ),
        None => {
            "No other snapshot of this session is whole, so that its files stay where they are: \
                 bring the store back from a copy"
                .into()
        }
    }
}

/// A disk, a quota and a limit of files fill up.
fn make_room(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::QuotaExceeded => {
            "Make room there, or raise the disk quota of the server's user"
        }
        io::ErrorKind::FileTooLarge => {
            "Make room there, or raise the limit of its files (ulimit -f)"
        }
        _ => "Make room there",
    }
}

fn try_again(kind: BytesKind, retry_after: Option<Duration>) -> String {
    match retry_after {
        Some(after) => format!("try again in {} s", after.as_secs_f64()),
        None if kind == BytesKind::Caches => {
            "it never fits: take a shorter sequence or fewer at a time, or a server with more"
                .into()
        }
        None => "it never fits: take a lower rank or fewer targets, or a server with more".into(),
    }
}

impl Error {
    /// The engine does not run; it does again soon.
    pub fn engine_down() -> Error {
        Error::EngineDown { retry_after: Duration::from_secs(1) }
    }

    /// The quota that it is over.
    pub fn excess(&self) -> Option<&Excess> {
        match self {
            Error::Quota(excess) => Some(excess),
            _ => None,
        }
    }
}

impl From<Excess> for Error {
    fn from(excess: Excess) -> Self {
        Error::Quota(excess)
    }
}
