//! Without dropout and gradients: losses, and logits. The leading device does it alone.

use super::SplitModel;
use super::replica::Run;
use crate::TrainError;
use crate::data::Batch;
use crate::loss::{Loss, LossInput, LossSum, sequence_log_probs};
use crate::trace;
use crate::wire::to_wire;
use offshoot_client::{ForwardInput, PendingEvaluate, Session};
use std::collections::VecDeque;
use tch::Tensor;
use tracing::Instrument;

impl SplitModel {
    /// The summed loss, and what to divide it by. `in_flight` batches are on their way at once; it
    /// changes no number of the client's.
    pub async fn evaluate(
        &self,
        session: &Session,
        loss: &dyn Loss,
        batches: &[Batch],
        in_flight: usize,
    ) -> Result<(LossSum, f64), TrainError> {
        let mut total = LossSum::default();
        let each = |input: LossInput| total.add(&loss.evaluate(&input));
        let outputs = self.outputs(session, batches, in_flight, each);
        outputs.instrument(trace::evaluation(batches.len())).await?;
        let weight = batches.iter().map(|batch| loss.weight(batch)).sum();
        Ok((total, weight))
    }

    /// For each batch, the log-probability of the predicted tokens of each sequence, summed.
    pub async fn log_probs(
        &self,
        session: &Session,
        batches: &[Batch],
        in_flight: usize,
    ) -> Result<Vec<Vec<f64>>, TrainError> {
        let mut all = Vec::with_capacity(batches.len());
        self.outputs(session, batches, in_flight, |input| all.push(sequence_log_probs(&input)))
            .await?;
        Ok(all)
    }

    /// Shows `each` what comes out of the last block for every batch, in their order.
    async fn outputs(
        &self,
        session: &Session,
        batches: &[Batch],
        in_flight: usize,
        mut each: impl FnMut(LossInput),
    ) -> Result<(), TrainError> {
        let mut to_send = batches.iter();
        let mut sent: VecDeque<Evaluating> = VecDeque::new();
        loop {
            while sent.len() < in_flight.max(1)
                && let Some(batch) = to_send.next()
            {
                sent.push_back(self.send_evaluate(session, batch).await?);
            }
            let Some(Evaluating { batch, run, answer }) = sent.pop_front() else { return Ok(()) };
            let hidden = self.leader.evaluate_above(&answer.await?, batch, &run)?;
            let _guard = tch::no_grad_guard();
            let top = &self.leader.top.part;
            each(LossInput { top, hidden: &hidden, labels: &run.labels, batch });
        }
    }

    /// Float32 logits `[n, V]` of the last position of each sequence.
    pub async fn last_logits(
        &self,
        session: &Session,
        batch: &Batch,
    ) -> Result<Tensor, TrainError> {
        let hidden = self.top_output(session, batch).await?;
        let _guard = tch::no_grad_guard();
        let ends = batch.seq_lens.iter().scan(0, |sum, &n| {
            *sum += n as i64;
            Some(*sum - 1)
        });
        let ends = Tensor::from_slice(&ends.collect::<Vec<i64>>()).to_device(hidden.device());
        Ok(self.leader.top.part.logits(&hidden.index_select(0, &ends)))
    }

    /// Float32 logits `[N, V]` of every position.
    pub async fn logits(&self, session: &Session, batch: &Batch) -> Result<Tensor, TrainError> {
        let hidden = self.top_output(session, batch).await?;
        let _guard = tch::no_grad_guard();
        Ok(self.leader.top.part.logits(&hidden))
    }

    /// `[N, H]` out of the last block.
    async fn top_output(&self, session: &Session, batch: &Batch) -> Result<Tensor, TrainError> {
        let Evaluating { batch, run, answer } = self.send_evaluate(session, batch).await?;
        self.leader.evaluate_above(&answer.await?, batch, &run)
    }

    async fn send_evaluate<'a>(
        &self,
        session: &Session,
        batch: &'a Batch,
    ) -> Result<Evaluating<'a>, TrainError> {
        let run = Run::new(&self.leader, batch, None);
        let hidden = self.leader.evaluate_below(&run, batch);
        let input = ForwardInput {
            hidden: to_wire(&hidden, session.wire_dtype()),
            seq_lens: batch.seq_lens.iter().map(|&n| n as u32).collect(),
            position_ids: Vec::new(),
            want_input_grad: false,
            dropout_key: 0,
        };
        Ok(Evaluating { batch, run, answer: session.send_evaluate(input).await? })
    }
}

/// An evaluation in the trunk.
struct Evaluating<'a> {
    batch: &'a Batch,
    run: Run,
    answer: PendingEvaluate,
}
