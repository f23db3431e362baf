use crate::types::{SessionId, SnapshotInfo};
use offshoot_proto::{TensorError, v1};
use std::path::PathBuf;
use std::time::Duration;

/// Everything that can go wrong. Cheap enough to clone: a session that has ended gives the same
/// error to every later call.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ClientError {
    /// The text given to `connect` is no address.
    #[error(
        "{endpoint:?} is no server address ({reason}); expected host:port, http://host:port or \
         https://host:port, such as 127.0.0.1:50051"
    )]
    BadEndpoint {
        /// What was given.
        endpoint: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A text that no token can be.
    #[error(
        "the token cannot be used: {problem}; expected one word such as ofs_..., in the environment \
         as OFFSHOOT_TOKEN or in the file of --token-file"
    )]
    BadToken {
        /// What is wrong with it.
        problem: &'static str,
    },
    /// A token, and a way to the server on which others can read it.
    #[error(
        "the token would travel to {endpoint} in clear text, where anybody on the way can take it; \
         reach the server with TLS (https://, --tls-ca), or say --allow-insecure-token if the way is \
         safe, as through a tunnel"
    )]
    InsecureToken {
        /// The address.
        endpoint: String,
    },
    /// A file for TLS that cannot be used.
    #[error("TLS: {}: {problem}", path.display())]
    TlsFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The server is there, and TLS between it and this client does not come about.
    #[error("no secure connection to {endpoint}: {problem}")]
    Tls {
        /// The address.
        endpoint: String,
        /// What is wrong, and what to do.
        problem: String,
    },
    /// The server does not take this client: no token, one that it does not know, or one that has
    /// expired or been revoked.
    #[error(
        "{endpoint} does not let this client in: {message}{}; {}",
        named_so(request_id), token_hint(*token_sent)
    )]
    Unauthenticated {
        /// The address.
        endpoint: String,
        /// The server's text.
        message: String,
        /// Whether a token was sent at all.
        token_sent: bool,
        /// What the server's log calls this refusal.
        request_id: Option<Box<str>>,
    },
    /// Nobody answers at the address, for as long as the options allow.
    #[error(
        "no answer from {endpoint} after {attempts} attempts in {:.1} s; last error: {cause}; is \
         the server running there (offshoot serve), and is the address right?", waited.as_secs_f64()
    )]
    Unreachable {
        /// The address.
        endpoint: String,
        /// Time from the first failure to giving up.
        waited: Duration,
        /// How often it was tried.
        attempts: u32,
        /// What the last attempt died of.
        cause: String,
    },
    /// Something listens, but it is no trunk server or one of another protocol version.
    #[error(
        "{endpoint} answers, but not as an Offshoot trunk server: {cause}; is this the right port, \
         and does the server speak offshoot.v1?"
    )]
    NotATrunkServer {
        /// The address.
        endpoint: String,
        /// What came.
        cause: String,
    },
    /// The server refused a call or a frame; it changed nothing. The session goes on.
    #[error(
        "{call} was refused ({}): {message}{}{}",
        code_name(*code), of_quota(quota.as_ref(), message), named_so(request_id)
    )]
    Refused {
        /// Name of the call or frame.
        call: &'static str,
        /// The server's reason.
        code: v1::ErrorCode,
        /// The server's text.
        message: String,
        /// When trying again may help, as after a server that is full. It was tried for as long as
        /// [`Retry::max_elapsed`](crate::Retry) allows already.
        retry_after: Option<Duration>,
        /// The tenant's quota that is used up, if that is the reason.
        quota: Option<v1::QuotaViolation>,
        /// What the server's log calls this refusal: users quote it to the server's operator.
        request_id: Option<Box<str>>,
    },
    /// A snapshot, or another part of what the server has stored, is damaged.
    #[error("{call}: what the server has stored is damaged: {message}{}", named_so(request_id))]
    Damaged {
        /// Name of the call.
        call: &'static str,
        /// The server's text.
        message: String,
        /// What the server's log calls this refusal.
        request_id: Option<Box<str>>,
    },
    /// This frame was not applied because one sent before it was refused. The session goes on; send
    /// it again if it still makes sense.
    #[error(
        "{call} was not applied, because a frame sent before it was refused: {earlier}; send it \
         again if it still makes sense"
    )]
    Aborted {
        /// Name of the call or frame.
        call: &'static str,
        /// The error of the earlier frame.
        earlier: Box<ClientError>,
    },
    /// The server came back in an older state, or without activations that this session needs.
    /// The session has ended; go back to a snapshot with
    /// [`Client::restore`](crate::Client::restore) and replay from there.
    #[error(
        "the server came back without part of this session: {}; restore the snapshot of your last \
         checkpoint and replay from there ({})",
        lost(*last_applied, *answered, lost_microbatches),
        newest(snapshots.first())
    )]
    RolledBack {
        /// The last frame that the server has.
        last_applied: u64,
        /// The last frame whose answer had arrived here.
        answered: u64,
        /// Open microbatches whose activations the server no longer has.
        lost_microbatches: Vec<u64>,
        /// What the session can be restored to, the newest first.
        snapshots: Vec<SnapshotInfo>,
    },
    /// Another client attached to this session, or restored or closed it. This one has ended.
    #[error(
        "session {session} was taken over by another client: {message}{}; only one client can train \
         a session at a time",
        named_so(request_id)
    )]
    TakenOver {
        /// The session.
        session: SessionId,
        /// The server's text.
        message: String,
        /// What the server's log calls this refusal.
        request_id: Option<Box<str>>,
    },
    /// The server no longer takes this session's stream. The session has ended.
    #[error(
        "the server does not take session {session} back ({}): {message}{}",
        code_name(*code), named_so(request_id)
    )]
    NotTakenBack {
        /// The session.
        session: SessionId,
        /// The server's reason.
        code: v1::ErrorCode,
        /// The server's text.
        message: String,
        /// What the server's log calls this refusal.
        request_id: Option<Box<str>>,
    },
    /// The session was closed here, or its task ended with the tokio runtime.
    #[error("the session is closed; open or restore one to go on")]
    Closed,
    /// A frame too large for the server.
    #[error(
        "{call} has {found} bytes, the server takes {limit} ({max_tokens} tokens in one \
         microbatch); send fewer tokens at once"
    )]
    TooLarge {
        /// Name of the frame.
        call: &'static str,
        /// Bytes of its tensor.
        found: usize,
        /// Bytes that the server takes.
        limit: usize,
        /// The server's limit in tokens.
        max_tokens: u32,
    },
    /// A tensor in an answer does not fit its own shape.
    #[error("{call} brought a broken tensor: {source}")]
    Tensor {
        /// Name of the call or frame.
        call: &'static str,
        /// What is wrong with it.
        source: TensorError,
    },
    /// The server broke the protocol.
    #[error("the server broke the protocol: {what}; this is a bug, please report it")]
    Protocol {
        /// What was expected and what came.
        what: String,
    },
}

