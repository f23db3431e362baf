use crate::TrainError;
use crate::checkpoint::{self, Best, Contents, Saved, TrainingState};
use crate::data::Batch;
use crate::options::{CancelToken, TrainOptions};
use crate::report::{DoneEvent, Event, Reporter, StepEvent, WireErrors};
use crate::resume;
use crate::sample::generate;
use crate::setup::{self, Prepared};
use crate::split::{Microbatches, clip_factor};
use crate::wire::host_to_tensor;
use offshoot_adapters::{AdapterSet, peft};
use offshoot_client::{ClientError, Session, SessionId};
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tch::Tensor;

/// Rollbacks in a row without a step beyond the ones before: then something is broken for good.
const MAX_ROLLBACKS: u32 = 5;

/// What a run left.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    /// Optimizer steps taken, those before a resumption included.
    pub step: u64,
    /// Stopped by its [`CancelToken`] before the last step.
    pub interrupted: bool,
    /// Losses of the steps taken by this call, oldest first.
    pub losses: Vec<f64>,
    /// Evaluations of this call: steps taken, and loss.
    pub evaluations: Vec<Best>,
    /// The lowest evaluation loss of the whole run.
    pub best: Option<Best>,
    /// The newest checkpoint.
    pub checkpoint: PathBuf,
    /// The PEFT directory for the uncut model; none if interrupted.
    pub adapter: Option<PathBuf>,
    /// The session, parked on the server.
    pub session: SessionId,
}

/// Trains. Everything that a run leaves is in its output directory and in the server's store.
///
/// It computes on the calling thread, between the awaits: give it the `block_on` of a multi-thread
/// runtime, so that the connection's tasks run beside it.
pub async fn train(options: TrainOptions, cancel: CancelToken) -> Result<Summary, TrainError> {
    let mut run = Run::begin(options).await?;
    let mut rollbacks = 0;
    let mut furthest = run.step;
    loop {
        match run.go_on(&cancel).await {
            Ok(()) => break,
            Err(TrainError::Client(error @ ClientError::RolledBack { .. })) => {
                rollbacks = if run.step > furthest { 1 } else { rollbacks + 1 };
                furthest = furthest.max(run.step);
                if rollbacks > MAX_ROLLBACKS {
                    return Err(error.into());
                }
                run.go_back(&error).await?;
            }
            Err(error) => {
                // What was in flight was dropped, and is discarded with this: the session may be
                // resumed from a checkpoint, and until then its tapes serve nobody.
                let _ = run.session.settle().await;
                return Err(error);
            }
        }
    }
    run.end().await
}

/// What this call has used up so far, replayed steps included.
pub(crate) struct Spent {
    pub began: Instant,
    /// In training steps, without evaluations and checkpoints.
    pub training: Duration,
    /// Of that, without work here.
    pub waited: Duration,
    pub tokens: u64,
    /// Most microbatches of one step.
    pub microbatches: usize,
}

impl Spent {
    fn add(&mut self, duration: Duration, waited: Duration, tokens: usize, microbatches: usize) {
        self.training += duration;
        self.waited += waited;
        self.tokens += tokens as u64;
        self.microbatches = self.microbatches.max(microbatches);
    }
}

impl Default for Spent {
    fn default() -> Self {
        let (began, none) = (Instant::now(), Duration::ZERO);
        Spent { began, training: none, waited: none, tokens: 0, microbatches: 0 }
    }
}

/// A run in progress.
pub(crate) struct Run {
    pub options: TrainOptions,
    pub prepared: Prepared,
    pub session: Session,
    pub report: Reporter,
    pub spent: Spent,
    /// Microbatches of a step that may be on their way at once.
    pub in_flight: usize,
    /// Steps taken.
    pub step: u64,
    /// Of the last evaluation, if it was at this step.
    pub eval_loss: Option<f64>,
    pub best: Option<Best>,
    /// The newest checkpoint: its step and directory.
    pub saved: Option<(u64, PathBuf)>,
    /// What this call began from.
    pub resumed: Option<Saved>,
    /// By step: a replayed one replaces what was there.
    pub losses: Vec<(u64, f64)>,
    pub evaluations: Vec<Best>,
}

impl Run {
    async fn begin(options: TrainOptions) -> Result<Self, TrainError> {
        let dir = &options.output.dir;
        let resumed = match &options.output.resume {
            Some(resume) => Some(checkpoint::find(resume, dir)?),
            None => None,
        };
        resume::check_output_dir(&options, resumed.as_ref())?;
        let prepared = setup::prepare(&options).await?;
        std::fs::create_dir_all(dir).map_err(TrainError::io(dir))?;
        let (step, n_steps) =
            (resumed.as_ref().map_or(0, |s| s.state.step), prepared.settings.n_steps);
        let report = Reporter::new(dir, step, n_steps, options.output.log_interval)?;
        let differences = match &resumed {
            Some(saved) => resume::check_settings(saved, &prepared)?,
            None => Vec::new(),
        };
        let session = match &resumed {
            Some(saved) => resume::restore(&prepared, saved).await?,
            None => setup::open(&prepared.client, &options, &prepared.settings).await?,
        };
        let mut run = Run {
            session,
            report,
            prepared,
            spent: Spent::default(),
            in_flight: options.steps.microbatches_in_flight,
            step: 0,
            eval_loss: None,
            best: None,
            saved: None,
            resumed: resumed.clone(),
            losses: Vec::new(),
            evaluations: Vec::new(),
            options,
        };
        run.describe();
        if let Some(saved) = resumed {
            run.set_state(&saved)?;
            let place = run.prepared.order.place(run.step);
            run.report.line(&format!(
                "resumed at step {} (epoch {}, sample {}) from {}",
                run.step,
                place.epoch,
                place.sample,
                saved.path.display()
            ));
            for difference in differences {
                run.report.line(&format!("not the run as it began: {difference}"));
            }
        }
        Ok(run)
    }

