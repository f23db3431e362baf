//! A training run whose every number is a function of its step, for comparing runs bit by bit.

use offshoot_client::{
    ADAMW_DEFAULTS, AdamWConfig, Client, ClientError, ExportedAdapter, ForwardInput, HostTensor,
    LoraConfig, OpenSession, Session, WireDType,
};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::Range;

/// Numbers in [-1, 1) that depend on nothing but their arguments.
pub fn values(seed: u64, n: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0xD1B5_4A32_D192_ED03;
    (0..n)
        .map(|_| {
            // splitmix64
            state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let mut z = state;
            z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            ((z ^ (z >> 31)) >> 40) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

/// A packed microbatch of random hidden states.
pub fn input(seed: u64, seq_lens: &[u32], hidden_size: usize) -> ForwardInput {
    let n_tokens = seq_lens.iter().sum::<u32>() as usize;
    let hidden = values(seed, n_tokens * hidden_size);
    ForwardInput {
        hidden: HostTensor::from_f32(&hidden, vec![n_tokens, hidden_size], WireDType::F32),
        seq_lens: seq_lens.to_vec(),
        position_ids: vec![],
        want_input_grad: true,
        dropout_key: seed,
    }
}

/// What `client`'s server is opened with, unless a test changes it: rank 3, dropout, a seed.
pub async fn open_request(client: &Client) -> Result<OpenSession, ClientError> {
    let server = client.describe().await?;
    Ok(OpenSession {
        name: "claim".into(),
        fingerprint: server.fingerprint,
        split_point_1: server.split_point_1,
        split_point_2: server.split_point_2,
        lora: LoraConfig { r: 3, lora_alpha: 6.0, lora_dropout: 0.1, ..Default::default() },
        adamw: AdamWConfig { weight_decay: 0.05, ..ADAMW_DEFAULTS },
        seed: 11,
        wire_dtype: WireDType::F32,
        initial_adapter: vec![],
    })
}

/// Trains steps `steps`: each of two microbatches that are in flight together, an evaluation, and a
/// clipped optimizer step that is not waited for. Gives every number that came back.
pub async fn train(
    session: &Session,
    hidden_size: usize,
    steps: Range<u64>,
) -> Result<Vec<Numbers>, ClientError> {
    train_heard(session, hidden_size, steps, || ()).await
}

/// The same; `heard` is called for each answer of a microbatch, as it comes.
pub async fn train_heard(
    session: &Session,
    hidden_size: usize,
    steps: Range<u64>,
    heard: impl Fn(),
) -> Result<Vec<Numbers>, ClientError> {
    let mut all = Vec::new();
    for step in steps {
        let first = session.send_forward(input(3 * step, &[5, 2, 4], hidden_size)).await?;
        let second = session.send_forward(input(3 * step + 1, &[3, 6], hidden_size)).await?;
        let (output, microbatch, _) = first.await?;
        heard();
        let first = microbatch.send_backward(loss_gradient(&output)).await?;
        let (output, microbatch, _) = second.await?;
        heard();
        let second = microbatch.send_backward(loss_gradient(&output)).await?;
        let evaluated = session.send_evaluate(input(3 * step + 2, &[7], hidden_size)).await?;
        let first = first.await?;
        heard();
        let second = second.await?;
        heard();
        let evaluated = evaluated.await?;
        heard();
        let clip_factor = (0.5 / second.norm_squared.sqrt()).min(1.0);
        session.step(0.01, clip_factor).await?;
        all.push(Numbers {
            norm_squared: [first.norm_squared.to_bits(), second.norm_squared.to_bits()],
            input_gradients: [first.input, second.input],
            evaluated,
        });
    }
    Ok(all)
}

/// What one step of [`train`] saw, comparable bit by bit.
#[derive(PartialEq)]
pub struct Numbers {
    norm_squared: [u64; 2],
    input_gradients: [Option<HostTensor>; 2],
    evaluated: HostTensor,
}

impl Numbers {
    /// Differs if a bit does.
    pub fn digest(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.norm_squared.hash(&mut hasher);
        let [first, second] = &self.input_gradients;
        for tensor in [first.as_ref(), second.as_ref(), Some(&self.evaluated)].into_iter().flatten()
        {
            tensor.to_f32().iter().for_each(|value| value.to_bits().hash(&mut hasher));
        }
        hasher.finish()
    }
}

/// Of a loss that is half the sum of squares of `output`.
fn loss_gradient(output: &HostTensor) -> HostTensor {
    output.clone()
}

/// An adapter's tensors as bits, in the order of their names.
pub fn bits(adapter: &ExportedAdapter) -> Vec<(String, Vec<u32>)> {
    let mut tensors: Vec<_> = adapter
        .tensors
        .iter()
        .map(|(name, t)| (name.clone(), t.to_f32().iter().map(|v| v.to_bits()).collect()))
        .collect();
    tensors.sort();
    tensors
}

/// Fails with the first tensor that differs, and by how much.
pub fn assert_same_adapter(found: &ExportedAdapter, expected: &ExportedAdapter) {
    assert_eq!(found.step, expected.step, "optimizer steps");
    let (found, expected) = (bits(found), bits(expected));
    let names = |b: &[(String, Vec<u32>)]| b.iter().map(|(n, _)| n.clone()).collect::<Vec<_>>();
    assert_eq!(names(&found), names(&expected));
    assert!(!found.is_empty());
    for ((name, found), (_, expected)) in found.iter().zip(&expected) {
        let far = found
            .iter()
            .zip(expected)
            .map(|(&a, &b)| f64::from(f32::from_bits(a)) - f64::from(f32::from_bits(b)));
        let largest = far.fold(0.0f64, |m, d| m.max(d.abs()));
        assert!(found == expected, "{name} differs by up to {largest:e}");
    }
}