/// An id, if it is one: older servers give none.
pub(crate) fn named(request_id: String) -> Option<Box<str>> {
    Some(request_id.into_boxed_str()).filter(|id| !id.is_empty())
}

/// What a user quotes.
fn named_so(request_id: &Option<Box<str>>) -> String {
    request_id.as_ref().map_or_else(String::new, |id| format!(" (request {id})"))
}

/// The code in words, as in `trunk.proto`.
fn code_name(code: v1::ErrorCode) -> &'static str {
    match code {
        v1::ErrorCode::Unspecified => "unspecified",
        v1::ErrorCode::Invalid => "invalid",
        v1::ErrorCode::Sequence => "sequence",
        v1::ErrorCode::Microbatch => "microbatch",
        v1::ErrorCode::Exhausted => "exhausted",
        v1::ErrorCode::Draining => "draining",
        v1::ErrorCode::NotFound => "not found",
        v1::ErrorCode::TakenOver => "taken over",
        v1::ErrorCode::Internal => "internal",
        v1::ErrorCode::Cache => "cache",
        v1::ErrorCode::Unauthenticated => "unauthenticated",
    }
}

fn token_hint(sent: bool) -> &'static str {
    match sent {
        false => "no token was sent: set OFFSHOOT_TOKEN or name a file with --token-file",
        true => {
            "ask the server's operator for a new one, or look which one OFFSHOOT_TOKEN or --token-file gives"
        }
    }
}

