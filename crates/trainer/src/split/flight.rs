//! Several microbatches on their way at once: while the trunk has one, bottom and top compute for
//! others, on one device or on several.

use super::SplitModel;
use super::devices::Slot;
use super::replica::{Above, Below, Goal, Replica};
use crate::TrainError;
use crate::data::Batch;
use crate::loss::{CrossEntropy, Loss, LossSum};
use crate::trace;
use offshoot_adapters::AdapterSet;
use offshoot_client::{
    ClientError, ForwardInput, FrameReport, Gradients, HostTensor, Microbatch, Session,
};
use std::collections::{BTreeMap, VecDeque};
use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};
use tch::Tensor;

/// The microbatches of one optimizer step.
#[derive(Clone, Copy)]
pub struct Microbatches<'a> {
    /// One microbatch each.
    pub batches: &'a [Batch],
    /// What is minimised.
    pub loss: &'a Arc<dyn Loss>,
    /// Names the dropout masks of the first one; the others count on from it.
    pub first_number: u64,
    /// Gradients are those of this times the summed loss.
    pub scale: f64,
    /// Most that are on their way at once: from the forward through the bottom to the backward
    /// through it. Each holds a tape here and one on the server. 0 is taken as 1; fewer than there
    /// are devices leave some without work.
    pub in_flight: usize,
}

/// What one microbatch gave.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MicrobatchResult {
    /// Of the batch, to be divided by the weight of all batches of the step.
    pub loss: LossSum,
    /// Sum of squares of all gradients that the trunk has accumulated since the last step.
    pub trunk_norm_squared: f64,
    /// What the trunk held for this microbatch.
    pub tape_bytes: u64,
}

/// What the microbatches of a step gave.
#[derive(Clone, Debug, PartialEq)]
pub struct Accumulated {
    /// In the order of the batches.
    pub results: Vec<MicrobatchResult>,
    /// Time without work here, because the next answer was not there yet.
    pub waited: Duration,
    /// As many in flight as the server has room for: fewer than asked for, if it was too full for
    /// one of several.
    pub in_flight: usize,
}

impl Accumulated {
    /// The loss of the step, given one over the weight of its batches, and what is reported beside
    /// it.
    pub fn mean_loss(&self, scale: f64) -> (f64, BTreeMap<String, f64>) {
        let mut total = LossSum::default();
        self.results.iter().for_each(|result| total.add(&result.loss));
        let (_, extra) = total.mean(scale);
        (self.results.iter().fold(0.0, |loss, result| loss + result.loss.sum * scale), extra)
    }
}

/// Microbatches on their way, in their order. Whatever is there is worked on, but forwards and
/// backwards are sent, and gradients are added, in the order of the microbatches.
struct Flight<'a> {
    model: &'a mut SplitModel,
    session: &'a Session,
    step: Microbatches<'a>,
    in_flight: usize,
    legs: VecDeque<Leg>,
    /// Frames sent: answers come in their order.
    n_frames: u64,
    waited: Duration,
}

/// One microbatch: which device has it, and what it waits for.
struct Leg {
    /// Counted from 0; the leader is the last one.
    device: usize,
    stage: Stage,
}

enum Stage {
    /// The bottom computes.
    Below(Slot<(HostTensor, Below)>),
    /// In the trunk.
    Up { frame: u64, below: Below, alone: bool, answer: Slot<Forwarded> },
    /// The top computes.
    Above { trunk: Microbatch, tape_bytes: u64, work: Slot<Result<Above, TrainError>> },
    /// In the trunk, on the way down.
    Down { frame: u64, below: Below, so_far: MicrobatchResult, answer: Slot<Backwarded> },
    /// The bottom computes its backward.
    Back { so_far: MicrobatchResult, work: Slot<Result<Option<Tensor>, TrainError>> },
    /// Only while it is moved on.
    Moving,
}

type Forwarded = Result<(HostTensor, Microbatch, FrameReport), ClientError>;
type Backwarded = Result<Gradients, ClientError>;

impl SplitModel {
    /// Forward and backward of the microbatches of a step through bottom, trunk and top; their
    /// gradients are added to what the adapters have.
    ///
    /// They are added in the order of the batches, whatever `in_flight` and however many devices
    /// there are, so neither changes a number of the client's. The trunk may run forwards that wait
    /// together as one batch, which changes theirs by rounding.
    pub async fn accumulate(
        &mut self,
        session: &Session,
        step: Microbatches<'_>,
    ) -> Result<Accumulated, TrainError> {
        self.fall_in();
        let in_flight = step.in_flight.max(1);
        let (legs, n_frames, waited) = (VecDeque::new(), 0, Duration::ZERO);
        let mut flight = Flight { model: self, session, step, in_flight, legs, n_frames, waited };
        let mut to_send = step.batches.iter().zip(0..);
        let mut results = Vec::with_capacity(step.batches.len());
        loop {
            // What is computed is sent before anything else is computed.
            let mut context = Context::from_waker(Waker::noop());
            if let Some(leg) = flight.computed(&mut context) {
                results.extend(flight.go_on(leg).await?);
            } else if flight.legs.len() < flight.in_flight
                && let Some((batch, number)) = to_send.next()
            {
                flight.begin(batch, number);
            } else if flight.legs.is_empty() {
                break;
            } else {
                let leg = flight.next().await;
                results.extend(flight.go_on(leg).await?);
            }
        }
        let Flight { waited, in_flight, .. } = flight;
        Ok(Accumulated { results, waited, in_flight })
    }

