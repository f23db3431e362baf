//! Sequences that go on, with their keys and values on the server: generation.

use crate::entry::Request;
use crate::pending::{Waiting, report, tensor, wrong_answer};
use crate::{ClientError, FrameReport, Session};
use offshoot_proto::v1::server_frame::Body;
use offshoot_proto::{HostTensor, v1};

/// The next tokens of one sequence that goes on.
#[derive(Debug, Clone, PartialEq)]
pub struct ExtendInput {
    /// Names the sequence's key/value cache among those of this session, of which it may have
    /// `limits().max_open_caches`.
    pub cache: u64,
    /// Tokens before these, which the cache must hold. What it holds behind them is dropped: a
    /// sequence can go back to a prefix and go on from there in another way. 0 begins the cache, or
    /// begins it anew.
    pub start: u32,
    /// `[n, H]` in the session's wire dtype: the input of layer `split_point_1` for the tokens
    /// `[start, start + n)`. `start + n` is at most `limits().max_cache_tokens`.
    pub hidden: HostTensor,
}

impl Session {
    /// Runs the trunk over the next tokens of one sequence, without dropout. The keys and values of
    /// those before them lie on the server, in a cache of this session: only the new rows travel.
    /// Gives the output of layer `split_point_2 - 1` for these rows, `[n, H]`.
    ///
    /// A cache goes when the session takes a step, leaves the device (it may whenever it has no frame
    /// in flight), or the server starts again. Then this fails, and
    /// [`ClientError::is_cache_gone`] is true: extend with `start` 0 and all tokens instead.
    pub async fn extend(
        &self,
        input: ExtendInput,
    ) -> Result<(HostTensor, FrameReport), ClientError> {
        self.send_extend(input).await?.await
    }

    /// Like [`extend`](Session::extend), but only sends: several sequences can be on their way at
    /// once.
    pub async fn send_extend(&self, input: ExtendInput) -> Result<PendingExtend, ClientError> {
        let ExtendInput { cache, start, hidden } = input;
        self.loss.add_hidden(&hidden);
        let extend = v1::Extend { cache, start, hidden: Some(hidden.into_proto()) };
        Ok(PendingExtend { answer: self.send(Request::Extend(extend)).await? })
    }

    /// Gives the bytes of a cache on the server back. One that is not there changes nothing.
    pub async fn drop_cache(&self, cache: u64) -> Result<(), ClientError> {
        self.send_drop_cache(cache).await?.await
    }

    /// Like [`drop_cache`](Session::drop_cache), but only sends. It takes place whether the answer is
    /// awaited or not.
    pub async fn send_drop_cache(&self, cache: u64) -> Result<PendingDropCache, ClientError> {
        let answer = self.send(Request::DropCache(v1::DropCache { cache })).await?;
        Ok(PendingDropCache { answer })
    }
}

/// An extension that was sent. Await it for the trunk's output.
#[derive(Debug)]
#[must_use = "await it for the answer"]
pub struct PendingExtend {
    answer: Waiting,
}

impl PendingExtend {
    pub(crate) async fn done(self) -> Result<(HostTensor, FrameReport), ClientError> {
        let call = self.answer.call;
        let answer = self.answer.answer().await?;
        let Body::Forward(done) = answer.body else { return wrong_answer(call) };
        let report = report((answer.round_trip, answer.retries), done.timing, 0);
        let report = FrameReport { cache_bytes: done.cache_bytes, ..report };
        Ok((tensor(call, done.hidden)?, report))
    }
}

/// A request to drop a cache that was sent. It takes place whether this is awaited or not.
#[derive(Debug)]
pub struct PendingDropCache {
    answer: Waiting,
}

impl PendingDropCache {
    pub(crate) async fn done(self) -> Result<(), ClientError> {
        let call = self.answer.call;
        match self.answer.answer().await?.body {
            Body::DropCache(_) => Ok(()),
            _ => wrong_answer(call),
        }
    }
}
