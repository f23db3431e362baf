//! The protocol without the SDK: frames as a careless or hostile client might send them.

use offshoot_proto::v1::{self, client_frame, server_frame, trunk_service_client};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

/// Generated client of the service.
pub type Rpc = trunk_service_client::TrunkServiceClient<Channel>;

/// Connects, without retries.
pub async fn rpc(endpoint: &str) -> Rpc {
    Rpc::connect(format!("http://{endpoint}")).await.expect("the server listens")
}

/// An attached stream that sends whatever it is given.
pub struct RawStream {
    /// What the server said to Hello.
    pub attached: v1::Attached,
    /// The number of the next frame that the server should apply.
    pub next: u64,
    out: mpsc::Sender<v1::ClientFrame>,
    answers: tonic::Streaming<v1::ServerFrame>,
}

impl RawStream {
    /// Says Hello, as a client that begins. An error is the server's answer.
    pub async fn attach(rpc: &mut Rpc, id: &str) -> Result<RawStream, v1::FrameError> {
        RawStream::attach_again(rpc, id, 0).await
    }

    /// Says Hello as a client of this epoch.
    pub async fn attach_again(
        rpc: &mut Rpc,
        id: &str,
        epoch: u64,
    ) -> Result<RawStream, v1::FrameError> {
        RawStream::attach_with(rpc, id, epoch, "").await
    }

    /// Says Hello with this token, if it is one.
    pub async fn attach_with(
        rpc: &mut Rpc,
        id: &str,
        epoch: u64,
        token: &str,
    ) -> Result<RawStream, v1::FrameError> {
        let (out, frames) = mpsc::channel(64);
        let hello = v1::Hello { session_id: id.to_string(), epoch, ..Default::default() };
        let hello = frame(0, client_frame::Body::Hello(hello));
        out.send(hello).await.expect("the receiver is here");
        let request = bearing(ReceiverStream::new(frames), token);
        let mut answers = rpc.train(request).await.expect("streams are taken").into_inner();
        let answer = answers.message().await.expect("an answer to Hello").expect("one frame");
        assert_eq!(answer.sequence, 0);
        match answer.body {
            Some(server_frame::Body::Attached(attached)) => {
                Ok(RawStream { next: attached.last_applied + 1, attached, out, answers })
            }
            Some(server_frame::Body::Error(error)) => Err(error),
            other => panic!("an answer to Hello, not {other:?}"),
        }
    }

    /// Sends a frame as it is.
    pub async fn send(&mut self, frame: v1::ClientFrame) {
        self.out.send(frame).await.expect("the stream is open");
    }

    /// The next answer.
    pub async fn answer(&mut self) -> v1::ServerFrame {
        self.answers.message().await.expect("the stream is open").expect("an answer")
    }

    /// How the stream ended: the last frames and the status, if it was one.
    pub async fn end(mut self) -> (Vec<v1::ServerFrame>, Option<tonic::Status>) {
        let mut last = Vec::new();
        loop {
            match self.answers.message().await {
                Ok(Some(frame)) => last.push(frame),
                Ok(None) => return (last, None),
                Err(status) => return (last, Some(status)),
            }
        }
    }

    /// Sends a frame and takes its answer.
    pub async fn ask(&mut self, frame: v1::ClientFrame) -> v1::ServerFrame {
        let sequence = frame.sequence;
        self.send(frame).await;
        let answer = self.answer().await;
        assert_eq!(answer.sequence, sequence, "answers come in order: {answer:?}");
        answer
    }

    /// Sends a body under the next number; it must be applied.
    pub async fn apply(&mut self, body: client_frame::Body) -> server_frame::Body {
        match self.ask(frame(self.next, body)).await.body {
            Some(server_frame::Body::Error(error)) => panic!("frame {}: {error:?}", self.next),
            Some(answer) => {
                self.next += 1;
                answer
            }
            None => panic!("an empty answer"),
        }
    }

    /// Sends a frame that must be refused.
    pub async fn refused(&mut self, frame: v1::ClientFrame) -> v1::FrameError {
        match self.ask(frame).await.body {
            Some(server_frame::Body::Error(error)) => error,
            other => panic!("a refusal, not {other:?}"),
        }
    }
}

/// A request with this token; without one if it is empty.
pub fn bearing<T>(message: T, token: &str) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    if !token.is_empty() {
        let value = format!("Bearer {token}").parse().expect("tokens are ASCII");
        request.metadata_mut().insert("authorization", value);
    }
    request
}

/// A frame that acknowledges nothing.
pub fn frame(sequence: u64, body: client_frame::Body) -> v1::ClientFrame {
    v1::ClientFrame { sequence, body: Some(body), ..Default::default() }
}

/// A Forward of an SDK's input.
pub fn forward(
    input: offshoot_client::ForwardInput,
    microbatch: u64,
    mode: v1::Mode,
) -> v1::Forward {
    v1::Forward {
        microbatch,
        hidden: Some(input.hidden.into_proto()),
        seq_lens: input.seq_lens,
        position_ids: input.position_ids,
        mode: mode as i32,
        want_input_grad: input.want_input_grad,
        dropout_key: input.dropout_key,
    }
}

/// A body, what is wrong with it, and what the server must say to it.
pub struct BadFrame {
    /// Named in the test's failure.
    pub what: &'static str,
    /// Sent under the number that is due.
    pub body: Option<client_frame::Body>,
    /// The refusal's code.
    pub code: v1::ErrorCode,
    /// What its text must name: what was expected and what came.
    pub names: &'static [&'static str],
}

/// Sends each bad frame and checks the refusal; after each, `good` must be applied under the same
/// number, with the same answer every time.
pub async fn check_protocol(stream: &mut RawStream, bad: Vec<BadFrame>, good: &v1::Forward) {
    let mut expected = None;
    for BadFrame { what, body, code, names } in bad {
        let sequence = stream.next;
        let error = stream.refused(v1::ClientFrame { sequence, body, ..Default::default() }).await;
        assert_eq!(error.code(), code, "{what}: {}", error.message);
        for name in names {
            assert!(error.message.contains(name), "{what}: {name:?} is not in {:?}", error.message);
        }
        println!("{what}: {}", error.message);
        let answer = stream.apply(client_frame::Body::Forward(good.clone())).await;
        let server_frame::Body::Forward(done) = answer else { panic!("{what}: {answer:?}") };
        let expected = expected.get_or_insert_with(|| done.hidden.clone());
        assert!(done.hidden == *expected, "{what}: another output afterwards");
    }
}
