//! What each error means to a client, and to who counts them: its class, its stable label, and when
//! trying again may help.

use super::Error;
use std::time::Duration;

/// What an error means to a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// The request is wrong and will stay wrong.
    Invalid,
    /// The request does not fit this server's model.
    Mismatch,
    Sequence,
    Microbatch,
    /// The cache is gone: the client begins the sequence again.
    Cache,
    /// The session does not stand in such a way that this can be done to it.
    Precondition,
    Exhausted,
    Draining,
    NotFound,
    TakenOver,
    /// Without a valid token.
    Unauthenticated,
    /// What was stored is damaged.
    DataLoss,
    /// The request was fine.
    Internal,
}

/// The session can be had again at once.
const SET_BACK_RETRY: Duration = Duration::from_millis(100);

impl Error {
    /// The class of each error; a new variant must choose.
    pub fn class(&self) -> Class {
        use Error::*;
        match self {
            Config(_) | Bind { .. } | Thread { .. } | Device { .. } | Transport { .. } => {
                Class::Internal
            }
            TrunkTooLarge { .. } | TenantsFile { .. } | AuditLog { .. } | Tls(_) => Class::Internal,
            MeteringLog { .. } | Telemetry { .. } => Class::Internal,
            Unauthenticated => Class::Unauthenticated,
            Reflection(_) | Gone { .. } | Panic { .. } | Poisoned | Busy => Class::Internal,
            TrunkChanged { .. } | EngineLost { .. } | Deaf { .. } => Class::Internal,
            StoreLocked { .. } | StoreWait { .. } => Class::Internal,
            StoreVersion { .. } | StoreFile { .. } => Class::Internal,
            StoreRecords { .. } | StoreNoRoom { .. } => Class::Internal,
            SnapshotDamaged { .. } | RecordDamaged { .. } => Class::DataLoss,
            SetBack { .. } => Class::Draining,
            DiskFull { .. } => Class::Exhausted,
            Model(_) | Adapter(_) | Tensor(_) | Missing { .. } | Setting { .. } => Class::Invalid,
            Shape { .. } | WireDType { .. } | SequenceLengths { .. } => Class::Invalid,
            EmptySequence { .. } | PositionIds { .. } | TooManyTokens { .. } => Class::Invalid,
            NotFinite { .. } | Overflow { .. } => Class::Invalid,
            Hello { .. } | HelloTimeout { .. } => Class::Invalid,
            Fingerprint { .. } | Split { .. } | SnapshotMismatch { .. } => Class::Mismatch,
            Gap { .. } | Payload { .. } | Forgotten { .. } => Class::Sequence,
            Acknowledged { .. } | Point { .. } => Class::Sequence,
            NoTape { .. } | OpenTape { .. } | StepWithOpen { .. } => Class::Microbatch,
            NoCache { .. } | CacheStart { .. } => Class::Cache,
            CacheTokens { .. } => Class::Invalid,
            HeadSnapshot { .. } | StaysBusy { .. } => Class::Precondition,
            Pinned { .. } | PinParked { .. } => Class::Precondition,
            PinRoom { .. } | PinFull => Class::Exhausted,
            OpenCaches { .. } => Class::Exhausted,
            InFlight { .. } | OpenMicrobatches { .. } | QueueFull { .. } => Class::Exhausted,
            LargeRequests { .. } | SlowRequest { .. } => Class::Exhausted,
            Quota(_) => Class::Exhausted,
            WaitingForRoom { .. } | Full { .. } | NeverFits => Class::Exhausted,
            NoRoom { .. } | LiveSessions { .. } | OutOfMemory { .. } => Class::Exhausted,
            UnknownSession(_) | UnknownSnapshot { .. } | Ended => Class::NotFound,
            TakenOver => Class::TakenOver,
            Draining { .. } | EngineDown { .. } => Class::Draining,
        }
    }

