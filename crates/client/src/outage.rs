//! A time without the server: how long it lasts, what people are told, and who can see that it is one.

use crate::ClientError;
use crate::client::Client;
use crate::options::{Backoff, Retry};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;

/// After so long people are told why nothing goes on.
const LONG: Duration = Duration::from_secs(5);
/// After so long people may have noticed, and are told that it is over.
const NOTICED: Duration = Duration::from_secs(1);

/// Why there is no answer where the connection is whole.
pub(crate) const SILENCE: &str = "the connection stands, and nothing comes";

/// How many calls and streams of a client are without the server now, and since when.
#[derive(Debug, Clone, Default)]
pub(crate) struct Link(Arc<watch::Sender<State>>);

#[derive(Debug, Clone, Copy, Default)]
struct State {
    n_waiting: usize,
    since: Option<Instant>,
}

impl Link {
    /// Since when nothing of a call or a stream gets through.
    pub(crate) fn offline_since(&self) -> Option<Instant> {
        self.0.borrow().since
    }

    /// Returns when that is so for at least this long.
    pub(crate) async fn offline_for(&self, least: Duration) {
        let mut states = self.0.subscribe();
        // The sender is in here.
        while let Ok(state) = states.wait_for(|state| state.since.is_some()).await.map(|s| *s) {
            let until = state.since.unwrap_or_else(Instant::now) + least;
            tokio::time::sleep_until(until).await;
            if self.offline_since() == state.since {
                return;
            }
        }
    }

    pub(crate) fn wait(&self) -> Waiting {
        self.wait_since(Instant::now())
    }

    fn wait_since(&self, since: Instant) -> Waiting {
        self.0.send_modify(|state| {
            state.n_waiting += 1;
            state.since = Some(state.since.map_or(since, |other| other.min(since)));
        });
        Waiting(self.clone())
    }
}

/// Something that waits for the server. Dropped, it waits no longer.
#[derive(Debug)]
pub(crate) struct Waiting(Link);

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.0.send_modify(|state| {
            state.n_waiting -= 1;
            if state.n_waiting == 0 {
                state.since = None;
            }
        });
    }
}

/// From the first failure until an answer arrives again.
#[derive(Debug)]
pub(crate) struct Outage {
    backoff: Backoff,
    max_elapsed: Duration,
    told: bool,
    /// Whether it was away, and not only too full.
    away: bool,
    waiting: Option<Waiting>,
}

impl Outage {
    pub(crate) fn new(retry: Retry) -> Self {
        Outage::since(retry, Instant::now())
    }

    /// One that began then.
    pub(crate) fn since(retry: Retry, began: Instant) -> Self {
        let max_elapsed = retry.max_elapsed;
        let (backoff, told, away) = (Backoff::since(retry, began), false, false);
        Outage { backoff, max_elapsed, told, away, waiting: None }
    }

    /// Waits for the time of the next attempt: none before the first one. False if it is time to give
    /// up.
    pub(crate) async fn attempt(&mut self) -> bool {
        self.backoff.attempt().await
    }

    /// The server cannot be reached.
    pub(crate) fn failed(&mut self, client: &Client, cause: &str) {
        self.away = true;
        self.tell(client, format_args!("no answer from {}", client.endpoint()), cause);
    }

    /// This one began then, unless it is going on.
    pub(crate) fn began(&mut self, at: Instant) {
        if self.waiting.is_none() {
            self.backoff.set_started(at);
        }
    }

    /// The server said that it, or the one behind it, is back soon.
    pub(crate) fn soon(&mut self) {
        self.backoff.set_soon();
    }

    /// The server cannot be asked for more, and gives no sign of life.
    pub(crate) fn silent(&mut self, client: &Client) {
        self.failed(client, SILENCE);
    }

    /// The server asks to be called later.
    pub(crate) fn put_off(&mut self, client: &Client, cause: &str) {
        self.tell(client, format_args!("{} has no room", client.endpoint()), cause);
    }

    fn tell(&mut self, client: &Client, what: std::fmt::Arguments<'_>, cause: &str) {
        self.waiting.get_or_insert_with(|| client.link().wait_since(self.backoff.started()));
        let elapsed = self.backoff.elapsed();
        if !self.told && elapsed >= LONG {
            self.told = true;
            tracing::warn!(
                "{what} for {:.0} s ({cause}); trying again for up to {:.0} s",
                elapsed.as_secs_f64(),
                self.max_elapsed.as_secs_f64(),
            );
        }
    }

    /// The server is there again, and everything goes on from where it was.
    pub(crate) fn over(&mut self, client: &Client) {
        let elapsed = self.backoff.elapsed();
        let waited = self.waiting.take().is_some() && (self.told || elapsed >= NOTICED);
        let (endpoint, seconds) = (client.endpoint(), elapsed.as_secs_f64());
        if waited && self.away {
            tracing::info!("reconnected to {endpoint} after {seconds:.0} s, nothing was lost");
        } else if waited && self.told {
            tracing::info!("{endpoint} has room after {seconds:.0} s");
        }
        (self.told, self.away) = (false, false);
    }

    /// It took too long.
    pub(crate) fn unreachable(&self, client: &Client, cause: String) -> ClientError {
        ClientError::Unreachable {
            endpoint: client.endpoint().to_string(),
            waited: self.elapsed(),
            attempts: self.attempts().max(1),
            cause,
        }
    }

    pub(crate) fn wait_at_least(&mut self, delay: Duration) {
        self.backoff.wait_at_least(delay);
    }

    pub(crate) fn elapsed(&self) -> Duration {
        self.backoff.elapsed()
    }

    pub(crate) fn attempts(&self) -> u32 {
        self.backoff.attempts()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_link_is_offline_while_anything_waits() {
        let link = Link::default();
        assert!(link.offline_since().is_none());
        let first = link.wait();
        let since = link.offline_since();
        let second = link.wait();
        drop(first);
        assert_eq!(link.offline_since(), since, "the same outage");
        link.offline_for(Duration::ZERO).await;
        drop(second);
        assert!(link.offline_since().is_none());
        let (mut seen, other) = (Box::pin(link.offline_for(Duration::ZERO)), link.clone());
        let pending = std::future::poll_fn(|context| {
            std::task::Poll::Ready(seen.as_mut().poll(context).is_pending())
        });
        assert!(pending.await);
        let _third = other.wait();
        seen.await;
    }
}
