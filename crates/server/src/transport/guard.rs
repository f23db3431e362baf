//! Around every request: its connection is busy while it runs, and what it sends is bounded before
//! a handler has seen any of it.

use super::Peer;
use super::body::{Incoming, Lasting, Room};
use super::caught::Caught;
use crate::refusals::Refusals;
use http::{Request, Response};
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use tonic::body::Body;
use tower::{Layer, Service};

/// The service whose calls are work; others (health, reflection) come and go.
const TRUNK: &str = "/offshoot.v1.TrunkService/";
/// Its one stream. Its frames are bounded by what the server may record of it.
const STREAM: &str = "/offshoot.v1.TrunkService/Train";

/// Puts [`Guard`] around the services.
#[derive(Clone)]
pub struct GuardLayer {
    room: Arc<Room>,
}

impl GuardLayer {
    /// With requests of at most so many bytes.
    pub fn new(max_request_bytes: usize, refusals: Arc<Refusals>) -> Self {
        GuardLayer { room: Arc::new(Room::new(max_request_bytes, refusals)) }
    }
}

impl<S> Layer<S> for GuardLayer {
    type Service = Guard<S>;

    fn layer(&self, inner: S) -> Guard<S> {
        Guard { inner, room: self.room.clone() }
    }
}

/// See the module's text.
#[derive(Clone)]
pub struct Guard<S> {
    inner: S,
    room: Arc<Room>,
}

impl<S> Service<Request<Body>> for Guard<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        let path = request.uri().path();
        let (is_trunk, is_stream) = (path.starts_with(TRUNK), path == STREAM);
        let call = request.extensions().get::<Peer>().cloned().map(|peer| {
            // As handlers know them from tonic.
            request.extensions_mut().insert(peer.tcp);
            if let Some(tls) = peer.tls {
                request.extensions_mut().insert(tls);
            }
            if is_trunk {
                Some(peer.state.call())
            } else {
                peer.state.touch();
                None
            }
        });
        let (bounded, share) = match is_stream {
            true => (request, None),
            false => {
                let share = self.room.share();
                (request.map(|body| Body::new(Incoming::new(body, share.clone()))), Some(share))
            }
        };
        let answer = Caught::new(self.inner.call(bounded));
        Box::pin(async move {
            let answer = answer.await;
            // What it took is free when the handler is done with it.
            drop(share);
            answer
                .map(|response| response.map(|body| Body::new(Lasting::new(body, call.flatten()))))
        })
    }
}
