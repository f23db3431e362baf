//! One attached stream: how it comes to be, and what the server's refusals of it mean.

use crate::client::Client;
use crate::identity::Token;
use crate::types::SessionId;
use crate::{ClientError, status};
use offshoot_proto::outgoing::Outgoing;
use offshoot_proto::v1::{self, client_frame, server_frame};
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;

pub(crate) struct Wire {
    pub(crate) out: mpsc::Sender<v1::ClientFrame>,
    pub(crate) answers: tonic::Streaming<v1::ServerFrame>,
    pub(crate) attached: v1::Attached,
    /// What it was opened with.
    pub(crate) token: Option<Token>,
}

/// Whose stream it is, for what is said about it.
pub(crate) struct Side<'a> {
    pub(crate) client: &'a Client,
    pub(crate) id: &'a SessionId,
    pub(crate) sent: Option<&'a Token>,
}

const RENEWED: &str = "the token was renewed";

/// Why there is no stream.
pub(crate) enum Failed {
    /// Worth another attempt.
    Broken(String),
    /// The same: the server ends or begins, and said so.
    Drains(String),
    /// The server said no.
    Refused(ClientError),
}

/// One attempt: opens a stream, says Hello, waits for the answer. `capacity` is the most frames that
/// will be without an answer.
pub(crate) async fn attach(
    client: &Client,
    id: &SessionId,
    hello: v1::Hello,
    capacity: usize,
) -> Result<Wire, Failed> {
    let patience = client.options().connect_timeout;
    match tokio::time::timeout(patience, say_hello(client, id, hello, capacity)).await {
        Ok(result) => result,
        Err(_) => Err(Failed::Broken(format!("no answer to Hello within {patience:?}"))),
    }
}

async fn say_hello(
    client: &Client,
    id: &SessionId,
    hello: v1::Hello,
    capacity: usize,
) -> Result<Wire, Failed> {
    // Hello beside a full window: the driver never has to wait for room.
    let (out, frames) = mpsc::channel(capacity + 1);
    let frame = v1::ClientFrame {
        sequence: 0,
        acknowledged: hello.last_answered,
        body: Some(client_frame::Body::Hello(hello)),
        ..Default::default()
    };
    if out.try_send(frame).is_err() {
        return Err(Failed::Broken("the stream closed at once".to_string()));
    }
    let token = client.token();
    let side = Side { client, id, sent: token.as_ref() };
    let judge = |status| judge(&side, &status);
    let mut rpc = client.stream_rpc();
    let outgoing = Outgoing::new(ReceiverStream::new(frames).map(Ok), client.frame_bytes());
    let mut request = client.request(tokio_stream::empty());
    request.extensions_mut().insert(outgoing);
    let mut answers = rpc.train(request).await.map_err(judge)?.into_inner();
    let answer = answers.message().await.map_err(judge)?;
    match answer.and_then(|frame| frame.body) {
        Some(server_frame::Body::Attached(attached)) => Ok(Wire { out, answers, attached, token }),
        Some(server_frame::Body::Error(error)) => Err(judge_error(&side, error)),
        None => Err(Failed::Broken("the stream ended before the answer to Hello".to_string())),
        Some(_) => Err(Failed::Refused(ClientError::Protocol {
            what: "the first answer on a stream was not the one to Hello".to_string(),
        })),
    }
}

/// A status that ended the stream.
pub(crate) fn judge(side: &Side<'_>, status: &tonic::Status) -> Failed {
    let Side { client, id, sent } = *side;
    if status::is_soon(status) {
        return Failed::Drains(client.cause(status));
    }
    if status::is_passing(status) && !status::is_final_quota(status) {
        return Failed::Broken(client.cause(status));
    }
    if status.code() == tonic::Code::Unauthenticated {
        if client.renews_token(sent) {
            return Failed::Broken(RENEWED.to_string());
        }
        let id = status::request_id(status);
        return Failed::Refused(client.unauthenticated(status.message(), id));
    }
    let (session, message) = (id.clone(), status.message().to_string());
    let request_id = status::request_id(status);
    Failed::Refused(match status::error_code(status.code()) {
        v1::ErrorCode::TakenOver => ClientError::TakenOver { session, message, request_id },
        code => ClientError::NotTakenBack { session, code, message, request_id },
    })
}

/// An error about the session as a whole.
pub(crate) fn judge_error(side: &Side<'_>, error: v1::FrameError) -> Failed {
    let Side { client, id, sent } = *side;
    let code = error.code();
    if code == v1::ErrorCode::Unauthenticated {
        if client.renews_token(sent) {
            return Failed::Broken(RENEWED.to_string());
        }
        let id = crate::error::named(error.request_id);
        return Failed::Refused(client.unauthenticated(&error.message, id));
    }
    if code == v1::ErrorCode::Draining {
        return Failed::Drains(error.message);
    }
    if error.retry_after_millis > 0 {
        return Failed::Broken(error.message);
    }
    let (session, message) = (id.clone(), error.message);
    let request_id = crate::error::named(error.request_id);
    Failed::Refused(match code {
        v1::ErrorCode::TakenOver => ClientError::TakenOver { session, message, request_id },
        _ => ClientError::NotTakenBack { session, code, message, request_id },
    })
}
