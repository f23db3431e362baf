//! A model that is asked, again and again, what follows a text.

use super::whole::WholeModel;
use crate::TrainError;
use crate::split::{Next, SplitCaches, SplitModel, Traffic};
use crate::trace;
use offshoot_client::{Client, ClientError, Session};
use offshoot_model::{KvCache, ModelConfig};
use tch::{Device, Tensor};
use tracing::{Instrument, Span};

/// Tokens that a cache has room for at first.
const FIRST_CAPACITY: usize = 256;
/// Rows of a long prompt that go through an uncut model at once: more would only cost memory.
const WHOLE_CHUNK: usize = 1024;
/// Every decoder has one sequence, and a session of ours has one decoder at a time.
const CACHE: u64 = 1;
/// Failures in a row without an answer between them: then something is broken for good.
const MAX_FRESH_STARTS: u32 = 5;

/// A model with a text that grows: split, with the trunk on a server, or whole.
///
/// It remembers the tokens that it was shown (keys and values of the trunk on the server, those of
/// bottom and top here), and runs only new ones. What the server has forgotten, it is shown again.
pub struct Decoder<'a> {
    way: Way<'a>,
    remembers: bool,
    /// What the caches hold. Empty while a pass runs: one that failed or was given up in the middle
    /// is not relied on.
    held: Vec<u32>,
    traffic: Traffic,
}

enum Way<'a> {
    Whole { model: &'a WholeModel, cache: KvCache },
    Split { model: &'a SplitModel, home: Home<'a>, caches: SplitCaches },
}

/// The session that has the trunk.
enum Home<'a> {
    /// Somebody else's, who knows what to do when the server goes back to an older state.
    Borrowed(&'a Session),
    /// For this only: it has nothing to lose, and is restored as it was opened.
    Own { session: &'a mut Session, client: &'a Client },
}

impl Home<'_> {
    fn session(&self) -> &Session {
        match self {
            Home::Borrowed(session) => session,
            Home::Own { session, .. } => session,
        }
    }
}

impl<'a> Decoder<'a> {
    /// The uncut model.
    pub fn whole(model: &'a WholeModel) -> Self {
        let cache = model.new_cache(FIRST_CAPACITY.min(model.config().max_positions));
        Self::new(Way::Whole { model, cache })
    }

    /// Bottom and top around a session that is in use for something else as well.
    pub fn split(model: &'a SplitModel, session: &'a Session) -> Self {
        Self::split_at(model, Home::Borrowed(session))
    }

    /// Bottom and top around a session that was opened for this only. If the server was killed and
    /// came back, the session is restored, and the text goes on.
    pub fn visiting(model: &'a SplitModel, session: &'a mut Session, client: &'a Client) -> Self {
        Self::split_at(model, Home::Own { session, client })
    }

    fn split_at(model: &'a SplitModel, home: Home<'a>) -> Self {
        let caches = model.new_caches(FIRST_CAPACITY.min(model.config().max_positions));
        Self::new(Way::Split { model, home, caches })
    }

    fn new(way: Way<'a>) -> Self {
        Decoder { way, remembers: true, held: Vec::new(), traffic: Traffic::default() }
    }

    /// Whether the texts to come are remembered, as they are unless somebody says otherwise. If not,
    /// every token costs a pass over the whole text: what the caches are compared with.
    pub fn remember(&mut self, remembers: bool) {
        self.remembers = remembers;
    }

    /// Of the model.
    pub fn config(&self) -> &ModelConfig {
        match &self.way {
            Way::Whole { model, .. } => model.config(),
            Way::Split { model, .. } => model.config(),
        }
    }

    /// Bytes of hidden states that travelled so far.
    pub fn traffic(&self) -> Traffic {
        self.traffic
    }

    /// Tokens that one text can have, prompt included.
    pub fn context(&self) -> usize {
        let of_model = self.config().max_positions;
        match &self.way {
            Way::Whole { .. } => of_model,
            Way::Split { home, .. } => {
                let limits = home.session().limits();
                let of_server = match self.remembers {
                    true => limits.max_cache_tokens,
                    false => limits.max_tokens_per_microbatch,
                };
                of_model.min(of_server as usize)
            }
        }
    }

