mod operations;
mod unary;

use crate::driver::Driver;
use crate::identity::Token;
use crate::loss::SentLoss;
use crate::options::{ClientOptions, Retry};
use crate::outage::Link;
use crate::session::Session;
use crate::types::{
    ExportedAdapter, OpenSession, Restored, ServerDescription, SessionId, SessionInfo, missing,
};
use crate::{ClientError, address, status, trace};
use offshoot_proto::WireDType;
use offshoot_proto::outgoing::ClientTransport;
use offshoot_proto::v1::{self, trunk_service_client::TrunkServiceClient};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tonic::transport::{Channel, Uri};
use unary::{Call, Repeat};

pub(crate) type Rpc = TrunkServiceClient<ClientTransport<Channel>>;

/// Room for what is no tensor in a message.
const MARGIN_BYTES: usize = 1 << 20;
/// For descriptions and lists.
const CONTROL_BYTES: usize = 16 << 20;
/// Of any message that protobuf's libraries can take.
const MOST_MESSAGE_BYTES: u64 = (2 << 30) - CONTROL_BYTES as u64;

/// A connection to one trunk server. Cloning it is cheap; all clones and all sessions share one
/// HTTP/2 connection, which is made again by itself when it breaks.
#[derive(Debug, Clone)]
pub struct Client {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    endpoint: String,
    options: ClientOptions,
    channel: Channel,
    uri: Uri,
    link: Link,
    /// As in the options, or as its file has it since the server no longer took that.
    token: Mutex<Option<Token>>,
    /// Whether people were told that a quota of tokens slows them.
    told_of_rate: AtomicBool,
    /// Largest message on a session's stream.
    frame_bytes: usize,
    hidden_size: usize,
}

impl Client {
    /// Connects to `host:port`, `http://host:port` or `https://host:port` with the default options, and
    /// asks the server what it holds.
    pub async fn connect(endpoint: &str) -> Result<Client, ClientError> {
        Client::connect_with(endpoint, ClientOptions::default()).await
    }

    /// Connects with options.
    pub async fn connect_with(
        endpoint: &str,
        options: ClientOptions,
    ) -> Result<Client, ClientError> {
        let address = address::to_endpoint(endpoint, &options)?;
        let (uri, channel) = (address.uri().clone(), address.connect_lazy());
        let patience = Retry { max_elapsed: options.connect_patience, ..options.retry };
        let mut client = Client {
            shared: Arc::new(Shared {
                endpoint: endpoint.to_string(),
                options: options.clone(),
                channel: channel.clone(),
                uri: uri.clone(),
                link: Link::default(),
                token: Mutex::new(options.token.clone()),
                told_of_rate: AtomicBool::new(false),
                frame_bytes: MARGIN_BYTES,
                hidden_size: 0,
            }),
        };
        let call = Call { retry: patience, first: true, ..client.call("Describe") };
        let server = client.describe_by(call).await.map_err(|error| match error {
            ClientError::Refused { message, .. } => {
                ClientError::NotATrunkServer { endpoint: endpoint.to_string(), cause: message }
            }
            other => other,
        })?;
        let tokens = server.limits.max_tokens_per_microbatch as usize;
        client.shared = Arc::new(Shared {
            endpoint: endpoint.to_string(),
            options,
            channel,
            uri,
            link: Link::default(),
            token: Mutex::new(client.token()),
            told_of_rate: AtomicBool::new(false),
            // Tensors in f32, the widest dtype; per token a position and a length beside them.
            frame_bytes: tokens
                .saturating_mul(4 * server.hidden_size + 16)
                .saturating_add(MARGIN_BYTES),
            hidden_size: server.hidden_size,
        });
        Ok(client)
    }

    /// What the server holds, and the bytes that it uses now.
    pub async fn describe(&self) -> Result<ServerDescription, ClientError> {
        self.describe_by(self.call("Describe")).await
    }

    async fn describe_by(&self, call: Call) -> Result<ServerDescription, ClientError> {
        let ask = |mut rpc: Rpc, request| async move { rpc.describe(request).await };
        let answer = self.unary(call, v1::DescribeRequest {}, ask).await?;
        ServerDescription::from_proto(answer)
    }

