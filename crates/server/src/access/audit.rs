//! The audit log: who opened, exported, deleted what and when, one JSON object on each line. It
//! holds names and ids; never tokens, tensors or texts.
//!
//! A thread writes, so that a slow disk holds nobody up; a full one does not either: what could not
//! be written is counted and said.

mod refusals;

use super::{Caller, Stranger};
use crate::error::Error;
use crate::log_file::LogFile;
use refusals::{Refusals, Who};
use serde::Serialize;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

/// Lines on their way to the disk.
const MAX_WAITING: usize = 1024;
/// A peer whose calls are refused has one line at once, and then one in so long.
const WINDOW: Duration = Duration::from_secs(60);

/// Where events are noted. Clones write to the same log.
#[derive(Clone, Default)]
pub struct Audit(Option<Arc<Inner>>);

struct Inner {
    lines: mpsc::SyncSender<Message>,
    refusals: Mutex<Refusals>,
    n_lost: AtomicU64,
    thread: Mutex<Option<JoinHandle<()>>>,
}

enum Message {
    Line(Box<Line>),
    Reopen,
    End,
}

/// What somebody did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    Open,
    Attach,
    Snapshot,
    Restore,
    Export,
    Close,
    Forget,
    /// Off the device.
    Evict,
    /// To the device.
    Pin,
    Unpin,
    DeleteSnapshot,
    RefusedAuthentication,
    TenantsReloaded,
    /// Lines that could not be written.
    LinesLost,
}

/// Which session and which of its snapshots an event is about.
#[derive(Debug, Clone, Default)]
pub struct Subject {
    /// As the caller named it, if that is an id.
    pub session: Option<String>,
    pub snapshot: Option<String>,
    /// Whose session it is, if an operator does it to another's.
    pub owner: Option<String>,
}

#[derive(Serialize)]
struct Line {
    /// RFC 3339, UTC, to the millisecond.
    time: String,
    action: Action,
    #[serde(skip_serializing_if = "String::is_empty")]
    tenant: String,
    /// The token's id.
    #[serde(skip_serializing_if = "String::is_empty")]
    token: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    peer: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    session: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    snapshot: Option<String>,
    /// Whose session it is, where that is not `tenant`.
    #[serde(skip_serializing_if = "Option::is_none")]
    owner: Option<String>,
    /// "ok", or the error's label.
    outcome: &'static str,
    /// Of events that share a line.
    #[serde(skip_serializing_if = "Option::is_none")]
    count: Option<u64>,
}

impl Line {
    fn new(action: Action, outcome: &'static str) -> Line {
        let now = humantime::format_rfc3339_millis(SystemTime::now());
        let time = now.to_string();
        let (tenant, token) = (String::new(), String::new());
        let (peer, session, snapshot, owner, count) = Default::default();
        Line { time, action, tenant, token, peer, session, snapshot, owner, outcome, count }
    }
}

impl Audit {
    /// Opens the log, which must succeed the first time. None: nothing is noted.
    pub fn start(path: Option<&Path>) -> Result<Audit, Error> {
        let Some(path) = path else { return Ok(Audit(None)) };
        let file = LogFile::of_audit(path)?;
        let (lines, waiting) = mpsc::sync_channel(MAX_WAITING);
        let inner = Arc::new(Inner {
            lines,
            refusals: Mutex::default(),
            n_lost: AtomicU64::new(0),
            thread: Mutex::default(),
        });
        let writer = Writer { file, inner: inner.clone() };
        let spawned = std::thread::Builder::new()
            .name("audit".into())
            .spawn(move || writer.run(&waiting))
            .map_err(|source| Error::Thread { name: "audit", source })?;
        *lock(&inner.thread) = Some(spawned);
        Ok(Audit(Some(inner)))
    }

