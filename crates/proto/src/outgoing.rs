//! A stream's messages on their way out, without a copy of their tensors.
//!
//! tonic's encoder writes a whole message into one new buffer. Here the small fields are written and
//! the bytes of a tensor go out as they lie: a message is a list of pieces, and HTTP/2 takes them one
//! after the other. What arrives is the same.
//!
//! tonic makes the body itself, so the messages travel beside it: in the extensions of the request or
//! the response, from where [`ClientTransport`] and [`ServerTransport`] make them the body.

use bytes::buf::UninitSlice;
use bytes::{Buf, BufMut, Bytes, BytesMut};
use http_body::{Body as HttpBody, Frame};
use prost::Message;
use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::tokio_stream::{Stream, StreamExt};
use tonic::codegen::{BoxFuture, Service, http};

/// Fewer bytes than this are copied: a piece of its own costs more.
const PIECE_BYTES: usize = 16 << 10;

type Pieces = VecDeque<Bytes>;
type Messages = Pin<Box<dyn Stream<Item = Result<Pieces, Status>> + Send>>;

/// The messages of one stream. Put it into the extensions of a request or a response whose own
/// stream is empty. Clones are the same stream; the first to be sent has it.
#[derive(Clone)]
pub struct Outgoing(Arc<Mutex<Option<Messages>>>);

impl Outgoing {
    /// A message of more than `max_bytes` ends the stream with an error.
    pub fn new<M: Message>(
        messages: impl Stream<Item = Result<M, Status>> + Send + 'static,
        max_bytes: usize,
    ) -> Self {
        let pieces = messages.map(move |message| encode(&message?, max_bytes));
        Outgoing(Arc::new(Mutex::new(Some(Box::pin(pieces)))))
    }

    fn into_body(self, sender: Sender) -> Body {
        match self.0.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(messages) => {
                Body::new(Sending { messages, pieces: Pieces::new(), sender, ended: false })
            }
            None => Body::empty(),
        }
    }
}

/// gRPC's prefix, no compression and a length, then the message.
fn encode(message: &impl Message, max_bytes: usize) -> Result<Pieces, Status> {
    let length = message.encoded_len();
    if length > max_bytes || length > u32::MAX as usize {
        return Err(Status::out_of_range(format!(
            "a message of {length} bytes is to be sent, the limit is {max_bytes}"
        )));
    }
    let mut buffer = Splice::default();
    buffer.small.put_u8(0);
    buffer.small.put_u32(length as u32);
    message.encode_raw(&mut buffer);
    buffer.cut();
    Ok(buffer.pieces)
}

/// Collects what is written; large [`Bytes`] as they are.
#[derive(Default)]
struct Splice {
    pieces: Pieces,
    small: BytesMut,
}

impl Splice {
    fn cut(&mut self) {
        if !self.small.is_empty() {
            self.pieces.push_back(self.small.split().freeze());
        }
    }
}

// SAFETY: everything is `BytesMut`'s own; `put` leaves the writing position alone.
unsafe impl BufMut for Splice {
    fn remaining_mut(&self) -> usize {
        self.small.remaining_mut()
    }

    unsafe fn advance_mut(&mut self, n: usize) {
        // SAFETY: what the caller promises is what `BytesMut` asks for.
        unsafe { self.small.advance_mut(n) }
    }

    fn chunk_mut(&mut self) -> &mut UninitSlice {
        self.small.chunk_mut()
    }

    fn put<T: Buf>(&mut self, mut source: T) {
        if source.remaining() < PIECE_BYTES {
            return self.small.put(source);
        }
        self.cut();
        // Of `Bytes` this is no copy.
        self.pieces.push_back(source.copy_to_bytes(source.remaining()));
    }
}

/// Who ends a stream with a status, and who just ends it.
#[derive(Clone, Copy, PartialEq)]
enum Sender {
    Client,
    Server,
}

/// The body of a request or a response.
struct Sending {
    messages: Messages,
    /// Of the message that is being sent.
    pieces: Pieces,
    sender: Sender,
    ended: bool,
}

impl HttpBody for Sending {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        loop {
            if let Some(piece) = self.pieces.pop_front() {
                return Poll::Ready(Some(Ok(Frame::data(piece))));
            }
            if self.ended {
                return Poll::Ready(None);
            }
            let status = match ready!(self.messages.as_mut().poll_next(context)) {
                Some(Ok(pieces)) => {
                    self.pieces = pieces;
                    continue;
                }
                Some(Err(status)) => status,
                None => Status::ok(""),
            };
            self.ended = true;
            return Poll::Ready(match (self.sender, status.code()) {
                (Sender::Server, _) => Some(trailers(&status)),
                (Sender::Client, tonic::Code::Ok) => None,
                (Sender::Client, _) => Some(Err(status)),
            });
        }
    }

    fn is_end_stream(&self) -> bool {
        self.ended && self.pieces.is_empty()
    }
}

