//! Everything that comes from a client is checked here, once. What leaves is a checked type, or an
//! error that says what was expected.

use crate::engine::{Settings, Start, TrunkInfo};
use crate::error::Error;
use crate::finite::first_bad;
use crate::registry::Opening;
use crate::session::{
    BackwardWork, Digest, ExtendWork, ForwardWork, Frame, Greeting, Head, Mode, StepWork, Work,
};
use offshoot_adapters::{AdamW, LoraSpec};
use offshoot_proto::v1::{self, client_frame::Body};
use offshoot_proto::{HostTensor, WireDType};
use std::sync::Arc;

/// Longest name of a session.
const MAX_NAME_BYTES: usize = 256;
/// Each is compared with every module of the trunk.
const MAX_TARGETS: usize = 1024;

/// What the tensors of one session must be like.
#[derive(Debug, Clone, Copy)]
pub struct FrameRules {
    /// H.
    pub hidden_size: usize,
    pub wire_dtype: WireDType,
    pub max_tokens: usize,
    pub max_cache_tokens: usize,
}

/// The first frame of a stream: which session it means, and what its client says of itself.
pub fn hello(frame: Option<v1::ClientFrame>) -> Result<(String, Greeting), Error> {
    let found = match frame {
        Some(v1::ClientFrame { sequence: 0, body: Some(Body::Hello(hello)), .. }) => {
            let v1::Hello { session_id, last_answered, epoch, client, attempt } = hello;
            let greeting = Greeting { last_answered, epoch, client, attempt };
            return Ok((session_id, greeting));
        }
        Some(frame) => format!("{} with sequence {}", body_name(&frame.body), frame.sequence),
        None => "the stream's end".into(),
    };
    Err(Error::Hello { found })
}

fn body_name(body: &Option<Body>) -> &'static str {
    match body {
        Some(Body::Hello(_)) => "Hello",
        Some(Body::Forward(_)) => "Forward",
        Some(Body::Backward(_)) => "Backward",
        Some(Body::Step(_)) => "Step",
        Some(Body::Discard(_)) => "Discard",
        Some(Body::Extend(_)) => "Extend",
        Some(Body::DropCache(_)) => "DropCache",
        None => "an empty frame",
    }
}

/// Elements of the frame's tensor, in bytes: what its check takes time for.
pub fn tensor_bytes(frame: &v1::ClientFrame) -> usize {
    let tensor = match &frame.body {
        Some(Body::Forward(forward)) => forward.hidden.as_ref(),
        Some(Body::Backward(backward)) => backward.grad.as_ref(),
        Some(Body::Extend(extend)) => extend.hidden.as_ref(),
        Some(Body::Hello(_) | Body::Step(_) | Body::Discard(_) | Body::DropCache(_)) | None => None,
    };
    tensor.map_or(0, |tensor| tensor.data.len())
}

/// Any other frame of a stream.
pub fn frame(frame: v1::ClientFrame, rules: &FrameRules) -> Result<Frame, Error> {
    let v1::ClientFrame { sequence, acknowledged, body, .. } = frame;
    if sequence == 0 {
        return Err(Error::Hello { found: format!("{} with sequence 0", body_name(&body)) });
    }
    let digest = match &body {
        Some(body) => digest(body),
        None => return Err(Error::Missing { field: "the frame's body" }),
    };
    let work = match body {
        Some(Body::Forward(forward)) => Work::Forward(self::forward(forward, rules)?),
        Some(Body::Backward(backward)) => Work::Backward(BackwardWork {
            microbatch: backward.microbatch,
            grad: rows("grad", backward.grad, rules)?,
        }),
        Some(Body::Step(step)) => Work::Step(self::step(step)?),
        Some(Body::Discard(v1::Discard { microbatch })) => Work::Discard { microbatch },
        Some(Body::Extend(extend)) => Work::Extend(self::extend(extend, rules)?),
        Some(Body::DropCache(v1::DropCache { cache })) => Work::DropCache { cache },
        Some(Body::Hello(_)) | None => return Err(Error::Hello { found: "another".into() }),
    };
    let head = Head { sequence, acknowledged, digest, effect: work.effect() };
    Ok(Frame { head, work })
}

