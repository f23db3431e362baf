use crate::ClientError;
use crate::claim::Wanted;
use crate::client::Client;
use crate::command::Command;
use crate::entry::Request;
use crate::loss::SentLoss;
use crate::pending::{Microbatch, PendingEvaluate, PendingForward, PendingStep, Waiting};
use crate::trace::FrameSpan;
use crate::types::{
    ErrorCode, ExportedAdapter, FrameReport, Limits, SessionId, SnapshotInfo, WireError,
};
use offshoot_proto::{HostTensor, WireDType, v1};
use std::sync::Arc;
use tokio::sync::{mpsc, oneshot};

/// One adapter being trained. Frames go out in the order of the calls, on one stream; the answers
/// come in the same order.
///
/// The stream is taken up again by itself after a break: see the
/// [crate documentation](crate#what-happens-when) for what can be relied on.
///
/// Dropping a session ends its stream after the last answer; the server keeps the adapter.
#[derive(Debug)]
pub struct Session {
    pub(crate) client: Client,
    pub(crate) id: SessionId,
    pub(crate) limits: Limits,
    pub(crate) wire_dtype: WireDType,
    pub(crate) adapter_parameters: u64,
    pub(crate) commands: mpsc::Sender<Command>,
    pub(crate) loss: SentLoss,
}

/// One microbatch on its way into the trunk.
#[derive(Debug, Clone, PartialEq)]
pub struct ForwardInput {
    /// `[N, H]` in the session's wire dtype: the input of layer `split_point_1`, sequence after
    /// sequence, only real tokens.
    pub hidden: HostTensor,
    /// Lengths of the packed sequences; they sum to N.
    pub seq_lens: Vec<u32>,
    /// One position for each token; empty: 0, 1, 2, ... within each sequence.
    pub position_ids: Vec<u32>,
    /// Whether the backward is to give the gradient by `hidden`. False when nothing below the trunk
    /// is trained: then it is neither computed nor sent. Ignored by evaluation.
    pub want_input_grad: bool,
    /// Decides the dropout masks, together with the session's seed. A function of the step, another
    /// one for each microbatch: then a replayed step sees the same masks. Ignored by evaluation.
    pub dropout_key: u64,
}

/// What a backward gives.
#[derive(Debug, Clone, PartialEq)]
pub struct Gradients {
    /// `[N, H]`: gradient of the loss by the `hidden` that was sent, if it was wanted.
    pub input: Option<HostTensor>,
    /// Sum of squares of the trunk's accumulated LoRA gradients, for the global norm.
    pub norm_squared: f64,
    /// Where the time went.
    pub report: FrameReport,
}

impl Session {
    /// The session's id, for [`Client::restore`].
    pub fn id(&self) -> &SessionId {
        &self.id
    }

    /// What the server allows this session.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// dtype of hidden states and gradients, both ways.
    pub fn wire_dtype(&self) -> WireDType {
        self.wire_dtype
    }

    /// Relative error of all hidden states and gradients sent from here, by rounding to the wire
    /// dtype; measured where [`HostTensor`] was made, on a sample of the rows. 0 where nothing was
    /// rounded. The server's side of it is in [`SessionInfo`](crate::SessionInfo).
    pub fn wire_error(&self) -> WireError {
        self.loss.error()
    }

    /// Trainable numbers in the trunk.
    pub fn adapter_parameters(&self) -> u64 {
        self.adapter_parameters
    }

    /// Runs the trunk over one microbatch in training mode: dropout is on, and the server keeps
    /// what the backward needs. Gives the output of layer `split_point_2 - 1`, `[N, H]`.
    pub async fn forward(
        &self,
        input: ForwardInput,
    ) -> Result<(HostTensor, Microbatch, FrameReport), ClientError> {
        self.send_forward(input).await?.await
    }

