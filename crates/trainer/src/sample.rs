//! Text drawn from the split model, to see what it has learned.

use crate::TrainError;
use crate::data::Batch;
use crate::split::SplitModel;
use crate::tokenizer::Tokenizer;
use offshoot_client::Session;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// How text is drawn from the model.
#[derive(Clone, Debug, PartialEq)]
pub struct SampleOptions {
    /// Most tokens that are drawn.
    pub n_tokens: usize,
    /// 0: always the most likely token.
    pub temperature: f64,
    /// Drawn from so many of the likeliest tokens.
    pub top_k: usize,
    /// Of the draw.
    pub seed: u64,
}

/// Goes on from a prompt until the model ends its text, without a cache: the whole text goes
/// through the model for each token, which is fine for a line or two.
pub async fn generate(
    model: &SplitModel,
    session: &Session,
    tokenizer: &Tokenizer,
    prompt: &[u32],
    options: &SampleOptions,
) -> Result<String, TrainError> {
    let mut random = ChaCha8Rng::seed_from_u64(options.seed);
    let mut ids: Vec<i64> = prompt.iter().map(|&id| i64::from(id)).collect();
    let mut drawn = Vec::new();
    let longest = session.limits().max_tokens_per_microbatch as usize;
    while !ids.is_empty() && drawn.len() < options.n_tokens && ids.len() <= longest {
        let n = ids.len();
        let batch = Batch { ids: ids.clone(), seq_lens: vec![n], labels: vec![-100; n], samples: vec![0] };
        let logits = model.last_logits(session, &batch).await?;
        let mut values = vec![0f32; logits.numel()];
        let _guard = tch::no_grad_guard();
        logits.to_device(tch::Device::Cpu).copy_data(&mut values, logits.numel());
        // 53 random bits: a number in [0, 1).
        let uniform = (random.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
        let next = choose(&values, options.temperature, options.top_k, uniform);
        if Some(next) == tokenizer.eos_id() {
            break;
        }
        drawn.push(next);
        ids.push(i64::from(next));
    }
    tokenizer.decode(&drawn)
}

/// The token that the number `uniform` in `[0, 1)` draws.
fn choose(logits: &[f32], temperature: f64, top_k: usize, uniform: f64) -> u32 {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    let likelier = |&a: &usize, &b: &usize| logits[b].total_cmp(&logits[a]).then(a.cmp(&b));
    if temperature <= 0.0 {
        return order.into_iter().min_by(likelier).unwrap_or_default() as u32;
    }
    order.sort_unstable_by(likelier);
    order.truncate(top_k.max(1));
    let highest = logits[order[0]];
    let weight = |&i: &usize| (f64::from(logits[i] - highest) / temperature).exp();
    let mut left = uniform * order.iter().map(weight).sum::<f64>();
    for i in &order {
        left -= weight(i);
        if left < 0.0 {
            return *i as u32;
        }
    }
    order[order.len() - 1] as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn greedy_takes_the_first_of_the_likeliest() {
        assert_eq!(choose(&[0.5, 2.0, -1.0, 2.0], 0.0, 50, 0.99), 1);
    }

    #[test]
    fn a_draw_follows_the_probabilities_of_the_top_k() {
        // With temperature 1: e^1, e^0 and nothing else, since k is 2.
        let logits = [0.0, 1.0, -1.0];
        let border = 1f64.exp() / (1f64.exp() + 1.0);
        assert_eq!(choose(&logits, 1.0, 2, 0.0), 1);
        assert_eq!(choose(&logits, 1.0, 2, border - 1e-6), 1);
        assert_eq!(choose(&logits, 1.0, 2, border + 1e-6), 0);
        assert_eq!(choose(&logits, 1.0, 2, 0.999_999), 0);
        // A low temperature sharpens.
        assert_eq!(choose(&logits, 0.1, 2, 0.99), 1);
    }
}
