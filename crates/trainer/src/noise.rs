//! What is done to hidden states and gradients before they leave this machine, so that less of the
//! text can be read from them: rows are clipped to a norm, and Gaussian noise is added.
//!
//! For a row x of H values, a clip norm C and noise r:
//!
//! ```text
//! sent = x * min(1, C / |x|) + n,    n ~ N(0, (r C)^2 / H) for each value
//! ```
//!
//! so that the noise is about r times as long as the longest row, whatever H is. In the words of
//! differential privacy the noise multiplier is r / sqrt(H); nothing is promised in those words here.
//!
//! The noise of a sequence is a function of a secret key and of exactly the values that it is added
//! to. A replayed or resumed step sends the same bytes. A message that is sent twice has the same
//! noise twice, so that nobody can take the mean of several; another message, however similar, has
//! noise of its own, so that nobody can take the difference of two. The run's seed could not serve as
//! the key: the server knows it, and could subtract the noise.

mod key;

pub use key::NoiseKey;
pub(crate) use key::of_run;

use crate::TrainError;
use offshoot_model::host;
use rand_chacha::ChaCha20Rng;
use rand_chacha::rand_core::SeedableRng;
use rand_distr::{Distribution, StandardNormal};
use tch::{Kind, Tensor};

/// What is done to the rows of one kind of tensor before they are sent.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Perturbation {
    /// Longer rows are scaled down to this L2 norm. Of hidden states as they are; of gradients in
    /// units of one token's own loss in nats, so that it does not depend on how many tokens a step
    /// has. None: no row is.
    pub clip_norm: Option<f64>,
    /// Length of the added noise in clip norms: its standard deviation is `noise * clip_norm /
    /// sqrt(H)` for each value. 0: none.
    pub noise: f64,
}

/// What is done to all that a run sends.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PrivacyOptions {
    /// To hidden states at the first split point: in training, evaluation and generation alike.
    pub hidden: Perturbation,
    /// To gradients at the second split point.
    pub gradients: Perturbation,
    /// Of the noise. None: one is drawn, and kept in the output directory for resumed runs.
    pub noise_key: Option<NoiseKey>,
}

/// A tensor on its way out.
pub(crate) struct Message<'a> {
    /// `[N, H]`.
    pub rows: &'a Tensor,
    /// Tokens of each sequence; they sum to N.
    pub seq_lens: &'a [usize],
    /// Position of the first row in its sequence.
    pub start: usize,
    pub kind: MessageKind,
}

#[derive(Clone, Copy)]
pub(crate) enum MessageKind {
    Hidden,
    /// Of this times the summed loss.
    Gradients {
        scale: f64,
    },
}

/// What a client does to its messages.
#[derive(Clone, Debug)]
pub(crate) struct Outgoing {
    pub hidden: Perturbation,
    pub gradients: Perturbation,
    pub key: NoiseKey,
}

impl Outgoing {
    /// Everything is sent as it is.
    pub fn unchanged() -> Self {
        let none = Perturbation::default();
        Outgoing { hidden: none, gradients: none, key: NoiseKey::draw() }
    }

    /// What is sent in place of the message: the rows themselves if nothing is to be done, else
    /// float32 `[N, H]`.
    pub fn perturb(&self, message: &Message) -> Tensor {
        match message.kind {
            MessageKind::Hidden => self.hidden.apply(&self.key, message),
            MessageKind::Gradients { .. } => self.gradients.apply(&self.key, message),
        }
    }
}

impl PrivacyOptions {
    /// The first option that no run can have.
    pub fn validate(&self) -> Result<(), TrainError> {
        self.hidden.validate(["hidden-clip-norm", "hidden-noise"])?;
        self.gradients.validate(["gradient-clip-norm", "gradient-noise"])
    }
}

impl Perturbation {
    /// Whether rows are sent as they are.
    pub fn is_none(&self) -> bool {
        self.clip_norm.is_none() && self.noise == 0.0
    }

