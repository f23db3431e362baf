use super::connections::Call;
use crate::error::Error;
use crate::refusals::Refusals;
use bytes::Bytes;
use http_body::{Body as HttpBody, Frame, SizeHint};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, Sleep};
use tonic::Status;
use tonic::body::Body;

/// Requests of fewer bytes need no room of their own.
const SMALL_BYTES: usize = 64 << 10;
/// What large requests may take together while they come in and are worked on: an adapter that a
/// session begins with, above all.
const LARGE_BYTES_TOGETHER: usize = 1 << 30;
/// Most at a time, however small the largest one is.
const MOST_LARGE: usize = 16;
/// A large request waits for others for so long, and is refused then.
const WAIT: Duration = Duration::from_secs(10);
/// What a request may take to come in: so long, and longer for what has come.
const SLOW: Duration = Duration::from_secs(30);
/// Slower than this on average, for long, is a way to hold others up.
const LEAST_BYTES_PER_SECOND: usize = 128 << 10;
/// Whose request it is, the service behind will see.
const UNKNOWN: &str = "";

/// Room for the large requests of all connections.
pub struct Room {
    large: Arc<Semaphore>,
    n_large: usize,
    refusals: Arc<Refusals>,
}

impl Room {
    /// For requests of at most so many bytes.
    pub fn new(max_request_bytes: usize, refusals: Arc<Refusals>) -> Self {
        let n_large = (LARGE_BYTES_TOGETHER / max_request_bytes.max(1)).clamp(1, MOST_LARGE);
        Room { large: Arc::new(Semaphore::new(n_large)), n_large, refusals }
    }

    /// What one request takes of it: nothing yet.
    pub fn share(&self) -> Share {
        Share {
            large: self.large.clone(),
            n_large: self.n_large,
            refusals: self.refusals.clone(),
            taken: Arc::default(),
        }
    }
}

/// What one request has of the room, until all clones are dropped.
#[derive(Clone)]
pub struct Share {
    large: Arc<Semaphore>,
    n_large: usize,
    refusals: Arc<Refusals>,
    taken: Arc<Mutex<Option<OwnedSemaphorePermit>>>,
}

type Waiting = Pin<Box<dyn Future<Output = Result<OwnedSemaphorePermit, Status>> + Send>>;

impl Share {
    fn wait(&self) -> Waiting {
        let (large, limit) = (self.large.clone(), self.n_large);
        let refusals = self.refusals.clone();
        Box::pin(async move {
            match tokio::time::timeout(WAIT, large.acquire_owned()).await {
                Ok(Ok(permit)) => Ok(permit),
                _ => Err(refusals.status(UNKNOWN, None, Error::LargeRequests { limit })),
            }
        })
    }

    fn put(&self, permit: OwnedSemaphorePermit) {
        *self.taken.lock().unwrap_or_else(PoisonError::into_inner) = Some(permit);
    }
}

/// A request's body on its way in: beyond a few bytes it waits for room, and it must not be slow.
pub struct Incoming {
    body: Body,
    share: Share,
    seen: usize,
    has_room: bool,
    waiting: Option<Waiting>,
    /// What came before there was room.
    held: Option<Frame<Bytes>>,
    begun: Instant,
    slow: Pin<Box<Sleep>>,
}

impl Incoming {
    /// Has no room yet.
    pub fn new(body: Body, share: Share) -> Self {
        let slow = Box::pin(tokio::time::sleep(SLOW));
        let begun = Instant::now();
        Incoming { body, share, seen: 0, has_room: false, waiting: None, held: None, begun, slow }
    }

    fn came(&mut self, n: usize) {
        self.seen += n;
        let longer = Duration::from_secs((self.seen / LEAST_BYTES_PER_SECOND) as u64);
        if self.begun + SLOW + longer > self.slow.deadline() {
            self.slow.as_mut().reset(self.begun + SLOW + longer);
        }
    }

