//! A stream's messages on their way out, without a copy of their tensors.
//!
//! tonic's encoder writes a whole message into one new buffer. Here the small fields are written and
//! the bytes of a tensor go out as they lie: a message is a list of pieces, and HTTP/2 takes them one
//! after the other. What arrives is the same.
//!
//! tonic makes the body itself, so the messages travel beside it: in the extensions of the request or
//! the response, from where [`ClientTransport`] and [`ServerTransport`] make them the body.

use crate::v1;
use bytes::{BufMut, Bytes, BytesMut};
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
    pub fn new<M: InPieces>(
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
fn encode(message: &impl InPieces, max_bytes: usize) -> Result<Pieces, Status> {
    let length = message.encoded_len();
    if length > max_bytes || length > u32::MAX as usize {
        return Err(Status::out_of_range(format!(
            "a message of {length} bytes is to be sent, the limit is {max_bytes}"
        )));
    }
    let mut small = BytesMut::new();
    small.put_u8(0);
    small.put_u32(length as u32);
    let large = message.around_data().filter(|around| around.data.len() >= PIECE_BYTES);
    let Some(Around { before, data, after }) = large else {
        small.reserve(length);
        message.encode_raw(&mut small);
        return Ok(Pieces::from([small.freeze()]));
    };
    small.extend(before);
    let pieces = [small.freeze(), data, after.into()];
    Ok(pieces.into_iter().filter(|piece| !piece.is_empty()).collect())
}

/// A message, and where in it a tensor's bytes lie. The rest is small and is encoded as ever; what
/// arrives is what `encode` of the whole message writes.
pub trait InPieces: Message {
    /// None: there is no tensor in it.
    fn around_data(&self) -> Option<Around>;
}

/// A tensor's bytes, and what an encoded message has before and behind them.
pub struct Around {
    before: Vec<u8>,
    data: Bytes,
    after: Vec<u8>,
}

impl Around {
    fn tensor(tensor: &v1::Tensor) -> Around {
        let v1::Tensor { dtype, shape, data, .. } = tensor;
        let before = v1::Tensor { dtype: *dtype, shape: shape.clone(), ..Default::default() };
        let after = v1::Tensor { dtype: 0, shape: vec![], data: Bytes::new(), ..tensor.clone() };
        let inner = Around { before: vec![], data: data.clone(), after: vec![] };
        inner.in_field(3, &before, &after)
    }

    /// As a field of a message: behind the message's fields of lower numbers, before those of higher
    /// ones.
    fn in_field(self, number: u8, lower: &impl Message, higher: &impl Message) -> Around {
        const LENGTH_DELIMITED: u8 = 2;
        let length = self.before.len() + self.data.len() + self.after.len();
        let mut before = lower.encode_to_vec();
        // Numbers up to 15 are one byte.
        before.push(number << 3 | LENGTH_DELIMITED);
        // A varint of at most ten bytes always fits behind a `Vec`.
        let _ = prost::encode_length_delimiter(length, &mut before);
        before.extend(self.before);
        let mut after = self.after;
        after.extend(higher.encode_to_vec());
        Around { before, data: self.data, after }
    }
}

impl InPieces for v1::ClientFrame {
    fn around_data(&self) -> Option<Around> {
        use v1::client_frame::Body;
        let (number, body) = match self.body.as_ref()? {
            Body::Forward(all) => {
                let hidden = Around::tensor(all.hidden.as_ref()?);
                let lower = v1::Forward { microbatch: all.microbatch, ..Default::default() };
                let higher = v1::Forward { microbatch: 0, hidden: None, ..all.clone() };
                (4, hidden.in_field(2, &lower, &higher))
            }
            Body::Backward(all) => {
                let grad = Around::tensor(all.grad.as_ref()?);
                let lower = v1::Backward { grad: None, ..all.clone() };
                (5, grad.in_field(2, &lower, &v1::Backward::default()))
            }
            Body::Extend(all) => {
                let hidden = Around::tensor(all.hidden.as_ref()?);
                let lower = v1::Extend { hidden: None, ..all.clone() };
                (8, hidden.in_field(3, &lower, &v1::Extend::default()))
            }
            _ => return None,
        };
        let (sequence, acknowledged) = (self.sequence, self.acknowledged);
        let lower = v1::ClientFrame { sequence, acknowledged, ..Default::default() };
        let (traceparent, tracestate) = (self.traceparent.clone(), self.tracestate.clone());
        let higher = v1::ClientFrame { traceparent, tracestate, ..Default::default() };
        Some(body.in_field(number, &lower, &higher))
    }
}

impl InPieces for v1::ServerFrame {
    fn around_data(&self) -> Option<Around> {
        use v1::server_frame::Body;
        let (number, body) = match self.body.as_ref()? {
            Body::Forward(all) => {
                let hidden = Around::tensor(all.hidden.as_ref()?);
                let higher = v1::ForwardDone { hidden: None, ..all.clone() };
                (3, hidden.in_field(1, &v1::ForwardDone::default(), &higher))
            }
            Body::Backward(all) => {
                let grad = Around::tensor(all.grad.as_ref()?);
                let higher = v1::BackwardDone { grad: None, ..all.clone() };
                (4, grad.in_field(1, &v1::BackwardDone::default(), &higher))
            }
            _ => return None,
        };
        let lower = v1::ServerFrame { body: None, ..self.clone() };
        Some(body.in_field(number, &lower, &v1::ServerFrame::default()))
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
    use crate::v1::client_frame;
    use crate::{HostTensor, WireDType};
    use tonic::codegen::tokio_stream;

    fn tensor(n_rows: usize, dtype: WireDType) -> v1::Tensor {
        let values: Vec<f32> = (0..n_rows * 700).map(|i| i as f32).collect();
        HostTensor::from_f32(&values, vec![n_rows, 700], dtype).into_proto()
    }

    fn frame(n_rows: usize, dtype: WireDType) -> v1::ClientFrame {
        let hidden = Some(tensor(n_rows, dtype));
        let forward = v1::Forward {
            microbatch: 1 << 40,
            hidden,
            seq_lens: vec![n_rows as u32],
            position_ids: vec![0; n_rows],
            mode: v1::Mode::Train as i32,
            want_input_grad: true,
            dropout_key: u64::MAX,
        };
        let body = Some(client_frame::Body::Forward(forward));
        traced(v1::ClientFrame { sequence: 300, acknowledged: 2, body, ..Default::default() })
    }

    fn traced(frame: v1::ClientFrame) -> v1::ClientFrame {
        let traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".into();
        v1::ClientFrame { traceparent, tracestate: "vendor=1".into(), ..frame }
    }

    fn check_pieces(frame: &impl InPieces, data: &Bytes) {
        let pieces = encode(frame, usize::MAX).unwrap();
        let message = frame.encode_to_vec();
        let mut expected = vec![0];
        expected.extend((message.len() as u32).to_be_bytes());
        expected.extend(message);
        assert_eq!(Vec::from(pieces.clone()).concat(), expected);
        let shared = pieces.iter().any(|piece| piece.as_ptr() == data.as_ptr());
        assert_eq!(shared, data.len() >= PIECE_BYTES);
    }

    #[test]
    fn the_pieces_are_the_message_and_the_tensor_is_not_copied() {
        use v1::server_frame;
        for dtype in WireDType::ALL {
            for n_rows in [1, 100] {
                let tensor = tensor(n_rows, dtype);
                let client = |body| {
                    let (sequence, body) = (300, Some(body));
                    traced(v1::ClientFrame { sequence, body, ..Default::default() })
                };
                let frame = frame(n_rows, dtype);
                let Some(client_frame::Body::Forward(forward)) = &frame.body else { panic!() };
                check_pieces(&frame, &forward.hidden.as_ref().unwrap().data);
                let (grad, hidden) = (Some(tensor.clone()), Some(tensor.clone()));
                let backward = v1::Backward { microbatch: 7, grad };
                check_pieces(&client(client_frame::Body::Backward(backward)), &tensor.data);
                let extend = v1::Extend { cache: 9, start: 1 << 20, hidden: hidden.clone() };
                check_pieces(&client(client_frame::Body::Extend(extend)), &tensor.data);

                let server = |body| v1::ServerFrame { sequence: 1 << 60, body: Some(body) };
                let timing = Some(v1::Timing { queue_micros: 5, ..Default::default() });
                let done = v1::ForwardDone { hidden, tape_bytes: 5, timing, cache_bytes: 1 << 33 };
                check_pieces(&server(server_frame::Body::Forward(done)), &tensor.data);
                let grad = Some(tensor.clone());
                let done = v1::BackwardDone { grad, grad_norm_squared: 0.5, timing };
                check_pieces(&server(server_frame::Body::Backward(done)), &tensor.data);
            }
        }
        let step = v1::StepDone { step: 9, ..Default::default() };
        let frame = v1::ServerFrame { sequence: 4, body: Some(server_frame::Body::Step(step)) };
        check_pieces(&frame, &Bytes::new());
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
            let first = Ok(v1::ClientFrame { sequence: 1, ..Default::default() });
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