    /// Trains to the last step, or until it is asked to end.
    async fn go_on(&mut self, cancel: &CancelToken) -> Result<(), TrainError> {
        // Not again after a resumption: every frame counts in the numbers of those after it, and
        // dropout masks depend on the numbers.
        if self.step == 0 && self.saved.is_none() {
            self.evaluate().await?;
            self.sample().await?;
        }
        let n_steps = self.prepared.settings.n_steps;
        while self.step < n_steps && !cancel.is_cancelled() {
            self.train_step().await?;
            let at_end = self.step == n_steps;
            if at_end || self.step.is_multiple_of(self.options.evaluation.interval) {
                self.evaluate().await?;
            }
            if at_end || self.step.is_multiple_of(self.options.output.save_interval) {
                self.save().await?;
            }
        }
        // Asked to end, or nothing was left to do at all.
        if self.saved.as_ref().is_none_or(|(step, _)| *step != self.step) {
            self.save().await?;
        }
        Ok(())
    }

    async fn train_step(&mut self) -> Result<(), TrainError> {
        let began = Instant::now();
        let in_flight = self.in_flight();
        let Prepared { split, data, order, schedule, server, .. } = &mut self.prepared;
        let samples = order.samples(self.step);
        let max_tokens = server.limits.max_tokens_per_microbatch as usize;
        let batches = data.batches(&samples, self.options.steps.batch_size, max_tokens);
        let n_predicted: usize = batches.iter().map(Batch::n_predicted).sum();
        let tokens: usize = batches.iter().map(Batch::n_tokens).sum();
        let scale = 1.0 / n_predicted as f64;

        // The numbers name the dropout masks: the same in a replayed step.
        let first_number = self.step << 16;
        let step = Microbatches { batches: &batches, first_number, scale, in_flight };
        let done = split.accumulate(&self.session, step).await?;
        let loss = done.results.iter().fold(0.0, |loss, result| loss + result.loss_sum * scale);
        let trunk_norm_squared = done.results.last().map_or(0.0, |last| last.trunk_norm_squared);
        let tape_bytes = done.results.iter().map(|result| result.tape_bytes).max();
        let grad_norm = split.grad_norm(trunk_norm_squared);
        if !grad_norm.is_finite() {
            return Err(TrainError::Diverged { what: "gradient's norm", value: grad_norm });
        }
        let learning_rate = schedule.learning_rate(self.step);
        let clip = clip_factor(grad_norm, self.options.optimizer.max_grad_norm);
        split.step(&self.session, learning_rate, clip).await?;

        self.step += 1;
        self.eval_loss = None;
        self.losses.push((self.step, loss));
        if done.in_flight < in_flight {
            self.lower_in_flight(done.in_flight);
        }
        let duration = began.elapsed();
        self.spent.add(duration, done.waited, tokens, batches.len());
        let seconds = duration.as_secs_f64();
        self.report.event(&Event::Step(StepEvent {
            step: self.step,
            loss,
            learning_rate,
            grad_norm,
            steps_per_second: 1.0 / seconds,
            tokens_per_second: tokens as f64 / seconds,
            wait_seconds: done.waited.as_secs_f64(),
            tokens: tokens as u64,
            tape_bytes: tape_bytes.unwrap_or_default(),
        }))
    }

    /// Mean loss over the evaluation data, if there are any.
    async fn evaluate(&mut self) -> Result<(), TrainError> {
        let Prepared { split, eval: Some(eval), server, .. } = &self.prepared else {
            return Ok(());
        };
        let all: Vec<usize> = (0..eval.samples.len()).collect();
        let max_tokens = server.limits.max_tokens_per_microbatch as usize;
        let batches = eval.batches(&all, self.options.steps.batch_size, max_tokens);
        let (loss_sum, n_predicted) =
            split.evaluate(&self.session, &batches, self.in_flight()).await?;
        let loss = loss_sum / n_predicted as f64;
        let evaluation = Best { step: self.step, loss };
        if self.best.is_none_or(|best| loss < best.loss) {
            self.best = Some(evaluation);
        }
        self.eval_loss = Some(loss).filter(|loss| loss.is_finite());
        self.evaluations.push(evaluation);
        let best = self.best.map_or(loss, |best| best.loss);
        self.report.event(&Event::Eval { step: self.step, loss, best })
    }

