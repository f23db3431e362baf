//! Copies of a session on their way to the store while it goes on: one at a time for each session,
//! and a few for all, since each is held in memory until it is written.

use super::{Profile, Residency};
use crate::error::Error;
use crate::registry::{Copied, blocking};
use crate::store::{SnapshotRecord, Why};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::sync::{OwnedMutexGuard, OwnedSemaphorePermit};
use tracing::Instrument;

/// Copies of all sessions that the server takes by itself and holds at a time.
pub(super) const MAX_COPIES: usize = 4;
/// A session whose snapshots fail says so at most so often.
const SAY_AGAIN: Duration = Duration::from_secs(60);

/// What is being written of one session.
#[derive(Debug, Default)]
pub struct Writes {
    /// Held while a snapshot of the session is written, so that they land in their order.
    one: Arc<tokio::sync::Mutex<()>>,
    /// The actor is gone: what it began and did not finish counts no more.
    ended: Arc<AtomicBool>,
    failures: Mutex<Failures>,
}

#[derive(Debug, Default)]
struct Failures {
    since_last_whole: u64,
    said: Option<Instant>,
}

/// The right to take and write one copy. Dropping it gives it back.
pub struct Writing {
    _of_session: OwnedMutexGuard<()>,
    _of_all: OwnedSemaphorePermit,
}

impl Writes {
    /// Waits until nothing of the session is being written. Whoever sets it back, or writes a later
    /// point, comes behind.
    pub async fn in_turn(&self) -> OwnedMutexGuard<()> {
        self.one.clone().lock_owned().await
    }

    /// What is still being written counts no more.
    pub fn end(&self) {
        self.ended.store(true, Ordering::Release);
    }

    fn failed(&self, profile: &Profile, error: &Error) {
        // Counts stay whole even if another thread panicked.
        let mut failures = self.failures.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        failures.since_last_whole += 1;
        if failures.said.is_none_or(|said| said.elapsed() >= SAY_AGAIN) {
            failures.said = Some(Instant::now());
            tracing::warn!(
                session = %profile.id, %error, failed = failures.since_last_whole,
                "session trains on without a new snapshot; its last one stays"
            );
        }
    }

    fn succeeded(&self) {
        *self.failures.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) =
            Failures::default();
    }
}

impl Residency {
    /// The right to copy a session while it trains, unless an earlier copy of it is still being
    /// written, or too many of others are.
    pub fn begin_copy(&self, profile: &Profile) -> Option<Writing> {
        let _of_session = profile.writes.one.clone().try_lock_owned().ok()?;
        let _of_all = self.copies.clone().try_acquire_owned().ok()?;
        Some(Writing { _of_session, _of_all })
    }

    /// Makes a copy durable, behind the actor that took it. A failure costs nothing but the
    /// snapshot.
    pub fn write_behind(self: Arc<Self>, profile: Arc<Profile>, copied: Copied, writing: Writing) {
        let runtime = self.runtime.clone();
        let write = async move {
            let begun = Instant::now();
            match self.write_own(&profile, copied).await {
                Ok(SnapshotRecord { id, step, bytes, .. }) => {
                    profile.writes.succeeded();
                    let seconds = begun.elapsed().as_secs_f64();
                    let session = profile.id;
                    tracing::debug!(%session, snapshot = id, step, bytes, seconds, "snapshot taken");
                }
                // Set back or forgotten meanwhile.
                Err(Error::Ended | Error::UnknownSession(_)) => {}
                Err(error) => {
                    profile.writes.failed(&profile, &error);
                }
            }
            drop(writing);
        };
        runtime.spawn(write.instrument(tracing::Span::current()));
    }

    async fn write_own(&self, profile: &Profile, copied: Copied) -> Result<SnapshotRecord, Error> {
        let (store, id, ended) = (self.store.clone(), profile.id, profile.writes.ended.clone());
        blocking(move || store.add_snapshot_unless(&ended, id, copied.encode(Why::Training))).await
    }
}