/// The quota with its numbers, unless the server's text has them.
fn of_quota(quota: Option<&v1::QuotaViolation>, message: &str) -> String {
    match quota {
        Some(v1::QuotaViolation { quota, limit, value }) if !message.contains(quota.as_str()) => {
            format!(" (quota {quota}: the limit is {limit}, this would be {value})")
        }
        _ => String::new(),
    }
}

fn lost(last_applied: u64, answered: u64, microbatches: &[u64]) -> String {
    if last_applied < answered {
        format!("it stands at frame {last_applied}, and answers up to {answered} had arrived")
    } else {
        format!("it no longer holds the activations of microbatches {microbatches:?}")
    }
}

fn newest(durable: Option<&SnapshotInfo>) -> String {
    match durable {
        Some(s) => format!("the server's newest is {}, step {}", s.snapshot_id, s.step),
        None => "the server has none: open a new session".to_string(),
    }
}

impl ClientError {
    /// From the status of a unary call that the server answered.
    pub(crate) fn refused(call: &'static str, status: &tonic::Status) -> Self {
        let code = crate::status::error_code(status.code());
        let retry_after = crate::status::pushback(status);
        let (message, quota) = (status.message().to_string(), crate::status::quota(status));
        let request_id = crate::status::request_id(status);
        if status.code() == tonic::Code::DataLoss {
            return ClientError::Damaged { call, message, request_id };
        }
        ClientError::Refused { call, code, message, retry_after, quota, request_id }
    }

    /// The server's reason, if it refused this or what this depended on.
    pub fn code(&self) -> Option<v1::ErrorCode> {
        match self {
            ClientError::Refused { code, .. } | ClientError::NotTakenBack { code, .. } => {
                Some(*code)
            }
            ClientError::TakenOver { .. } => Some(v1::ErrorCode::TakenOver),
            ClientError::Aborted { earlier, .. } => earlier.code(),
            _ => None,
        }
    }

    /// What the server's log calls the refusal that this is, or that this depended on: what a user
    /// quotes to the server's operator.
    pub fn request_id(&self) -> Option<&str> {
        match self {
            ClientError::Refused { request_id, .. }
            | ClientError::Damaged { request_id, .. }
            | ClientError::TakenOver { request_id, .. }
            | ClientError::NotTakenBack { request_id, .. }
            | ClientError::Unauthenticated { request_id, .. } => request_id.as_deref(),
            ClientError::Aborted { earlier, .. } => earlier.request_id(),
            _ => None,
        }
    }

    /// In a word, for spans.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            ClientError::Refused { code, .. } | ClientError::NotTakenBack { code, .. } => {
                code_name(*code)
            }
            ClientError::Aborted { .. } => "aborted",
            ClientError::TakenOver { .. } => "taken over",
            ClientError::RolledBack { .. } => "rolled back",
            ClientError::Unreachable { .. } => "unreachable",
            _ => "error",
        }
    }

    /// Whether an [`extend`](crate::Session::extend) found its cache gone: the session left the device
    /// meanwhile, took a step, or the server started again. Begin the sequence again, with start 0 and
    /// all of its tokens.
    pub fn is_cache_gone(&self) -> bool {
        self.code() == Some(v1::ErrorCode::Cache)
    }

    /// When trying again may help, if the server refused this only for now.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            ClientError::Refused { retry_after, .. } => *retry_after,
            ClientError::Aborted { earlier, .. } => earlier.retry_after(),
            _ => None,
        }
    }

    /// Whether the session can still be used after this error.
    pub fn ends_session(&self) -> bool {
        match self {
            ClientError::Refused { .. }
            | ClientError::Damaged { .. }
            | ClientError::Aborted { .. }
            | ClientError::TooLarge { .. }
            | ClientError::Tensor { .. } => false,
            ClientError::BadEndpoint { .. }
            | ClientError::BadToken { .. }
            | ClientError::InsecureToken { .. }
            | ClientError::TlsFile { .. }
            | ClientError::Tls { .. }
            | ClientError::Unauthenticated { .. }
            | ClientError::Unreachable { .. }
            | ClientError::NotATrunkServer { .. }
            | ClientError::RolledBack { .. }
            | ClientError::TakenOver { .. }
            | ClientError::NotTakenBack { .. }
            | ClientError::Closed
            | ClientError::Protocol { .. } => true,
        }
    }
}
