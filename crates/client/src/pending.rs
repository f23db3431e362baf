//! What was sent and is not answered: answers of the session's task, typed, for whoever awaits them.

use crate::ClientError;
use crate::claim::Claim;
use crate::command::Answer;
use crate::entry::Request;
use crate::extend::{PendingDropCache, PendingExtend};
use crate::session::{Gradients, Sender};
use crate::types::FrameReport;
use offshoot_proto::v1::server_frame::Body;
use offshoot_proto::{HostTensor, v1};
use std::future::IntoFuture;
use std::pin::Pin;
use std::time::Duration;
use tokio::sync::oneshot;

#[derive(Debug)]
pub(crate) struct Waiting {
    pub(crate) call: &'static str,
    pub(crate) receiver: oneshot::Receiver<Result<Answer, ClientError>>,
}

impl Waiting {
    pub(crate) async fn answer(self) -> Result<Answer, ClientError> {
        self.receiver.await.unwrap_or(Err(ClientError::Closed))
    }

    /// The answer if it has come.
    fn now(&mut self) -> Option<Result<Answer, ClientError>> {
        self.receiver.try_recv().ok()
    }
}

pub(crate) fn tensor(
    call: &'static str,
    tensor: Option<v1::Tensor>,
) -> Result<HostTensor, ClientError> {
    HostTensor::from_proto(tensor).map_err(|source| ClientError::Tensor { call, source })
}

pub(crate) fn report(
    sent: (Duration, u32),
    timing: Option<v1::Timing>,
    tape_bytes: u64,
) -> FrameReport {
    let (round_trip, retries) = sent;
    FrameReport { retries, ..FrameReport::new(round_trip, timing, tape_bytes) }
}

pub(crate) fn wrong_answer<T>(call: &'static str) -> Result<T, ClientError> {
    Err(ClientError::Protocol { what: format!("{call} was answered as another kind of frame") })
}

/// The server holds this microbatch's activations. Its one use is
/// [`backward`](Microbatch::backward), which uses it up.
///
/// Dropped without its backward it is discarded on the server too, as is a forward or a backward
/// that is dropped before its answer or refused: no tape stays behind, and nothing stands in the way
/// of the next step. For a forward that is to have no backward [`Session::evaluate`](crate::Session::evaluate) is cheaper.
#[derive(Debug)]
#[must_use = "dropped without its backward, a microbatch is discarded on the server"]
pub struct Microbatch {
    id: u64,
    claim: Claim,
    sender: Sender,
}

impl Microbatch {
    /// The microbatch's number in its session.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Runs the trunk's backward. `grad` is `[N, H]` in the session's wire dtype: the gradient of
    /// the loss by what [`Session::forward`](crate::Session::forward) gave. LoRA gradients accumulate on the server until the
    /// next step.
    pub async fn backward(self, grad: HostTensor) -> Result<Gradients, ClientError> {
        self.send_backward(grad).await?.await
    }

    /// Like [`backward`](Microbatch::backward), but only sends.
    pub async fn send_backward(self, grad: HostTensor) -> Result<PendingBackward, ClientError> {
        let Microbatch { id, claim, sender } = self;
        sender.loss.add_gradients(&grad);
        let backward = v1::Backward { microbatch: id, grad: Some(grad.into_proto()) };
        Ok(PendingBackward { answer: sender.send(Request::Backward { backward, claim }).await? })
    }
}

/// A forward that was sent. Await it for the trunk's output.
#[derive(Debug)]
#[must_use = "await it for the answer"]
pub struct PendingForward {
    pub(crate) answer: Waiting,
    pub(crate) claim: Claim,
    pub(crate) sender: Sender,
}

impl PendingForward {
    async fn done(self) -> Result<(HostTensor, Microbatch, FrameReport), ClientError> {
        let call = self.answer.call;
        let answer = self.answer.answer().await?;
        let Body::Forward(done) = answer.body else { return wrong_answer(call) };
        let report = report((answer.round_trip, answer.retries), done.timing, done.tape_bytes);
        let microbatch =
            Microbatch { id: answer.microbatch, claim: self.claim, sender: self.sender };
        Ok((tensor(call, done.hidden)?, microbatch, report))
    }
}

/// An evaluation that was sent. Await it for the trunk's output.
#[derive(Debug)]
#[must_use = "await it for the answer"]
pub struct PendingEvaluate {
    pub(crate) answer: Waiting,
}

impl PendingEvaluate {
    async fn done(self) -> Result<HostTensor, ClientError> {
        Ok(self.with_report().await?.0)
    }

    /// The trunk's output, as from awaiting it, and where the time went.
    pub async fn with_report(self) -> Result<(HostTensor, FrameReport), ClientError> {
        let call = self.answer.call;
        let answer = self.answer.answer().await?;
        let Body::Forward(done) = answer.body else { return wrong_answer(call) };
        let report = report((answer.round_trip, answer.retries), done.timing, 0);
        Ok((tensor(call, done.hidden)?, report))
    }
}

/// A backward that was sent. Await it for the gradients.
#[derive(Debug)]
#[must_use = "await it for the answer"]
pub struct PendingBackward {
    answer: Waiting,
}

impl PendingBackward {
    async fn done(self) -> Result<Gradients, ClientError> {
        let call = self.answer.call;
        let answer = self.answer.answer().await?;
        let Body::Backward(done) = answer.body else { return wrong_answer(call) };
        Ok(Gradients {
            report: report((answer.round_trip, answer.retries), done.timing, 0),
            norm_squared: done.grad_norm_squared,
            input: match done.grad {
                Some(grad) => Some(tensor(call, Some(grad))?),
                None => None,
            },
        })
    }
}

/// A step that was sent. It takes place whether this is awaited or not; awaiting it gives the number
/// of steps taken so far.
#[derive(Debug)]
pub struct PendingStep {
    pub(crate) answer: Waiting,
}

/// A step that the server has taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepTaken {
    /// Optimizer steps taken so far, this one included.
    pub step: u64,
    /// The number of its frame, as in [`SnapshotInfo`](crate::SnapshotInfo).
    pub sequence: u64,
    /// The server makes the session durable as it is after this step. A client that keeps its own part
    /// of this step can go back to it if the server falls back.
    pub snapshot: bool,
}

impl PendingStep {
    async fn done(self) -> Result<u64, ClientError> {
        let call = self.answer.call;
        Ok(step_taken(call, self.answer.answer().await?)?.step)
    }

    /// The answer if it is there already. It is, once a later frame is answered. Given out once.
    pub fn now(&mut self) -> Option<Result<StepTaken, ClientError>> {
        let answer = self.answer.now()?;
        Some(answer.and_then(|answer| step_taken(self.answer.call, answer)))
    }
}

fn step_taken(call: &'static str, answer: Answer) -> Result<StepTaken, ClientError> {
    let sequence = answer.sequence;
    match answer.body {
        Body::Step(v1::StepDone { step, snapshot }) => Ok(StepTaken { step, sequence, snapshot }),
        _ => wrong_answer(call),
    }
}

macro_rules! awaitable {
    ($pending:ty => $output:ty) => {
        impl IntoFuture for $pending {
            type Output = Result<$output, ClientError>;
            type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send>>;

            fn into_future(self) -> Self::IntoFuture {
                Box::pin(self.done())
            }
        }
    };
}

awaitable!(PendingForward => (HostTensor, Microbatch, FrameReport));
awaitable!(PendingEvaluate => HostTensor);
awaitable!(PendingBackward => Gradients);
awaitable!(PendingStep => u64);
awaitable!(PendingExtend => (HostTensor, FrameReport));
awaitable!(PendingDropCache => ());
