//! OperationsService: thin handlers around [`Operations`].

use super::Operations;
use crate::access::Caller;
use crate::error::Error;
use crate::grpc::caller;
use crate::session::SessionId;
use offshoot_proto::v1::{self, operations_service_server::OperationsService};
use std::sync::Arc;
use tonic::{Request, Response, Status};

/// Bytes of the largest request: ids and numbers.
pub const MAX_REQUEST_BYTES: usize = 16 << 10;
/// Bytes of the largest answer: the sessions of an overview, which are counted.
pub const MAX_ANSWER_BYTES: usize = 16 << 20;

/// The service.
pub struct OperationsGrpc(Arc<Operations>);

impl OperationsGrpc {
    /// Over what there is to see and to do.
    pub fn new(operations: Arc<Operations>) -> Self {
        OperationsGrpc(operations)
    }

    /// Who calls, and what is asked for.
    fn open<T>(&self, request: Request<T>) -> Result<(Caller, T), Status> {
        match caller(request.extensions()) {
            Ok(caller) => Ok((caller, request.into_inner())),
            Err(error) => Err(self.0.registry.refusals().status("", None, error)),
        }
    }

    /// An answer on its way out, about a session if one was named.
    fn told<T>(
        &self,
        caller: &Caller,
        session: &str,
        answer: Result<T, Error>,
    ) -> Result<Response<T>, Status> {
        let session = SessionId::parse(session);
        let refused =
            |error| self.0.registry.refusals().status(&caller.tenant.name, session, error);
        answer.map(Response::new).map_err(refused)
    }
}

#[tonic::async_trait]
impl OperationsService for OperationsGrpc {
    async fn overview(
        &self,
        request: Request<v1::OverviewRequest>,
    ) -> Result<Response<v1::OverviewResponse>, Status> {
        let (caller, v1::OverviewRequest { samples_since_millis }) = self.open(request)?;
        // A thousand sessions are some milliseconds of work, which is not for the threads that serve
        // frames.
        let (operations, who) = (self.0.clone(), caller.clone());
        let look = move || operations.overview(&who, samples_since_millis);
        let overview = tokio::task::spawn_blocking(look).await;
        self.told(&caller, "", overview.map_err(|_| Error::Gone { part: "overview" }))
    }

    async fn list_snapshots(
        &self,
        request: Request<v1::ListSnapshotsRequest>,
    ) -> Result<Response<v1::ListSnapshotsResponse>, Status> {
        let (caller, v1::ListSnapshotsRequest { session_id }) = self.open(request)?;
        let listed = self.0.snapshots(&caller, &session_id).await;
        self.told(&caller, &session_id, listed)
    }

    async fn evict_session(
        &self,
        request: Request<v1::EvictSessionRequest>,
    ) -> Result<Response<v1::EvictSessionResponse>, Status> {
        let (caller, v1::EvictSessionRequest { session_id }) = self.open(request)?;
        let done = self.0.evict(&caller, &session_id).await;
        self.told(&caller, &session_id, done)
    }

    async fn pin_session(
        &self,
        request: Request<v1::PinSessionRequest>,
    ) -> Result<Response<v1::PinSessionResponse>, Status> {
        let (caller, v1::PinSessionRequest { session_id, pinned }) = self.open(request)?;
        let done = self.0.pin(&caller, &session_id, pinned).await;
        self.told(&caller, &session_id, done)
    }

    async fn delete_session(
        &self,
        request: Request<v1::DeleteSessionRequest>,
    ) -> Result<Response<v1::DeleteSessionResponse>, Status> {
        let (caller, v1::DeleteSessionRequest { session_id }) = self.open(request)?;
        let done = self.0.delete_session(&caller, &session_id).await;
        self.told(&caller, &session_id, done)
    }

    async fn delete_snapshot(
        &self,
        request: Request<v1::DeleteSnapshotRequest>,
    ) -> Result<Response<v1::DeleteSnapshotResponse>, Status> {
        let (caller, request) = self.open(request)?;
        let v1::DeleteSnapshotRequest { session_id, snapshot_id } = request;
        let done = self.0.delete_snapshot(&caller, &session_id, &snapshot_id).await;
        self.told(&caller, &session_id, done)
    }

    async fn list_tenants(
        &self,
        request: Request<v1::ListTenantsRequest>,
    ) -> Result<Response<v1::ListTenantsResponse>, Status> {
        let (caller, v1::ListTenantsRequest {}) = self.open(request)?;
        let tenants = self.0.tenants(&caller);
        self.told(&caller, "", Ok(tenants))
    }
}
