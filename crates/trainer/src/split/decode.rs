//! One sequence that grows: bottom and top remember its tokens here, the trunk on the server.

use super::SplitModel;
use super::replica::Side;
use crate::TrainError;
use crate::wire::{self, to_wire};
use offshoot_client::{ExtendInput, ForwardInput, HostTensor, Session};
use offshoot_model::{KvCache, ModelConfig, Part, Rows, Segment};
use tch::Tensor;

/// Keys and values of one sequence in bottom and top.
pub(crate) struct SplitCaches {
    bottom: KvCache,
    top: KvCache,
}

/// The next tokens of a sequence.
pub(crate) struct Next<'a> {
    pub ids: &'a [u32],
    /// Tokens before them, which all caches hold.
    pub start: usize,
    /// Names the sequence's cache on the server.
    pub cache: u64,
}

/// Bytes of hidden states that travelled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Traffic {
    pub sent_bytes: u64,
    pub received_bytes: u64,
}

impl Traffic {
    /// What came to it after an earlier state.
    pub fn since(self, before: Traffic) -> Traffic {
        Traffic {
            sent_bytes: self.sent_bytes - before.sent_bytes,
            received_bytes: self.received_bytes - before.received_bytes,
        }
    }
}

impl SplitModel {
    /// Empty ones, for a sequence of at most `capacity` tokens unless they are grown.
    pub(crate) fn new_caches(&self, capacity: usize) -> SplitCaches {
        let new = |side: &Side| side.part.new_cache(capacity as i64);
        SplitCaches { bottom: new(&self.leader.bottom), top: new(&self.leader.top) }
    }

    /// Of the whole model.
    pub(crate) fn config(&self) -> &ModelConfig {
        self.leader.top.part.config()
    }

    /// Runs the next tokens through all three parts, without dropout: `[n, H]` out of the last block.
    /// If it fails, the caches here may hold the tokens nevertheless.
    pub(crate) async fn extend(
        &self,
        session: &Session,
        caches: &mut SplitCaches,
        next: Next<'_>,
        traffic: &mut Traffic,
    ) -> Result<Tensor, TrainError> {
        let Next { ids, start, cache } = next;
        let rows = Rows::after(&[ids.len()], &[start], self.leader.device());
        let bottom = &mut caches.bottom;
        let hidden =
            self.below(ids, (&rows, start), session, |side, x| side.go_on(x, &rows, bottom, start));
        traffic.sent_bytes += hidden.n_bytes() as u64;
        let input = ExtendInput { cache, start: start as u32, hidden };
        let (output, _) = session.extend(input).await?;
        traffic.received_bytes += output.n_bytes() as u64;
        self.above(&output, &rows, |side, x| side.go_on(x, &rows, &mut caches.top, start))
    }

    /// The same for a whole sequence, without any cache.
    pub(crate) async fn read(
        &self,
        session: &Session,
        ids: &[u32],
        traffic: &mut Traffic,
    ) -> Result<Tensor, TrainError> {
        let rows = Rows::new(&[ids.len()], None, self.leader.device());
        let hidden = self.below(ids, (&rows, 0), session, |side, x| side.read(x, &rows));
        traffic.sent_bytes += hidden.n_bytes() as u64;
        let input = ForwardInput {
            hidden,
            seq_lens: vec![ids.len() as u32],
            position_ids: Vec::new(),
            want_input_grad: false,
            dropout_key: 0,
        };
        let output = session.evaluate(input).await?;
        traffic.received_bytes += output.n_bytes() as u64;
        self.above(&output, &rows, |side, x| side.read(x, &rows))
    }

    fn below(
        &self,
        ids: &[u32],
        (rows, start): (&Rows, usize),
        session: &Session,
        run: impl FnOnce(&Side, &Tensor) -> Tensor,
    ) -> HostTensor {
        let _guard = tch::no_grad_guard();
        let bottom = &self.leader.bottom;
        let x = embed(&bottom.part, ids, rows);
        let hidden = self.leader.perturb_hidden(&run(bottom, &x), &[ids.len()], start);
        to_wire(&hidden, session.wire_dtype())
    }

    fn above(
        &self,
        output: &HostTensor,
        rows: &Rows,
        run: impl FnOnce(&Side, &Tensor) -> Tensor,
    ) -> Result<Tensor, TrainError> {
        let _guard = tch::no_grad_guard();
        let top = &self.leader.top;
        let shape = [rows.n_tokens() as usize, self.config().hidden_size as usize];
        let x = wire::receive(output, shape)?.to_device(top.part.device()).to_kind(top.part.kind());
        Ok(run(top, &x))
    }

    /// Float32 logits `[V]` behind the last row of `hidden` `[n, H]`.
    pub(crate) fn last_row_logits(&self, hidden: &Tensor) -> Tensor {
        let _guard = tch::no_grad_guard();
        self.leader.top.part.logits(&hidden.slice(0, -1, None, 1)).squeeze_dim(0)
    }
}

impl Side {
    /// `[n, H] -> [n, H]` behind the first `start` tokens of the cache, which holds the rows' tokens
    /// afterwards.
    fn go_on(&self, x: &Tensor, rows: &Rows, cache: &mut KvCache, start: usize) -> Tensor {
        go_on(&self.part, x, rows, self.segment(rows), (cache, start))
    }

    /// `[N, H] -> [N, H]` of a whole sequence.
    fn read(&self, x: &Tensor, rows: &Rows) -> Tensor {
        self.part.forward_eval(x, rows, &[self.segment(rows)])
    }

    fn segment(&self, rows: &Rows) -> Segment<'_> {
        Segment { rows: 0..rows.n_tokens(), adapter: self.adapter.as_ref(), dropout: None }
    }
}

/// Token ids to hidden states `[n, H]`.
pub(crate) fn embed(part: &Part, ids: &[u32], rows: &Rows) -> Tensor {
    let ids: Vec<i64> = ids.iter().map(|&id| i64::from(id)).collect();
    part.embed(&Tensor::from_slice(&ids).to_device(part.device()), rows)
}

/// `[n, H] -> [n, H]` behind the first `start` tokens of the cache, which has more room afterwards if
/// it needed it, and holds the rows' tokens.
pub(crate) fn go_on(
    part: &Part,
    x: &Tensor,
    rows: &Rows,
    segment: Segment,
    (cache, start): (&mut KvCache, usize),
) -> Tensor {
    cache.truncate(start as i64);
    let needed = start as i64 + rows.n_tokens();
    if needed > cache.capacity() {
        // Twice as much, so that a long text is copied a few times only.
        let most = part.config().max_positions as i64;
        cache.grow((2 * cache.capacity()).min(most).max(needed));
    }
    part.forward_cached(x, rows, &[segment], &mut [Some(cache)])
}
