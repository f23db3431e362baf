//! The unary calls of who is let in, each with its checked answer or an error.

use super::call::Deed;
use super::{TrunkGrpc, decode, views};
use crate::access::{Action, Caller, Subject};
use crate::engine::Exported;
use crate::error::Error;
use crate::registry::{Listed, OwnSession, Restored, snapshot_info};
use crate::session::SessionId;
use crate::store::SnapshotRecord;
use offshoot_proto::{HostTensor, v1};

impl TrunkGrpc {
    fn deed(&self, caller: Caller, action: Action, subject: Subject) -> Deed {
        Deed { caller, audit: self.audit.clone(), action, subject }
    }

    pub(super) async fn describe_to(
        &self,
        caller: Caller,
        _request: v1::DescribeRequest,
    ) -> Result<v1::DescribeResponse, Error> {
        Ok(views::describe(&self.registry, &self.engine, &caller))
    }

    pub(super) async fn open(
        &self,
        caller: Caller,
        request: v1::OpenSessionRequest,
    ) -> Result<v1::OpenSessionResponse, Error> {
        let tenant = caller.tenant.clone();
        let (trunk, name) = (self.engine.trunk(), tenant.name.as_str().into());
        if let Some(lora) = &request.lora {
            self.engine.accounts().of(&tenant.name).check_rank(lora.r).map_err(Error::from)?;
        }
        let opening = decode::opening(request, trunk, &self.limits, name)?;
        let registry = self.registry.clone();
        let open = async move { registry.open(opening).await };
        let deed = self.deed(caller, Action::Open, Subject::default());
        let named = |(id, _): &(SessionId, _), subject: &mut Subject| {
            subject.session = Some(id.to_string());
        };
        let (id, admitted) = deed.run(open, named).await?;
        Ok(v1::OpenSessionResponse {
            session_id: id.to_string(),
            limits: Some(self.registry.limits_for(&tenant)),
            adapter_parameters: admitted.n_parameters,
            adapter_bytes: admitted.bytes,
        })
    }

    pub(super) async fn take_snapshot(
        &self,
        caller: Caller,
        request: v1::SnapshotRequest,
    ) -> Result<v1::SnapshotResponse, Error> {
        let v1::SnapshotRequest { session_id, after_sequence, keep } = request;
        let own = self.registry.owners().check(&caller.tenant.name, &session_id);
        let registry = self.registry.clone();
        let snapshot = async move { registry.snapshot(own?, after_sequence, keep).await };
        let deed = self.deed(caller, Action::Snapshot, Subject::named(&session_id));
        let named = |taken: &SnapshotRecord, subject: &mut Subject| {
            subject.snapshot = Some(taken.id.clone());
        };
        let snapshot = deed.run(snapshot, named).await?;
        Ok(v1::SnapshotResponse { snapshot: Some(snapshot_info(&snapshot)) })
    }

    pub(super) async fn set_back(
        &self,
        caller: Caller,
        request: v1::RestoreRequest,
    ) -> Result<v1::RestoreResponse, Error> {
        let tenant = caller.tenant.clone();
        let v1::RestoreRequest { session_id, snapshot_id } = request;
        let own = self.registry.owners().check(&tenant.name, &session_id);
        let registry = self.registry.clone();
        let restore = async move {
            let own = own?;
            Ok((own, registry.restore(own, &snapshot_id).await?))
        };
        let deed = self.deed(caller, Action::Restore, Subject::named(&session_id));
        let named = |(_, done): &(OwnSession, Restored), subject: &mut Subject| {
            subject.snapshot = Some(done.snapshot.id.clone());
        };
        let (own, restored) = deed.run(restore, named).await?;
        let Restored { snapshot, n_parameters, adapter_bytes, settings } = restored;
        let session = v1::OpenSessionResponse {
            session_id: own.id().to_string(),
            limits: Some(self.registry.limits_for(&tenant)),
            adapter_parameters: n_parameters,
            adapter_bytes,
        };
        Ok(v1::RestoreResponse {
            snapshot: Some(snapshot_info(&snapshot)),
            session: Some(session),
            lora: Some(views::lora_config(settings.lora)),
            wire_dtype: settings.wire_dtype.to_proto() as i32,
        })
    }

    pub(super) async fn export(
        &self,
        caller: Caller,
        request: v1::ExportAdapterRequest,
    ) -> Result<v1::ExportAdapterResponse, Error> {
        let v1::ExportAdapterRequest { session_id, include_gradients } = request;
        let own = self.registry.owners().check(&caller.tenant.name, &session_id);
        let registry = self.registry.clone();
        let export = async move { registry.export(own?, include_gradients).await };
        let deed = self.deed(caller, Action::Export, Subject::named(&session_id));
        let (lora, Exported { tensors, gradients, step }) = deed.run(export, |_, _| {}).await?;
        Ok(v1::ExportAdapterResponse {
            lora: Some(views::lora_config(lora)),
            tensors: tensors.into_iter().map(named_tensor).collect(),
            step,
            gradients: gradients.into_iter().map(named_tensor).collect(),
        })
    }

    pub(super) async fn list(
        &self,
        caller: Caller,
        _request: v1::ListSessionsRequest,
    ) -> Result<v1::ListSessionsResponse, Error> {
        let Caller { tenant, .. } = caller;
        let trunk = self.engine.trunk();
        let info = |Listed { id, record, live }: &Listed| v1::SessionInfo {
            snapshots: record.snapshots.iter().map(snapshot_info).collect(),
            ..views::session_info(*id, record, live.as_ref(), trunk)
        };
        let sessions = self.registry.list(&tenant.name).await?.iter().map(info).collect();
        Ok(v1::ListSessionsResponse { sessions })
    }

    pub(super) async fn close(
        &self,
        caller: Caller,
        request: v1::CloseSessionRequest,
    ) -> Result<v1::CloseSessionResponse, Error> {
        let v1::CloseSessionRequest { session_id, forget } = request;
        let own = self.registry.owners().check(&caller.tenant.name, &session_id);
        let registry = self.registry.clone();
        let close = async move { registry.close(own?, forget).await };
        let action = if forget { Action::Forget } else { Action::Close };
        let deed = self.deed(caller, action, Subject::named(&session_id));
        let named = |taken: &Option<SnapshotRecord>, subject: &mut Subject| {
            subject.snapshot = taken.as_ref().map(|taken| taken.id.clone());
        };
        let snapshot = deed.run(close, named).await?;
        let snapshot = snapshot.as_ref().map(snapshot_info);
        Ok(v1::CloseSessionResponse { snapshot })
    }
}

fn named_tensor((name, tensor): (String, HostTensor)) -> v1::NamedTensor {
    v1::NamedTensor { name, tensor: Some(tensor.into_proto()) }
}