fn forward(forward: v1::Forward, rules: &FrameRules) -> Result<ForwardWork, Error> {
    let mode = match forward.mode() {
        v1::Mode::Train => Mode::Train,
        v1::Mode::Eval => Mode::Eval,
        v1::Mode::Unspecified => return Err(Error::Missing { field: "mode" }),
    };
    let hidden = rows("hidden", forward.hidden, rules)?;
    let n_tokens = hidden.shape()[0];
    if let Some(index) = forward.seq_lens.iter().position(|&length| length == 0) {
        return Err(Error::EmptySequence { index });
    }
    let sum = forward.seq_lens.iter().map(|&length| u64::from(length)).sum();
    if sum != n_tokens as u64 {
        return Err(Error::SequenceLengths { sum, n_tokens });
    }
    let found = forward.position_ids.len();
    if found != 0 && found != n_tokens {
        return Err(Error::PositionIds { found, n_tokens });
    }
    let position_ids = forward.position_ids.iter().map(|&p| i64::from(p)).collect();
    Ok(ForwardWork {
        microbatch: forward.microbatch,
        hidden,
        seq_lens: forward.seq_lens.iter().map(|&length| length as usize).collect(),
        position_ids: (found != 0).then_some(position_ids),
        mode,
        want_input_grad: forward.want_input_grad,
        dropout_key: forward.dropout_key,
    })
}

fn extend(extend: v1::Extend, rules: &FrameRules) -> Result<ExtendWork, Error> {
    let v1::Extend { cache, start, hidden } = extend;
    let (start, hidden) = (u64::from(start), rows("hidden", hidden, rules)?);
    let (found, limit) = (start + hidden.shape()[0] as u64, rules.max_cache_tokens);
    if found > limit as u64 {
        return Err(Error::CacheTokens { found, limit });
    }
    Ok(ExtendWork { cache, start, hidden })
}

/// A tensor `[N, H]` in the session's dtype, N at least 1 and within the limit, all values finite.
fn rows(
    field: &'static str,
    tensor: Option<v1::Tensor>,
    rules: &FrameRules,
) -> Result<HostTensor, Error> {
    let tensor = tensor.ok_or(Error::Missing { field })?;
    let tensor = HostTensor::from_proto(Some(tensor))?;
    if tensor.dtype() != rules.wire_dtype {
        let (found, expected) = (tensor.dtype().name(), rules.wire_dtype.name());
        return Err(Error::WireDType { field, found, expected });
    }
    match *tensor.shape() {
        [n, h] if n > 0 && h == rules.hidden_size => {
            if n > rules.max_tokens {
                return Err(Error::TooManyTokens { found: n, limit: rules.max_tokens });
            }
        }
        ref found => {
            let found = found.to_vec();
            let expected = format!("[tokens, {}], at least one token", rules.hidden_size);
            return Err(Error::Shape { field, found, expected });
        }
    }
    match first_bad(&tensor) {
        Some(index) => Err(Error::NotFinite { field, index }),
        None => Ok(tensor),
    }
}

fn step(step: v1::Step) -> Result<StepWork, Error> {
    let v1::Step { learning_rate, clip_factor, shared_loss } = step;
    let wrong = |field, found: f64, expected: &str| {
        Err(Error::Setting { field, found: found.to_string(), expected: expected.into() })
    };
    if !(learning_rate.is_finite() && learning_rate >= 0.0) {
        return wrong("learning_rate", learning_rate, "zero or a positive number");
    }
    if !(0.0..=1.0).contains(&clip_factor) {
        return wrong("clip_factor", clip_factor, "at least 0, at most 1 (1: nothing is clipped)");
    }
    if let Some(loss) = shared_loss.filter(|loss| !loss.is_finite()) {
        return wrong("shared_loss", loss, "a finite number, or none");
    }
    Ok(StepWork { learning_rate, clip_factor, shared_loss })
}

/// blake3 of a body, field by field, so that the tensor's bytes are not encoded again.
fn digest(body: &Body) -> Digest {
    let mut hasher = blake3::Hasher::new();
    let tensor = |hasher: &mut blake3::Hasher, tensor: &Option<v1::Tensor>| {
        let Some(tensor) = tensor else { return };
        numbers(hasher, [tensor.dtype as u64]);
        numbers(hasher, tensor.shape.iter().map(|&n| n.into()));
        // Absent and 0 are not the same.
        numbers(hasher, tensor.scale_exponent.map(|exponent| exponent as u64));
        numbers(hasher, tensor.outlier_channels.iter().map(|&channel| channel.into()));
        for part in [&tensor.data, &tensor.block_scales, &tensor.outlier_values] {
            numbers(hasher, [part.len() as u64]);
            hasher.update(part);
        }
    };
    match body {
        Body::Hello(_) => {}
        Body::Forward(forward) => {
            let flags = [forward.mode as u64, forward.want_input_grad.into()];
            let names = [1, forward.microbatch, forward.dropout_key];
            numbers(&mut hasher, names.into_iter().chain(flags));
            tensor(&mut hasher, &forward.hidden);
            numbers(&mut hasher, forward.seq_lens.iter().map(|&n| n.into()));
            numbers(&mut hasher, forward.position_ids.iter().map(|&n| n.into()));
        }
        Body::Backward(backward) => {
            numbers(&mut hasher, [2, backward.microbatch]);
            tensor(&mut hasher, &backward.grad);
        }
        Body::Step(step) => {
            numbers(&mut hasher, [3, step.learning_rate.to_bits(), step.clip_factor.to_bits()]);
            // Without it the digest is that of a step of a client that knows nothing of it.
            if let Some(loss) = step.shared_loss {
                numbers(&mut hasher, [loss.to_bits()]);
            }
        }
        Body::Discard(discard) => numbers(&mut hasher, [4, discard.microbatch]),
        Body::Extend(extend) => {
            numbers(&mut hasher, [5, extend.cache, extend.start.into()]);
            tensor(&mut hasher, &extend.hidden);
        }
        Body::DropCache(dropped) => numbers(&mut hasher, [6, dropped.cache]),
    }
    *hasher.finalize().as_bytes()
}

