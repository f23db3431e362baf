//! Who still wants a microbatch's tape.

use crate::command::Command;
use std::sync::{Arc, Weak};
use tokio::sync::mpsc;

/// Held by everyone who does: the pending forward, the `Microbatch`, the backward on its way.
pub(crate) type Claim = Arc<Wanted>;
/// Tells whether there still is such a one.
pub(crate) type Interest = Weak<Wanted>;

/// Once nobody wants the tape any more, the session's task is told.
#[derive(Debug, Default)]
pub(crate) struct Wanted {
    task: Option<mpsc::WeakSender<Command>>,
}

impl Wanted {
    pub(crate) fn by(task: &mpsc::Sender<Command>) -> Claim {
        Arc::new(Wanted { task: Some(task.downgrade()) })
    }
}

impl Drop for Wanted {
    fn drop(&mut self) {
        // Without room something else is about to wake the task, and without senders it ends.
        if let Some(task) = self.task.as_ref().and_then(mpsc::WeakSender::upgrade) {
            let _ = task.try_send(Command::Look);
        }
    }
}
