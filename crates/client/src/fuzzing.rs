//! For fuzz targets and property tests, behind the feature `fuzzing`: what comes from a server goes
//! the way it goes in a session, and a window without its task, its clock and its network. No part
//! of the SDK.

use crate::claim::Claim;
use crate::entry::{Entry, Request};
use crate::pending::{report, tensor};
use crate::types::{ExportedAdapter, ServerDescription, SessionInfo};
use crate::window::{Cause, Gone, Outcome, Window};
use offshoot_proto::v1::{self, server_frame};
use std::collections::BTreeMap;
use std::time::Duration;

/// Everything that a session and its callers read of an answer.
pub fn server_frame(frame: v1::ServerFrame) {
    let sent = (Duration::from_millis(1), 0);
    match frame.body {
        Some(server_frame::Body::Attached(attached)) => {
            let window = Window::<()>::new(frame.sequence, &attached.limits.unwrap_or_default());
            let _ = window.attached(attached.last_applied, &attached.open_microbatches);
        }
        Some(server_frame::Body::Forward(done)) => {
            let _ = report(sent, done.timing, done.tape_bytes).wire();
            let _ = tensor("Forward", done.hidden).map(|hidden| hidden.to_f32());
        }
        Some(server_frame::Body::Backward(done)) => {
            let _ = report(sent, done.timing, 0).wire();
            let _ = tensor("Backward", done.grad).map(|grad| grad.to_f32());
        }
        Some(_) | None => {}
    }
}

/// The answers of unary calls.
pub fn answers(
    described: v1::DescribeResponse,
    listed: v1::SessionInfo,
    exported: v1::ExportAdapterResponse,
) {
    let _ = ServerDescription::from_proto(described);
    let _ = SessionInfo::from_proto(listed);
    if let Ok(exported) = ExportedAdapter::from_proto(exported) {
        for (_, tensor) in exported.tensors.iter().chain(&exported.gradients) {
            assert_eq!(tensor.to_f32().len(), tensor.shape().iter().product::<usize>());
        }
    }
}

/// How a request ended. `tag` is what it was pushed with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Done {
    Applied { tag: u64, microbatch: u64 },
    Refused { tag: u64 },
    Aborted { tag: u64 },
}

/// What a session's task is without its clock and its stream: requests in, frames out, answers in.
pub struct Side {
    window: Window<u64>,
    /// Of forwards that nobody gave up, by their tag.
    claims: BTreeMap<u64, Claim>,
    /// The server said when to try again.
    waits: bool,
}

/// The tag of what nobody waits for.
pub const NOBODY: u64 = u64::MAX;

impl Side {
    /// A session whose answers have come up to `answered`.
    pub fn new(answered: u64, limits: &v1::Limits) -> Self {
        Side { window: Window::new(answered, limits), claims: BTreeMap::new(), waits: false }
    }

    /// Whether another request is taken now.
    pub fn has_room(&self) -> bool {
        self.window.has_room()
    }

    /// Whether everything is answered.
    pub fn is_empty(&self) -> bool {
        self.window.is_empty()
    }

    /// For Hello.
    pub fn answered(&self) -> u64 {
        self.window.answered()
    }

    /// Whether the task would leave a draining server.
    pub fn may_leave(&self) -> bool {
        self.window.may_leave()
    }

    /// A forward; one in training mode is wanted until [`Side::give_up`].
    pub fn forward(&mut self, forward: v1::Forward, tag: u64) {
        let claim = Claim::default();
        let interest = std::sync::Arc::downgrade(&claim);
        self.claims.insert(tag, claim);
        self.window.push(Request::Forward { forward, interest }, tag);
    }

    /// The backward of the forward `of`, answered as `microbatch`.
    pub fn backward(&mut self, of: u64, microbatch: u64, tag: u64) {
        let claim = self.claims.remove(&of).unwrap_or_default();
        let backward = v1::Backward { microbatch, grad: None };
        self.window.push(Request::Backward { backward, claim }, tag);
    }

    /// Nobody wants the forward's tape any more.
    pub fn give_up(&mut self, tag: u64) {
        self.claims.remove(&tag);
    }

    pub fn step(&mut self, step: v1::Step, tag: u64) {
        self.window.push(Request::Step(step), tag);
    }

    pub fn extend(&mut self, extend: v1::Extend, tag: u64) {
        self.window.push(Request::Extend(extend), tag);
    }

    pub fn drop_cache(&mut self, cache: u64, tag: u64) {
        self.window.push(Request::DropCache(v1::DropCache { cache }), tag);
    }

    /// The next frame for the stream.
    pub fn send(&mut self) -> Option<v1::ClientFrame> {
        for microbatch in self.window.abandoned() {
            self.window.push(Request::Discard(v1::Discard { microbatch }), NOBODY);
        }
        self.window.take_unsent()
    }

    /// An answer from the stream. None: it fits no frame, and the session is over.
    pub fn receive(&mut self, frame: v1::ServerFrame) -> Option<Vec<Done>> {
        let sequence = frame.sequence;
        let error = match frame.body {
            Some(server_frame::Body::Error(error)) => error,
            Some(_) => {
                let Outcome::Answered(entry) = self.window.applied(sequence) else { return None };
                let microbatch = entry.microbatch();
                return Some(vec![Done::Applied { tag: entry.reply, microbatch }]);
            }
            None => return None,
        };
        let cause = match error.code() {
            _ if self.window.is_returning() => Cause::Final,
            v1::ErrorCode::Draining => Cause::Drain,
            _ if error.retry_after_millis > 0 => Cause::Retry,
            _ => Cause::Final,
        };
        self.waits |= cause == Cause::Retry;
        let mut done = match self.window.refused(sequence, cause) {
            Outcome::Refused(entry) => vec![Done::Refused { tag: entry.reply }],
            Outcome::Aborted(entry) => vec![Done::Aborted { tag: entry.reply }],
            Outcome::Kept => Vec::new(),
            Outcome::Answered(_) | Outcome::Unexpected { .. } => return None,
        };
        done.extend(aborted(self.window.settle()));
        Some(done)
    }

    /// The wait that the server asked for is over.
    pub fn release(&mut self) {
        if self.waits && !self.window.is_returning() {
            self.waits = false;
            self.window.release();
        }
    }

    /// The stream broke.
    pub fn disconnected(&mut self) -> Vec<Done> {
        self.waits = false;
        aborted(self.window.disconnected())
    }

    /// The server is back.
    ///
    /// # Errors
    /// True: it stands where this side never was. False: it is in an older state.
    pub fn attached(&mut self, attached: &v1::Attached) -> Result<(), bool> {
        if let Some(limits) = &attached.limits {
            self.window.set_limits(limits);
        }
        self.window
            .attached(attached.last_applied, &attached.open_microbatches)
            .map_err(|gone| gone == Gone::Ahead)
    }
}

fn aborted(entries: Vec<Entry<u64>>) -> Vec<Done> {
    entries.into_iter().map(|entry| Done::Aborted { tag: entry.reply }).collect()
}
