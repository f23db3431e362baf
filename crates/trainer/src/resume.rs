use crate::TrainError;
use crate::adapter::Adapter;
use crate::checkpoint::{self, Saved};
use crate::options::TrainOptions;
use crate::origin::Origin;
use crate::setup::{self, Prepared};
use crate::train::keep::Keeper;
use crate::train::{Rollback, Run};
use offshoot_client::{ClientError, Session, SessionId, SnapshotInfo};
use std::path::Path;

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

    /// Where the run goes on, and why it is not a later step, and what is not as it was. Later
    /// checkpoints are set aside.
    pub fn tell_of_resumption(
        &self,
        saved: &Saved,
        fallen: &[String],
        notes: &[String],
    ) -> Result<(), TrainError> {
        for line in fallen {
            self.report.line(line);
        }
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
        for note in notes {
            self.report.line(note);
        }
        Ok(())
    }

    /// After the server came back in an older state: back to the newest of the `snapshots` that it has
    /// (none: it does not say) of which this side has its part, in memory or as a checkpoint, or to the
    /// beginning. The steps after that are replayed exactly.
    pub async fn go_back(&mut self, snapshots: &[SnapshotInfo]) -> Result<(), TrainError> {
        let was = self.step;
        // The answer to the last step may be there, and this side is still as it was after it.
        let _ = self.keep();
        let mut refused = Vec::new();
        for point in self.points(snapshots)? {
            match self.prepared.client.restore(self.session.id(), Some(&point.snapshot_id)).await {
                Ok((session, restored)) if restored.snapshot.step == point.step => {
                    self.session = session;
                    self.set_back(&point)?;
                    return self.replay(was, "");
                }
                Ok((_, restored)) => refused.push(format!(
                    "snapshot {} is of step {}, not of step {}",
                    point.snapshot_id, restored.snapshot.step, point.step
                )),
                Err(ClientError::Damaged { message, .. }) => {
                    self.report.line(&format!(
                        "the server's snapshot of step {} is damaged ({message}); going back to the one before",
                        point.step
                    ));
                    refused.push(message);
                }
                Err(error @ ClientError::Refused { .. }) => refused.push(error.to_string()),
                Err(error) => return Err(error.into()),
            }
        }
        if self.saved.is_none() {
            return self.begin_anew(was).await;
        }
        // The first one is the newest one's.
        let problem = match refused.is_empty() {
            true => "it has none of their snapshots".into(),
            false => refused.swap_remove(0),
        };
        let own = checkpoint::list(&self.options.output.dir)?;
        let instead = newest_whole(&own).map_or(String::new(), |whole| {
            format!(
                "; begin a new run in another --output-dir with the adapter of step {}, without its optimizer: --init-adapter {}",
                whole.state.step,
                whole.path.display()
            )
        });
        Err(TrainError::Checkpoint {
            path: self.options.output.dir.clone(),
            problem: format!(
                "the server lost the session's newer state, and no checkpoint can be restored: {problem}{instead}"
            ),
        })
    }

    /// No checkpoint yet. Step 0 is a function of the seed and of the adapter that it began with.
    async fn begin_anew(&mut self, was: u64) -> Result<(), TrainError> {
        let old = self.session.id().clone();
        self.session = setup::open(&self.options, &self.prepared).await?;
        // Only tidiness: the server may not know it any more.
        let _ = self.prepared.client.close_session(&old, true).await;
        self.prepared.split.reset()?;
        if let Origin::Adapter { adapter, .. } = &self.prepared.origin {
            self.prepared.split.load_adapter(&adapter.tensors)?;
        }
        self.keeper = Keeper::default();
        (self.step, self.eval_loss, self.best, self.saved) = (0, None, None, None);
        self.evaluations.clear();
        self.replay(was, " in a new session")
    }

    /// Where the run can go back to, the newest first: what both sides have.
    fn points(&self, snapshots: &[SnapshotInfo]) -> Result<Vec<Point>, TrainError> {
        let own = self.session.id().to_string();
        let mut saved = checkpoint::list(&self.options.output.dir)?;
        saved.splice(0..0, self.resumed.clone());
        saved.retain(|saved| saved.state.session_id.as_deref() == Some(own.as_str()));
        let on_disk = saved.into_iter().filter_map(|saved| {
            let snapshot_id = saved.state.snapshot_id.clone()?;
            let is_there = snapshots.iter().any(|s| s.snapshot_id == snapshot_id);
            (is_there || snapshots.is_empty()).then_some(Point {
                step: saved.state.step,
                snapshot_id,
                saved: Some(saved),
            })
        });
        let in_memory = self.keeper.kept().filter_map(|kept| {
            let is_it = |s: &&SnapshotInfo| (s.step, s.sequence) == (kept.step, kept.sequence);
            let snapshot_id = snapshots.iter().find(is_it)?.snapshot_id.clone();
            Some(Point { step: kept.step, snapshot_id, saved: None })
        });
        let mut points: Vec<Point> = in_memory.chain(on_disk).collect();
        // Of one step the checkpoint comes first: it was asked for, and stays.
        points.sort_by_key(|point| std::cmp::Reverse((point.step, point.saved.is_some())));
        Ok(points)
    }

    /// This side as it was at a point that the server has been restored to.
    fn set_back(&mut self, point: &Point) -> Result<(), TrainError> {
        let kept = self.keeper.back_to(point.step);
        let dir = self.options.output.dir.clone();
        match (&point.saved, kept) {
            (Some(saved), _) => self.set_state(saved)?,
            (None, Some(kept)) => {
                self.prepared.split.set_state(kept.client)?;
                (self.step, self.eval_loss, self.best) = (kept.step, kept.eval_loss, kept.best);
                self.evaluations = kept.evaluations;
            }
            (None, None) => unreachable!("the point was made from the copy"),
        }
        // Their snapshots are gone; the replay writes them again.
        checkpoint::remove_after(&dir, self.step)?;
        if point.saved.is_none() {
            let newest = checkpoint::list(&dir)?.pop().or_else(|| self.resumed.clone());
            self.saved = newest.map(|saved| (saved.state.step, saved.path));
        }
        Ok(())
    }

    /// From the step that both sides are at again.
    fn replay(&mut self, was: u64, how: &str) -> Result<(), TrainError> {
        let step = self.step;
        self.unfinished = true;
        self.rollbacks.push(Rollback { was, step });
        self.losses.retain(|(s, _)| *s <= step);
        self.report.rewind(step)?;
        self.report.line(&match was - step {
            0 => {
                format!("the server lost what it had of the step after {step}{how}: doing it again")
            }
            n => format!(
                "the server fell back to step {step}{how} (was {was}): replaying {n} step{}",
                if n == 1 { "" } else { "s" }
            ),
        });
        Ok(())
    }
}