    /// Stable name of the variant, for metrics.
    pub fn label(&self) -> &'static str {
        use Error::*;
        match self {
            Config(_) => "config",
            Bind { .. } => "bind",
            Thread { .. } => "thread",
            Device { .. } => "device",
            Tls(_) => "tls",
            Transport { .. } => "transport",
            TrunkTooLarge { .. } => "trunk_too_large",
            Reflection(_) => "reflection",
            Model(_) => "model",
            Adapter(_) => "adapter",
            StoreLocked { .. } => "store_locked",
            StoreWait { .. } => "store_wait",
            StoreVersion { .. } => "store_version",
            StoreFile { .. } => "store_file",
            StoreRecords { .. } => "store_records",
            SnapshotDamaged { .. } => "snapshot_damaged",
            RecordDamaged { .. } => "record_damaged",
            SetBack { .. } => "set_back",
            DiskFull { .. } => "disk_full",
            StoreNoRoom { .. } => "store_no_room",
            TenantsFile { .. } => "tenants_file",
            AuditLog { .. } => "audit_log",
            MeteringLog { .. } => "metering_log",
            Telemetry { .. } => "telemetry",
            Unauthenticated => "unauthenticated",
            Tensor(_) => "tensor",
            Missing { .. } => "missing",
            Setting { .. } => "setting",
            Shape { .. } => "shape",
            WireDType { .. } => "wire_dtype",
            SequenceLengths { .. } => "sequence_lengths",
            EmptySequence { .. } => "empty_sequence",
            PositionIds { .. } => "position_ids",
            TooManyTokens { .. } => "too_many_tokens",
            NotFinite { .. } => "not_finite",
            Overflow { .. } => "overflow",
            Fingerprint { .. } => "fingerprint",
            Split { .. } => "split",
            SnapshotMismatch { .. } => "snapshot_mismatch",
            Hello { .. } => "hello",
            HelloTimeout { .. } => "hello_timeout",
            Gap { .. } => "gap",
            Payload { .. } => "payload",
            Forgotten { .. } => "forgotten",
            Acknowledged { .. } => "acknowledged",
            Point { .. } => "point",
            NoTape { .. } => "no_tape",
            OpenTape { .. } => "open_tape",
            StepWithOpen { .. } => "step_with_open",
            NoCache { .. } => "no_cache",
            CacheStart { .. } => "cache_start",
            CacheTokens { .. } => "cache_tokens",
            OpenCaches { .. } => "open_caches",
            InFlight { .. } => "in_flight",
            OpenMicrobatches { .. } => "open_microbatches",
            Quota(excess) => excess.quota.name(),
            LargeRequests { .. } => "large_requests",
            SlowRequest { .. } => "slow_request",
            QueueFull { .. } => "queue_full",
            Full { .. } => "full",
            NeverFits => "never_fits",
            WaitingForRoom { .. } => "waiting_for_room",
            NoRoom { .. } => "no_room",
            LiveSessions { .. } => "live_sessions",
            UnknownSession(_) => "unknown_session",
            UnknownSnapshot { .. } => "unknown_snapshot",
            HeadSnapshot { .. } => "head_snapshot",
            StaysBusy { .. } => "stays_busy",
            Pinned { .. } => "pinned",
            PinParked { .. } => "pin_parked",
            PinRoom { .. } => "pin_room",
            PinFull => "pin_full",
            TakenOver => "taken_over",
            Draining { .. } => "draining",
            EngineDown { .. } => "engine_down",
            Ended => "ended",
            Busy => "busy",
            Panic { .. } => "panic",
            OutOfMemory { .. } => "out_of_memory",
            Poisoned => "poisoned",
            Gone { .. } => "gone",
            TrunkChanged { .. } => "trunk_changed",
            EngineLost { .. } => "engine_lost",
            Deaf { .. } => "deaf",
        }
    }

    /// When trying again may help.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Error::Draining { retry_after } | Error::EngineDown { retry_after } => {
                Some(*retry_after)
            }
            Error::DiskFull { retry_after, .. } => Some(*retry_after),
            Error::SetBack { .. } => Some(SET_BACK_RETRY),
            Error::NoRoom { retry_after, .. } => *retry_after,
            Error::Full { retry_after } => Some(*retry_after),
            Error::LiveSessions { .. } | Error::WaitingForRoom { .. } => {
                Some(Duration::from_secs(5))
            }
            Error::Quota(excess) => excess.retry_after,
            Error::LargeRequests { .. } => Some(Duration::from_secs(1)),
            Error::SlowRequest { .. } => Some(Duration::from_secs(1)),
            Error::InFlight { .. } | Error::QueueFull { .. } | Error::Busy => {
                Some(Duration::from_millis(100))
            }
            _ => None,
        }
    }
}