    fn poll_room(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Status>> {
        if self.has_room || self.seen <= SMALL_BYTES {
            return Poll::Ready(Ok(()));
        }
        let waiting = self.waiting.get_or_insert_with(|| self.share.wait());
        let permit = ready!(waiting.as_mut().poll(context));
        self.waiting = None;
        self.share.put(permit?);
        self.has_room = true;
        // Waiting was not the client's fault.
        self.begun = Instant::now();
        let longer = Duration::from_secs((self.seen / LEAST_BYTES_PER_SECOND) as u64);
        self.slow.as_mut().reset(self.begun + SLOW + longer);
        Poll::Ready(Ok(()))
    }
}

impl HttpBody for Incoming {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if self.held.is_none() {
            match Pin::new(&mut self.body).poll_frame(context) {
                Poll::Ready(Some(Ok(frame))) => {
                    let n = frame.data_ref().map_or(0, Bytes::len);
                    self.came(n);
                    self.held = Some(frame);
                }
                Poll::Ready(other) => return Poll::Ready(other),
                Poll::Pending if self.slow.as_mut().poll(context).is_ready() => {
                    let bytes = self.seen;
                    let slow = Error::SlowRequest { bytes };
                    let status = self.share.refusals.status(UNKNOWN, None, slow);
                    return Poll::Ready(Some(Err(status)));
                }
                Poll::Pending => return Poll::Pending,
            }
        }
        if let Err(status) = ready!(self.poll_room(context)) {
            return Poll::Ready(Some(Err(status)));
        }
        Poll::Ready(self.held.take().map(Ok))
    }

    fn is_end_stream(&self) -> bool {
        self.held.is_none() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}

/// A response's body; while it lasts, its call does.
pub struct Lasting {
    body: Body,
    _call: Option<Call>,
}

impl Lasting {
    /// None: nobody counts it.
    pub fn new(body: Body, call: Option<Call>) -> Self {
        Lasting { body, _call: call }
    }
}

impl HttpBody for Lasting {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::sync::mpsc;

    /// A body that a test sends.
    struct Sent(mpsc::UnboundedReceiver<Bytes>);

    impl HttpBody for Sent {
        type Data = Bytes;
        type Error = Status;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            context: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
            self.0.poll_recv(context).map(|bytes| bytes.map(|bytes| Ok(Frame::data(bytes))))
        }
    }

    fn incoming(room: &Room) -> (mpsc::UnboundedSender<Bytes>, Incoming, Share) {
        let ((send, sent), share) = (mpsc::unbounded_channel(), room.share());
        (send, Incoming::new(Body::new(Sent(sent)), share.clone()), share)
    }

    async fn next(incoming: &mut Incoming) -> Option<Result<usize, Status>> {
        let frame = std::future::poll_fn(|cx| Pin::new(&mut *incoming).poll_frame(cx)).await;
        frame.map(|frame| frame.map(|frame| frame.data_ref().map_or(0, Bytes::len)))
    }

    #[tokio::test(start_paused = true)]
    async fn large_requests_wait_for_each_other_and_small_ones_for_nobody() {
        let room = Room::new(LARGE_BYTES_TOGETHER, Arc::default());
        let (large, small) = (Bytes::from(vec![0; SMALL_BYTES + 1]), Bytes::from(vec![0; 9]));
        let (send, mut first, share) = incoming(&room);
        send.send(large.clone()).unwrap();
        assert_eq!(next(&mut first).await.unwrap().unwrap(), large.len());
        drop(first);
        // The handler still works on it.
        let (send, mut second, _) = incoming(&room);
        send.send(large.clone()).unwrap();
        let status = next(&mut second).await.unwrap().unwrap_err();
        assert_eq!(status.code(), tonic::Code::ResourceExhausted);
        assert!(status.metadata().contains_key("grpc-retry-pushback-ms"));
        let (send, mut third, _) = incoming(&room);
        send.send(small).unwrap();
        assert_eq!(next(&mut third).await.unwrap().unwrap(), 9);
        drop(share);
        let (send, mut fourth, _) = incoming(&room);
        send.send(large.clone()).unwrap();
        assert_eq!(next(&mut fourth).await.unwrap().unwrap(), large.len());
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_that_drips_is_refused_and_a_steady_one_is_not() {
        let room = Room::new(1, Arc::default());
        let (_send, mut silent, _) = incoming(&room);
        let begun = Instant::now();
        assert!(next(&mut silent).await.unwrap().unwrap_err().message().contains("too slowly"));
        assert_eq!(begun.elapsed().as_secs(), SLOW.as_secs());
        let (send, mut steady, _) = incoming(&room);
        for _ in 0..100 {
            send.send(Bytes::from(vec![0; LEAST_BYTES_PER_SECOND])).unwrap();
            next(&mut steady).await.unwrap().unwrap();
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        drop(send);
        assert!(next(&mut steady).await.is_none());
    }
}