/// A step of which the server has a snapshot and this side its own part.
struct Point {
    step: u64,
    snapshot_id: String,
    /// None: this side's part is in memory.
    saved: Option<Saved>,
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

/// What is not as it was, in lines for people.
pub(crate) fn check_settings(
    saved: &Saved,
    prepared: &Prepared,
) -> Result<Vec<String>, TrainError> {
    let (was, is) = (&saved.state.settings, &prepared.settings);
    let differences = was.differences(is).map_err(|differences| {
        TrainError::Checkpoint {
            path: saved.path.clone(),
            problem: format!(
                "it belongs to another model, cut or adapter: {}; use the options that it was made with, or start a new run in another --output-dir",
                differences.join("; ")
            ),
        }
    })?;
    let mut lines: Vec<String> =
        differences.iter().map(|d| format!("not the run as it began: {d}")).collect();
    if is.sends_more_than(was) {
        lines.push("warning: what is sent from here on has less noise than what was sent so far: --hidden-noise and --gradient-noise are not kept from the checkpoint, give them again".into());
    }
    Ok(lines)
}

/// The server's side of the checkpoint that a run goes on from. If its snapshot is damaged, and only the
/// latest one was asked for, that of the one before it, and so on. Says so in the lines.
pub(crate) async fn restore_latest(
    options: &TrainOptions,
    prepared: &Prepared,
    saved: Saved,
) -> Result<(Session, Saved, Vec<String>), TrainError> {
    let damaged = match restore(prepared, &saved).await {
        Ok(session) => return Ok((session, saved, Vec::new())),
        Err(error @ TrainError::Damaged { .. }) => error,
        Err(error) => return Err(error),
    };
    let folder = saved.path.parent();
    let mut before = folder.map(checkpoint::list).transpose()?.unwrap_or_default();
    before.retain(|older| {
        older.state.step < saved.state.step && older.state.session_id == saved.state.session_id
    });
    // A checkpoint that was named is the one that was meant.
    let names_one = options
        .output
        .resume
        .as_ref()
        .is_some_and(|resume| resume.ends_with("best") || Path::new(resume) == saved.path);
    let mut tried = vec![saved];
    if names_one {
        return Err(with_advice(damaged, &tried, before.last()));
    }
    while let Some(older) = before.pop() {
        match restore(prepared, &older).await {
            Ok(session) => {
                let name = |saved: &Saved| format!("checkpoint_step_{}", saved.state.step);
                let lines = vec![format!(
                    "the server's snapshot of {} is damaged: going on from {}",
                    tried.iter().map(name).collect::<Vec<_>>().join(", "),
                    name(&older)
                )];
                return Ok((session, older, lines));
            }
            Err(TrainError::Damaged { problem, .. }) => {
                tracing::debug!(step = older.state.step, problem, "damaged, too");
                tried.push(older);
            }
            // Its snapshot is gone: those before it are older still.
            Err(TrainError::Checkpoint { .. }) => break,
            Err(error) => return Err(error),
        }
    }
    Err(with_advice(damaged, &tried, None))
}

/// What can be done about a damaged snapshot: `tried` has it and the older ones that are damaged, too,
/// the newest first; `before` may be whole.
fn with_advice(error: TrainError, tried: &[Saved], before: Option<&Saved>) -> TrainError {
    let TrainError::Damaged { path, problem, .. } = error else { return error };
    let older: Vec<String> =
        tried.iter().skip(1).map(|saved| saved.state.step.to_string()).collect();
    let also = match older.is_empty() {
        true => String::new(),
        false => {
            format!("those of the older checkpoints are damaged, too (step {}); ", older.join(", "))
        }
    };
    let mut advice = Vec::new();
    if let Some(before) = before {
        advice.push(format!("try the one before: --resume {}", before.path.display()));
    }
    if let Some(whole) = newest_whole(tried) {
        advice.push(format!(
            "begin a new run in another --output-dir with the adapter of step {}, without its optimizer: --init-adapter {}",
            whole.state.step,
            whole.path.display()
        ));
    }
    if advice.is_empty() {
        advice.push("bring the server's store back from a copy".into());
    }
    TrainError::Damaged { path, problem, advice: also + &advice.join("; or ") }
}

/// The newest checkpoint whose adapter can be read.
fn newest_whole(saved: &[Saved]) -> Option<&Saved> {
    saved
        .iter()
        .filter(|saved| Adapter::read(&saved.path).is_ok())
        .max_by_key(|saved| saved.state.step)
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
        Err(ClientError::Damaged { message, .. }) => {
            let (path, advice) = (saved.path.clone(), String::new());
            Err(TrainError::Damaged { path, problem: message, advice })
        }
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
