use crate::TrainError;
use crate::checkpoint::{self, Saved};
use crate::options::TrainOptions;
use crate::origin::Origin;
use crate::setup::{self, Prepared};
use crate::train::Run;
use offshoot_client::{ClientError, Session, SessionId};

impl Run {
    /// Client, step and losses as a checkpoint has them.
    pub fn set_state(&mut self, saved: &Saved) -> Result<(), TrainError> {
        self.prepared.split.set_state(saved.client_state()?)?;
        self.step = saved.state.step;
        self.eval_loss = saved.state.eval_loss;
        self.best = saved.state.best;
        self.evaluations = saved.state.evaluations.clone();
        self.saved = Some((self.step, saved.path.clone()));
        Ok(())
    }

    /// Where the run goes on, and what is not as it was. Later checkpoints are set aside.
    pub fn tell_of_resumption(
        &self,
        saved: &Saved,
        differences: &[String],
    ) -> Result<(), TrainError> {
        if let Some(aside) = checkpoint::set_aside_after(&self.options.output.dir, self.step)? {
            let aside = aside.display();
            self.report.line(&format!("the checkpoints of later steps are in {aside} now"));
        }
        let place = self.prepared.plan.place(self.step);
        self.report.line(&format!(
            "resumed at step {} (epoch {}, sample {}) from {}",
            self.step,
            place.epoch,
            place.sample,
            saved.path.display()
        ));
        if self.step >= self.prepared.settings.n_steps {
            self.report.line("the run is at its last step already: there is nothing to train");
        }
        for difference in differences {
            self.report.line(&format!("not the run as it began: {difference}"));
        }
        Ok(())
    }

    /// After the server came back in an older state: back to the newest checkpoint whose snapshot it
    /// still has, or to the beginning. The steps after that are replayed exactly.
    pub async fn go_back(&mut self, cause: &ClientError) -> Result<(), TrainError> {
        tracing::info!(%cause, "the server rolled back");
        let own = self.session.id().to_string();
        let mut refused = Vec::new();
        let mut known = checkpoint::list(&self.options.output.dir)?;
        known.splice(0..0, self.resumed.clone());
        known.retain(|saved| saved.state.session_id.as_deref() == Some(own.as_str()));
        for saved in known.into_iter().rev() {
            match restore(&self.prepared, &saved).await {
                Ok(session) => {
                    self.session = session;
                    self.set_state(&saved)?;
                    // Their snapshots are gone; the replay writes them again.
                    checkpoint::remove_after(&self.options.output.dir, self.step)?;
                    return self.replay_from(&format!("checkpoint {}", saved.path.display()));
                }
                Err(TrainError::Checkpoint { problem, .. }) => refused.push(problem),
                Err(error) => return Err(error),
            }
        }
        if let Some(problem) = refused.pop() {
            return Err(TrainError::Checkpoint {
                path: self.options.output.dir.clone(),
                problem: format!(
                    "the server lost the session's newer state, and no checkpoint can be restored: {problem}"
                ),
            });
        }
        // No checkpoint yet. Step 0 is a function of the seed and of the adapter that it began with.
        let old = self.session.id().clone();
        self.session = setup::open(&self.options, &self.prepared).await?;
        // Only tidiness: the server may not know it any more.
        let _ = self.prepared.client.close_session(&old, true).await;
        self.prepared.split.reset()?;
        if let Origin::Adapter { adapter, .. } = &self.prepared.origin {
            self.prepared.split.load_adapter(&adapter.tensors)?;
        }
        (self.step, self.eval_loss, self.best, self.saved) = (0, None, None, None);
        self.evaluations.clear();
        self.replay_from("the beginning, in a new session")
    }

    fn replay_from(&mut self, from: &str) -> Result<(), TrainError> {
        let step = self.step;
        self.losses.retain(|(s, _)| *s <= step);
        self.report.rewind(step)?;
        self.report.line(&format!(
            "the server came back in an older state; going on at step {step} from {from}"
        ));
        Ok(())
    }
}

/// Checkpoints of another run, or of steps yet to come, would be taken for this run's.
pub(crate) fn check_output_dir(
    options: &TrainOptions,
    resumed: Option<&Saved>,
) -> Result<(), TrainError> {
    let Some(last) = checkpoint::list(&options.output.dir)?.pop() else { return Ok(()) };
    // `best` can only mean to leave the later ones; they are set aside. An imported one has none.
    let to_best = options.output.resume.as_deref() == Some("best");
    let to_imported = options.output.resume.is_some() && resumed.is_none() && last.state.step == 0;
    if to_best || to_imported {
        return Ok(());
    }
    let problem = match resumed {
        None => format!(
            "it holds checkpoints of another run, up to step {}; go on with it by --resume latest, or name another folder",
            last.state.step
        ),
        Some(saved) if saved.state.step < last.state.step => format!(
            "it holds checkpoints up to step {}, and the run is to go on from step {}; name another folder for the new branch, or move the later checkpoints away",
            last.state.step, saved.state.step
        ),
        Some(_) => return Ok(()),
    };
    let value = options.output.dir.display().to_string();
    Err(TrainError::Option { option: "output-dir", value, problem })
}

pub(crate) fn check_settings(
    saved: &Saved,
    prepared: &Prepared,
) -> Result<Vec<String>, TrainError> {
    saved.state.settings.differences(&prepared.settings).map_err(|differences| {
        TrainError::Checkpoint {
            path: saved.path.clone(),
            problem: format!(
                "it belongs to another model, cut or adapter: {}; use the options that it was made with, or start a new run in another --output-dir",
                differences.join("; ")
            ),
        }
    })
}

/// The server's side of a checkpoint.
pub(crate) async fn restore(prepared: &Prepared, saved: &Saved) -> Result<Session, TrainError> {
    let state = &saved.state;
    let Some((session_id, snapshot_id)) = state.snapshot() else {
        return Err(TrainError::Checkpoint {
            path: saved.path.clone(),
            problem: "no server has its session; begin with its adapter by --init-adapter".into(),
        });
    };
    let id = SessionId::from(session_id.to_string());
    match prepared.client.restore(&id, Some(snapshot_id)).await {
        Ok((session, restored)) if restored.snapshot.step == state.step => Ok(session),
        Ok((_, restored)) => Err(TrainError::Checkpoint {
            path: saved.path.clone(),
            problem: format!(
                "it is of step {}, the server's snapshot {} is of step {}; are they of one run?",
                state.step, snapshot_id, restored.snapshot.step
            ),
        }),
        Err(error @ ClientError::Refused { .. }) => Err(TrainError::Checkpoint {
            path: saved.path.clone(),
            problem: format!(
                "the server cannot restore snapshot {snapshot_id} of session {session_id}: {error}. It keeps the last few snapshots of a session (--snapshots-kept) in its --store-dir. Take a later checkpoint; or start the server with the store that the run used; or begin a new run with this checkpoint's adapter, without its optimizer: --init-adapter {}",
                saved.path.display()
            ),
        }),
        Err(error) => Err(error.into()),
    }
}