    /// `options`: how clip norm and noise are called where they were given.
    pub fn validate(&self, options: [&'static str; 2]) -> Result<(), TrainError> {
        let wrong = |option, value: f64, problem: String| {
            Err(TrainError::Option { option, value: value.to_string(), problem })
        };
        let [clip, noise] = options;
        if let Some(norm) = self.clip_norm
            && !(norm.is_finite() && norm > 0.0)
        {
            let problem = "expected a positive number; leave it out for no clipping";
            return wrong(clip, norm, problem.into());
        }
        if !(self.noise.is_finite() && self.noise >= 0.0) {
            let problem = "expected a number such as 0.5, or 0 for no noise";
            return wrong(noise, self.noise, problem.into());
        }
        if self.noise > 0.0 && self.clip_norm.is_none() {
            let problem = format!(
                "noise is measured in units of --{clip}, which is missing; offshoot leak prints the norms that rows have, and their median is a good beginning"
            );
            return wrong(noise, self.noise, problem);
        }
        Ok(())
    }

    fn apply(&self, key: &NoiseKey, message: &Message) -> Tensor {
        let _guard = tch::no_grad_guard();
        let Some(clip_norm) = self.clip_norm else { return message.rows.shallow_clone() };
        let clip_norm = clip_norm * message.kind.unit();
        let rows = message.rows.to_kind(Kind::Float);
        let mut clipped = &rows * clip_factor(&norms(&rows), clip_norm);
        if self.noise > 0.0 {
            let width = message.rows.size()[1];
            let deviation = self.noise * clip_norm / (width as f64).sqrt();
            let noise = normal(key, message, &clipped) * deviation;
            let _ = clipped.g_add_(&noise.to_device(clipped.device()));
        }
        clipped
    }

    /// The gradient `[N, H]` by rows as they were before they were clipped, from the gradient by what
    /// was sent. Noise is added, so it passes through. With u = x / |x|, a clipped row is C u, and
    /// d(C u)/dx = C / |x| (1 - u u^T).
    pub(crate) fn backward(&self, rows: &Tensor, grad: &Tensor) -> Tensor {
        let Some(clip_norm) = self.clip_norm else { return grad.shallow_clone() };
        let (x, wide) = (rows.to_kind(Kind::Float), grad.to_kind(Kind::Float));
        let norms = norms(&x); // [N, 1]
        let unit = &x / &norms;
        let along = (&unit * &wide).sum_dim_intlist(1, true, Kind::Float); // [N, 1]
        let through = (&wide - unit * along) * clip_factor(&norms, clip_norm);
        through.where_self(&norms.gt(clip_norm), &wide).to_kind(grad.kind())
    }
}

impl MessageKind {
    /// What a clip norm of 1 is in a message.
    fn unit(self) -> f64 {
        match self {
            MessageKind::Hidden => 1.0,
            MessageKind::Gradients { scale } => scale,
        }
    }

    fn name(self) -> &'static [u8] {
        match self {
            MessageKind::Hidden => b"hidden states",
            MessageKind::Gradients { .. } => b"gradients",
        }
    }
}

/// `[N, H] -> [N, 1]`.
fn norms(rows: &Tensor) -> Tensor {
    rows.norm_scalaropt_dim(2, [1i64].as_slice(), true)
}

/// 1 for rows that are short enough, so that they stay as they are to the bit.
fn clip_factor(norms: &Tensor, clip_norm: f64) -> Tensor {
    (norms.reciprocal() * clip_norm).clamp_max(1.0)
}

/// Float32 `[N, H]` of standard normal deviates. `values`: what they will be added to.
fn normal(key: &NoiseKey, message: &Message, values: &Tensor) -> Tensor {
    let width = message.rows.size()[1] as usize;
    let bytes = host::bytes_of(values, Kind::Float);
    let mut noise = Vec::with_capacity(bytes.len() / 4);
    let (mut from, mut start) = (0, message.start);
    for &length in message.seq_lens {
        let to = from + 4 * length * width;
        let mut hasher = key.hasher();
        hasher.update(message.kind.name()).update(&(start as u64).to_le_bytes());
        hasher.update(&(length as u64).to_le_bytes()).update(&bytes[from..to]);
        let mut generator = ChaCha20Rng::from_seed(*hasher.finalize().as_bytes());
        let n = length * width;
        noise.extend((0..n).map(|_| -> f32 { StandardNormal.sample(&mut generator) }));
        (from, start) = (to, 0);
    }
    host::tensor_of(noise, &message.rows.size())
}

#[cfg(test)]
mod tests;
