use super::Run;
use crate::TrainError;
use crate::data::Batch;
use crate::report::{Event, StepEvent};
use crate::setup::Prepared;
use crate::split::{Microbatches, clip_factor};
use crate::trace;
use std::time::Instant;

impl Run {
    /// One optimizer step.
    pub(super) async fn train_step(&mut self) -> Result<(), TrainError> {
        let began = Instant::now();
        let in_flight = self.n_in_flight();
        let Prepared { split, data, plan, losses, .. } = &mut self.prepared;
        let batches: Vec<Batch> =
            plan.microbatches(self.step).iter().map(|samples| data.batch(samples)).collect();
        let n_samples: usize = batches.iter().map(|batch| batch.samples.len()).sum();
        let weight: f64 = batches.iter().map(|batch| losses.train.weight(batch)).sum();
        let tokens: usize = batches.iter().map(Batch::n_tokens).sum();
        let scale = 1.0 / weight;
        trace::step_has(batches.len(), tokens);

        // The numbers name the dropout masks: the same in a replayed step.
        let first_number = self.step << 16;
        let loss = &losses.train;
        let step = Microbatches { batches: &batches, loss, first_number, scale, in_flight };
        let done = split.accumulate(&self.session, step).await?;
        let (loss, extra) = done.mean_loss(scale);
        let trunk_norm_squared = done.results.last().map_or(0.0, |last| last.trunk_norm_squared);
        let tape_bytes = done.results.iter().map(|result| result.tape_bytes).max();
        let grad_norm = split.grad_norm(trunk_norm_squared);
        if !grad_norm.is_finite() {
            return Err(TrainError::Diverged { what: "gradient's norm", value: grad_norm });
        }
        self.keep()?;
        let Prepared { split, schedule, .. } = &mut self.prepared;
        let learning_rate = schedule.learning_rate(self.step);
        let clip = clip_factor(grad_norm, self.options.optimizer.max_grad_norm);
        // A loss that is no number says nothing to anybody.
        let shared = Some(loss).filter(|loss| self.options.output.share_loss && loss.is_finite());
        let step = split.step_sharing(&self.session, (learning_rate, clip), shared);
        self.keeper.pending = Some(step.await?);

        self.step += 1;
        self.eval_loss = None;
        self.losses.push((self.step, loss));
        if self.in_flight.seen(in_flight, done.in_flight) {
            self.tell_of_waiting();
        }
        let duration = began.elapsed();
        self.spent.add(duration, done.waited, tokens, batches.len());
        let seconds = duration.as_secs_f64();
        let epoch = self.epoch();
        self.report.event(&Event::Step(StepEvent {
            step: self.step,
            epoch,
            loss,
            learning_rate,
            grad_norm,
            steps_per_second: 1.0 / seconds,
            tokens_per_second: tokens as f64 / seconds,
            wait_seconds: done.waited.as_secs_f64(),
            samples: n_samples as u64,
            tokens: tokens as u64,
            tape_bytes: tape_bytes.unwrap_or_default(),
            extra,
        }))
    }

    /// How often all samples have been seen.
    pub(super) fn epoch(&self) -> f64 {
        let Prepared { plan, data, .. } = &self.prepared;
        let place = plan.place(self.step);
        place.epoch as f64 + place.sample as f64 / data.n_units() as f64
    }
}
