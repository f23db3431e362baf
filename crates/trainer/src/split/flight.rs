//! Several microbatches on their way at once: while the trunk has one, bottom and top compute for
//! another.

use super::{Run, SplitModel, forward_input};
use crate::TrainError;
use crate::data::Batch;
use crate::wire::to_wire;
use offshoot_client::{ForwardInput, PendingBackward, PendingEvaluate, PendingForward, Session};
use offshoot_model::{DropoutKey, Tape};
use std::collections::VecDeque;
use std::time::{Duration, Instant};
use tch::Tensor;

/// The microbatches of one optimizer step.
#[derive(Clone, Copy, Debug)]
pub struct Microbatches<'a> {
    /// One microbatch each.
    pub batches: &'a [Batch],
    /// Names the dropout masks of the first one; the others count on from it.
    pub first_number: u64,
    /// Gradients are those of this times the summed loss.
    pub scale: f64,
    /// Most that are on their way at once: from the forward through the bottom to the backward
    /// through it. Each holds a tape here and one on the server. 0 is taken as 1.
    pub in_flight: usize,
}

/// What one microbatch gave.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct MicrobatchResult {
    /// Sum of the cross-entropy over the predicted tokens, in nats.
    pub loss_sum: f64,
    /// Tokens that were predicted.
    pub n_predicted: i64,
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

/// Microbatches on their way, in the order in which their frames were sent. Answers come in that
/// order, so the next one to work on is always the first.
struct Flight<'a> {
    model: &'a mut SplitModel,
    session: &'a Session,
    scale: f64,
    in_flight: usize,
    legs: VecDeque<Leg<'a>>,
    waited: Duration,
}

/// One microbatch in the trunk, on the way up or down.
enum Leg<'a> {
    Up { below: Below<'a>, alone: bool, answer: PendingForward },
    Down { below: Below<'a>, so_far: MicrobatchResult, answer: PendingBackward },
}

/// What the bottom keeps of a microbatch.
struct Below<'a> {
    batch: &'a Batch,
    run: Run,
    tape: Tape,
}

impl SplitModel {
    /// Forward and backward of the microbatches of a step through bottom, trunk and top; their
    /// gradients are added to what the adapters have.
    ///
    /// They are added in the order of the batches, whatever `in_flight` is, so it changes no number
    /// of the client's. The trunk may run forwards that wait together as one batch, which changes
    /// theirs by rounding.
    pub async fn accumulate(
        &mut self,
        session: &Session,
        step: Microbatches<'_>,
    ) -> Result<Accumulated, TrainError> {
        let Microbatches { batches, first_number, scale, in_flight } = step;
        let (in_flight, legs, waited) = (in_flight.max(1), VecDeque::new(), Duration::ZERO);
        let mut flight = Flight { model: self, session, scale, in_flight, legs, waited };
        let mut to_send = batches.iter().zip(first_number..);
        let mut results = Vec::with_capacity(batches.len());
        loop {
            while flight.legs.len() < flight.in_flight
                && let Some((batch, number)) = to_send.next()
            {
                flight.begin(batch, number).await?;
            }
            match flight.legs.pop_front() {
                Some(Leg::Up { below, alone, answer }) => flight.turn(below, alone, answer).await?,
                Some(Leg::Down { below, so_far, answer }) => {
                    results.push(flight.end(below, so_far, answer).await?);
                }
                None => break,
            }
        }
        let Flight { waited, in_flight, .. } = flight;
        Ok(Accumulated { results, waited, in_flight })
    }

    /// Forward and backward of one microbatch. `number` names the dropout masks of all three parts.
    pub async fn microbatch(
        &mut self,
        session: &Session,
        batch: &Batch,
        number: u64,
        scale: f64,
    ) -> Result<MicrobatchResult, TrainError> {
        let batches = std::slice::from_ref(batch);
        let step = Microbatches { batches, first_number: number, scale, in_flight: 1 };
        let mut results = self.accumulate(session, step).await?.results;
        Ok(results.pop().expect("one result for each batch"))
    }

    /// Summed loss and number of predicted tokens, without dropout and gradients. `in_flight`
    /// batches are on their way at once; it changes no number of the client's.
    pub async fn evaluate(
        &self,
        session: &Session,
        batches: &[Batch],
        in_flight: usize,
    ) -> Result<(f64, i64), TrainError> {
        let mut to_send = batches.iter();
        let mut sent: VecDeque<Evaluating> = VecDeque::new();
        let (mut loss_sum, mut n_predicted) = (0.0, 0);
        loop {
            while sent.len() < in_flight.max(1)
                && let Some(batch) = to_send.next()
            {
                sent.push_back(self.send_evaluate(session, batch).await?);
            }
            let Some(Evaluating { batch, run, answer }) = sent.pop_front() else { break };
            let hidden = self.evaluated(batch, &run, answer).await?;
            let _guard = tch::no_grad_guard();
            let (sum, n) = self.top.part.loss_eval(&hidden, &run.labels);
            loss_sum += sum;
            n_predicted += n;
        }
        Ok((loss_sum, n_predicted))
    }

