//! The end of a server: every session is made durable, those with open microbatches when these are
//! done.

use super::Registry;
use crate::session::{DrainWhenQuiet, Reason, SessionId};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;

/// How often a drain says how far it is.
const TELL_EVERY: Duration = Duration::from_secs(2);

/// Tells a drain that nobody waits for it any more. Clones are the same.
#[derive(Clone)]
pub struct Hurry(Arc<watch::Sender<bool>>);

impl Default for Hurry {
    fn default() -> Self {
        Hurry(Arc::new(watch::channel(false).0))
    }
}

impl Hurry {
    /// Open microbatches are not waited for: what there is of each session is made durable now, and
    /// their clients run them again.
    pub fn now(&self) {
        self.0.send_replace(true);
    }

    async fn wanted(&self) {
        // The sender is in here.
        let _ = self.0.subscribe().wait_for(|wanted| *wanted).await;
    }
}

/// What a drain waits for.
struct Patience {
    quiet_by: Instant,
    hurry: Hurry,
    /// Sessions with something open.
    n_open: AtomicUsize,
}

impl Registry {
    /// Takes no new sessions from now on, and live ones only until they are parked.
    pub fn begin_drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
        self.residency.begin_drain();
    }

    /// Lets open microbatches finish until `quiet_by`, then makes every session durable and takes
    /// it off the device. Returns how many could not be.
    pub async fn drain(self: &Arc<Self>, quiet_by: Instant, hurry: &Hurry) -> usize {
        self.begin_drain();
        let n_open = AtomicUsize::new(0);
        let patience = Arc::new(Patience { quiet_by, hurry: hurry.clone(), n_open });
        let mut n_failed = 0;
        // Twice, for sessions that were just being opened.
        for _ in 0..2 {
            n_failed = self.drain_all(&patience).await;
        }
        n_failed
    }

    async fn drain_all(self: &Arc<Self>, patience: &Arc<Patience>) -> usize {
        let mut all = JoinSet::new();
        for id in self.slots.ids() {
            let (registry, patience) = (self.clone(), patience.clone());
            all.spawn(async move { registry.drain_one(id, &patience).await });
        }
        let (mut n_failed, mut n_saved) = (0, 0);
        let mut tell = tokio::time::interval_at(Instant::now() + TELL_EVERY, TELL_EVERY);
        loop {
            tokio::select! {
                drained = all.join_next() => match drained {
                    None => return n_failed,
                    Some(Ok(true)) => n_saved += 1,
                    Some(Ok(false)) => n_failed += 1,
                    Some(Err(error)) => {
                        tracing::error!(%error, "draining a session failed");
                        n_failed += 1;
                    }
                },
                _ = tell.tick() => {
                    let left = patience.quiet_by.saturating_duration_since(Instant::now());
                    tracing::info!(
                        sessions_left = all.len(), sessions_saved = n_saved,
                        sessions_not_saved = n_failed,
                        with_open_microbatches = patience.n_open.load(Ordering::Relaxed),
                        waits_seconds = left.as_secs_f64().round(), "draining"
                    );
                }
            }
        }
    }

    async fn drain_one(&self, id: SessionId, patience: &Patience) -> bool {
        let Some(actor) = self.slots.actor(id) else { return true };
        // Without the lock, so that a client that lost its stream can come back and finish.
        patience.n_open.fetch_add(1, Ordering::Relaxed);
        let is_quiet = tokio::select! {
            biased;
            _ = actor.send(DrainWhenQuiet) => true,
            () = tokio::time::sleep_until(patience.quiet_by) => false,
            () = patience.hurry.wanted() => false,
        };
        patience.n_open.fetch_sub(1, Ordering::Relaxed);
        if !is_quiet {
            tracing::warn!(session = %id, "drained with an open microbatch; its tape is dropped");
        }
        let mut held = self.slots.lock(id).await;
        if held.live().is_none() {
            return true;
        }
        match self.park(id, &mut held, Reason::Drain).await {
            Ok(snapshot) => {
                tracing::info!(session = %id, step = snapshot.step, "session parked");
                true
            }
            Err(error) => {
                tracing::error!(session = %id, %error, "session could not be made durable");
                false
            }
        }
    }
}
