//! The wire: thin handlers that decode and check, hand over, and encode.

mod call;
pub(crate) mod decode;
mod memory;
mod stream;
mod unary;
pub(crate) mod views;

use crate::access::{Audit, Caller};
use crate::engine::EngineClient;
use crate::error::Error;
use crate::registry::Registry;
use crate::session::SessionId;
use crate::trace;
pub(crate) use call::{Deed, caller};
use offshoot_proto::WireDType;
use offshoot_proto::outgoing::Outgoing;
use offshoot_proto::v1::{self, trunk_service_server::TrunkService};
use std::sync::Arc;
use stream::StreamContext;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Extensions, Request, Response, Status, Streaming};

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

    fn caller(&self, extensions: &Extensions) -> Result<Caller, Status> {
        caller(extensions).map_err(|error| self.registry.refusals().status("", None, error))
    }

    /// Answers a call; a refusal of it gets its id, and is about this session if one is named.
    async fn answer<Q, A, F>(
        &self,
        request: Request<Q>,
        session: Option<SessionId>,
        answer: impl FnOnce(Caller, Q) -> F + Send,
    ) -> Result<Response<A>, Status>
    where
        Q: Send,
        F: Future<Output = Result<A, Error>> + Send,
    {
        let caller = self.caller(request.extensions())?;
        let tenant = caller.tenant.name.clone();
        let answered = answer(caller, request.into_inner()).await;
        answered.map(Response::new).map_err(|error| {
            trace::failed(&tracing::Span::current(), &error);
            self.registry.refusals().status(&tenant, session, error)
        })
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
        let about = None;
        self.answer(request, about, |caller, asked| self.describe_to(caller, asked)).await
    }

    async fn open_session(
        &self,
        request: Request<v1::OpenSessionRequest>,
    ) -> Result<Response<v1::OpenSessionResponse>, Status> {
        let about = None;
        self.answer(request, about, |caller, asked| self.open(caller, asked)).await
    }

    async fn train(
        &self,
        request: Request<Streaming<v1::ClientFrame>>,
    ) -> Result<Response<Self::TrainStream>, Status> {
        let caller = self.caller(request.extensions())?;
        let room = self.limits.max_frames_in_flight as usize + stream::EXTRA_ANSWERS;
        let (answers, out) = mpsc::channel(room);
        let context = StreamContext {
            registry: self.registry.clone(),
            account: self.engine.accounts().of(&caller.tenant.name),
            caller,
            audit: self.audit.clone(),
            refusals: self.registry.refusals().clone(),
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
        let about = SessionId::parse(&request.get_ref().session_id);
        self.answer(request, about, |caller, asked| self.take_snapshot(caller, asked)).await
    }

    async fn restore(
        &self,
        request: Request<v1::RestoreRequest>,
    ) -> Result<Response<v1::RestoreResponse>, Status> {
        let about = SessionId::parse(&request.get_ref().session_id);
        self.answer(request, about, |caller, asked| self.set_back(caller, asked)).await
    }

    async fn export_adapter(
        &self,
        request: Request<v1::ExportAdapterRequest>,
    ) -> Result<Response<v1::ExportAdapterResponse>, Status> {
        let about = SessionId::parse(&request.get_ref().session_id);
        self.answer(request, about, |caller, asked| self.export(caller, asked)).await
    }

    async fn list_sessions(
        &self,
        request: Request<v1::ListSessionsRequest>,
    ) -> Result<Response<v1::ListSessionsResponse>, Status> {
        let about = None;
        self.answer(request, about, |caller, asked| self.list(caller, asked)).await
    }

    async fn close_session(
        &self,
        request: Request<v1::CloseSessionRequest>,
    ) -> Result<Response<v1::CloseSessionResponse>, Status> {
        let about = SessionId::parse(&request.get_ref().session_id);
        self.answer(request, about, |caller, asked| self.close(caller, asked)).await
    }
}