    /// Notes what a caller did, and what came of it.
    pub fn did<T>(
        &self,
        caller: &Caller,
        action: Action,
        subject: Subject,
        result: &Result<T, Error>,
    ) {
        let Some(inner) = &self.0 else { return };
        let outcome = result.as_ref().map_or_else(Error::label, |_| "ok");
        let mut line = Line::new(action, outcome);
        (line.tenant, line.token) = (caller.tenant.name.clone(), caller.token_id.to_string());
        line.peer = caller.peer.map(|peer| peer.to_string());
        (line.session, line.snapshot) = (subject.session, subject.snapshot);
        line.owner = subject.owner;
        inner.send(line);
    }

    /// Notes a call without a valid token. Many from one peer share a line.
    pub fn refused(&self, stranger: &Stranger) {
        let Some(inner) = &self.0 else { return };
        let who = Who::of(stranger);
        if lock(&inner.refusals).note(who) {
            let mut line = Line::new(Action::RefusedAuthentication, "unauthenticated");
            line.peer = stranger.peer.map(|peer| peer.to_string());
            line.tenant = stranger.tenant.clone().unwrap_or_default();
            line.token = stranger.token.clone().unwrap_or_default();
            inner.send(line);
        }
    }

    /// Notes that the tenants file was read again.
    pub fn reloaded<T>(&self, result: &Result<T, Error>) {
        let Some(inner) = &self.0 else { return };
        let outcome = result.as_ref().map_or_else(Error::label, |_| "ok");
        inner.send(Line::new(Action::TenantsReloaded, outcome));
    }

    /// Opens the file anew, after it was moved away.
    pub fn reopen(&self) {
        if let Some(inner) = &self.0 {
            // If so many lines wait, the writer looks at the file soon enough.
            let _ = inner.lines.try_send(Message::Reopen);
        }
    }

    /// Writes what is left. Blocks until it is in the file.
    pub fn end(&self) {
        let Some(inner) = &self.0 else { return };
        let Some(thread) = lock(&inner.thread).take() else { return };
        // It has ended already if it does not take this.
        let _ = inner.lines.send(Message::End);
        if thread.join().is_err() {
            tracing::error!("the audit log's thread has failed");
        }
    }
}

impl Inner {
    fn send(&self, line: Line) {
        if self.lines.try_send(Message::Line(Box::new(line))).is_err() {
            self.n_lost.fetch_add(1, Ordering::Relaxed);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each use is whole even if another thread panicked.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Writer {
    file: LogFile,
    inner: Arc<Inner>,
}

impl Writer {
    fn run(mut self, waiting: &mpsc::Receiver<Message>) {
        let mut window_ends = Instant::now() + WINDOW;
        loop {
            let left = window_ends.saturating_duration_since(Instant::now());
            match waiting.recv_timeout(left) {
                Ok(Message::Line(line)) => self.write(&line),
                Ok(Message::Reopen) => self.file.reopen(),
                Ok(Message::End) | Err(mpsc::RecvTimeoutError::Disconnected) => {
                    return self.write_refusals();
                }
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    self.write_refusals();
                    window_ends = Instant::now() + WINDOW;
                }
            }
        }
    }

    fn write(&mut self, line: &Line) {
        if !self.put(line) {
            self.inner.n_lost.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let n_lost = self.inner.n_lost.swap(0, Ordering::Relaxed);
        if n_lost > 0 {
            let mut line = Line::new(Action::LinesLost, "lost");
            line.count = Some(n_lost);
            if !self.put(&line) {
                self.inner.n_lost.fetch_add(n_lost, Ordering::Relaxed);
            }
        }
    }

    fn put(&mut self, line: &Line) -> bool {
        // A line of strings and numbers can always be written as JSON.
        serde_json::to_vec(line).is_ok_and(|bytes| self.file.write_line(bytes))
    }

    fn write_refusals(&mut self) {
        let refusals = lock(&self.inner.refusals).take();
        for (who, count) in refusals {
            let mut line = Line::new(Action::RefusedAuthentication, "unauthenticated");
            let Who { peer, known } = who;
            line.peer = Some(peer.map_or_else(|| "others".into(), |peer| peer.to_string()));
            (line.tenant, line.token) = known.unwrap_or_default();
            line.count = Some(count);
            self.write(&line);
        }
    }
}

#[cfg(test)]
mod tests;
