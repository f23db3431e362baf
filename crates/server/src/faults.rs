//! Failures that tests ask for, at the places where real ones would come. Only the feature `faults`,
//! which the tests' package alone names, has a way to ask; without it each place is an empty call.

#[cfg(feature = "faults")]
use std::sync::{Mutex, PoisonError};

/// Where a failure strikes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Within one job, where its panic is its own answer.
    Forward,
    Backward,
    Step,
    /// On the engine's thread between two batches, where a panic ends the thread.
    Engine,
    /// While the trunk is loaded.
    Load,
    /// In a session's actor, as a frame comes.
    Actor,
    /// In a task of the server, at its next turn.
    Keeper,
    Parking,
}

/// The failures that are to come.
#[derive(Debug, Default)]
pub struct Faults {
    #[cfg(feature = "faults")]
    planned: Mutex<Vec<(Fault, u32)>>,
}

impl Faults {
    /// The `nth` pass from now on, counted from 1, panics.
    #[cfg(feature = "faults")]
    pub fn plan(&self, fault: Fault, nth: u32) {
        let mut planned = self.planned.lock().unwrap_or_else(PoisonError::into_inner);
        planned.push((fault, nth));
    }

    /// Something comes past this place.
    #[inline]
    pub(crate) fn pass(&self, here: Fault) {
        #[cfg(feature = "faults")]
        {
            let mut planned = self.planned.lock().unwrap_or_else(PoisonError::into_inner);
            for (_, left) in planned.iter_mut().filter(|(fault, _)| *fault == here) {
                *left = left.saturating_sub(1);
            }
            let struck = planned.iter().position(|&(_, left)| left == 0);
            if let Some(struck) = struck {
                planned.remove(struck);
                drop(planned);
                panic!("a test asked for this failure: {here:?}");
            }
        }
        #[cfg(not(feature = "faults"))]
        let _ = here;
    }
}
