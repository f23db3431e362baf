//! What goes between a session and its task.

use crate::ClientError;
use crate::entry::Request;
use crate::trace::FrameSpan;
use offshoot_proto::v1::server_frame;
use std::time::Duration;
use tokio::sync::oneshot;

/// What a session can ask of its task.
pub(crate) enum Command {
    Send {
        request: Box<Request>,
        span: FrameSpan,
        reply: oneshot::Sender<Result<Answer, ClientError>>,
    },
    /// A microbatch is not wanted any more.
    Look,
    /// The stream is to be taken up anew, to learn where the server stands.
    Reattach,
    /// Answered with the last number once no frame is without an answer.
    Settle { reply: oneshot::Sender<Result<u64, ClientError>> },
}

/// An answer with the microbatch of the frame and the time that it took.
pub(crate) struct Answer {
    pub(crate) body: server_frame::Body,
    pub(crate) sequence: u64,
    pub(crate) microbatch: u64,
    pub(crate) round_trip: Duration,
    pub(crate) retries: u32,
}

// Tensors stay out of logs.
impl std::fmt::Debug for Answer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Answer").field("microbatch", &self.microbatch).finish_non_exhaustive()
    }
}