fn trailers(status: &Status) -> Result<Frame<Bytes>, Status> {
    let mut trailers = http::HeaderMap::with_capacity(2);
    status.add_header(&mut trailers)?;
    Ok(Frame::trailers(trailers))
}

/// A connection whose requests may carry [`Outgoing`].
#[derive(Debug, Clone)]
pub struct ClientTransport<S>(pub S);

impl<S: Service<http::Request<Body>>> Service<http::Request<Body>> for ClientTransport<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, mut request: http::Request<Body>) -> S::Future {
        if let Some(outgoing) = request.extensions_mut().remove::<Outgoing>() {
            *request.body_mut() = outgoing.into_body(Sender::Client);
        }
        self.0.call(request)
    }
}

/// A service whose responses may carry [`Outgoing`].
#[derive(Debug, Clone)]
pub struct ServerTransport<S>(pub S);

impl<S, B> Service<http::Request<B>> for ServerTransport<S>
where
    S: Service<http::Request<B>, Response = http::Response<Body>>,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = BoxFuture<S::Response, S::Error>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let response = self.0.call(request);
        Box::pin(async move {
            let mut response = response.await?;
            if let Some(outgoing) = response.extensions_mut().remove::<Outgoing>() {
                *response.body_mut() = outgoing.into_body(Sender::Server);
            }
            Ok(response)
        })
    }
}

impl<S: tonic::server::NamedService> tonic::server::NamedService for ServerTransport<S> {
    const NAME: &'static str = S::NAME;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::v1::{self, client_frame};
    use crate::{HostTensor, WireDType};
    use tonic::codegen::tokio_stream;

    fn frame(n_rows: usize, dtype: WireDType) -> v1::ClientFrame {
        let values: Vec<f32> = (0..n_rows * 700).map(|i| i as f32).collect();
        let hidden = HostTensor::from_f32(&values, vec![n_rows, 700], dtype).into_proto();
        let seq_lens = vec![n_rows as u32];
        let forward = v1::Forward { hidden: Some(hidden), seq_lens, ..Default::default() };
        let body = Some(client_frame::Body::Forward(forward));
        v1::ClientFrame { sequence: 300, acknowledged: 2, body }
    }

    #[test]
    fn the_pieces_are_the_message_and_the_tensor_is_not_copied() {
        for dtype in WireDType::ALL {
            for n_rows in [1, 100] {
                let frame = frame(n_rows, dtype);
                let pieces = encode(&frame, usize::MAX).unwrap();
                let message = frame.encode_to_vec();
                let mut expected = vec![0];
                expected.extend((message.len() as u32).to_be_bytes());
                expected.extend(message);
                assert_eq!(Vec::from(pieces.clone()).concat(), expected);
                let Some(client_frame::Body::Forward(forward)) = frame.body else { panic!() };
                let data = forward.hidden.unwrap().data;
                let shared = pieces.iter().any(|piece| piece.as_ptr() == data.as_ptr());
                assert_eq!(shared, data.len() >= PIECE_BYTES);
            }
        }
    }

    async fn sent(outgoing: Outgoing, sender: Sender) -> Vec<Result<Frame<Bytes>, String>> {
        let mut body = outgoing.into_body(sender);
        let mut frames = Vec::new();
        while let Some(frame) =
            std::future::poll_fn(|context| Pin::new(&mut body).poll_frame(context)).await
        {
            frames.push(frame.map_err(|status| status.to_string()));
        }
        frames
    }

    #[tokio::test]
    async fn a_stream_ends_with_a_status_at_the_server_only() {
        let messages = |last: Option<Status>| {
            let first = Ok(v1::CloseSessionRequest { session_id: "x".into(), forget: true });
            let all: Vec<Result<_, Status>> = std::iter::once(first).chain(last.map(Err)).collect();
            Outgoing::new(tokio_stream::iter(all), 1000)
        };
        let status = |frame: &Result<Frame<Bytes>, String>| {
            let trailers = frame.as_ref().unwrap().trailers_ref().unwrap();
            trailers["grpc-status"].to_str().unwrap().to_string()
        };
        let fine = sent(messages(None), Sender::Server).await;
        assert_eq!((fine.len(), status(&fine[1]).as_str()), (2, "0"));
        let failed = sent(messages(Some(Status::internal("x"))), Sender::Server).await;
        assert_eq!((failed.len(), status(&failed[1]).as_str()), (2, "13"));
        assert_eq!(sent(messages(None), Sender::Client).await.len(), 1);
        let failed = sent(messages(Some(Status::internal("broken"))), Sender::Client).await;
        assert!(failed[1].as_ref().unwrap_err().contains("broken"));

        let large = tokio_stream::iter([Ok(frame(10, WireDType::F32))]);
        let refused = sent(Outgoing::new(large, 1000), Sender::Server).await;
        assert_eq!((refused.len(), status(&refused[0]).as_str()), (1, "11"));
        // A clone of what was sent has nothing left.
        let once = messages(None);
        sent(once.clone(), Sender::Client).await;
        assert!(sent(once, Sender::Client).await.is_empty());
    }
}
