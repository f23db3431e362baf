//! What a run learns from: token sequences with their masks, and packed batches of them.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::ops::Range;

/// The label of a position whose next token is not to be predicted, as in PyTorch.
pub const NOT_PREDICTED: i64 = -100;

/// One sequence to learn from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sample {
    /// Token ids.
    pub ids: Vec<i64>,
    /// For each token, whether it is to be predicted from those before it. The first never is.
    pub learn: Vec<bool>,
}

/// All samples of a run, in the order of the sources. Tokens of all samples stand one after the
/// other, so that a large data set costs five bytes a token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataSet {
    pub(super) ids: Vec<u32>,
    pub(super) learn: Vec<bool>,
    /// Where each sample ends in `ids`.
    pub(super) ends: Vec<usize>,
    /// Neighbouring samples that belong together and stay in one microbatch: 1, or 2 for preference
    /// pairs (the chosen answer at even indices, the rejected one behind it).
    pub unit: usize,
    /// What became of the records.
    pub stats: LoadStats,
    /// The tokens were found in the cache.
    pub cached: bool,
}

/// What became of the records of a data set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoadStats {
    /// Read, those passed over included.
    pub n_records: usize,
    /// Records in which nothing was left to predict; they are passed over.
    pub n_skipped: usize,
    /// Records that lost tokens, because they were longer than the limit.
    pub n_truncated: usize,
    /// Records that became several samples.
    pub n_split: usize,
    /// Samples; of a preference record, two.
    pub n_samples: usize,
    /// Tokens of all samples.
    pub n_tokens: usize,
    /// Tokens that are learned.
    pub n_learned: usize,
}

impl fmt::Display for LoadStats {
    /// `666 records, 700 samples, 41203 tokens (62% learned), 5% of the records truncated, ...`
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let share = |n: usize, of: usize| 100.0 * n as f64 / of.max(1) as f64;
        write!(
            f,
            "{}, {}, {} tokens ({:.0}% learned)",
            counted(self.n_records, "record"),
            counted(self.n_samples, "sample"),
            self.n_tokens,
            share(self.n_learned, self.n_tokens),
        )?;
        for (n, what) in [
            (self.n_truncated, "truncated"),
            (self.n_split, "split"),
            (self.n_skipped, "passed over"),
        ] {
            if n > 0 {
                let records = counted(n, "record");
                write!(f, ", {records} {what} ({:.1}%)", share(n, self.n_records))?;
            }
        }
        Ok(())
    }
}

fn counted(n: usize, what: &str) -> String {
    if n == 1 { format!("1 {what}") } else { format!("{n} {what}s") }
}

impl Default for DataSet {
    fn default() -> Self {
        let (ids, learn, ends) = Default::default();
        DataSet { ids, learn, ends, unit: 1, stats: LoadStats::default(), cached: false }
    }
}

impl DataSet {
    /// Samples in an order of your own, such as of a test. Each is a unit by itself.
    pub fn of(samples: &[Sample]) -> DataSet {
        let mut data = DataSet::default();
        for sample in samples {
            data.push(sample.ids.iter().map(|&id| id as u32), &sample.learn);
        }
        data
    }

    pub(super) fn push(&mut self, ids: impl Iterator<Item = u32>, learn: &[bool]) {
        self.ids.extend(ids);
        self.learn.extend(learn);
        self.ends.push(self.ids.len());
        debug_assert_eq!(self.ids.len(), self.learn.len());
        self.stats.n_samples += 1;
        self.stats.n_tokens += learn.len();
        self.stats.n_learned += learn.iter().skip(1).filter(|&&learn| learn).count();
    }

    /// Number of samples.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there is no sample.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// Number of units: of samples, or of pairs.
    pub fn n_units(&self) -> usize {
        self.len() / self.unit
    }

    /// Tokens of all samples.
    pub fn n_tokens(&self) -> usize {
        self.ids.len()
    }

    fn rows(&self, i: usize) -> Range<usize> {
        let start = if i == 0 { 0 } else { self.ends[i - 1] };
        start..self.ends[i]
    }

    /// Tokens of sample `i`.
    pub fn length(&self, i: usize) -> usize {
        self.rows(i).len()
    }

    /// Sample `i`.
    pub fn sample(&self, i: usize) -> Sample {
        let rows = self.rows(i);
        let ids = self.ids[rows.clone()].iter().map(|&id| i64::from(id)).collect();
        Sample { ids, learn: self.learn[rows].to_vec() }
    }

    /// These samples as one packed microbatch.
    pub fn batch(&self, samples: &[usize]) -> Batch {
        let mut batch = Batch::default();
        for &i in samples {
            batch.push(&self.sample(i));
        }
        batch.samples = samples.to_vec();
        batch
    }

    /// Equal for equal samples in equal order; a resumed run must see the same.
    pub fn fingerprint(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        let mut bytes = Vec::new();
        for i in 0..self.len() {
            let rows = self.rows(i);
            bytes.clear();
            bytes.extend((rows.len() as u64).to_le_bytes());
            for row in rows {
                bytes.extend(i64::from(self.ids[row]).to_le_bytes());
                bytes.push(u8::from(self.learn[row]));
            }
            hasher.update(&bytes);
        }
        hasher.finalize().to_hex()[..32].to_string()
    }

    /// The highest token id, for [a check](crate::TrainError::Tokenizer) against the model's
    /// vocabulary.
    pub fn highest_id(&self) -> i64 {
        self.ids.iter().max().map_or(0, |&id| i64::from(id))
    }
}

/// Sequences packed one after the other, without padding: what one microbatch runs on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// `[N]` token ids.
    pub ids: Vec<i64>,
    /// Tokens of each sequence; they sum to N.
    pub seq_lens: Vec<usize>,
    /// `[N]`, the token after each position, or [`NOT_PREDICTED`].
    pub labels: Vec<i64>,
    /// For each sequence, which sample of its [`DataSet`] it is; counted from 0 where there is none.
    pub samples: Vec<usize>,
}

impl Batch {
    /// Adds a sequence at the end.
    pub fn push(&mut self, sample: &Sample) {
        let next = sample.ids.iter().zip(&sample.learn).skip(1);
        let labels = next.map(|(&id, &learn)| if learn { id } else { NOT_PREDICTED });
        self.ids.extend(&sample.ids);
        self.labels.extend(labels.chain([NOT_PREDICTED]).take(sample.ids.len()));
        self.samples.push(self.seq_lens.len());
        self.seq_lens.push(sample.ids.len());
    }

    /// N.
    pub fn n_tokens(&self) -> usize {
        self.ids.len()
    }

    /// Positions that count in the loss.
    pub fn n_predicted(&self) -> usize {
        self.labels.iter().filter(|&&label| label != NOT_PREDICTED).count()
    }
}
