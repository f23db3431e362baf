//! What is not training: the server at a glance, and what may be done to sessions from outside. A tenant
//! finds its own sessions, an operator everybody's.

use super::unary::{Call, Repeat};
use super::{CONTROL_BYTES, Client};
use crate::ClientError;
use crate::operations::{Overview, SnapshotView, TenantView};
use crate::types::SessionId;
use offshoot_proto::v1::{self, operations_service_client::OperationsServiceClient};
use tonic::transport::Channel;
use tonic::{Code, Status};

type Rpc = OperationsServiceClient<Channel>;

impl Client {
    /// Everything at a glance: the server, the sessions, the samples after this moment (Unix milliseconds;
    /// 0: of the last hour), and what was refused.
    pub async fn overview(&self, samples_since_millis: u64) -> Result<Overview, ClientError> {
        let request = v1::OverviewRequest { samples_since_millis };
        let ask = |mut rpc: Rpc, request| async move { rpc.overview(request).await };
        self.operate(self.call("Overview"), request, ask).await
    }

    /// The snapshots of a session, newest first.
    pub async fn list_snapshots(&self, id: &SessionId) -> Result<Vec<SnapshotView>, ClientError> {
        let request = v1::ListSnapshotsRequest { session_id: id.to_string() };
        let ask = |mut rpc: Rpc, request| async move { rpc.list_snapshots(request).await };
        let answer = self.operate(self.call("ListSnapshots"), request, ask).await?;
        Ok(answer.snapshots)
    }

    /// Takes a session off the device as soon as it has come to the end of what it began; its next frame
    /// brings it back, and its client notices nothing. Returns when it has left. A pinned session is
    /// refused.
    pub async fn evict_session(&self, id: &SessionId) -> Result<(), ClientError> {
        let request = v1::EvictSessionRequest { session_id: id.to_string() };
        let ask = |mut rpc: Rpc, request| async move { rpc.evict_session(request).await };
        self.operate(self.at_once("EvictSession"), request, ask).await.map(drop)
    }

    /// Keeps a live session on the device however idle it is, until it is unpinned or parked; or lets it
    /// come and go again.
    pub async fn pin_session(&self, id: &SessionId, pinned: bool) -> Result<(), ClientError> {
        let request = v1::PinSessionRequest { session_id: id.to_string(), pinned };
        let ask = |mut rpc: Rpc, request| async move { rpc.pin_session(request).await };
        self.operate(self.at_once("PinSession"), request, ask).await.map(drop)
    }

    /// Ends a session, whoever uses it, and deletes it with all its snapshots.
    pub async fn delete_session(&self, id: &SessionId) -> Result<(), ClientError> {
        let request = v1::DeleteSessionRequest { session_id: id.to_string() };
        let ask = |mut rpc: Rpc, request| async move { rpc.delete_session(request).await };
        self.operate(self.once("DeleteSession"), request, ask).await.map(drop)
    }

    /// Deletes one snapshot of a session; the one that it goes on from is refused.
    pub async fn delete_snapshot(
        &self,
        id: &SessionId,
        snapshot_id: &str,
    ) -> Result<(), ClientError> {
        let (session_id, snapshot_id) = (id.to_string(), snapshot_id.to_string());
        let request = v1::DeleteSnapshotRequest { session_id, snapshot_id };
        let ask = |mut rpc: Rpc, request| async move { rpc.delete_snapshot(request).await };
        self.operate(self.once("DeleteSnapshot"), request, ask).await.map(drop)
    }

    /// The tenants with their use and quotas: all for an operator, else the own one.
    pub async fn list_tenants(&self) -> Result<Vec<TenantView>, ClientError> {
        let ask = |mut rpc: Rpc, request| async move { rpc.list_tenants(request).await };
        let request = v1::ListTenantsRequest {};
        let answer = self.operate(self.call("ListTenants"), request, ask).await?;
        Ok(answer.tenants)
    }

    /// Somebody waits for the answer: a server that has no room for this now says so.
    fn at_once(&self, name: &'static str) -> Call {
        Call { waits_for_room: false, ..self.call(name) }
    }

    /// What is gone cannot be deleted again.
    fn once(&self, name: &'static str) -> Call {
        Call { repeat: Repeat::OnlyUnsent, ..self.at_once(name) }
    }

    async fn operate<Q: Clone, A, F>(
        &self,
        call: Call,
        request: Q,
        ask: impl Fn(Rpc, tonic::Request<Q>) -> F,
    ) -> Result<A, ClientError>
    where
        F: Future<Output = Result<tonic::Response<A>, Status>>,
    {
        let channel = self.shared.channel.clone();
        let rpc = OperationsServiceClient::new(channel).max_decoding_message_size(CONTROL_BYTES);
        let asked = |request| {
            let asked = ask(rpc.clone(), request);
            async move { asked.await.map_err(explain_old) }
        };
        self.unary_of(call, request, asked).await
    }
}

/// A server from before there was this service.
fn explain_old(status: Status) -> Status {
    match status.code() {
        Code::Unimplemented => Status::unimplemented(
            "this server does not know the call: it is older than this program, or something before \
             it lets only offshoot.v1.TrunkService through",
        ),
        _ => status,
    }
}
