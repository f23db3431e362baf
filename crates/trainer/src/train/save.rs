use super::{Run, Summary};
use crate::TrainError;
use crate::checkpoint::{self, Contents, TrainingState};
use crate::report::{DoneEvent, Event, WireErrors};
use crate::setup::Prepared;
use crate::wire::host_to_tensor;
use offshoot_adapters::{AdapterSet, peft};
use tch::Tensor;

impl Run {
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

    /// A checkpoint of this step, and the server's snapshot of it.
    pub(super) async fn save(&mut self) -> Result<(), TrainError> {
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

    /// Exports, says where everything is, and leaves the session.
    pub(super) async fn end(mut self) -> Result<Summary, TrainError> {
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
