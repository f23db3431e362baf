use super::{Run, Summary};
use crate::TrainError;
use crate::adapter::Adapter;
use crate::checkpoint::{self, Contents, Saved, TrainingState};
use crate::options::{AdapterChoice, CancelToken, OutputOptions};
use crate::report::{DoneEvent, Event, WireErrors};
use crate::setup::Prepared;
use crate::trace;
use crate::wire::host_to_tensor;
use offshoot_adapters::{AdapterSet, peft};
use offshoot_client::{ClientError, ErrorCode, SnapshotInfo};
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tch::Tensor;
use tracing::Instrument;

/// For what only tidies up.
const PATIENCE_AT_THE_END: Duration = Duration::from_secs(10);

/// What becomes of a checkpoint if the server has no room for its snapshot.
#[derive(Clone, Copy)]
pub(super) enum Room<'a> {
    /// It is left out; the run goes on.
    Optional,
    /// The run ends here all the same, without waiting.
    Now,
    /// The training is done: its adapter is written first, and then the server is waited for, until this
    /// is asked to end.
    Awaited(&'a CancelToken),
}

/// Between two attempts to get the last snapshot from a server whose store fails.
const STORE_DELAY: Duration = Duration::from_secs(5);

/// The PEFT directory of a run that came to its end.
const ADAPTER: &str = "adapter";

