//! This side's part of the last steps of which the server has a snapshot: if the server falls back to
//! one of them, the run goes on from there without a checkpoint.

use super::Run;
use crate::TrainError;
use crate::checkpoint::Best;
use crate::split::ClientState;
use offshoot_client::PendingStep;
use std::collections::VecDeque;

/// Copies in memory. The server's newest snapshot may have been cut off in the middle of its writing,
/// and the one before it is then what counts.
const MOST: usize = 3;

/// What a checkpoint of this step would hold of this side.
pub(crate) struct Kept {
    pub step: u64,
    /// The number of the step's frame, as the snapshot has it.
    pub sequence: u64,
    pub client: ClientState,
    pub eval_loss: Option<f64>,
    pub best: Option<Best>,
    pub evaluations: Vec<Best>,
}

/// The copies, and the step whose answer may ask for another.
#[derive(Default)]
pub(crate) struct Keeper {
    pub pending: Option<PendingStep>,
    kept: VecDeque<Kept>,
}

impl Keeper {
    /// Oldest first.
    pub fn kept(&self) -> impl Iterator<Item = &Kept> {
        self.kept.iter()
    }

    /// Takes the copy of a step out, and forgets those of later ones.
    pub fn back_to(&mut self, step: u64) -> Option<Kept> {
        self.pending = None;
        let n_left = self.kept.partition_point(|kept| kept.step < step);
        let taken = self.kept.drain(n_left..).next();
        taken.filter(|kept| kept.step == step)
    }

    fn push(&mut self, kept: Kept) {
        if self.kept.len() == MOST {
            self.kept.pop_front();
        }
        self.kept.push_back(kept);
    }
}

impl Run {
    /// Keeps this side's part of the last step if its answer says that the server makes a snapshot of it.
    /// To be called where that answer has come and the next step is not taken: between the backwards of
    /// the next step's microbatches and that step. It is seldom, and costs a copy of what trains here.
    pub(crate) fn keep(&mut self) -> Result<(), TrainError> {
        let Some(taken) = self.keeper.pending.as_mut().and_then(PendingStep::now) else {
            return Ok(());
        };
        self.keeper.pending = None;
        let taken = taken?;
        if taken.snapshot && taken.step == self.step {
            tracing::debug!(step = self.step, "the server makes a snapshot of this step");
            self.keeper.push(Kept {
                step: self.step,
                sequence: taken.sequence,
                client: self.prepared.split.to_state_after_step(),
                eval_loss: self.eval_loss,
                best: self.best,
                evaluations: self.evaluations.clone(),
            });
        }
        Ok(())
    }
}
