//! A panic in a handler is that call's answer. Without this it would end the connection, and with it
//! the calls and streams of everybody who came through the same proxy.

use http::Response;
use std::convert::Infallible;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::task::{Context, Poll};
use tonic::Status;
use tonic::body::Body;

type Answer = Result<Response<Body>, Infallible>;

/// A call under way.
pub(super) struct Caught<F>(Option<Pin<Box<F>>>);

impl<F: Future<Output = Answer>> Caught<F> {
    pub fn new(call: F) -> Self {
        Caught(Some(Box::pin(call)))
    }
}

impl<F: Future<Output = Answer>> Future for Caught<F> {
    type Output = Answer;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Answer> {
        let Some(call) = &mut self.0 else { return Poll::Pending };
        catch_unwind(AssertUnwindSafe(|| call.as_mut().poll(context))).unwrap_or_else(|_| {
            // Dropped where it is not polled again.
            self.0 = None;
            tracing::error!("a call panicked");
            let failed = Status::internal("the call failed inside the server; look at its log");
            Poll::Ready(Ok(failed.into_http()))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_panic_is_an_internal_error_of_its_call() {
        let fine = Caught::new(async { Ok(Response::new(Body::empty())) }).await.unwrap();
        assert!(fine.headers().get("grpc-status").is_none());
        let panics = async {
            tokio::task::yield_now().await;
            panic!("in a handler")
        };
        let failed = Caught::new(panics).await.unwrap();
        assert_eq!(failed.headers()["grpc-status"], "13");
    }
}
