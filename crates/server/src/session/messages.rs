//! What can be said to a [`SessionActor`](super::SessionActor).

use super::frame::Frame;
use super::outbox::{Permit, StreamEnds};
use super::state::{DRAIN_RETRY, Resume};
use crate::engine::Exported;
use crate::error::Error;
use crate::meter::Left;
use actix::Message;
use offshoot_adapters::AdapterState;
use offshoot_proto::v1::{self, ServerFrame};
use std::sync::Arc;

/// A stream says Hello. The one before, if there is one, ends.
#[derive(Message)]
#[rtype(result = "Result<Attached, Error>")]
pub struct Attach {
    pub greeting: Greeting,
    pub durable: Option<v1::SnapshotInfo>,
    /// All that it can be set back to, newest first.
    pub snapshots: Vec<v1::SnapshotInfo>,
    pub farewell: Permit,
    pub ends: StreamEnds,
}

/// What a client says of itself.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Greeting {
    /// The last frame whose answer it has seen.
    pub last_answered: u64,
    /// What it was called before; 0: nothing, it begins.
    pub epoch: u64,
    /// Its own number, unless 0.
    pub client: u64,
    /// Counts its Hellos.
    pub attempt: u64,
}

/// The stream is attached.
#[derive(Debug)]
pub struct Attached {
    /// Among the streams of this session.
    pub number: u64,
    /// The answer to Hello, to be sent before any other.
    pub hello: ServerFrame,
    /// Of the client that is attached now.
    pub epoch: u64,
}

/// A frame of a stream: checked, or why it is refused.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Frames {
    /// [`Attached::number`].
    pub stream: u64,
    pub sequence: u64,
    pub frame: Result<Frame, Error>,
    pub permit: Permit,
    /// Until its answer is sent.
    pub span: tracing::Span,
}

/// A stream has ended.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Detach {
    /// [`Attached::number`].
    pub stream: u64,
}

/// A stream's token is not valid any more: the stream ends, the session does not.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Revoke {
    /// [`Attached::number`].
    pub stream: u64,
}

/// Why a copy of the session is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// The client asked, and says where it stands.
    Snapshot { after: u64 },
    /// The lease is over. Refused if a stream came meanwhile.
    Lease,
    /// The client is done.
    Close,
    /// The server ends.
    Drain,
    /// Its tenant is not in the tenants file any more.
    Removed,
}

impl Reason {
    /// Whether the session ends with it.
    pub(super) fn ends(self) -> bool {
        !matches!(self, Reason::Snapshot { .. })
    }

    /// Why the session is not live any more, if it ends for this.
    pub(crate) fn left(self) -> Left {
        match self {
            Reason::Snapshot { .. } => Left::Running,
            Reason::Lease | Reason::Removed => Left::Parked,
            Reason::Close => Left::Closed,
            Reason::Drain => Left::Drained,
        }
    }

    /// What the stream hears if the session ends for this.
    pub(super) fn farewell(self) -> Error {
        match self {
            Reason::Drain | Reason::Lease => Error::Draining { retry_after: DRAIN_RETRY },
            Reason::Removed => Error::Unauthenticated,
            Reason::Close | Reason::Snapshot { .. } => Error::Ended,
        }
    }
}

/// Copies the session to the host, after all frames that were taken in. But for a snapshot it is
/// the last thing to happen: then comes [`Retire`] or [`Keep`].
#[derive(Message)]
#[rtype(result = "Result<SessionCut, Error>")]
pub struct Cut {
    pub reason: Reason,
}

/// A session between two frames.
#[derive(Debug)]
pub enum SessionCut {
    /// As it is now.
    Copied { adapters: Arc<AdapterState>, resume: Resume },
    /// The store's head is the session as it is now.
    InStore,
}

/// The last copy could not be made durable: the session goes on.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Keep;

/// Ends the actor; the session's place on the device is given back.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Retire;

/// Ends the actor, as [`Retire`]: what the session had on the device is lost.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Lost;

/// No training Forward is admitted from now on. Answered when nothing is left that a snapshot would
/// tear apart, or the client has gone.
#[derive(Message)]
#[rtype(result = "()")]
pub struct DrainWhenQuiet;

/// Takes a quiet session one tier down: from the device, or from the host's memory. Sent under the
/// session's lock. [`Error::Busy`]: it cannot go now.
#[derive(Message)]
#[rtype(result = "Result<(), Error>")]
pub struct Leave;

/// The adapter as it is after all frames that were taken in.
#[derive(Message)]
#[rtype(result = "Result<ExportOf, Error>")]
pub struct Export {
    /// Also what Backwards accumulated since the last Step.
    pub gradients: bool,
}

/// A session's adapter, from wherever it is.
#[derive(Debug)]
pub enum ExportOf {
    Device(Exported),
    Host(Arc<AdapterState>),
    /// The store's head holds it.
    InStore,
}
