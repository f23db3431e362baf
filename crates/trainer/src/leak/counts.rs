//! How many guesses are right.

use serde::Serialize;
use std::cmp::Reverse;
use std::collections::HashMap;
use tch::{Device, Tensor};

/// Shares of tokens that a reader named.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Recovered {
    /// By its first guess.
    pub top_1: f64,
    /// Among its first ten.
    pub top_10: f64,
    /// Of the frequent tokens: the commonest ones, that make up half of the text.
    pub frequent_top_1: f64,
    pub frequent_top_10: f64,
    /// Of the others. They carry most of what a text says.
    pub rare_top_1: f64,
    pub rare_top_10: f64,
    /// The first guess for each token, sample after sample, without each sample's first.
    #[serde(skip)]
    pub guesses: Vec<u32>,
}

/// Shares of tokens that are right if one always says the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Baseline {
    /// The commonest token.
    pub top_1: f64,
    /// The ten commonest ones.
    pub top_10: f64,
    /// Different tokens that count as frequent, and all different ones.
    pub frequent_tokens: usize,
    pub distinct_tokens: usize,
}

/// What there is to be read.
pub(super) struct Counts {
    ids: Vec<i64>,
    is_frequent: Vec<bool>,
    baseline: Baseline,
}

impl Counts {
    pub fn new(ids: Vec<i64>) -> Self {
        let mut by_id: HashMap<i64, usize> = HashMap::new();
        for &id in &ids {
            *by_id.entry(id).or_default() += 1;
        }
        let mut ranked: Vec<(i64, usize)> = by_id.into_iter().collect();
        ranked.sort_by_key(|&(id, n)| (Reverse(n), id));
        // The fewest that together are half of all.
        let (mut covered, mut frequent) = (0, Vec::new());
        for &(id, n) in &ranked {
            if 2 * covered >= ids.len() {
                break;
            }
            covered += n;
            frequent.push(id);
        }
        let share = |n: usize| n as f64 / ids.len().max(1) as f64;
        let baseline = Baseline {
            top_1: share(ranked.first().map_or(0, |(_, n)| *n)),
            top_10: share(ranked.iter().take(10).map(|(_, n)| n).sum()),
            frequent_tokens: frequent.len(),
            distinct_tokens: ranked.len(),
        };
        let is_frequent = ids.iter().map(|id| frequent.contains(id)).collect();
        Counts { ids, is_frequent, baseline }
    }

    pub fn n_tokens(&self) -> usize {
        self.ids.len()
    }

    pub fn baseline(&self) -> Baseline {
        self.baseline
    }

    /// Of guesses int64 `[n, k]`, one row for each token.
    pub fn of(&self, guesses: &Tensor) -> Recovered {
        let k = guesses.size()[1] as usize;
        let guesses = Vec::<i64>::try_from(guesses.flatten(0, -1).to_device(Device::Cpu));
        let guesses = guesses.expect("guesses are whole numbers");
        // First and tenth guess of all, frequent and rare tokens.
        let (mut right, mut all) = ([[0usize; 2]; 3], [0usize; 3]);
        for ((&id, &is_frequent), guesses) in
            self.ids.iter().zip(&self.is_frequent).zip(guesses.chunks(k))
        {
            let found = [usize::from(guesses[0] == id), usize::from(guesses.contains(&id))];
            for class in [0, if is_frequent { 1 } else { 2 }] {
                all[class] += 1;
                right[class][0] += found[0];
                right[class][1] += found[1];
            }
        }
        let share =
            |class: usize, which: usize| right[class][which] as f64 / all[class].max(1) as f64;
        Recovered {
            top_1: share(0, 0),
            top_10: share(0, 1),
            frequent_top_1: share(1, 0),
            frequent_top_10: share(1, 1),
            rare_top_1: share(2, 0),
            rare_top_10: share(2, 1),
            guesses: guesses.chunks(k).map(|guesses| guesses[0] as u32).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frequent_tokens_are_half_of_the_text_and_the_baseline_says_the_commonest() {
        let counts = Counts::new(vec![5, 5, 5, 7, 7, 1, 2, 3]);
        let baseline = counts.baseline();
        assert_eq!((baseline.top_1, baseline.top_10), (3.0 / 8.0, 1.0));
        assert_eq!((baseline.frequent_tokens, baseline.distinct_tokens), (2, 5));
        // The first guess is right for both 7 and for the 1, the second one for a 5 as well.
        let guesses = [[9, 5], [9, 9], [9, 9], [7, 9], [7, 9], [1, 9], [9, 9], [9, 9i64]];
        let found = counts.of(&Tensor::from_slice2(&guesses));
        assert_eq!((found.top_1, found.top_10), (3.0 / 8.0, 4.0 / 8.0));
        assert_eq!((found.frequent_top_1, found.frequent_top_10), (2.0 / 5.0, 3.0 / 5.0));
        assert_eq!((found.rare_top_1, found.rare_top_10), (1.0 / 3.0, 1.0 / 3.0));
        assert_eq!(found.guesses[3..6], [7, 7, 1]);
    }
}