    /// Starts a new session with a fresh optimizer, at step 0.
    ///
    /// Not repeated by itself when the connection breaks in the middle, because the server may have
    /// opened a session already; [`list_sessions`](Client::list_sessions) tells.
    pub async fn open(&self, session: OpenSession) -> Result<Session, ClientError> {
        let wire_dtype = session.wire_dtype;
        let call = Call { repeat: Repeat::OnlyUnsent, ..self.call("OpenSession") };
        let ask = |mut rpc: Rpc, request| async move { rpc.open_session(request).await };
        let answer = self.unary(call, session.into_proto(), ask).await?;
        self.attach(answer, wire_dtype, 0).await
    }

    /// Sets a session back to one of its snapshots, the newest if none is named, and takes it up
    /// from there. Frames after the snapshot are forgotten and open microbatches are discarded; a
    /// [`Session`] of the same id that still exists somewhere ends.
    pub async fn restore(
        &self,
        id: &SessionId,
        snapshot_id: Option<&str>,
    ) -> Result<(Session, Restored), ClientError> {
        let request = v1::RestoreRequest {
            session_id: id.to_string(),
            snapshot_id: snapshot_id.unwrap_or_default().to_string(),
        };
        let ask = |mut rpc: Rpc, request| async move { rpc.restore(request).await };
        let answer = self.unary(self.call("Restore"), request, ask).await?;
        let snapshot = answer.snapshot.ok_or_else(|| missing("Restore", "snapshot"))?;
        let opened = answer.session.ok_or_else(|| missing("Restore", "session"))?;
        let restored = Restored {
            lora: answer.lora.ok_or_else(|| missing("Restore", "lora"))?,
            wire_dtype: WireDType::from_proto(answer.wire_dtype)
                .map_err(|source| ClientError::Tensor { call: "Restore", source })?,
            adapter_parameters: opened.adapter_parameters,
            adapter_bytes: opened.adapter_bytes,
            snapshot,
        };
        let session = self.attach(opened, restored.wire_dtype, restored.snapshot.sequence).await?;
        Ok((session, restored))
    }

    async fn attach(
        &self,
        opened: v1::OpenSessionResponse,
        wire_dtype: WireDType,
        last_answered: u64,
    ) -> Result<Session, ClientError> {
        let id = SessionId::from(opened.session_id);
        let limits = opened.limits.ok_or_else(|| missing("OpenSession", "limits"))?;
        let commands = Driver::start(self.clone(), id.clone(), last_answered, &limits).await?;
        Ok(Session {
            client: self.clone(),
            id,
            limits,
            wire_dtype,
            adapter_parameters: opened.adapter_parameters,
            commands,
            loss: SentLoss::default(),
        })
    }

    /// All sessions that the server knows, live and parked.
    pub async fn list_sessions(&self) -> Result<Vec<SessionInfo>, ClientError> {
        let ask = |mut rpc: Rpc, request| async move { rpc.list_sessions(request).await };
        let answer = self.unary(self.call("ListSessions"), v1::ListSessionsRequest {}, ask).await?;
        Ok(answer.sessions.into_iter().map(SessionInfo::from_proto).collect())
    }

    /// A session's adapter, whoever uses it; a parked one's is that of its newest snapshot.
    pub async fn export_session(&self, id: &SessionId) -> Result<ExportedAdapter, ClientError> {
        // How many values it has is not known here; protobuf's own limit is.
        self.export(id, MOST_MESSAGE_BYTES / 4, false).await
    }

    /// Parks a session, whoever uses it: it is made durable and leaves the device. With `forget` it
    /// is deleted with all its snapshots. Gives the snapshot taken.
    pub async fn close_session(
        &self,
        id: &SessionId,
        forget: bool,
    ) -> Result<Option<v1::SnapshotInfo>, ClientError> {
        let request = v1::CloseSessionRequest { session_id: id.to_string(), forget };
        let ask = |mut rpc: Rpc, request| async move { rpc.close_session(request).await };
        let answer = self.unary(self.call("CloseSession"), request, ask).await?;
        Ok(answer.snapshot)
    }

    pub(crate) async fn snapshot(
        &self,
        id: &SessionId,
        after_sequence: u64,
        keep: Vec<String>,
        waits_for_room: bool,
    ) -> Result<v1::SnapshotInfo, ClientError> {
        let request = v1::SnapshotRequest { session_id: id.to_string(), after_sequence, keep };
        let ask = |mut rpc: Rpc, request| async move { rpc.snapshot(request).await };
        let call = Call { waits_for_room, ..self.call("Snapshot") };
        let answer = self.unary(call, request, ask).await?;
        answer.snapshot.ok_or_else(|| missing("Snapshot", "snapshot"))
    }

