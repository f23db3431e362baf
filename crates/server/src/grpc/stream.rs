use super::decode::{self, FrameRules};
use crate::access::{Action, Audit, Caller, Subject};
use crate::error::Error;
use crate::quota::Account;
use crate::refusals::Refusals;
use crate::registry::{AttachedStream, Registry, StreamEnd};
use crate::session::{Detach, Frame, Frames, Revoke};
use crate::trace::{self, Whose};
use offshoot_proto::v1::{ClientFrame, ServerFrame};
use prost::Message;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tonic::{Status, Streaming};

/// How long a client may keep a stream open without saying who it is.
const HELLO_TIMEOUT: Duration = Duration::from_secs(30);
/// A tensor of so many bytes takes most of a millisecond to check and digest.
const LARGE_BYTES: usize = 1 << 20;
/// Room beside the frames in flight: for the answer to Hello and for the last word.
pub const EXTRA_ANSWERS: usize = 2;

type Answers = mpsc::Sender<Result<ServerFrame, Status>>;

/// What a stream needs of the server.
pub struct StreamContext {
    pub registry: Arc<Registry>,
    /// The caller's, whose session it is, or there is no stream.
    pub account: Arc<Account>,
    pub caller: Caller,
    pub audit: Audit,
    pub refusals: Arc<Refusals>,
    pub hidden_size: usize,
    pub max_tokens: usize,
    pub max_cache_tokens: usize,
}

/// Reads one stream until either side ends it.
pub async fn run(context: StreamContext, mut frames: Streaming<ClientFrame>, answers: Answers) {
    let (ends, ended) = oneshot::channel();
    let attached = match attach(&context, &mut frames, &answers, ends).await {
        Ok(attached) => attached,
        Err(error) => {
            let tenant = &context.caller.tenant.name;
            let patience = context.registry.access().patience();
            patience.wait(tenant, error.class().grpc_code()).await;
            // The client may be gone.
            let refusal = context.refusals.frame(tenant, None, &error, 0);
            let _ = answers.send(Ok(refusal)).await;
            return;
        }
    };
    let rules = FrameRules {
        hidden_size: context.hidden_size,
        wire_dtype: attached.wire_dtype,
        max_tokens: context.max_tokens,
        max_cache_tokens: context.max_cache_tokens,
    };
    tokio::select! {
        _ = ended => {}
        () = read(&attached, (&rules, &context.account), &mut frames, &answers) => {}
        () = context.registry.access().ended(&context.caller) => {
            // A session that ended meanwhile has said its last word.
            let _ = attached.actor.send(Revoke { stream: attached.number }).await;
        }
    }
    // A session that ended meanwhile knows.
    let _ = attached.actor.send(Detach { stream: attached.number }).await;
}

async fn attach(
    context: &StreamContext,
    frames: &mut Streaming<ClientFrame>,
    answers: &Answers,
    ends: oneshot::Sender<()>,
) -> Result<AttachedStream, Error> {
    let seconds = HELLO_TIMEOUT.as_secs();
    let first = tokio::time::timeout(HELLO_TIMEOUT, frames.message()).await;
    let first = first.map_err(|_| Error::HelloTimeout { seconds })?;
    let (named, greeting) = decode::hello(first.ok().flatten())?;
    let closed = |_| Error::Gone { part: "stream" };
    let hello = answers.clone().reserve_owned().await.map_err(closed)?;
    let farewell = answers.clone().reserve_owned().await.map_err(closed)?;
    let end = StreamEnd { greeting, hello, farewell, ends };
    let (registry, caller) = (context.registry.clone(), context.caller.clone());
    let audit = context.audit.clone();
    let attach = async move {
        let attached = match registry.owners().check(&caller.tenant.name, &named) {
            Ok(own) => registry.attach(own, end).await,
            Err(error) => Err(error),
        };
        audit.did(&caller, Action::Attach, Subject::named(&named), &attached);
        attached
    };
    // Reviving a session goes on even if this client leaves.
    tokio::spawn(attach).await.map_err(|_| Error::Gone { part: "session" })?
}

/// Until the client ends the stream or the session is gone.
async fn read(
    attached: &AttachedStream,
    (rules, account): (&FrameRules, &Account),
    frames: &mut Streaming<ClientFrame>,
    answers: &Answers,
) {
    loop {
        let frame = match frames.message().await {
            Ok(Some(frame)) => frame,
            Ok(None) => {
                // The client has said all that it will say and still reads: it gets its answers.
                // Then all room is free but that for the last word.
                let _ = answers.reserve_many(answers.max_capacity() - 1).await;
                return;
            }
            Err(status) => {
                tracing::debug!(code = ?status.code(), "stream broke");
                return;
            }
        };
        // Not before there is room for its answer.
        let Ok(permit) = answers.clone().reserve_owned().await else { return };
        let sequence = frame.sequence;
        attached.meter.received(frame.encoded_len());
        let whose = Whose { session: attached.session, tenant: account.name() };
        let span = trace::frame(&frame, whose);
        let frame = check(frame, *rules).await.and_then(|frame| {
            // As the tenants file has it now. A Backward always runs.
            account.check_tokens(frame.work.n_forward_tokens())?;
            Ok(frame)
        });
        let frames = Frames { stream: attached.number, sequence, frame, permit, span };
        if attached.actor.send(frames).await.is_err() {
            return;
        }
    }
}

/// Checks a frame: a large one beside the runtime's threads, so that other sessions' frames do not
/// wait for it.
async fn check(frame: ClientFrame, rules: FrameRules) -> Result<Frame, Error> {
    if decode::tensor_bytes(&frame) < LARGE_BYTES {
        return decode::frame(frame, &rules);
    }
    let checked = tokio::task::spawn_blocking(move || decode::frame(frame, &rules)).await;
    checked.map_err(|_| Error::Gone { part: "check of a frame" })?
}
