use offshoot_proto::HostTensor;
use std::fmt;
use uuid::Uuid;

/// Names a session for its whole life, across restarts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionId(Uuid);

impl SessionId {
    /// One that nobody can guess.
    pub fn new() -> Self {
        SessionId(Uuid::new_v4())
    }

    /// What [`fmt::Display`] wrote.
    pub fn parse(text: &str) -> Option<Self> {
        Uuid::try_parse(text).ok().map(SessionId)
    }
}

impl Default for SessionId {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.as_simple().fmt(f)
    }
}

/// blake3 of a frame's body.
pub type Digest = [u8; 32];

/// A frame that was checked at the edge.
#[derive(Debug)]
pub struct Frame {
    pub head: Head,
    pub work: Work,
}

/// What the order of frames depends on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Head {
    /// At least 1.
    pub sequence: u64,
    pub acknowledged: u64,
    pub digest: Digest,
    pub effect: Effect,
}

/// What a frame does to the session's open microbatches and caches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// A Forward in training mode leaves a tape.
    Open(u64),
    /// A Backward uses it.
    Close(u64),
    /// A Discard drops it, if it is there.
    Discard(u64),
    Step,
    /// A Forward in evaluation mode.
    Nothing,
    /// An Extend begins a cache or goes on with it.
    Extend(u64),
    /// A DropCache drops it, if it is there.
    DropCache(u64),
}

/// What a frame asks of the device.
#[derive(Debug)]
pub enum Work {
    Forward(ForwardWork),
    Backward(BackwardWork),
    Step(StepWork),
    /// The tape will have no Backward.
    Discard {
        microbatch: u64,
    },
    Extend(ExtendWork),
    /// The sequence is at its end.
    DropCache {
        cache: u64,
    },
}

/// A checked Forward.
#[derive(Debug)]
pub struct ForwardWork {
    pub microbatch: u64,
    /// `[N, H]`, finite.
    pub hidden: HostTensor,
    /// None zero; they sum to N.
    pub seq_lens: Vec<usize>,
    /// One for each token, or none given.
    pub position_ids: Option<Vec<i64>>,
    pub mode: Mode,
    pub want_input_grad: bool,
    /// With the session's seed, names the dropout masks.
    pub dropout_key: u64,
}

/// Why a forward runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Dropout on, a tape is kept.
    Train,
    /// Dropout off, nothing is kept.
    Eval,
}

/// A checked Backward.
#[derive(Debug)]
pub struct BackwardWork {
    pub microbatch: u64,
    /// `[N, H]`, finite; N is that of the Forward, which the engine knows.
    pub grad: HostTensor,
}

/// A checked Extend.
#[derive(Debug)]
pub struct ExtendWork {
    /// Among the session's.
    pub cache: u64,
    /// Tokens before these, which the engine has to find in the cache; what it holds behind them goes.
    /// 0 begins it anew.
    pub start: u64,
    /// `[n, H]`, finite; `start + n` is within the limit.
    pub hidden: HostTensor,
}

/// A checked Step: all are finite, rate and factor not negative.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepWork {
    pub learning_rate: f64,
    pub clip_factor: f64,
    /// What the client chose to tell of its loss. Nothing is computed with it.
    pub shared_loss: Option<f64>,
}

impl Work {
    /// Tokens that are new to the server; those of a Backward came with its Forward.
    pub fn n_forward_tokens(&self) -> usize {
        match self {
            Work::Forward(ForwardWork { hidden, .. }) | Work::Extend(ExtendWork { hidden, .. }) => {
                hidden.shape()[0]
            }
            Work::Backward(_) | Work::Step(_) | Work::Discard { .. } | Work::DropCache { .. } => 0,
        }
    }

    /// What this does to the open microbatches and caches.
    pub fn effect(&self) -> Effect {
        match self {
            Work::Forward(ForwardWork { mode: Mode::Eval, .. }) => Effect::Nothing,
            Work::Forward(forward) => Effect::Open(forward.microbatch),
            Work::Backward(backward) => Effect::Close(backward.microbatch),
            Work::Step(_) => Effect::Step,
            Work::Discard { microbatch } => Effect::Discard(*microbatch),
            Work::Extend(extend) => Effect::Extend(extend.cache),
            Work::DropCache { cache } => Effect::DropCache(*cache),
        }
    }
}