    /// Like [`forward`](Session::forward), but only sends: several microbatches can be on their way
    /// at once. Waits while `limits().max_frames_in_flight` frames are without an answer.
    pub async fn send_forward(&self, input: ForwardInput) -> Result<PendingForward, ClientError> {
        let claim = Wanted::by(&self.commands);
        let interest = Arc::downgrade(&claim);
        self.loss.add_hidden(&input.hidden);
        let forward = to_proto(input, v1::Mode::Train);
        let answer = self.send(Request::Forward { forward, interest }).await?;
        Ok(PendingForward { answer, claim, sender: self.sender() })
    }

    /// Runs the trunk without dropout and keeps nothing.
    pub async fn evaluate(&self, input: ForwardInput) -> Result<HostTensor, ClientError> {
        self.send_evaluate(input).await?.await
    }

    /// Like [`evaluate`](Session::evaluate), but only sends.
    pub async fn send_evaluate(&self, input: ForwardInput) -> Result<PendingEvaluate, ClientError> {
        let interest = Default::default();
        self.loss.add_hidden(&input.hidden);
        let forward = to_proto(input, v1::Mode::Eval);
        Ok(PendingEvaluate { answer: self.send(Request::Forward { forward, interest }).await? })
    }

    /// Applies AdamW once to the gradients accumulated since the last step, each multiplied by
    /// `clip_factor` first. Sent and not waited for: the next forward may follow at once, and runs
    /// with the new weights. If the step is refused and nobody awaits the [`PendingStep`], the next
    /// call of the session says so.
    ///
    /// Every open microbatch needs its backward before the step.
    pub async fn step(
        &self,
        learning_rate: f64,
        clip_factor: f64,
    ) -> Result<PendingStep, ClientError> {
        self.send_step(v1::Step { learning_rate, clip_factor, shared_loss: None }).await
    }

    /// Like [`step`](Session::step), and tells the server the step's mean loss, which must be finite:
    /// its operator and this tenant see it in the session's overview. Nothing is computed with it. Without
    /// this the server never learns of any loss.
    pub async fn step_sharing_loss(
        &self,
        learning_rate: f64,
        clip_factor: f64,
        loss: f64,
    ) -> Result<PendingStep, ClientError> {
        let shared_loss = Some(loss);
        self.send_step(v1::Step { learning_rate, clip_factor, shared_loss }).await
    }

    async fn send_step(&self, step: v1::Step) -> Result<PendingStep, ClientError> {
        let answer = self.send(Request::Step(step)).await?;
        Ok(PendingStep { answer })
    }

    /// Waits for all outstanding answers, then makes the session durable as it is. The server keeps
    /// the last few snapshots asked for; [`snapshot_keeping`](Session::snapshot_keeping) names others.
    pub async fn snapshot(&self) -> Result<SnapshotInfo, ClientError> {
        self.snapshot_keeping(Vec::new()).await
    }

    /// Like [`snapshot`](Session::snapshot); the server also keeps the older snapshots named here,
    /// such as that of the best checkpoint, the most important first: as many of them as it keeps of
    /// the last ones, until the next snapshot does not name them.
    pub async fn snapshot_keeping(&self, keep: Vec<String>) -> Result<SnapshotInfo, ClientError> {
        self.snapshot_now(keep, true).await
    }

    /// Like [`snapshot_keeping`](Session::snapshot_keeping), but a server that has no room for a snapshot
    /// now (its disk is full, a quota is used up) is not waited for: that is an error at once, and the
    /// session goes on. A server that is away is waited for.
    pub async fn try_snapshot(&self, keep: Vec<String>) -> Result<SnapshotInfo, ClientError> {
        self.snapshot_now(keep, false).await
    }

    async fn snapshot_now(
        &self,
        keep: Vec<String>,
        waits_for_room: bool,
    ) -> Result<SnapshotInfo, ClientError> {
        let after = self.settle().await?;
        let taken = self.client.snapshot(&self.id, after, keep, waits_for_room).await;
        if let Err(ClientError::Refused {
            code: ErrorCode::Invalid | ErrorCode::Sequence, ..
        }) = taken
        {
            // A server that was killed may be asked for the snapshot before the stream has learned that
            // it stands elsewhere now.
            self.reattach().await?;
        }
        taken
    }

