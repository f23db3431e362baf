use super::Run;
use crate::TrainError;
use crate::checkpoint::Best;
use crate::data::PromptFormat;
use crate::generate::{Decoder, Request};
use crate::report::{EvalEvent, Event};
use crate::setup::Prepared;
use std::time::Instant;

impl Run {
    /// Mean loss over the evaluation data, if there are any.
    pub(super) async fn evaluate(&mut self) -> Result<(), TrainError> {
        let began = Instant::now();
        let Prepared { split, eval: Some(eval), server, losses, .. } = &self.prepared else {
            return Ok(());
        };
        let max_tokens = server.limits.max_tokens_per_microbatch as usize;
        let batches = eval.in_order(self.options.steps.microbatch_size(), max_tokens)?;
        let in_flight = self.n_in_flight();
        let (total, weight) =
            split.evaluate(&self.session, &*losses.eval, &batches, in_flight).await?;
        let (loss, extra) = total.mean(1.0 / weight);
        let evaluation = Best { step: self.step, loss };
        if loss.is_finite() && self.best.is_none_or(|best| loss < best.loss) {
            self.best = Some(evaluation);
        }
        self.eval_loss = Some(loss).filter(|loss| loss.is_finite());
        self.evaluations.push(evaluation);
        let best = self.best.unwrap_or(evaluation);
        let epoch = self.epoch();
        self.report.event(&Event::Eval(EvalEvent {
            step: self.step,
            epoch,
            loss,
            best: best.loss,
            best_step: best.step,
            seconds: began.elapsed().as_secs_f64(),
            extra,
        }))
    }

    /// Texts that the model goes on from, as it is now.
    pub(super) async fn sample(&mut self) -> Result<(), TrainError> {
        if self.options.samples.prompts.is_empty() {
            return Ok(());
        }
        let Prepared { split, tokenizer, end_ids, .. } = &self.prepared;
        let mut decoder = Decoder::split(split, &self.session);
        for prompt in &self.options.samples.prompts {
            let ids = match self.options.data.prompt_format {
                PromptFormat::Plain => tokenizer.encode(prompt)?,
                PromptFormat::Chat => tokenizer.encode_prompt_as_chat(prompt)?,
            };
            let request = Request {
                prompt: &ids,
                options: &self.options.samples.options,
                end_ids,
                tokenizer: Some(tokenizer),
            };
            let text = decoder.generate(&request, &mut |_| {}).await?.text;
            self.report.event(&Event::Sample { step: self.step, prompt: prompt.clone(), text })?;
        }
        decoder.close().await
    }
}