/// The count first, so that neighbouring lists cannot be mistaken for each other.
fn numbers(hasher: &mut blake3::Hasher, values: impl IntoIterator<Item = u64>) {
    let bytes: Vec<u8> = values.into_iter().flat_map(u64::to_le_bytes).collect();
    hasher.update(&(bytes.len() as u64).to_le_bytes()).update(&bytes);
}

/// A request for a new session.
pub fn opening(
    request: v1::OpenSessionRequest,
    trunk: &TrunkInfo,
    limits: &v1::Limits,
    tenant: Arc<str>,
) -> Result<Opening, Error> {
    let name = request.name;
    if name.len() > MAX_NAME_BYTES {
        let (found, expected) = (format!("{} bytes long", name.len()), "at most 256 bytes".into());
        return Err(Error::Setting { field: "name", found, expected });
    }
    if request.fingerprint != trunk.fingerprint {
        return Err(Error::Fingerprint {
            server_model: trunk.model_name.clone(),
            server: trunk.fingerprint.clone(),
            client: request.fingerprint.chars().take(64).collect(),
        });
    }
    let client = request.split_point_1 as usize..request.split_point_2 as usize;
    if client != trunk.layers {
        return Err(Error::Split { server: trunk.layers.clone(), client });
    }
    let lora = lora(request.lora, trunk, limits)?;
    let adamw = request.adamw.ok_or(Error::Missing { field: "adamw" })?;
    let v1::AdamWConfig { beta1, beta2, eps, weight_decay } = adamw;
    let adamw = AdamW { beta1, beta2, eps, weight_decay };
    adamw.validate()?;
    let wire_dtype = WireDType::from_proto(request.wire_dtype)?;
    let start = match request.initial_adapter {
        tensors if tensors.is_empty() => Start::Fresh,
        tensors => Start::Given(tensors.into_iter().map(adapter).collect::<Result<_, _>>()?),
    };
    let settings = Settings { tenant, lora, adamw, seed: request.seed, wire_dtype };
    Ok(Opening { name, settings, start })
}

fn lora(
    lora: Option<v1::LoraConfig>,
    trunk: &TrunkInfo,
    limits: &v1::Limits,
) -> Result<LoraSpec, Error> {
    let lora = lora.ok_or(Error::Missing { field: "lora" })?;
    if lora.r > limits.max_rank {
        let (found, expected) = (lora.r.to_string(), format!("at most {}", limits.max_rank));
        return Err(Error::Setting { field: "lora.r", found, expected });
    }
    let spec = LoraSpec {
        r: lora.r as usize,
        lora_alpha: lora.lora_alpha,
        lora_dropout: lora.lora_dropout,
        use_rslora: lora.use_rslora,
        target_modules: match lora.target_modules {
            none if none.is_empty() => trunk.default_targets.clone(),
            targets => targets,
        },
    };
    spec.validate()?;
    let n_targets = spec.target_modules.len();
    if n_targets > MAX_TARGETS {
        let (found, expected) = (n_targets.to_string(), format!("at most {MAX_TARGETS} names"));
        return Err(Error::Setting { field: "lora.target_modules", found, expected });
    }
    Ok(spec)
}

fn adapter(named: v1::NamedTensor) -> Result<(String, HostTensor), Error> {
    let field = "initial_adapter";
    let tensor = named.tensor.ok_or(Error::Missing { field })?;
    let tensor = HostTensor::from_proto(Some(tensor))?;
    if tensor.dtype() != WireDType::F32 {
        let (found, expected) = (tensor.dtype().name().into(), "f32".into());
        return Err(Error::Setting { field, found, expected });
    }
    match first_bad(&tensor) {
        Some(index) => Err(Error::NotFinite { field, index }),
        None => Ok((named.name, tensor)),
    }
}

#[cfg(test)]
#[path = "decode_tests.rs"]
mod tests;