    /// Forward and backward of one microbatch with the plain cross-entropy. `number` names the
    /// dropout masks of all three parts.
    pub async fn microbatch(
        &mut self,
        session: &Session,
        batch: &Batch,
        number: u64,
        scale: f64,
    ) -> Result<MicrobatchResult, TrainError> {
        let batches = std::slice::from_ref(batch);
        let loss: Arc<dyn Loss> = Arc::new(CrossEntropy::default());
        let step = Microbatches { batches, loss: &loss, first_number: number, scale, in_flight: 1 };
        let mut results = self.accumulate(session, step).await?.results;
        Ok(results.pop().expect("one result for each batch"))
    }
}

impl<'a> Flight<'a> {
    /// Gives a microbatch to the next device.
    fn begin(&mut self, batch: &'a Batch, number: u64) {
        let dtype = self.session.wire_dtype();
        let device = number as usize % self.model.n_devices();
        let span = trace::part("bottom.forward", number);
        let (batch, number) = (batch.clone(), self.step.first_number + number);
        let below = move |replica: &mut Replica| replica.below(batch, number, dtype);
        let work = self.compute(device, move |replica| span.in_scope(|| below(replica)));
        self.legs.push_back(Leg { device, stage: Stage::Below(work) });
    }

    /// The leader computes at once, while the others have been given theirs before it.
    fn compute<T: Send + 'static>(
        &mut self,
        device: usize,
        work: impl FnOnce(&mut Replica) -> T + Send + 'static,
    ) -> Slot<T> {
        match self.model.others.get(device) {
            Some(other) => other.run(work),
            None => Slot::Ready(work(&mut self.model.leader)),
        }
    }

    /// The leg that can go on next.
    async fn next(&mut self) -> usize {
        let began = Instant::now();
        let computing = self.legs.iter_mut().any(|leg| leg.stage.is_computing());
        let leg =
            poll_fn(|context| match self.computed(context).or_else(|| self.answered(context)) {
                Some(leg) => Poll::Ready(leg),
                None => Poll::Pending,
            });
        let leg = leg.await;
        if !computing {
            self.waited += began.elapsed();
        }
        leg
    }

    /// The first leg with something computed whose turn it is.
    fn computed(&mut self, context: &mut Context) -> Option<usize> {
        // Whether all legs before this one have sent their forward, and their backward.
        let (mut forward, mut backward) = (true, true);
        for (i, leg) in self.legs.iter_mut().enumerate() {
            let ready = leg.stage.is_ready(context);
            let found = match &leg.stage {
                Stage::Below(_) => ready && forward,
                Stage::Above { .. } => ready && backward,
                Stage::Back { .. } => ready && i == 0,
                Stage::Up { .. } | Stage::Down { .. } | Stage::Moving => false,
            };
            if found {
                return Some(i);
            }
            forward &= !matches!(leg.stage, Stage::Below(_));
            backward &= matches!(leg.stage, Stage::Down { .. } | Stage::Back { .. });
        }
        None
    }

    /// The leg with the oldest answer; the leader's last, since it computes on this thread.
    fn answered(&mut self, context: &mut Context) -> Option<usize> {
        let leader = self.model.others.len();
        let answered = self.legs.iter_mut().enumerate().filter_map(|(i, leg)| {
            let (Stage::Up { frame, .. } | Stage::Down { frame, .. }) = leg.stage else {
                return None;
            };
            let ready = leg.stage.is_ready(context);
            ready.then_some((leg.device == leader, frame, i))
        });
        answered.min().map(|(_, _, i)| i)
    }

    /// From one stage to the next. Gives the result after the last one.
    async fn go_on(&mut self, leg: usize) -> Result<Option<MicrobatchResult>, TrainError> {
        let stage = match std::mem::replace(&mut self.legs[leg].stage, Stage::Moving) {
            Stage::Below(work) => self.send_forward(work).await?,
            Stage::Up { below, alone, answer, .. } => self.turn(leg, below, alone, answer)?,
            Stage::Above { trunk, tape_bytes, work } => {
                self.send_backward(trunk, tape_bytes, work).await?
            }
            Stage::Down { below, so_far, answer, .. } => {
                self.come_back(leg, below, so_far, answer)?
            }
            Stage::Back { so_far, mut work } => {
                let lora = work.take()?;
                accumulate(&mut self.model.leader.bottom.adapter, lora);
                self.legs.pop_front();
                return Ok(Some(so_far));
            }
            Stage::Moving => unreachable!("a leg is moved on by one call at a time"),
        };
        self.legs[leg].stage = stage;
        Ok(None)
    }

    async fn send_forward(
        &mut self,
        mut work: Slot<(HostTensor, Below)>,
    ) -> Result<Stage, TrainError> {
        let (hidden, below) = work.take();
        let input = ForwardInput {
            hidden,
            seq_lens: below.batch.seq_lens.iter().map(|&n| n as u32).collect(),
            position_ids: Vec::new(),
            want_input_grad: self.model.leader.bottom.adapter.is_some(),
            dropout_key: below.number(),
        };
        let answer = timed(&mut self.waited, self.session.send_forward(input)).await?;
        let answer = Slot::Waiting(answer.into_future());
        Ok(Stage::Up { frame: self.frame(), below, alone: self.legs.len() == 1, answer })
    }

    /// Gives the trunk's output to the top.
    fn turn(
        &mut self,
        leg: usize,
        below: Below,
        alone: bool,
        mut answer: Slot<Forwarded>,
    ) -> Result<Stage, TrainError> {
        let (output, trunk, report) = answer.take()?;
        if report.retries > 0 && !alone {
            self.in_flight = (self.in_flight / 2).max(1);
        }
        let (scale, dtype) = (self.step.scale, self.session.wire_dtype());
        let loss = Arc::clone(self.step.loss);
        let goal = Goal { loss, scale, dtype };
        let span = trace::part("top.forward_backward", below.number() - self.step.first_number);
        let above = move |replica: &mut Replica| replica.above(below, &output, &goal);
        let device = self.legs[leg].device;
        let work = self.compute(device, move |replica| span.in_scope(|| above(replica)));
        Ok(Stage::Above { trunk, tape_bytes: report.tape_bytes, work })
    }

    async fn send_backward(
        &mut self,
        trunk: Microbatch,
        tape_bytes: u64,
        mut work: Slot<Result<Above, TrainError>>,
    ) -> Result<Stage, TrainError> {
        let Above { below, value, grad, lora } = work.take()?;
        accumulate(&mut self.model.leader.top.adapter, lora);
        let answer = timed(&mut self.waited, trunk.send_backward(grad)).await?;
        let so_far = MicrobatchResult { loss: value, tape_bytes, trunk_norm_squared: 0.0 };
        let answer = Slot::Waiting(answer.into_future());
        Ok(Stage::Down { frame: self.frame(), below, so_far, answer })
    }

    /// Gives the trunk's gradient to the bottom, if it learns anything.
    fn come_back(
        &mut self,
        leg: usize,
        below: Below,
        so_far: MicrobatchResult,
        mut answer: Slot<Backwarded>,
    ) -> Result<Stage, TrainError> {
        let gradients = answer.take()?;
        let so_far = MicrobatchResult { trunk_norm_squared: gradients.norm_squared, ..so_far };
        if self.model.leader.bottom.adapter.is_none() {
            return Ok(Stage::Back { so_far, work: Slot::Ready(Ok(None)) });
        }
        let grad = gradients.input.ok_or_else(|| TrainError::Answer {
            problem: "a backward brought no gradient for the bottom, which asked for one".into(),
        })?;
        let span = trace::part("bottom.backward", below.number() - self.step.first_number);
        let back = move |replica: &mut Replica| replica.back(below, &grad);
        let device = self.legs[leg].device;
        let work = self.compute(device, move |replica| span.in_scope(|| back(replica)));
        Ok(Stage::Back { so_far, work })
    }

    fn frame(&mut self) -> u64 {
        self.n_frames += 1;
        self.n_frames
    }
}