    /// Takes the stream up anew, and waits for what is without an answer. A server that has fallen back
    /// meanwhile is noticed: [`ClientError::RolledBack`].
    pub async fn reattach(&self) -> Result<(), ClientError> {
        self.commands.send(Command::Reattach).await.map_err(|_| ClientError::Closed)?;
        self.settle().await.map(drop)
    }

    /// Waits for all outstanding answers, then fetches the adapter.
    pub async fn export(&self) -> Result<ExportedAdapter, ClientError> {
        self.settle().await?;
        self.client.export(&self.id, self.adapter_parameters, false).await
    }

    /// Like [`export`](Session::export), with the gradients accumulated since the last step.
    pub async fn export_with_gradients(&self) -> Result<ExportedAdapter, ClientError> {
        self.settle().await?;
        self.client.export(&self.id, self.adapter_parameters, true).await
    }

    /// Waits for all outstanding answers, then parks the session on the server: it is made durable
    /// and leaves the device. With `forget` it is deleted with all its snapshots. Gives the
    /// snapshot taken.
    pub async fn close(self, forget: bool) -> Result<Option<SnapshotInfo>, ClientError> {
        match self.settle().await {
            // What is to be deleted may be in any state.
            Err(ClientError::RolledBack { .. }) if forget => {}
            settled => {
                settled?;
            }
        }
        let Session { client, id, commands, .. } = self;
        // The stream ends first, so that the server's end of it is no surprise.
        drop(commands);
        client.close_session(&id, forget).await
    }

    /// Waits until every frame sent so far is answered. Gives the number of the last one.
    pub async fn settle(&self) -> Result<u64, ClientError> {
        let (reply, answer) = oneshot::channel();
        let command = Command::Settle { reply };
        self.commands.send(command).await.map_err(|_| ClientError::Closed)?;
        answer.await.map_err(|_| ClientError::Closed)?
    }

    fn sender(&self) -> Sender {
        Sender {
            commands: self.commands.clone(),
            loss: self.loss.clone(),
            tensor_bytes: self.client.tensor_bytes(&self.limits),
            max_tokens: self.limits.max_tokens_per_microbatch,
        }
    }

    pub(crate) async fn send(&self, request: Request) -> Result<Waiting, ClientError> {
        self.sender().send(request).await
    }
}

fn to_proto(input: ForwardInput, mode: v1::Mode) -> v1::Forward {
    v1::Forward {
        microbatch: 0,
        hidden: Some(input.hidden.into_proto()),
        seq_lens: input.seq_lens,
        position_ids: input.position_ids,
        mode: mode as i32,
        want_input_grad: input.want_input_grad && mode == v1::Mode::Train,
        dropout_key: input.dropout_key,
    }
}

/// The way to the session's task.
#[derive(Debug)]
pub(crate) struct Sender {
    commands: mpsc::Sender<Command>,
    pub(crate) loss: SentLoss,
    tensor_bytes: usize,
    max_tokens: u32,
}

impl Sender {
    pub(crate) async fn send(&self, request: Request) -> Result<Waiting, ClientError> {
        let call = request.call();
        // The server would end the whole stream over a message that is too large.
        let (found, limit) = (request.size(), self.tensor_bytes);
        if found > limit {
            return Err(ClientError::TooLarge { call, found, limit, max_tokens: self.max_tokens });
        }
        let (reply, receiver) = oneshot::channel();
        let span = FrameSpan::begin(&request);
        let command = Command::Send { request: Box::new(request), span, reply };
        self.commands.send(command).await.map_err(|_| ClientError::Closed)?;
        Ok(Waiting { call, receiver })
    }
}
