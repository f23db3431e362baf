use super::audit::Audit;
use super::{Access, Caller};
use crate::error::Error;
use crate::refusals::Refusals;
use crate::trace;
use http::{Request, Response};
use std::net::SocketAddr;
use std::sync::Arc;
use std::task::{Context, Poll};
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::{BoxFuture, Service};
use tonic::server::NamedService;
use tonic::transport::server::TcpConnectInfo;
use tracing::Instrument;

/// Around a service: only callers get in. A request without a valid token is answered before
/// anything of its body is read; one with a token has its [`Caller`] in its extensions.
#[derive(Clone)]
pub struct Gate<S> {
    inner: S,
    keeper: Keeper,
}

/// Who lets callers in, and notes whom it did not.
#[derive(Clone)]
pub struct Keeper {
    pub access: Arc<Access>,
    pub audit: Audit,
    pub refusals: Arc<Refusals>,
}

impl Keeper {
    /// Puts a service behind the gate.
    pub fn guard<S>(&self, inner: S) -> Gate<S> {
        Gate { inner, keeper: self.clone() }
    }

    /// Who makes this request.
    pub fn admit<B>(&self, request: &Request<B>) -> Result<Caller, Error> {
        let peer = peer(request);
        let admitted = self.access.authenticate(request.headers(), peer);
        if admitted.is_err() {
            // Not what was sent: it may be somebody's token with a slip of the pen.
            tracing::debug!(?peer, path = request.uri().path(), "no valid token");
            let stranger = self.access.stranger(request.headers(), peer);
            self.access.refused(&stranger);
            self.audit.refused(&stranger);
        }
        admitted
    }
}

fn peer<B>(request: &Request<B>) -> Option<SocketAddr> {
    request.extensions().get::<TcpConnectInfo>()?.remote_addr()
}

impl<S, B> Service<Request<B>> for Gate<S>
where
    S: Service<Request<B>, Response = Response<Body>>,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = BoxFuture<Response<Body>, S::Error>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        match self.keeper.admit(&request) {
            Ok(caller) => {
                let path = request.uri().path();
                let span = trace::called(path, request.headers(), &caller.tenant.name);
                let (access, tenant) = (self.keeper.access.clone(), caller.tenant.clone());
                request.extensions_mut().insert(caller);
                let called = self.inner.call(request).instrument(span);
                Box::pin(async move {
                    let response = called.await?;
                    // A refusal has its status in the headers, where other answers have none.
                    if let Some(status) = Status::from_header_map(response.headers()) {
                        access.patience().wait(&tenant.name, status.code()).await;
                    }
                    Ok(response)
                })
            }
            Err(error) => {
                // Whoever it is, is no tenant.
                let refusal = self.keeper.refusals.status("", None, error);
                let access = self.keeper.access.clone();
                Box::pin(async move {
                    access.patience().wait("", refusal.code()).await;
                    Ok(refusal.into_http())
                })
            }
        }
    }
}

impl<S: NamedService> NamedService for Gate<S> {
    const NAME: &'static str = S::NAME;
}
