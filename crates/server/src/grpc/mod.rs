//! The wire: thin handlers that decode and check, hand over, and encode.

mod decode;
mod stream;

use crate::engine::{EngineClient, Exported, TrunkInfo};
use crate::error::Error;
use crate::ledger::Usage;
use crate::registry::{Listed, Registry, Restored, snapshot_info};
use crate::residency::{Residency, Tier};
use offshoot_adapters::LoraSpec;
use offshoot_proto::outgoing::Outgoing;
use offshoot_proto::v1::{self, trunk_service_server::TrunkService};
use offshoot_proto::{HostTensor, WireDType};
use std::sync::Arc;
use std::sync::atomic::Ordering;
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
}

impl TrunkGrpc {
    /// Frames and unary calls of any number of clients.
    pub fn new(registry: Arc<Registry>, engine: EngineClient) -> Self {
        let limits = registry.limits();
        TrunkGrpc { registry, engine, limits }
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
        _: Request<v1::DescribeRequest>,
    ) -> Result<Response<v1::DescribeResponse>, Status> {
        let memory = memory(&self.engine, self.registry.residency());
        Ok(Response::new(describe(self.engine.trunk(), self.limits, memory)))
    }

    async fn open_session(
        &self,
        request: Request<v1::OpenSessionRequest>,
    ) -> Result<Response<v1::OpenSessionResponse>, Status> {
        let (trunk, tenant) = (self.engine.trunk(), Arc::default());
        let opening = decode::opening(request.into_inner(), trunk, &self.limits, tenant)?;
        let registry = self.registry.clone();
        let (id, admitted) = finish(async move { registry.open(opening).await }).await?;
        Ok(Response::new(v1::OpenSessionResponse {
            session_id: id.to_string(),
            limits: Some(self.limits),
            adapter_parameters: admitted.n_parameters,
            adapter_bytes: admitted.bytes,
        }))
    }

    async fn train(
        &self,
        request: Request<Streaming<v1::ClientFrame>>,
    ) -> Result<Response<Self::TrainStream>, Status> {
        let room = self.limits.max_frames_in_flight as usize + stream::EXTRA_ANSWERS;
        let (answers, out) = mpsc::channel(room);
        let context = StreamContext {
            registry: self.registry.clone(),
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
        let v1::SnapshotRequest { session_id, after_sequence, keep } = request.into_inner();
        let (id, registry) = (decode::session_id(&session_id)?, self.registry.clone());
        let snapshot = async move { registry.snapshot(id, after_sequence, keep).await };
        let snapshot = finish(snapshot).await?;
        Ok(Response::new(v1::SnapshotResponse { snapshot: Some(snapshot_info(&snapshot)) }))
    }

    async fn restore(
        &self,
        request: Request<v1::RestoreRequest>,
    ) -> Result<Response<v1::RestoreResponse>, Status> {
        let v1::RestoreRequest { session_id, snapshot_id } = request.into_inner();
        let (id, registry) = (decode::session_id(&session_id)?, self.registry.clone());
        let restored = finish(async move { registry.restore(id, &snapshot_id).await }).await?;
        let Restored { snapshot, n_parameters, adapter_bytes, settings } = restored;
        let session = v1::OpenSessionResponse {
            session_id: id.to_string(),
            limits: Some(self.limits),
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
        let v1::ExportAdapterRequest { session_id, include_gradients } = request.into_inner();
        let (id, registry) = (decode::session_id(&session_id)?, self.registry.clone());
        let export = async move { registry.export(id, include_gradients).await };
        let (lora, Exported { tensors, gradients, step }) = finish(export).await?;
        Ok(Response::new(v1::ExportAdapterResponse {
            lora: Some(lora_config(lora)),
            tensors: tensors.into_iter().map(named_tensor).collect(),
            step,
            gradients: gradients.into_iter().map(named_tensor).collect(),
        }))
    }

    async fn list_sessions(
        &self,
        _: Request<v1::ListSessionsRequest>,
    ) -> Result<Response<v1::ListSessionsResponse>, Status> {
        let trunk = self.engine.trunk();
        let info = |listed| session_info(listed, trunk);
        let sessions = self.registry.list().await?.into_iter().map(info).collect();
        Ok(Response::new(v1::ListSessionsResponse { sessions }))
    }

    async fn close_session(
        &self,
        request: Request<v1::CloseSessionRequest>,
    ) -> Result<Response<v1::CloseSessionResponse>, Status> {
        let v1::CloseSessionRequest { session_id, forget } = request.into_inner();
        let (id, registry) = (decode::session_id(&session_id)?, self.registry.clone());
        let snapshot = finish(async move { registry.close(id, forget).await }).await?;
        let snapshot = snapshot.as_ref().map(snapshot_info);
        Ok(Response::new(v1::CloseSessionResponse { snapshot }))
    }
}

/// Runs to its end even if the caller hangs up: nothing is left half done.
async fn finish<T: Send + 'static>(
    call: impl Future<Output = Result<T, Error>> + Send + 'static,
) -> Result<T, Error> {
    let gone = |_| Error::Gone { part: "call" };
    tokio::spawn(call).await.map_err(gone)?
}

fn memory(engine: &EngineClient, residency: &Residency) -> v1::MemoryReport {
    let Usage { budget, now, peak, peak_total } = engine.ledger().usage();
    let host = residency.host().usage();
    v1::MemoryReport {
        resident_bytes: resident_bytes(),
        weights_bytes: now.weights,
        adapter_bytes: now.adapters,
        tape_bytes: now.tapes,
        live_sessions: residency.n_live() as u32,
        open_microbatches: engine.stats().n_tapes.load(Ordering::Relaxed) as u32,
        workspace_bytes: now.workspace,
        budget_bytes: budget.unwrap_or(0),
        peak: Some(v1::PeakBytes {
            adapter_bytes: peak.adapters,
            tape_bytes: peak.tapes,
            workspace_bytes: peak.workspace,
            total_bytes: peak_total,
            cache_bytes: peak.caches,
        }),
        host_bytes: host.now.adapters,
        host_budget_bytes: host.budget.unwrap_or(0),
        sessions_on_device: residency.count(Tier::Device) as u32,
        sessions_on_host: residency.count(Tier::Host) as u32,
        waiting_for_room: residency.n_waiting() as u32,
        cache_bytes: now.caches,
        open_caches: engine.stats().n_caches.load(Ordering::Relaxed) as u32,
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

/// Resident set of this process; 0 where /proc is not there.
fn resident_bytes() -> u64 {
    // Not statm: that counts pages, and their size cannot be asked for without unsafe code.
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let kilobytes = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let number = kilobytes.and_then(|text| text.trim().trim_end_matches(" kB").parse::<u64>().ok());
    number.unwrap_or(0) * 1024
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
