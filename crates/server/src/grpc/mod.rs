//! The wire: thin handlers that decode and check, hand over, and encode.

mod call;
pub(crate) mod decode;
mod memory;
mod stream;

use crate::access::{Action, Audit, Caller, Subject};
use crate::engine::{EngineClient, Exported, TrunkInfo};
use crate::error::Error;
use crate::registry::{Listed, OwnSession, Registry, Restored, snapshot_info};
use crate::residency::Tier;
use crate::session::SessionId;
use crate::store::SnapshotRecord;
use call::{Deed, caller};
use offshoot_adapters::LoraSpec;
use offshoot_proto::outgoing::Outgoing;
use offshoot_proto::v1::{self, trunk_service_server::TrunkService};
use offshoot_proto::{HostTensor, WireDType};
use std::sync::Arc;
use stream::StreamContext;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

/// Around a message's tensor.
const MARGIN_BYTES: usize = 64 * 1024;
/// Adapters travel whole in one message; larger ones than this do not.
const MAX_ADAPTER_BYTES: u64 = 1 << 30;
/// Most bytes of a number in a list of lengths or positions, twice for each token.
const NUMBER_BYTES: usize = 5;

/// The service, over the registry.
pub struct TrunkGrpc {
    registry: Arc<Registry>,
    engine: EngineClient,
    limits: v1::Limits,
    audit: Audit,
}

impl TrunkGrpc {
    /// Frames and unary calls of any number of clients.
    pub fn new(registry: Arc<Registry>, engine: EngineClient, audit: Audit) -> Self {
        let limits = registry.limits();
        TrunkGrpc { registry, engine, limits, audit }
    }

    fn deed(&self, caller: Caller, action: Action, subject: Subject) -> Deed {
        Deed { caller, audit: self.audit.clone(), action, subject }
    }

    /// Bytes of the largest frame of a stream.
    pub fn max_frame_bytes(&self) -> usize {
        let per_token = self.engine.trunk().hidden_size * WireDType::F32.size() + 2 * NUMBER_BYTES;
        self.limits.max_tokens_per_microbatch as usize * per_token + MARGIN_BYTES
    }

    /// Bytes of the largest message that a client has reason to send or to expect.
    pub fn max_message_bytes(&self) -> usize {
        let (trunk, limits) = (self.engine.trunk(), &self.limits);
        let adapter = trunk.parameters_per_rank * u64::from(limits.max_rank) * 4;
        // With its names.
        let adapter = (adapter + adapter / 8).min(MAX_ADAPTER_BYTES);
        self.max_frame_bytes().max(adapter as usize + MARGIN_BYTES)
    }
}

#[tonic::async_trait]
impl TrunkService for TrunkGrpc {
    // Nothing: what a stream is sent travels beside it, see `offshoot_proto::outgoing`.
    type TrainStream = tokio_stream::Empty<Result<v1::ServerFrame, Status>>;

    async fn describe(
        &self,
        request: Request<v1::DescribeRequest>,
    ) -> Result<Response<v1::DescribeResponse>, Status> {
        let Caller { tenant, .. } = caller(request.extensions())?;
        let memory = if self.registry.access().is_open() {
            memory::of_all(&self.engine, self.registry.residency())
        } else {
            memory::of_one(&self.engine, &tenant, &self.registry.views(&tenant.name).await)
        };
        let limits = self.registry.limits_for(&tenant);
        Ok(Response::new(describe(self.engine.trunk(), limits, memory)))
    }

    async fn open_session(
        &self,
        request: Request<v1::OpenSessionRequest>,
    ) -> Result<Response<v1::OpenSessionResponse>, Status> {
        let caller = caller(request.extensions())?;
        let tenant = caller.tenant.clone();
        let (trunk, name) = (self.engine.trunk(), tenant.name.as_str().into());
        let request = request.into_inner();
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
        Ok(Response::new(v1::OpenSessionResponse {
            session_id: id.to_string(),
            limits: Some(self.registry.limits_for(&tenant)),
            adapter_parameters: admitted.n_parameters,
            adapter_bytes: admitted.bytes,
        }))
    }

    async fn train(
        &self,
        request: Request<Streaming<v1::ClientFrame>>,
    ) -> Result<Response<Self::TrainStream>, Status> {
        let caller = caller(request.extensions())?;
        let room = self.limits.max_frames_in_flight as usize + stream::EXTRA_ANSWERS;
        let (answers, out) = mpsc::channel(room);
        let context = StreamContext {
            registry: self.registry.clone(),
            account: self.engine.accounts().of(&caller.tenant.name),
            caller,
            audit: self.audit.clone(),
            hidden_size: self.engine.trunk().hidden_size,
            max_tokens: self.limits.max_tokens_per_microbatch as usize,
            max_cache_tokens: self.limits.max_cache_tokens as usize,
        };
        tokio::spawn(stream::run(context, request.into_inner(), answers));
        let mut response = Response::new(tokio_stream::empty());
        let outgoing = Outgoing::new(ReceiverStream::new(out), self.max_message_bytes());
        response.extensions_mut().insert(outgoing);
        Ok(response)
    }

    async fn snapshot(
        &self,
        request: Request<v1::SnapshotRequest>,
    ) -> Result<Response<v1::SnapshotResponse>, Status> {
        let caller = caller(request.extensions())?;
        let v1::SnapshotRequest { session_id, after_sequence, keep } = request.into_inner();
        let own = self.registry.owners().check(&caller.tenant.name, &session_id);
        let registry = self.registry.clone();
        let snapshot = async move { registry.snapshot(own?, after_sequence, keep).await };
        let deed = self.deed(caller, Action::Snapshot, Subject::named(&session_id));
        let named = |taken: &SnapshotRecord, subject: &mut Subject| {
            subject.snapshot = Some(taken.id.clone());
        };
        let snapshot = deed.run(snapshot, named).await?;
        Ok(Response::new(v1::SnapshotResponse { snapshot: Some(snapshot_info(&snapshot)) }))
    }