impl Stage {
    /// Whether what it waits for is there.
    fn is_ready(&mut self, context: &mut Context) -> bool {
        match self {
            Stage::Below(work) => work.is_ready(context),
            Stage::Up { answer, .. } => answer.is_ready(context),
            Stage::Above { work, .. } => work.is_ready(context),
            Stage::Down { answer, .. } => answer.is_ready(context),
            Stage::Back { work, .. } => work.is_ready(context),
            Stage::Moving => false,
        }
    }

    /// Whether a device of this client has it and is not done.
    fn is_computing(&self) -> bool {
        match self {
            Stage::Below(work) => work.is_waiting(),
            Stage::Above { work, .. } => work.is_waiting(),
            Stage::Back { work, .. } => work.is_waiting(),
            Stage::Up { .. } | Stage::Down { .. } | Stage::Moving => false,
        }
    }
}

/// Adds a flat gradient of any device.
fn accumulate(adapter: &mut Option<AdapterSet>, gradient: Option<Tensor>) {
    if let (Some(adapter), Some(gradient)) = (adapter, gradient) {
        let _guard = tch::no_grad_guard();
        adapter.accumulate(&gradient.to_device(adapter.device()));
    }
}

/// Adds the time that it takes.
async fn timed<T>(waited: &mut Duration, answer: impl IntoFuture<Output = T>) -> T {
    let began = Instant::now();
    let answer = answer.await;
    *waited += began.elapsed();
    answer
}
