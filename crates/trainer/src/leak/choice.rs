//! Which samples are measured, and which ones the reader knows.

use super::{LeakData, LeakOptions};
use crate::TrainError;
use crate::data::{Batch, DataSet, Sample};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use std::collections::HashSet;
use tch::Tensor;

/// Tokens that go through the layers at once.
const BATCH_TOKENS: usize = 2048;

/// No sample of one is among the other's.
pub(super) struct Choice {
    pub test: Vec<Sample>,
    pub fit: Vec<Sample>,
}

impl Choice {
    /// The same ones for the same text, drawn from all of it. Of a text of which the reader knows a
    /// part at most half is measured.
    pub fn of(options: &LeakOptions, data: &LeakData) -> Result<Self, TrainError> {
        let mut order = shuffled(data.text.len());
        let total: usize = (0..data.text.len()).map(|i| data.text.length(i)).sum();
        let most = if data.reader.is_some() { total } else { total / 2 };
        let test = take(data.text, &mut order, options.n_tokens.min(most));
        let known: HashSet<&[i64]> = test.iter().map(|sample| sample.ids.as_slice()).collect();
        let (source, mut order) = match data.reader {
            Some(reader) => (reader, shuffled(reader.len())),
            None => (data.text, order),
        };
        order.retain(|&i| !known.contains(source.sample(i).ids.as_slice()));
        let fit = take(source, &mut order, options.n_reader_tokens);
        for (option, samples, whose) in [
            ("train-file", &test, "to measure"),
            ("reader-data", &fit, "for the linear reader to learn from"),
        ] {
            if samples.is_empty() {
                return Err(TrainError::Option {
                    option,
                    value: format!("({} samples, {total} tokens)", data.text.len()),
                    problem: format!(
                        "there is too little text {whose}: at least two different samples of two tokens are needed, or other text as --reader-data; give more text, or a smaller --max-seq-length, which makes more samples of a long text"
                    ),
                });
            }
        }
        Ok(Choice { test, fit })
    }

    /// Tokens of the longest sample.
    pub fn longest(&self) -> usize {
        self.test.iter().chain(&self.fit).map(|sample| sample.ids.len()).max().unwrap_or(1)
    }

    /// Token ids of what is measured.
    pub fn texts(&self) -> Vec<Vec<u32>> {
        let ids = |sample: &Sample| sample.ids.iter().map(|&id| id as u32).collect();
        self.test.iter().map(ids).collect()
    }
}

/// Samples from the front of `order` until there are so many tokens; the last one is cut.
fn take(data: &DataSet, order: &mut Vec<usize>, n_tokens: usize) -> Vec<Sample> {
    let (mut taken, mut left, mut used) = (Vec::new(), n_tokens, 0);
    for &i in order.iter() {
        if left < 2 {
            break;
        }
        used += 1;
        let mut sample = data.sample(i);
        sample.ids.truncate(left);
        sample.learn.truncate(left);
        left -= sample.ids.len();
        // The first token is not measured.
        if sample.ids.len() >= 2 {
            taken.push(sample);
        }
    }
    order.drain(..used);
    taken
}

fn shuffled(n: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n).collect();
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    for i in (1..n).rev() {
        order.swap(i, (rng.next_u64() % (i as u64 + 1)) as usize);
    }
    order
}

/// Packed, in their order.
pub(super) fn batches(samples: &[Sample]) -> Vec<Batch> {
    let mut batches: Vec<Batch> = Vec::new();
    for sample in samples {
        match batches.last_mut() {
            Some(batch) if batch.n_tokens() + sample.ids.len() <= BATCH_TOKENS => {
                batch.push(sample)
            }
            _ => {
                let mut batch = Batch::default();
                batch.push(sample);
                batches.push(batch);
            }
        }
    }
    batches
}

/// All rows but the first of each sequence: their places int64 `[n]`, and their tokens.
pub(super) fn later_rows(batch: &Batch) -> (Tensor, Vec<i64>) {
    let mut places = Vec::with_capacity(batch.n_tokens());
    let mut start = 0;
    for &length in &batch.seq_lens {
        places.extend((start + 1..start + length).map(|place| place as i64));
        start += length;
    }
    let ids = places.iter().map(|&place| batch.ids[place as usize]).collect();
    (Tensor::from_slice(&places), ids)
}