    async fn sample(&mut self) -> Result<(), TrainError> {
        use crate::data::PromptFormat;
        let Prepared { split, tokenizer, .. } = &self.prepared;
        for prompt in &self.options.samples.prompts {
            let ids = match self.options.data.prompt_format {
                PromptFormat::Plain => tokenizer.encode(prompt)?,
                PromptFormat::Chat => tokenizer.encode_prompt_as_chat(prompt)?,
            };
            let text =
                generate(split, &self.session, tokenizer, &ids, &self.options.samples.options)
                    .await?;
            self.report.event(&Event::Sample { step: self.step, prompt: prompt.clone(), text })?;
        }
        Ok(())
    }

    /// The trunk's tensors under PEFT's names.
    async fn trunk_tensors(&self) -> Result<Vec<(String, Tensor)>, TrainError> {
        let exported = self.session.export().await?;
        if exported.step != self.step {
            return Err(TrainError::Answer {
                problem: format!(
                    "the trunk's adapter is at step {}, the client's at step {}; does another client train this session?",
                    exported.step, self.step
                ),
            });
        }
        let tensors = exported.tensors.iter();
        Ok(tensors.map(|(name, tensor)| (name.clone(), host_to_tensor(tensor))).collect())
    }

    async fn tensors(&self) -> Result<[Vec<(String, Tensor)>; 3], TrainError> {
        let trunk = self.trunk_tensors().await?;
        let [bottom, top] = self.prepared.split.adapters();
        let named =
            |set: Option<&AdapterSet>| set.map(AdapterSet::named_tensors).unwrap_or_default();
        Ok([named(bottom), trunk, named(top)])
    }

    async fn save(&mut self) -> Result<(), TrainError> {
        let snapshot = self.session.snapshot_keeping(self.snapshots_in_use()?).await?;
        let tensors = self.tensors().await?;
        let Prepared { split, order, settings, config, .. } = &self.prepared;
        let names = (self.session.id().to_string(), snapshot.snapshot_id);
        let state = TrainingState {
            eval_loss: self.eval_loss,
            best: self.best,
            ..TrainingState::new(self.step, order.place(self.step), names, settings.clone())
        };
        let contents = Contents {
            state: &state,
            n_layers: config.n_layers,
            fan_in_fan_out: config.family.fan_in_fan_out(),
            client: &split.to_state(),
            tensors,
        };
        let path = checkpoint::write(&self.options.output.dir, &contents)?;
        checkpoint::prune(&self.options.output.dir)?;
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        self.saved = Some((self.step, path));
        self.report.event(&Event::Checkpoint { step: self.step, name })
    }

    /// What the checkpoints of this run name, the most important first: the best one may be older
    /// than what the server keeps by itself.
    fn snapshots_in_use(&self) -> Result<Vec<String>, TrainError> {
        let own = self.session.id().to_string();
        let mut saved = checkpoint::list(&self.options.output.dir)?;
        saved.extend(self.resumed.clone());
        saved.retain(|saved| saved.state.session_id == own);
        let best = checkpoint::best(&saved);
        let in_use = best.into_iter().chain(saved.iter().rev());
        Ok(in_use.map(|saved| saved.state.snapshot_id.clone()).collect())
    }

    async fn end(mut self) -> Result<Summary, TrainError> {
        let interrupted = self.step < self.prepared.settings.n_steps;
        let (_, saved) = self.saved.clone().expect("a run ends with a checkpoint");
        let mut adapter = None;
        if !interrupted {
            self.sample().await?;
            let dir = self.options.output.dir.join("adapter");
            let tensors: Vec<_> = self.tensors().await?.into_iter().flatten().collect();
            let fan_in_fan_out = self.prepared.config.family.fan_in_fan_out();
            let config = checkpoint::peft_config(&self.prepared.settings, fan_in_fan_out);
            peft::write_dir(&dir, &config, &tensors)?;
            adapter = Some(dir);
        }
        let wire_error = WireErrors::of(&self.session, &self.prepared.client).await?;
        let wire_dtype = self.session.wire_dtype().name();
        self.report.line(&format!("wire dtype {wire_dtype}, {wire_error}"));
        self.report.event(&Event::Done(DoneEvent {
            step: self.step,
            interrupted,
            seconds: self.spent.began.elapsed().as_secs_f64(),
            training_seconds: self.spent.training.as_secs_f64(),
            wait_seconds: self.spent.waited.as_secs_f64(),
            tokens: self.spent.tokens,
            best: self.best,
            wire_error,
        }))?;
        self.conclude(adapter.as_deref(), &saved);
        let session = self.session.id().clone();
        // Gives the device's memory back; the session can be restored.
        self.session.close(false).await?;
        Ok(Summary {
            step: self.step,
            interrupted,
            losses: self.losses.into_iter().map(|(_, loss)| loss).collect(),
            evaluations: self.evaluations,
            best: self.best,
            checkpoint: saved,
            adapter,
            session,
        })
    }
}