    pub(crate) async fn export(
        &self,
        id: &SessionId,
        adapter_parameters: u64,
        include_gradients: bool,
    ) -> Result<ExportedAdapter, ClientError> {
        let request = v1::ExportAdapterRequest { session_id: id.to_string(), include_gradients };
        let each = if include_gradients { 8 } else { 4 };
        let bytes = usize::try_from(adapter_parameters).unwrap_or(usize::MAX).saturating_mul(each);
        // Names and shapes are in the control part.
        let answer_bytes = bytes.saturating_add(CONTROL_BYTES);
        let call = Call { answer_bytes, ..self.call("ExportAdapter") };
        let ask = |mut rpc: Rpc, request| async move { rpc.export_adapter(request).await };
        let answer = self.unary(call, request, ask).await?;
        ExportedAdapter::from_proto(answer)
    }

    /// With what the server knows this client by.
    pub(crate) fn request<T>(&self, message: T) -> tonic::Request<T> {
        let mut request = tonic::Request::new(message);
        if let Some(token) = self.token() {
            token.sign(&mut request);
        }
        trace::mark_request(&mut request);
        request
    }

    /// What the next request is signed with.
    pub(crate) fn token(&self) -> Option<Token> {
        self.shared.token.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether there is another token than the one that was `sent` and that the server does not take:
    /// its file may have a new one, which is used from here on.
    pub(crate) fn renews_token(&self, sent: Option<&Token>) -> bool {
        let mut token = self.shared.token.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(renewed) = token.as_ref().and_then(Token::renewed) {
            *token = Some(renewed);
        }
        token.as_ref() != sent
    }

    fn rpc(&self, answer_bytes: usize) -> Rpc {
        let channel = ClientTransport(self.shared.channel.clone());
        TrunkServiceClient::new(channel).max_decoding_message_size(answer_bytes)
    }

    /// For a session's stream.
    pub(crate) fn stream_rpc(&self) -> Rpc {
        self.rpc(self.shared.frame_bytes)
    }

    /// The most bytes that a message on a session's stream may have.
    pub(crate) fn frame_bytes(&self) -> usize {
        self.shared.frame_bytes
    }

    /// The most bytes that a frame's tensor may have.
    pub(crate) fn tensor_bytes(&self, limits: &v1::Limits) -> usize {
        let tokens = limits.max_tokens_per_microbatch as usize;
        let bytes = tokens.saturating_mul(4 * self.shared.hidden_size);
        bytes.min(self.shared.frame_bytes - MARGIN_BYTES)
    }

    pub(crate) fn options(&self) -> &ClientOptions {
        &self.shared.options
    }

    pub(crate) fn endpoint(&self) -> &str {
        &self.shared.endpoint
    }

    /// Whether the server answers anything at all; it may take as long as it takes.
    pub(crate) async fn is_alive(&self) -> bool {
        let mut rpc = self.rpc(CONTROL_BYTES);
        match rpc.describe(self.request(v1::DescribeRequest {})).await {
            Ok(_) => true,
            Err(status) => !status::is_transport(&status),
        }
    }

    pub(crate) fn link(&self) -> &Link {
        &self.shared.link
    }

    /// Returns once a call or a session of this client has been without the server for so long, and
    /// still is. Whoever wants to end meanwhile need not wait for it.
    pub async fn offline_for(&self, least: Duration) {
        self.shared.link.offline_for(least).await;
    }

    /// Returns once the server has left a question without an answer for so long.
    pub async fn silent_for(&self, least: Duration) {
        while tokio::time::timeout(least, self.is_alive()).await.is_ok() {
            tokio::time::sleep(least).await;
        }
    }

    /// True once: people are told one time that a quota slows them.
    pub(crate) fn tells_of_rate(&self) -> bool {
        !self.shared.told_of_rate.swap(true, Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Compiled, not run: whatever a session can do, it can do in a task of its own.
    #[allow(dead_code)]
    fn sessions_run_in_tasks(client: Client, session: Session, open: OpenSession) {
        tokio::spawn(async move {
            client.describe().await?;
            client.list_sessions().await?;
            client.open(open).await?;
            client.restore(session.id(), None).await?;
            client.close_session(session.id(), false).await?;
            session.step(1e-3, 1.0).await?.await?;
            session.snapshot().await?;
            session.export().await?;
            session.close(false).await
        });
    }
}
