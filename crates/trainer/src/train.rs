mod conclude;
mod evaluate;
mod follow;
pub(crate) mod keep;
mod save;
mod step;

use crate::TrainError;
use crate::checkpoint::{Best, Saved};
use crate::data::source::Sources;
use crate::early_stop;
use crate::in_flight::InFlight;
use crate::options::{AdapterChoice, CancelToken, TrainOptions};
use crate::origin::Origin;
use crate::report::{Event, ReportOptions, Reporter};
use crate::resume;
use crate::setup::{self, Prepared};
use crate::trace;
use crate::train::follow::unless_stopped;
use crate::train::save::Room;
use keep::Keeper;
use offshoot_client::{Session, SessionId};
use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tracing::Instrument;

/// What a run left.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    /// Optimizer steps taken, those before a resumption included.
    pub step: u64,
    /// Stopped by its [`CancelToken`] before the last step.
    pub interrupted: bool,
    /// Ended before the last step because the evaluation loss no longer improved.
    pub stopped_early: bool,
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
    /// After how many steps that adapter was taken.
    pub adapter_step: Option<u64>,
    /// How often the server fell back to an older state, and this run with it.
    pub rollbacks: Vec<Rollback>,
    /// The session, parked on the server.
    pub session: SessionId,
}

/// A server that came back in an older state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rollback {
    /// Steps that were taken.
    pub was: u64,
    /// Those that were left. What lies between was replayed.
    pub step: u64,
}

/// Trains. Everything that a run leaves is in its output directory and in the server's store.
///
/// It computes on the calling thread, between the awaits: give it the `block_on` of a multi-thread
/// runtime, so that the connection's tasks run beside it.
pub async fn train(options: TrainOptions, cancel: CancelToken) -> Result<Summary, TrainError> {
    run(options, None, cancel).await
}

/// The same on sources of your own, in place of those that `options.sources` names; of that only
/// the limits of samples count. A resumed run goes on exactly if it is given the same records.
pub async fn train_with_sources(
    options: TrainOptions,
    sources: Sources,
    cancel: CancelToken,
) -> Result<Summary, TrainError> {
    run(options, Some(sources), cancel).await
}

async fn run(
    options: TrainOptions,
    own: Option<Sources>,
    cancel: CancelToken,
) -> Result<Summary, TrainError> {
    let mut run = Run::begin(options, own, &cancel).await?;
    let exported = run.follow(&cancel).await?;
    run.end(exported).await
}

/// Holds a run's folder until the process ends or this is dropped.
fn hold(dir: &Path) -> Result<File, TrainError> {
    let folder = File::open(dir).map_err(TrainError::io(dir))?;
    match folder.try_lock() {
        Err(TryLockError::WouldBlock) => Err(TrainError::Option {
            option: "output-dir",
            value: dir.display().to_string(),
            problem: "another run writes there now; wait for its end, or name another folder"
                .into(),
        }),
        // Some network file systems have no locks.
        Ok(()) | Err(TryLockError::Error(_)) => Ok(folder),
    }
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
    pub in_flight: InFlight,
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
    /// All of the run, those before a resumption included.
    pub evaluations: Vec<Best>,
    /// This side's part of the last steps that the server can go back to.
    pub keeper: Keeper,
    /// Of this call.
    pub rollbacks: Vec<Rollback>,
    /// What follows the last step (evaluation, checkpoint) may not have been done: the run went back to
    /// it.
    pub unfinished: bool,
    /// Whether the last checkpoint could not be written because the server had no room for a snapshot.
    pub skipped: bool,
    /// The most checkpoints of which it is known whether the server has their snapshots.
    pub n_compared: usize,
    /// No other run writes into the folder while this is held.
    _folder: File,
}

