use crate::identity::{TlsOptions, Token};
use std::time::Duration;

/// How a [`Client`](crate::Client) reaches its server and how long it keeps trying.
#[derive(Debug, Clone, PartialEq)]
pub struct ClientOptions {
    /// For one attempt: the connection itself, and the wait for the server's first answer on a
    /// session's stream.
    pub connect_timeout: Duration,
    /// How long [`Client::connect`](crate::Client::connect) keeps trying when nobody listens.
    /// Short, because a wrong address is more likely than a server that is about to start.
    pub connect_patience: Duration,
    /// For everything after the first connection.
    pub retry: Retry,
    /// A connection without traffic for so long is asked for a sign of life.
    pub keepalive_interval: Duration,
    /// Without a sign of life for so long the connection counts as broken.
    pub keepalive_timeout: Duration,
    /// What the server knows this client by, if it has a tenants file.
    pub token: Option<Token>,
    /// Whether a token may travel without TLS to another machine.
    pub allow_insecure_token: bool,
    /// How TLS is spoken. Without any of it, TLS is on if the address begins with `https://`.
    pub tls: TlsOptions,
}

impl Default for ClientOptions {
    fn default() -> Self {
        ClientOptions {
            connect_timeout: Duration::from_secs(10),
            connect_patience: Duration::from_secs(3),
            retry: Retry::default(),
            keepalive_interval: Duration::from_secs(20),
            keepalive_timeout: Duration::from_secs(20),
            token: None,
            allow_insecure_token: false,
            tls: TlsOptions::default(),
        }
    }
}

/// Exponential backoff: each delay is twice the one before, up to `max_delay`, and a random half of
/// it is taken off so that many clients of one server do not come back in the same moment.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Retry {
    /// Before the second attempt. The first one is made at once.
    pub first_delay: Duration,
    /// No delay is longer.
    pub max_delay: Duration,
    /// From the first failure on. Then the error goes to the caller.
    pub max_elapsed: Duration,
}

impl Default for Retry {
    fn default() -> Self {
        Retry::DEFAULT
    }
}

impl Retry {
    /// What it is unless somebody says otherwise: up to a minute.
    pub const DEFAULT: Retry = Retry {
        first_delay: Duration::from_millis(100),
        max_delay: Duration::from_secs(5),
        max_elapsed: Duration::from_secs(60),
    };

    /// The delay after failed attempt number `attempt` (0, 1, 2, ...), or nothing once `elapsed`
    /// since the first failure is too long. `jitter` is in [0, 1).
    pub(crate) fn delay(&self, attempt: u32, elapsed: Duration, jitter: f64) -> Option<Duration> {
        if elapsed >= self.max_elapsed {
            return None;
        }
        let doubled = self.first_delay.saturating_mul(2u32.saturating_pow(attempt));
        let delay = doubled.min(self.max_delay).mul_f64(1.0 - jitter / 2.0);
        Some(delay.min(self.max_elapsed - elapsed))
    }
}

/// A server that said that it ends has a successor soon: nobody should sleep long when that begins.
const SOON_DELAY: Duration = Duration::from_millis(500);
/// After so long it has not come soon.
const SOON: Duration = Duration::from_secs(120);

/// Counts the attempts of one outage.
#[derive(Debug)]
pub(crate) struct Backoff {
    retry: Retry,
    /// The server said that it, or its successor, is back soon.
    soon: bool,
    started: tokio::time::Instant,
    attempts: u32,
    /// The next delay is not shorter.
    least: Duration,
}

impl Backoff {
    /// Of an outage that began then.
    pub(crate) fn since(retry: Retry, started: tokio::time::Instant) -> Self {
        Backoff { retry, soon: false, started, attempts: 0, least: Duration::ZERO }
    }

    /// It began then.
    pub(crate) fn set_started(&mut self, started: tokio::time::Instant) {
        self.started = started;
    }

    pub(crate) fn started(&self) -> tokio::time::Instant {
        self.started
    }

    pub(crate) fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// Attempts let through so far.
    pub(crate) fn attempts(&self) -> u32 {
        self.attempts
    }

    /// The server asked for this delay before the next attempt, at least.
    pub(crate) fn wait_at_least(&mut self, delay: Duration) {
        self.least = delay;
    }

    /// The server is expected back soon.
    pub(crate) fn set_soon(&mut self) {
        self.soon = true;
    }

    /// How it is tried now.
    fn retry(&self, elapsed: Duration) -> Retry {
        match self.soon && elapsed < SOON {
            true => Retry { max_delay: self.retry.max_delay.min(SOON_DELAY), ..self.retry },
            false => self.retry,
        }
    }

    /// Waits for the time of the next attempt: none before the first one. False if it is time to
    /// give up.
    pub(crate) async fn attempt(&mut self) -> bool {
        if let Some(failed) = self.attempts.checked_sub(1) {
            let elapsed = self.elapsed();
            match self.retry(elapsed).delay(failed, elapsed, rand::random()) {
                // A last attempt at the end, even if the server asked to be left alone for longer.
                Some(delay) => {
                    let left = self.retry.max_elapsed.saturating_sub(elapsed);
                    tokio::time::sleep(delay.max(self.least).min(left)).await;
                }
                None => return false,
            }
        }
        self.attempts = self.attempts.saturating_add(1);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_double_stay_bounded_and_end() {
        let retry = Retry {
            first_delay: Duration::from_millis(100),
            max_delay: Duration::from_millis(500),
            max_elapsed: Duration::from_secs(2),
        };
        let at = |attempt| retry.delay(attempt, Duration::ZERO, 0.0).unwrap().as_millis();
        assert_eq!([at(0), at(1), at(2), at(3), at(40)], [100, 200, 400, 500, 500]);
        assert_eq!(retry.delay(0, Duration::ZERO, 0.5).unwrap().as_millis(), 75);
        // The last delay ends with the patience, not after it.
        let late = retry.delay(9, Duration::from_millis(1900), 0.0).unwrap();
        assert_eq!(late.as_millis(), 100);
        assert_eq!(retry.delay(9, Duration::from_secs(2), 0.0), None);
    }

    #[test]
    fn a_server_that_is_back_soon_is_asked_often_for_a_while() {
        let mut backoff = Backoff::since(Retry::DEFAULT, tokio::time::Instant::now());
        let longest = |backoff: &Backoff, seconds| {
            let elapsed = Duration::from_secs(seconds);
            let retry = Retry { max_elapsed: Duration::MAX, ..backoff.retry(elapsed) };
            retry.delay(30, elapsed, 0.0).unwrap()
        };
        assert_eq!(longest(&backoff, 1), Retry::DEFAULT.max_delay);
        backoff.set_soon();
        assert_eq!(longest(&backoff, 1), SOON_DELAY);
        assert_eq!(longest(&backoff, 119), SOON_DELAY);
        assert_eq!(longest(&backoff, 120), Retry::DEFAULT.max_delay);
    }
}