    /// Gives the server's memory of the text back. A decoder that is only dropped leaves it there until
    /// the session ends, takes a step or leaves the device.
    pub async fn close(self) -> Result<(), TrainError> {
        if let Way::Split { home, .. } = &self.way
            && self.remembers
        {
            home.session().drop_cache(CACHE).await?;
        }
        Ok(())
    }

    /// The scores (float32 logits) `[V]` of what follows `ids`, which are not empty and at most
    /// [`context`](Decoder::context).
    pub(super) async fn scores(&mut self, ids: &[u32]) -> Result<Vec<f32>, TrainError> {
        let mut fresh_starts = 0;
        loop {
            let span = if self.is_split() { trace::token() } else { Span::none() };
            match self.scores_once(ids).instrument(span).await {
                Ok(logits) => {
                    let mut values = vec![0f32; logits.numel()];
                    logits.to_device(Device::Cpu).copy_data(&mut values, logits.numel());
                    return Ok(values);
                }
                Err(TrainError::Client(error)) => {
                    fresh_starts += 1;
                    if fresh_starts > MAX_FRESH_STARTS || !self.begin_again(&error).await? {
                        return Err(error.into());
                    }
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn is_split(&self) -> bool {
        matches!(self.way, Way::Split { .. })
    }

    /// Whether the text can be shown to the server again after this error.
    async fn begin_again(&mut self, error: &ClientError) -> Result<bool, TrainError> {
        let Way::Split { home, .. } = &mut self.way else { return Ok(false) };
        if error.is_cache_gone() {
            tracing::debug!(%error, "the server has forgotten the text; it is sent again");
            return Ok(true);
        }
        let Home::Own { session, client } = home else { return Ok(false) };
        if !matches!(error, ClientError::RolledBack { .. }) {
            return Ok(false);
        }
        tracing::debug!(%error, "the server was started again; the session is restored");
        **session = client.restore(session.id(), None).await?.0;
        Ok(true)
    }

    async fn scores_once(&mut self, ids: &[u32]) -> Result<Tensor, TrainError> {
        if !self.remembers {
            return self.scores_of_all(ids).await;
        }
        let held = std::mem::take(&mut self.held);
        let common = held.iter().zip(ids).take_while(|(held, id)| held == id).count();
        // One row at least has to run: the last one, which the scores are of.
        let mut start = common.min(ids.len() - 1);
        let mut hidden = None;
        match &mut self.way {
            Way::Whole { model, cache } => {
                for chunk in ids[start..].chunks(WHOLE_CHUNK) {
                    hidden = Some(model.extend(chunk, start, cache));
                    start += chunk.len();
                }
            }
            Way::Split { model, home, caches } => {
                let session = home.session();
                let most = session.limits().max_tokens_per_microbatch.max(1) as usize;
                for chunk in ids[start..].chunks(most) {
                    let next = Next { ids: chunk, start, cache: CACHE };
                    hidden = Some(model.extend(session, caches, next, &mut self.traffic).await?);
                    start += chunk.len();
                }
            }
        }
        self.held = ids.to_vec();
        let hidden = hidden.expect("at least one row was left to run");
        Ok(match &self.way {
            Way::Whole { model, .. } => model.last_row_logits(&hidden),
            Way::Split { model, .. } => model.last_row_logits(&hidden),
        })
    }

    async fn scores_of_all(&mut self, ids: &[u32]) -> Result<Tensor, TrainError> {
        match &self.way {
            Way::Whole { model, .. } => Ok(model.last_row_logits(&model.evaluate(ids))),
            Way::Split { model, home, .. } => {
                let hidden = model.read(home.session(), ids, &mut self.traffic).await?;
                Ok(model.last_row_logits(&hidden))
            }
        }
    }
}
