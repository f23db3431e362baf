//! Watches the engine's thread. When it dies, with all that was on the device: health says
//! NOT_SERVING, every live session ends, the trunk is loaded again, and health says SERVING. Clients
//! come back by themselves and go on from their sessions' last snapshots.

use crate::engine::{Engine, EngineClient};
use crate::error::Error;
use crate::registry::Registry;
use crate::transport::{Health, State};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// More failures than this within [`WINDOW`], and another start would not help either.
const MAX_FAILURES: usize = 5;
const WINDOW: Duration = Duration::from_secs(600);
/// Before the second start within the window; each further one waits twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// A batch that takes longer than this is worth a line in the log. Nothing ends it: a thread cannot be
/// ended from outside.
const LONG_TURN: Duration = Duration::from_secs(60);
const LOOK_EVERY: Duration = Duration::from_secs(10);

/// The task that watches.
pub struct Supervisor {
    stop: oneshot::Sender<()>,
    task: JoinHandle<Engine>,
    lost: oneshot::Receiver<Error>,
}

impl Supervisor {
    /// Watches from now on.
    pub fn start(engine: Engine, registry: Arc<Registry>, health: Health) -> Self {
        let (stop, stopped) = oneshot::channel();
        let (give_up, lost) = oneshot::channel();
        let client = engine.client();
        let watch = Watch { engine, client, registry, health, failures: Failures::default() };
        let task = tokio::spawn(watch.run(stopped, give_up));
        Supervisor { stop, task, lost }
    }

    /// Until the engine has failed too often; why. Not to be called again after that.
    pub async fn lost(&mut self) -> Error {
        (&mut self.lost).await.unwrap_or(Error::Gone { part: "supervisor" })
    }

    /// Ends the watch; the engine, unless the watch itself had failed.
    pub async fn stop(self) -> Option<Engine> {
        // It may have failed.
        let _ = self.stop.send(());
        self.task.await.ok()
    }
}

struct Watch {
    engine: Engine,
    client: EngineClient,
    registry: Arc<Registry>,
    health: Health,
    failures: Failures,
}

impl Watch {
    async fn run(
        mut self,
        mut stop: oneshot::Receiver<()>,
        give_up: oneshot::Sender<Error>,
    ) -> Engine {
        loop {
            let cause = tokio::select! {
                biased;
                _ = &mut stop => return self.engine,
                cause = self.engine.ended() => cause,
                () = tell_of_long_turns(self.client.clone()) => continue,
            };
            let again = tokio::select! {
                biased;
                _ = &mut stop => return self.engine,
                again = self.start_again(cause) => again,
            };
            if let Err(error) = again {
                // Whoever owns the server ends it now.
                let _ = give_up.send(error);
                let _ = stop.await;
                return self.engine;
            }
        }
    }

    async fn start_again(&mut self, mut cause: String) -> Result<(), Error> {
        self.health.set(State::StartingAgain).await;
        self.client.stats().count_death();
        tracing::error!(cause, "the engine died; sessions go back to their last snapshots");
        let sessions = self.registry.lose_device().await;
        tracing::warn!(sessions, "live sessions have ended; their clients will come back");
        if self.registry.is_draining() {
            // The server ends anyway.
            return std::future::pending().await;
        }
        loop {
            let Some(pause) = self.failures.next(Instant::now()) else {
                let minutes = WINDOW.as_secs() / 60;
                return Err(Error::EngineLost { n_times: MAX_FAILURES, minutes, cause });
            };
            tokio::time::sleep(pause).await;
            match self.engine.restart().await {
                Ok(()) => break,
                Err(error) => {
                    tracing::error!(%error, "the trunk could not be loaded again");
                    cause = error.to_string();
                }
            }
        }
        // Unless it drains.
        self.health.set(State::Serving).await;
        tracing::info!("the engine runs again");
        Ok(())
    }
}

/// Never ends.
async fn tell_of_long_turns(engine: EngineClient) {
    let mut tell_from = LONG_TURN;
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        match engine.stats().turn() {
            Some((kind, lasts)) if lasts >= tell_from => {
                let seconds = lasts.as_secs();
                tracing::warn!(?kind, seconds, "a batch takes very long on the device");
                tell_from *= 2;
            }
            Some((_, lasts)) if lasts >= LONG_TURN => {}
            _ => tell_from = LONG_TURN,
        }
    }
}

/// Deaths of the engine and starts that failed.
#[derive(Default)]
struct Failures(VecDeque<Instant>);

impl Failures {
    /// One more. How long to wait before the next start; None: there have been too many.
    fn next(&mut self, now: Instant) -> Option<Duration> {
        while self.0.front().is_some_and(|first| now.duration_since(*first) >= WINDOW) {
            self.0.pop_front();
        }
        self.0.push_back(now);
        match self.0.len() {
            1 => Some(Duration::ZERO),
            n if n < MAX_FAILURES => Some(FIRST_PAUSE * (1 << (n - 2))),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn starts_come_more_slowly_and_end_after_too_many_failures() {
        let (mut failures, begun) = (Failures::default(), Instant::now());
        let mut at = |seconds: u64| failures.next(begun + Duration::from_secs(seconds));
        let pauses: Vec<_> = (0..5).map(|i| at(i * 20).map(|pause| pause.as_millis())).collect();
        assert_eq!(pauses, [Some(0), Some(500), Some(1000), Some(2000), None]);
    }

    #[test]
    fn old_failures_are_forgotten() {
        let (mut failures, begun) = (Failures::default(), Instant::now());
        let mut at = |seconds: u64| failures.next(begun + Duration::from_secs(seconds));
        for i in 0..20 {
            assert!(at(i * 200).is_some(), "the {i}th");
        }
        assert_eq!(at(20 * 200 + 600), Some(Duration::ZERO));
    }
}