    /// `[N, H]` out of the last block, without dropout.
    pub(super) async fn top_output(
        &self,
        session: &Session,
        batch: &Batch,
    ) -> Result<Tensor, TrainError> {
        let Evaluating { batch, run, answer } = self.send_evaluate(session, batch).await?;
        self.evaluated(batch, &run, answer).await
    }

    async fn send_evaluate<'a>(
        &self,
        session: &Session,
        batch: &'a Batch,
    ) -> Result<Evaluating<'a>, TrainError> {
        let run = Run::new(self, batch, None);
        let hidden = {
            let _guard = tch::no_grad_guard();
            let hidden = self.bottom.part.embed(&run.ids, &run.rows);
            self.bottom.part.forward_eval(&hidden, &run.rows, &[run.segment(&self.bottom)])
        };
        let answer = session.send_evaluate(forward_input(batch, &hidden, session)).await?;
        Ok(Evaluating { batch, run, answer })
    }

    async fn evaluated(
        &self,
        batch: &Batch,
        run: &Run,
        answer: PendingEvaluate,
    ) -> Result<Tensor, TrainError> {
        let output = self.receive(&answer.await?, batch)?;
        let _guard = tch::no_grad_guard();
        Ok(self.top.part.forward_eval(&output, &run.rows, &[run.segment(&self.top)]))
    }
}

/// An evaluation in the trunk.
struct Evaluating<'a> {
    batch: &'a Batch,
    run: Run,
    answer: PendingEvaluate,
}

impl<'a> Flight<'a> {
    /// Through the bottom and off.
    async fn begin(&mut self, batch: &'a Batch, number: u64) -> Result<(), TrainError> {
        let (model, session) = (&*self.model, self.session);
        let dropout = DropoutKey { seed: model.seed, microbatch: number };
        let run = Run::new(model, batch, Some(dropout));
        let (hidden, tape) = model.below(batch, &run);
        let input = ForwardInput {
            want_input_grad: model.bottom.adapter.is_some(),
            dropout_key: number,
            ..forward_input(batch, &hidden, session)
        };
        let answer = timed(&mut self.waited, session.send_forward(input)).await?;
        let alone = self.legs.is_empty();
        self.legs.push_back(Leg::Up { below: Below { batch, run, tape }, alone, answer });
        Ok(())
    }

    /// Through the top to the loss and back, and off again.
    async fn turn(
        &mut self,
        below: Below<'a>,
        alone: bool,
        answer: PendingForward,
    ) -> Result<(), TrainError> {
        let (output, microbatch, report) = timed(&mut self.waited, answer).await?;
        if report.retries > 0 && !alone {
            self.in_flight = (self.in_flight / 2).max(1);
        }
        let Below { batch, run, .. } = &below;
        let output = self.model.receive(&output, batch)?;
        let (loss, tape) = self.model.above(&output, batch, run, self.scale);
        if !loss.loss_sum.is_finite() {
            return Err(TrainError::Diverged { what: "loss", value: loss.loss_sum });
        }
        let grad = self.model.top.backward(tape, &loss.grad, run, true).expect("it was wanted");
        let grad = to_wire(&grad, self.session.wire_dtype());
        let answer = timed(&mut self.waited, microbatch.send_backward(grad)).await?;
        let so_far = MicrobatchResult {
            loss_sum: loss.loss_sum,
            n_predicted: loss.n_predicted,
            tape_bytes: report.tape_bytes,
            trunk_norm_squared: 0.0,
        };
        self.legs.push_back(Leg::Down { below, so_far, answer });
        Ok(())
    }

    /// Back through the bottom.
    async fn end(
        &mut self,
        below: Below<'a>,
        so_far: MicrobatchResult,
        answer: PendingBackward,
    ) -> Result<MicrobatchResult, TrainError> {
        let gradients = timed(&mut self.waited, answer).await?;
        let Below { batch, run, tape } = below;
        if self.model.bottom.adapter.is_some() {
            let grad = gradients.input.ok_or_else(|| TrainError::Answer {
                problem: "a backward brought no gradient for the bottom, which asked for one"
                    .into(),
            })?;
            let grad = self.model.receive(&grad, batch)?;
            self.model.bottom.backward(tape, &grad, &run, false);
        }
        Ok(MicrobatchResult { trunk_norm_squared: gradients.norm_squared, ..so_far })
    }
}

/// Adds the time that it takes.
async fn timed<T>(waited: &mut Duration, answer: impl IntoFuture<Output = T>) -> T {
    let began = Instant::now();
    let answer = answer.await;
    *waited += began.elapsed();
    answer
}
