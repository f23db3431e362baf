//! Whether the server gives a sign of life while something waits for its answer. A busy server may take
//! long for that and answers a small question meanwhile; one that is stopped, or that nothing gets
//! through to, answers neither, and the connection itself tells only much later.

use crate::client::Client;
use std::pin::Pin;
use std::time::Duration;
use tokio::time::Instant;

/// Without any answer for so long the server is asked for a sign of life.
const QUIET: Duration = Duration::from_secs(3);
/// Without one for so long it is silent. What is between is for a question behind large tensors on a
/// slow line.
const SILENT: Duration = Duration::from_secs(8);

/// What has changed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Sign {
    Silent,
    Alive,
    /// Silent for longer than anybody wants to wait.
    TooLong,
}

type Question = Pin<Box<dyn Future<Output = bool> + Send>>;

/// The signs of life of one stream or call.
pub(crate) struct Pulse {
    client: Client,
    /// Silent for longer is too long.
    patience: Duration,
    last: Instant,
    waits: bool,
    silent: bool,
    question: Option<Question>,
    /// Not asked before.
    ask_at: Instant,
}

impl Pulse {
    pub(crate) fn new(client: &Client, patience: Duration) -> Self {
        let (client, last) = (client.clone(), Instant::now());
        let (waits, silent, question, ask_at) = (false, false, None, last + QUIET);
        Pulse { client, patience, last, waits, silent, question, ask_at }
    }

    /// Something came. True if the server was silent before.
    pub(crate) fn beat(&mut self) -> bool {
        self.last = Instant::now();
        self.ask_at = self.last + QUIET;
        self.question = None;
        std::mem::take(&mut self.silent)
    }

    /// Whether an answer is waited for from now on.
    pub(crate) fn set_waits(&mut self, waits: bool) {
        if waits != self.waits {
            self.waits = waits;
            if !self.silent {
                self.beat();
            }
        }
    }

    /// The last sign of life, or the beginning of the wait.
    pub(crate) fn last(&self) -> Instant {
        self.last
    }

    pub(crate) fn is_silent(&self) -> bool {
        self.silent
    }

    /// The next change, while something is waited for. It may be dropped and called again.
    pub(crate) async fn next(&mut self) -> Sign {
        loop {
            let end = match self.silent {
                _ if !self.waits => return std::future::pending().await,
                true => self.last + self.patience,
                false => self.last + SILENT,
            };
            let client = &self.client;
            tokio::select! {
                biased;
                answered = answer(client, &mut self.question, self.ask_at) => {
                    self.question = None;
                    self.ask_at = Instant::now() + QUIET;
                    if answered && self.beat() {
                        return Sign::Alive;
                    }
                }
                () = tokio::time::sleep_until(end) => {
                    if self.silent {
                        return Sign::TooLong;
                    }
                    self.silent = true;
                    return Sign::Silent;
                }
            }
        }
    }
}

/// Asks, unless that is done, and waits for the answer.
async fn answer(client: &Client, question: &mut Option<Question>, ask_at: Instant) -> bool {
    if question.is_none() {
        tokio::time::sleep_until(ask_at).await;
    }
    let client = client.clone();
    question.get_or_insert_with(|| Box::pin(async move { client.is_alive().await })).await
}