    async fn restore(
        &self,
        request: Request<v1::RestoreRequest>,
    ) -> Result<Response<v1::RestoreResponse>, Status> {
        let caller = caller(request.extensions())?;
        let tenant = caller.tenant.clone();
        let v1::RestoreRequest { session_id, snapshot_id } = request.into_inner();
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
        Ok(Response::new(v1::RestoreResponse {
            snapshot: Some(snapshot_info(&snapshot)),
            session: Some(session),
            lora: Some(lora_config(settings.lora)),
            wire_dtype: settings.wire_dtype.to_proto() as i32,
        }))
    }

    async fn export_adapter(
        &self,
        request: Request<v1::ExportAdapterRequest>,
    ) -> Result<Response<v1::ExportAdapterResponse>, Status> {
        let caller = caller(request.extensions())?;
        let v1::ExportAdapterRequest { session_id, include_gradients } = request.into_inner();
        let own = self.registry.owners().check(&caller.tenant.name, &session_id);
        let registry = self.registry.clone();
        let export = async move { registry.export(own?, include_gradients).await };
        let deed = self.deed(caller, Action::Export, Subject::named(&session_id));
        let (lora, Exported { tensors, gradients, step }) = deed.run(export, |_, _| {}).await?;
        Ok(Response::new(v1::ExportAdapterResponse {
            lora: Some(lora_config(lora)),
            tensors: tensors.into_iter().map(named_tensor).collect(),
            step,
            gradients: gradients.into_iter().map(named_tensor).collect(),
        }))
    }

    async fn list_sessions(
        &self,
        request: Request<v1::ListSessionsRequest>,
    ) -> Result<Response<v1::ListSessionsResponse>, Status> {
        let Caller { tenant, .. } = caller(request.extensions())?;
        let trunk = self.engine.trunk();
        let info = |listed| session_info(listed, trunk);
        let sessions = self.registry.list(&tenant.name).await?.into_iter().map(info).collect();
        Ok(Response::new(v1::ListSessionsResponse { sessions }))
    }

    async fn close_session(
        &self,
        request: Request<v1::CloseSessionRequest>,
    ) -> Result<Response<v1::CloseSessionResponse>, Status> {
        let caller = caller(request.extensions())?;
        let v1::CloseSessionRequest { session_id, forget } = request.into_inner();
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
        Ok(Response::new(v1::CloseSessionResponse { snapshot }))
    }
}

fn describe(
    trunk: &TrunkInfo,
    limits: v1::Limits,
    memory: v1::MemoryReport,
) -> v1::DescribeResponse {
    v1::DescribeResponse {
        model_name: trunk.model_name.clone(),
        model_type: trunk.model_type.clone(),
        fingerprint: trunk.fingerprint.clone(),
        n_layers: trunk.n_layers as u32,
        split_point_1: trunk.layers.start as u32,
        split_point_2: trunk.layers.end as u32,
        hidden_size: trunk.hidden_size as u32,
        compute_dtype: trunk.compute_dtype.name().into(),
        device: trunk.device.clone(),
        wire_dtypes: WireDType::ALL.iter().map(|dtype| dtype.to_proto() as i32).collect(),
        limits: Some(limits),
        server_version: env!("CARGO_PKG_VERSION").into(),
        lora_modules: trunk.lora_modules.clone(),
        default_target_modules: trunk.default_targets.clone(),
        memory: Some(memory),
    }
}

fn lora_config(spec: LoraSpec) -> v1::LoraConfig {
    let LoraSpec { r, lora_alpha, lora_dropout, use_rslora, target_modules } = spec;
    v1::LoraConfig { r: r as u32, lora_alpha, lora_dropout, use_rslora, target_modules }
}

fn named_tensor((name, tensor): (String, HostTensor)) -> v1::NamedTensor {
    v1::NamedTensor { name, tensor: Some(tensor.into_proto()) }
}

fn session_info(listed: Listed, trunk: &TrunkInfo) -> v1::SessionInfo {
    let Listed { id, record, live } = listed;
    let state = match &live {
        Some(live) if live.is_attached => v1::SessionState::Attached,
        Some(_) => v1::SessionState::Detached,
        None => v1::SessionState::Parked,
    };
    let residency = match live.as_ref().map(|live| live.tier) {
        Some(Tier::Device) => v1::Residency::Device,
        Some(Tier::Host) => v1::Residency::Host,
        Some(Tier::Disk) | None => v1::Residency::Disk,
    };
    let (step, last_applied) = match (&live, record.head()) {
        (Some(live), _) => (live.step, live.applied),
        (None, Some(head)) => (head.step, head.sequence),
        (None, None) => (0, 0),
    };
    v1::SessionInfo {
        session_id: id.to_string(),
        state: state as i32,
        step,
        last_applied,
        adapter_bytes: match residency {
            v1::Residency::Device | v1::Residency::Host => trunk.adapter_bytes(&record.lora),
            v1::Residency::Disk | v1::Residency::Unspecified => 0,
        },
        residency: residency as i32,
        tape_bytes: live.as_ref().map_or(0, |live| live.tape_bytes),
        cache_bytes: live.as_ref().map_or(0, |live| live.cache_bytes),
        wire_error: live.as_ref().map(|live| live.wire_loss.to_proto()),
        snapshots: record.snapshots.iter().map(snapshot_info).collect(),
        lora: Some(lora_config(record.lora)),
        name: record.name,
    }
}
