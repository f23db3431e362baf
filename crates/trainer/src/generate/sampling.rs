//! From scores to a token: the arithmetic of Transformers' logits processors, in their order.

use super::Sampling;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use std::collections::BTreeSet;

/// Chooses one token after another.
pub(super) struct Sampler<'a> {
    settings: &'a Sampling,
    random: ChaCha8Rng,
}

/// What the choice of one token depends on beside its scores.
pub(super) struct Place<'a> {
    /// The text so far, prompt included.
    pub ids: &'a [u32],
    /// Tokens that may not be chosen here.
    pub forbidden: &'a [u32],
}

/// A token that is still possible, with its score.
type Candidate = (u32, f32);

impl<'a> Sampler<'a> {
    pub fn new(settings: &'a Sampling) -> Self {
        Sampler { settings, random: ChaCha8Rng::seed_from_u64(settings.seed) }
    }

    /// The next token, given the scores (logits) `[V]` of all. Each call but greedy ones takes one
    /// number from the seed's sequence.
    pub fn choose(&mut self, mut scores: Vec<f32>, place: &Place) -> u32 {
        self.penalise(&mut scores, place);
        if self.settings.temperature == 0.0 {
            return likeliest(&scores);
        }
        let candidates = self.candidates(scores);
        // 53 random bits: a number in [0, 1).
        let uniform = (self.random.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
        draw(&candidates, uniform)
    }

    /// What holds for greedy choices as well.
    fn penalise(&self, scores: &mut [f32], place: &Place) {
        let penalty = self.settings.repetition_penalty as f32;
        if penalty != 1.0 {
            // Each token once, however often it is in the text.
            for id in place.ids.iter().collect::<BTreeSet<_>>() {
                if let Some(score) = scores.get_mut(*id as usize) {
                    *score = if *score < 0.0 { *score * penalty } else { *score / penalty };
                }
            }
        }
        for id in place.forbidden {
            if let Some(score) = scores.get_mut(*id as usize) {
                *score = f32::NEG_INFINITY;
            }
        }
    }

    /// What temperature, top-k and top-p leave, the likeliest first, equal ones in the order of
    /// their ids.
    fn candidates(&self, scores: Vec<f32>) -> Vec<Candidate> {
        let Sampling { temperature, top_k, top_p, .. } = *self.settings;
        let divisor = temperature as f32;
        let possible = (0u32..).zip(scores).filter(|(_, score)| *score > f32::NEG_INFINITY);
        let mut left: Vec<Candidate> = possible.map(|(id, score)| (id, score / divisor)).collect();
        if top_k > 0 && top_k < left.len() {
            // Those as likely as the last of the k stay, too.
            let (_, &mut (_, border), _) =
                left.select_nth_unstable_by(top_k - 1, |a, b| b.1.total_cmp(&a.1));
            left.retain(|(_, score)| *score >= border);
        }
        left.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        if top_p < 1.0 {
            left.truncate(n_above(&left, top_p));
        }
        left
    }
}

/// The lowest id of the highest score.
fn likeliest(scores: &[f32]) -> u32 {
    let better = |best: usize, i: usize| if scores[i] > scores[best] { i } else { best };
    (0..scores.len()).reduce(better).unwrap_or_default() as u32
}

/// How many of the likeliest first `candidates` stay under top-p. Transformers adds probabilities
/// from the least likely one on and removes those whose sum stays within `1 - top_p`; the likeliest
/// one always stays.
fn n_above(candidates: &[Candidate], top_p: f64) -> usize {
    let weights = weights(candidates);
    let bound = (1.0 - top_p) * weights.iter().sum::<f64>();
    let mut sum = 0.0;
    let removed = weights.iter().rev().take_while(|weight| {
        sum += **weight;
        sum <= bound
    });
    (candidates.len() - removed.count()).max(1)
}

/// Proportional to the probabilities; the likeliest one's is 1.
fn weights(candidates: &[Candidate]) -> Vec<f64> {
    let highest = candidates.first().map_or(0.0, |(_, score)| *score);
    candidates.iter().map(|(_, score)| f64::from(score - highest).exp()).collect()
}

/// The token that the number `uniform` in `[0, 1)` draws.
fn draw(candidates: &[Candidate], uniform: f64) -> u32 {
    let weights = weights(candidates);
    let mut left = uniform * weights.iter().sum::<f64>();
    for ((id, _), weight) in candidates.iter().zip(weights) {
        left -= weight;
        if left < 0.0 {
            return *id;
        }
    }
    candidates.last().map_or(0, |(id, _)| *id)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    fn recorded() -> Value {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/logits_processors.json");
        serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
    }

    fn list<T>(value: &Value, each: impl Fn(&Value) -> T) -> Vec<T> {
        value.as_array().unwrap().iter().map(each).collect()
    }

    #[test]
    fn scores_are_those_of_transformers() {
        let recorded = recorded();
        let ids = |value: &Value| list(value, |id| id.as_u64().unwrap() as u32);
        let prompt_length = recorded["prompt_length"].as_u64().unwrap() as usize;
        let cases = recorded["cases"].as_array().unwrap();
        assert!(cases.len() >= 14);
        for case in cases {
            let set = &case["settings"];
            let number = |name: &str, absent: f64| set[name].as_f64().unwrap_or(absent);
            let settings = Sampling {
                temperature: number("temperature", 1.0),
                top_k: number("top_k", 0.0) as usize,
                top_p: number("top_p", 1.0),
                repetition_penalty: number("repetition_penalty", 1.0),
                seed: 0,
            };
            let text = ids(&case["ids"]);
            let n_new = text.len() - prompt_length;
            let too_early = n_new < number("min_new_tokens", 0.0) as usize;
            let forbidden = if too_early { ids(&recorded["eos"]) } else { Vec::new() };
            let place = Place { ids: &text, forbidden: &forbidden };
            let mut scores = list(&case["logits"], |x| x.as_f64().unwrap() as f32);

            let mut greedy = Sampler::new(&settings);
            let at_zero = Sampling { temperature: 0.0, ..settings.clone() };
            greedy.settings = &at_zero;
            let chosen = u64::from(greedy.choose(scores.clone(), &place));
            assert_eq!(chosen, case["argmax"].as_u64().unwrap(), "{set}");

            let sampler = Sampler::new(&settings);
            sampler.penalise(&mut scores, &place);
            let mut found = sampler.candidates(scores);
            found.sort_unstable_by_key(|(id, _)| *id);
            let expected = list(&case["scores"], |pair| {
                (pair[0].as_u64().unwrap() as u32, pair[1].as_f64().unwrap() as f32)
            });
            let only_ids = |list: &[Candidate]| list.iter().map(|(id, _)| *id).collect::<Vec<_>>();
            assert_eq!(only_ids(&found), only_ids(&expected), "{set}");
            for ((id, found), (_, expected)) in found.iter().zip(&expected) {
                let far = (found - expected).abs();
                assert!(far <= 1e-6 * expected.abs(), "{set}, {id}: {found} is not {expected}");
            }
        }
    }

    #[test]
    fn a_draw_follows_the_probabilities() {
        // e^1 and e^0: the rest was taken away.
        let candidates = [(7, 1.0), (3, 0.0)];
        let border = 1f64.exp() / (1f64.exp() + 1.0);
        assert_eq!(draw(&candidates, 0.0), 7);
        assert_eq!(draw(&candidates, border - 1e-6), 7);
        assert_eq!(draw(&candidates, border + 1e-6), 3);
        assert_eq!(draw(&candidates, 1.0 - 1e-16), 3);
    }

    #[test]
    fn a_seed_decides_all_draws() {
        let place = Place { ids: &[], forbidden: &[] };
        let drawn = |seed| {
            let settings = Sampling { temperature: 1.0, seed, ..Sampling::default() };
            let mut sampler = Sampler::new(&settings);
            (0..40).map(|_| sampler.choose(vec![0.3; 30], &place)).collect::<Vec<_>>()
        };
        assert_eq!(drawn(5), drawn(5));
        assert_ne!(drawn(5), drawn(6));
        let different: BTreeSet<u32> = drawn(5).into_iter().collect();
        assert!(different.len() > 10, "{different:?}");
    }

    #[test]
    fn of_equal_scores_greedy_takes_the_first() {
        assert_eq!(likeliest(&[0.5, 2.0, -1.0, 2.0]), 1);
        assert_eq!(likeliest(&[f32::NEG_INFINITY, -3.0]), 1);
    }
}