impl Run {
    async fn begin(
        options: TrainOptions,
        own: Option<Sources>,
        cancel: &CancelToken,
    ) -> Result<Self, TrainError> {
        let dir = &options.output.dir;
        // Before the session is touched: a resumption would take it from the run that has it.
        let held = if dir.is_dir() { Some(hold(dir)?) } else { None };
        let origin = Origin::find(&options)?;
        let resumed = origin.checkpoint().cloned();
        resume::check_output_dir(&options, resumed.as_ref())?;
        let stops = !cancel.is_cancelled();
        let prepared = tokio::select! {
            prepared = setup::prepare(&options, own, origin) => prepared?,
            // Nothing was asked of the server but what it holds.
            () = cancel.cancelled(), if stops => return Err(TrainError::StoppedAtStart),
        };
        let mut resumed = resumed;
        let mut fallen = Vec::new();
        let (session, notes) = match resumed.take() {
            Some(saved) => {
                let notes = resume::check_settings(&saved, &prepared)?;
                let restored = resume::restore_latest(&options, &prepared, saved);
                let restored = unless_stopped(cancel, &prepared.client, restored).await?;
                let (session, saved, lines) = restored;
                (resumed, fallen) = (Some(saved), lines);
                (session, notes)
            }
            None => {
                let opened = setup::open(&options, &prepared);
                (unless_stopped(cancel, &prepared.client, opened).await?, Vec::new())
            }
        };
        // Nothing is written before it is certain that the run can begin.
        std::fs::create_dir_all(dir).map_err(TrainError::io(dir))?;
        let held = held.map_or_else(|| hold(dir), Ok)?;
        if let Some(text) = &options.output.config {
            let file = dir.join("config.toml");
            std::fs::write(&file, text).map_err(TrainError::io(&file))?;
        }
        prepared.privacy.write_key(dir)?;
        let step = resumed.as_ref().map_or(0, |saved| saved.state.step);
        let report = Reporter::new(&ReportOptions {
            output_dir: dir,
            step,
            n_steps: prepared.settings.n_steps,
            log_interval: options.output.log_interval,
            quiet: options.output.quiet,
            tensorboard: options.output.tensorboard,
        })?;
        let mut run = Run {
            session,
            report,
            prepared,
            spent: Spent::default(),
            in_flight: InFlight::new(options.most_in_flight()),
            step: 0,
            eval_loss: None,
            best: None,
            saved: None,
            resumed: resumed.clone(),
            losses: Vec::new(),
            evaluations: Vec::new(),
            keeper: Keeper::default(),
            rollbacks: Vec::new(),
            unfinished: false,
            skipped: false,
            n_compared: 0,
            _folder: held,
            options,
        };
        run.describe();
        run.report.event(&Event::Start(run.start_event(step)))?;
        if let Some(saved) = resumed {
            run.set_state(&saved)?;
            run.tell_of_resumption(&saved, &fallen, &notes)?;
        }
        Ok(run)
    }

    /// Trains to the last step, to an early stop, or until it is asked to end.
    async fn go_on(&mut self, cancel: &CancelToken) -> Result<(), TrainError> {
        self.set_references().await?;
        // Not again after a resumption: every frame counts in the numbers of those after it, and
        // dropout masks depend on the numbers.
        if self.step == 0 && self.saved.is_none() {
            self.evaluate().await?;
            self.sample().await?;
        }
        if std::mem::take(&mut self.unfinished) && self.step > 0 {
            self.after_step().await?;
        }
        let n_steps = self.prepared.settings.n_steps;
        while self.step < n_steps && !self.stops_early() && !cancel.is_cancelled() {
            let span = trace::step(&self.session, self.step + 1);
            self.train_step().instrument(span).await?;
            self.after_step().await?;
        }
        // Asked to end, or nothing was left to do at all.
        if !self.is_saved() {
            let at_end = self.step == n_steps || self.stops_early();
            self.save(if at_end { Room::Awaited(cancel) } else { Room::Now }).await?;
        }
        Ok(())
    }

    /// What is due behind a step, unless it was done.
    async fn after_step(&mut self) -> Result<(), TrainError> {
        let at_end = self.step == self.prepared.settings.n_steps;
        let is_evaluated = self.evaluations.last().is_some_and(|last| last.step == self.step);
        let interval = self.options.evaluation.interval;
        if (at_end || self.step.is_multiple_of(interval)) && !is_evaluated {
            self.evaluate().await?;
        }
        let wanted = self.options.output.adapter == AdapterChoice::Best && self.is_best();
        let due = wanted || self.step.is_multiple_of(self.options.output.save_interval);
        // The last one is written by whoever ends the run.
        if due && !at_end && !self.is_saved() {
            self.save(Room::Optional).await?;
        }
        Ok(())
    }

    fn is_saved(&self) -> bool {
        self.saved.as_ref().is_some_and(|(step, _)| *step == self.step)
    }

    /// Whether so many evaluations brought no improvement that the run is over. Only the recorded
    /// evaluations decide, so that a resumed run ends where this one would.
    pub(crate) fn stops_early(&self) -> bool {
        let evaluation = &self.options.evaluation;
        evaluation.patience.is_some_and(|patience| {
            early_stop::without_improvement(&self.evaluations, evaluation.threshold) >= patience
        })
    }

    /// Whether the evaluation of this step is the best one since training began. Step 0 does not
    /// count: it is the base model.
    pub(crate) fn is_best(&self) -> bool {
        let trained = self.evaluations.iter().filter(|e| e.step > 0 && e.loss.is_finite());
        trained.min_by(|a, b| a.loss.total_cmp(&b.loss)).is_some_and(|best| best.step == self.step)
    }
}
