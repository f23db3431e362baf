//! A client that trains, whatever happens to its server, and notes when answers come.

use anyhow::Context;
use offshoot_client::{Client, ClientOptions, Retry, Session};
use offshoot_tests::follow::{go_back, open};
use offshoot_tests::run::{bits, train_heard};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

const RANK: u32 = 8;

/// How far a team is.
#[derive(Default)]
pub struct Progress {
    /// Steps taken, replayed ones included.
    pub taken: AtomicU64,
    pub furthest: AtomicU64,
    /// Times of all answers.
    answers: Mutex<Vec<Instant>>,
}

/// What a team ends with.
pub struct Outcome {
    /// Of every number of each step.
    pub digests: Vec<u64>,
    pub adapter: Vec<(String, Vec<u32>)>,
    /// By the server's count.
    pub steps: u64,
    pub replayed: u64,
    pub went_back: u64,
}

pub struct Team {
    client: Client,
    session: Session,
    h: usize,
    pub progress: Arc<Progress>,
    /// The last step, as soon as it is known.
    until: Arc<AtomicU64>,
}

impl Progress {
    pub fn answers(&self) -> MutexGuard<'_, Vec<Instant>> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Team {
    /// As `offshoot train` connects.
    pub async fn new(endpoint: &str, until: Arc<AtomicU64>) -> anyhow::Result<Team> {
        let retry = Retry { max_elapsed: Duration::from_secs(600), ..Retry::DEFAULT };
        let options = ClientOptions { retry, ..ClientOptions::default() };
        let client = Client::connect_with(endpoint, options).await?;
        let h = client.describe().await?.hidden_size;
        let session = open(&client, RANK).await;
        Ok(Team { client, session, h, progress: Arc::default(), until })
    }

    pub async fn train(mut self) -> anyhow::Result<Outcome> {
        let (mut digests, mut step) = (Vec::new(), 0);
        let (mut replayed, mut went_back) = (0, 0);
        loop {
            let is_last = step >= self.until.load(Ordering::SeqCst);
            let heard = || self.progress.answers().push(Instant::now());
            let done = match is_last {
                true => self.session.settle().await.map(|_| None),
                false => train_heard(&self.session, self.h, step..step + 1, heard).await.map(Some),
            };
            match done {
                Ok(None) => break,
                Ok(Some(numbers)) => {
                    let digest = numbers.first().context("one step was taken")?.digest();
                    match digests.get(step as usize) {
                        Some(before) => {
                            anyhow::ensure!(*before == digest, "step {step} has other numbers now");
                            replayed += 1;
                        }
                        None => digests.push(digest),
                    }
                    step += 1;
                    self.progress.taken.fetch_add(1, Ordering::SeqCst);
                    self.progress.furthest.fetch_max(step, Ordering::SeqCst);
                }
                Err(error) => {
                    step = go_back(&self.client, &mut self.session, error).await.step;
                    went_back += 1;
                }
            }
        }
        let exported = self.session.export().await?;
        let (steps, adapter) = (exported.step, bits(&exported));
        Ok(Outcome { digests, adapter, steps, replayed, went_back })
    }
}