impl Run {
    /// The trunk's tensors under PEFT's names.
    async fn trunk_tensors(&self) -> Result<Vec<(String, Tensor)>, TrainError> {
        let exported = self.session.export().await?;
        if exported.step != self.step {
            // It may have been killed just now.
            self.session.reattach().await?;
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

    /// A checkpoint of this step, and the server's snapshot of it. One of several can be left out if the
    /// server has no room for its snapshot.
    pub(super) async fn save(&mut self, room: Room<'_>) -> Result<(), TrainError> {
        let span = trace::between("train.checkpoint", &self.session, self.step);
        self.write_checkpoint(room).instrument(span).await
    }

    async fn write_checkpoint(&mut self, room: Room<'_>) -> Result<(), TrainError> {
        let keep = self.snapshots_in_use()?;
        let mut taken = self.session.try_snapshot(keep.clone()).await;
        let mut adapter = None;
        if let (Err(cause), Room::Awaited(cancel)) = (&taken, room)
            && may_pass(cause)
        {
            let (dir, _) = self.export().await?;
            self.report.line(&format!(
                "the server takes no snapshot of the last step yet ({cause}); the adapter is in {} already, and only the checkpoint of step {} is missing; trying again for up to {} s",
                dir.display(),
                self.step,
                self.options.model.client.retry.max_elapsed.as_secs(),
            ));
            adapter = Some(dir);
            tokio::select! {
                later = self.snapshot_later(keep) => taken = later,
                () = cancel.cancelled() => {}
            }
        }
        let snapshot = match taken {
            Ok(snapshot) => snapshot,
            Err(cause) if may_pass(&cause) => return self.without_snapshot(room, cause, adapter),
            Err(error) => return Err(error.into()),
        };
        self.skipped = false;
        let tensors = self.tensors().await?;
        let Prepared { split, plan, settings, config, .. } = &self.prepared;
        let names = (self.session.id().to_string(), snapshot.snapshot_id);
        let state = TrainingState {
            eval_loss: self.eval_loss,
            best: self.best,
            evaluations: self.evaluations.clone(),
            ..TrainingState::new(self.step, plan.place(self.step), names, settings.clone())
        };
        let contents = Contents {
            state: &state,
            n_layers: config.n_layers,
            fan_in_fan_out: config.family.fan_in_fan_out(),
            client: &split.to_state(),
            tensors,
        };
        let OutputOptions { dir, keep_last, .. } = &self.options.output;
        let path = checkpoint::write(dir, &contents)?;
        checkpoint::prune(dir, *keep_last)?;
        // Of an earlier end of this run: older than what it would be taken for.
        let exported = dir.join(ADAPTER);
        if exported.exists() {
            std::fs::remove_dir_all(&exported).map_err(TrainError::io(&exported))?;
        }
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        self.saved = Some((self.step, path));
        self.report.event(&Event::Checkpoint { step: self.step, name })?;
        self.compare_snapshots().await
    }

    /// Tries again for as long as the options say.
    async fn snapshot_later(&self, keep: Vec<String>) -> Result<SnapshotInfo, ClientError> {
        let patience = self.options.model.client.retry.max_elapsed;
        let began = Instant::now();
        loop {
            // Waits for a disk or a quota by itself; not for a store that fails.
            match self.session.snapshot_keeping(keep.clone()).await {
                Err(cause) if may_pass(&cause) && began.elapsed() + STORE_DELAY < patience => {
                    tokio::time::sleep(STORE_DELAY).await;
                }
                taken => return taken,
            }
        }
    }

    /// The server takes no snapshot now: the run goes on and says so, unless this is its end.
    fn without_snapshot(
        &mut self,
        room: Room<'_>,
        cause: ClientError,
        adapter: Option<PathBuf>,
    ) -> Result<(), TrainError> {
        let newest = self.saved.as_ref().map(|(_, path)| path.clone());
        let step = self.step;
        if !matches!(room, Room::Optional) {
            return Err(TrainError::NoLastSnapshot {
                step,
                cause: Box::new(cause),
                newest,
                adapter,
            });
        }
        self.report.line(&match std::mem::replace(&mut self.skipped, true) {
            false => format!(
                "no checkpoint at step {step}: {cause}; training goes on, and every next checkpoint tries again"
            ),
            true => {
                let newest = newest.map_or("there is none yet".into(), |path| {
                    format!("the newest is {}", path.display())
                });
                format!("no checkpoint at step {step} either; {newest}")
            }
        });
        Ok(())
    }

    /// Says once if the server keeps fewer snapshots than there are checkpoints here.
    async fn compare_snapshots(&mut self) -> Result<(), TrainError> {
        let own = self.own_checkpoints()?;
        if own.len() <= self.n_compared {
            return Ok(());
        }
        self.n_compared = own.len();
        let sessions = self.prepared.client.list_sessions().await?;
        let Some(session) = sessions.iter().find(|session| session.id == *self.session.id()) else {
            return Ok(());
        };
        let has = |id: &str| session.snapshots.iter().any(|snapshot| snapshot.snapshot_id == id);
        let gone: Vec<String> = own
            .iter()
            .filter(|saved| saved.state.snapshot_id.as_deref().is_some_and(|id| !has(id)))
            .map(|saved| format!("checkpoint_step_{}", saved.state.step))
            .collect();
        if !gone.is_empty() {
            self.n_compared = usize::MAX;
            self.report.line(&format!(
                "the server no longer has the snapshot of {}: it keeps fewer than the {} checkpoints of --keep-last. Such a checkpoint can be exported, and a new run can begin with its adapter (--init-adapter), but --resume needs the snapshot; start the server with a higher --snapshots-kept, or lower --keep-last",
                gone.join(", "),
                self.options.output.keep_last,
            ));
        }
        Ok(())
    }

    /// What the checkpoints of this run name, the most important first: the best one may be older
    /// than what the server keeps by itself.
    fn snapshots_in_use(&self) -> Result<Vec<String>, TrainError> {
        let saved = self.own_checkpoints()?;
        let best = checkpoint::best(&saved);
        let in_use = best.into_iter().chain(saved.iter().rev());
        Ok(in_use.filter_map(|saved| saved.state.snapshot_id.clone()).collect())
    }

    /// The checkpoints of this run's session, oldest first, with the one that it was resumed from.
    fn own_checkpoints(&self) -> Result<Vec<Saved>, TrainError> {
        let own = self.session.id().to_string();
        let mut saved = checkpoint::list(&self.options.output.dir)?;
        if let Some(resumed) = &self.resumed
            && saved.iter().all(|saved| saved.state.step != resumed.state.step)
        {
            saved.insert(0, resumed.clone());
        }
        saved.retain(|saved| saved.state.session_id.as_deref() == Some(own.as_str()));
        Ok(saved)
    }

    /// Writes the PEFT directory for the uncut model. Gives it and the step that it is of.
    async fn export(&mut self) -> Result<(PathBuf, u64), TrainError> {
        let mut step = self.step;
        let mut tensors = None;
        if self.options.output.adapter == AdapterChoice::Best {
            match checkpoint::best(&self.own_checkpoints()?) {
                // The last step may be the best one, and have no checkpoint.
                Some(best) if best.state.step != step && !self.is_best() => {
                    step = best.state.step;
                    tensors = Some(Adapter::read(&best.path)?.tensors);
                }
                Some(_) => {}
                None => self.report.line(
                    "no checkpoint has a finite evaluation loss; the adapter is the last step's",
                ),
            }
        }
        let tensors = match tensors {
            Some(tensors) => tensors,
            None => self.tensors().await?.into_iter().flatten().collect(),
        };
        let dir = self.options.output.dir.join(ADAPTER);
        let fan_in_fan_out = self.prepared.config.family.fan_in_fan_out();
        let config = checkpoint::peft_config(&self.prepared.settings, fan_in_fan_out);
        peft::write_dir(&dir, &config, &tensors)?;
        Ok((dir, step))
    }

    /// The last samples and the adapter of a run that has come to its end.
    pub(super) async fn export_at_end(&mut self) -> Result<Option<(PathBuf, u64)>, TrainError> {
        if self.is_interrupted() {
            return Ok(None);
        }
        self.sample().await?;
        Ok(Some(self.export().await?))
    }

    fn is_interrupted(&self) -> bool {
        self.step < self.prepared.settings.n_steps && !self.stops_early()
    }

    /// Says where everything is, and leaves the session.
    pub(super) async fn end(
        mut self,
        exported: Option<(PathBuf, u64)>,
    ) -> Result<Summary, TrainError> {
        let interrupted = self.is_interrupted();
        let stopped_early = !interrupted && self.step < self.prepared.settings.n_steps;
        let (_, saved) = self.saved.clone().expect("a run ends with a checkpoint");
        // Everything is saved: what follows is not worth a long wait for a server that has just left.
        let wire_error = WireErrors::of(&self.session, &self.prepared.client);
        let wire_error = tokio::time::timeout(PATIENCE_AT_THE_END, wire_error).await;
        let wire_error = wire_error.ok().and_then(Result::ok).unwrap_or_default();
        // A finished run that was resumed has sent nothing.
        if self.spent.microbatches > 0 {
            let wire_dtype = self.session.wire_dtype().name();
            self.report.line(&format!("wire dtype {wire_dtype}, {wire_error}"));
        }
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
        self.conclude(exported.as_ref(), &saved);
        let session = self.session.id().clone();
        // Gives the device's memory back; the session can be restored. Everything is saved: a server
        // that cannot do it now does it by itself when the session's lease is over.
        match tokio::time::timeout(PATIENCE_AT_THE_END, self.session.close(false)).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => tracing::warn!("the session was not parked on the server: {error}"),
            Err(_) => tracing::warn!(
                "the session was not parked on the server: no answer in {} s",
                PATIENCE_AT_THE_END.as_secs()
            ),
        }
        let n_before = self.resumed.map_or(0, |saved| saved.state.evaluations.len());
        Ok(Summary {
            step: self.step,
            interrupted,
            stopped_early,
            losses: self.losses.into_iter().map(|(_, loss)| loss).collect(),
            evaluations: self.evaluations.split_off(n_before.min(self.evaluations.len())),
            best: self.best,
            checkpoint: saved,
            adapter_step: exported.as_ref().map(|(_, step)| *step),
            adapter: exported.map(|(dir, _)| dir),
            rollbacks: self.rollbacks,
            session,
        })
    }
}

/// Whether the server may take the snapshot later: its disk is full, a quota is used up, or its store
/// fails, such as one that is not mounted. What is broken for good shows in the next step.
fn may_pass(cause: &ClientError) -> bool {
    use ErrorCode::{Exhausted, Internal};
    matches!(cause, ClientError::Refused { code: Exhausted | Internal, .. })
}
