use super::pack::Units;
use super::sample::{Batch, DataSet};
use crate::TrainError;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use std::sync::{Mutex, PoisonError};

/// What ends a microbatch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MicrobatchSize {
    /// So many samples (pairs, for preferences), as they come in the epoch's order.
    Samples(usize),
    /// As many samples as fit into a number of tokens, chosen among neighbours in the epoch's order
    /// so that little room is left.
    Tokens {
        /// Of all samples of a microbatch.
        max_tokens: usize,
        /// Most samples (pairs, for preferences), however short they are.
        max_samples: Option<usize>,
    },
}

/// What, beside the data, decides which samples a step takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlanOptions {
    /// What ends a microbatch.
    pub size: MicrobatchSize,
    /// Microbatches in a step.
    pub gradient_accumulation_steps: usize,
    /// Most tokens that the server takes at once.
    pub server_max_tokens: usize,
    /// Of the order.
    pub seed: u64,
}

/// Which samples each optimizer step takes, and how they are packed: a pure function of the samples'
/// lengths, the options and the step, so that a resumed run goes on with exactly the microbatches
/// that an uninterrupted one would have had. Every epoch goes through all samples once, in an order
/// of its own; its last step may be smaller. With a budget of tokens, epochs may differ in their
/// number of steps.
#[derive(Debug)]
pub struct Plan {
    /// Tokens of each unit.
    lengths: Vec<u32>,
    shortest: u32,
    unit: usize,
    options: PlanOptions,
    known: Mutex<Known>,
}

/// What was worked out already.
#[derive(Debug, Default)]
struct Known {
    /// Steps up to the end of each epoch, from the first on.
    ends: Vec<u64>,
    /// The steps of the epoch asked for last.
    epoch: Option<(u64, Vec<Step>)>,
}

/// The microbatches of a step, each of units.
type Step = Vec<Vec<usize>>;

/// Where in the data a step stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Counted from 0.
    pub epoch: u64,
    /// Samples (pairs, for preferences) that the epoch's steps before this one take.
    pub sample: usize,
}

impl Plan {
    /// Refuses data of which a sample, or a pair, is too long for a microbatch, and a budget that the
    /// server does not take.
    ///
    /// Panics if there are no samples, or a step takes none.
    pub fn new(data: &DataSet, options: PlanOptions) -> Result<Self, TrainError> {
        let lengths = unit_lengths(data);
        assert!(!lengths.is_empty(), "a data set that was loaded has a sample");
        assert!(options.gradient_accumulation_steps > 0, "a step has a microbatch");
        check_size(&lengths, data.unit, options.size, options.server_max_tokens)?;
        let shortest = lengths.iter().min().copied().unwrap_or_default();
        Ok(Plan { lengths, shortest, unit: data.unit, options, known: Mutex::default() })
    }

    /// Steps that go through all samples so many times.
    pub fn n_steps(&self, num_epochs: u64) -> u64 {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        match num_epochs.checked_sub(1) {
            None => 0,
            Some(last) => self.end_of(last, &mut known),
        }
    }

    /// Where step `step`, counted from 0, begins.
    pub fn place(&self, step: u64) -> Place {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let (epoch, within) = self.find(step, &mut known);
        let before = &self.steps(epoch, &mut known)[..within];
        Place { epoch, sample: before.iter().flatten().map(Vec::len).sum() }
    }

    /// The samples of each microbatch of step `step`, counted from 0. Samples of one unit are
    /// neighbours.
    pub fn microbatches(&self, step: u64) -> Vec<Vec<usize>> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let (epoch, within) = self.find(step, &mut known);
        let microbatches = &self.steps(epoch, &mut known)[within];
        microbatches.iter().map(|units| samples_of(units, self.unit)).collect()
    }

    /// How full the microbatches of the first epoch are: their tokens over the budget's. None
    /// without a budget.
    pub fn fill(&self) -> Option<f64> {
        let MicrobatchSize::Tokens { max_tokens, .. } = self.options.size else { return None };
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let n = self.steps(0, &mut known).iter().map(Vec::len).sum::<usize>();
        let tokens: u64 = self.lengths.iter().map(|&n| u64::from(n)).sum();
        Some(tokens as f64 / (n * max_tokens) as f64)
    }

    /// The epoch of a step and which of its steps it is.
    fn find(&self, step: u64, known: &mut Known) -> (u64, usize) {
        if let Some(per_epoch) = self.steps_of_every_epoch() {
            return (step / per_epoch, (step % per_epoch) as usize);
        }
        let mut epoch = 0;
        while self.end_of(epoch, known) <= step {
            epoch += 1;
        }
        let begin = if epoch == 0 { 0 } else { self.end_of(epoch - 1, known) };
        (epoch, (step - begin) as usize)
    }

    /// Steps up to the end of an epoch.
    fn end_of(&self, epoch: u64, known: &mut Known) -> u64 {
        if let Some(per_epoch) = self.steps_of_every_epoch() {
            return (epoch + 1) * per_epoch;
        }
        while known.ends.len() as u64 <= epoch {
            let next = known.ends.len() as u64;
            let n = self.steps(next, known).len() as u64;
            known.ends.push(known.ends.last().copied().unwrap_or_default() + n);
        }
        known.ends[epoch as usize]
    }

    /// Without a budget of tokens, epochs have the same number of steps.
    fn steps_of_every_epoch(&self) -> Option<u64> {
        match self.options.size {
            MicrobatchSize::Samples(n) => {
                let per_step = n * self.options.gradient_accumulation_steps;
                Some(self.lengths.len().div_ceil(per_step) as u64)
            }
            MicrobatchSize::Tokens { .. } => None,
        }
    }

    fn steps<'a>(&self, epoch: u64, known: &'a mut Known) -> &'a [Step] {
        if known.epoch.as_ref().is_none_or(|(last, _)| *last != epoch) {
            known.epoch = Some((epoch, self.lay_out(epoch)));
        }
        let (_, steps) = known.epoch.as_ref().expect("it was just set");
        steps
    }

    fn lay_out(&self, epoch: u64) -> Vec<Step> {
        let PlanOptions { size, gradient_accumulation_steps, server_max_tokens, seed } =
            self.options;
        let units = Units { lengths: &self.lengths, shortest: self.shortest };
        let order = shuffled(self.lengths.len(), seed, epoch);
        match size {
            MicrobatchSize::Samples(n) => order
                .chunks(n * gradient_accumulation_steps)
                .map(|of_step| units.microbatches(of_step, size, server_max_tokens))
                .collect(),
            MicrobatchSize::Tokens { .. } => units
                .microbatches(&order, size, server_max_tokens)
                .chunks(gradient_accumulation_steps)
                .map(<[_]>::to_vec)
                .collect(),
        }
    }
}

impl DataSet {
    /// All samples in their own order, packed: for evaluation. Refuses what [`Plan::new`] refuses.
    pub fn in_order(
        &self,
        size: MicrobatchSize,
        server_max_tokens: usize,
    ) -> Result<Vec<Batch>, TrainError> {
        let lengths = unit_lengths(self);
        check_size(&lengths, self.unit, size, server_max_tokens)?;
        let shortest = lengths.iter().min().copied().unwrap_or_default();
        let units = Units { lengths: &lengths, shortest };
        let order: Vec<usize> = (0..lengths.len()).collect();
        let microbatches = units.microbatches(&order, size, server_max_tokens);
        Ok(microbatches.iter().map(|units| self.batch(&samples_of(units, self.unit))).collect())
    }
}

fn unit_lengths(data: &DataSet) -> Vec<u32> {
    let of_unit = |i: usize| (i..i + data.unit).map(|i| data.length(i)).sum::<usize>() as u32;
    (0..data.n_units()).map(|unit| of_unit(unit * data.unit)).collect()
}

fn samples_of(units: &[usize], unit: usize) -> Vec<usize> {
    units.iter().flat_map(|&u| u * unit..(u + 1) * unit).collect()
}

fn check_size(
    lengths: &[u32],
    unit: usize,
    size: MicrobatchSize,
    server_max_tokens: usize,
) -> Result<(), TrainError> {
    let longest = lengths.iter().max().map_or(0, |&n| n as usize);
    let what = if unit == 1 { "sample" } else { "preference pair" };
    let wrong = |option, value: usize, problem| {
        Err(TrainError::Option { option, value: value.to_string(), problem })
    };
    if let MicrobatchSize::Tokens { max_tokens, .. } = size {
        if max_tokens > server_max_tokens {
            return wrong(
                "max-tokens-per-batch",
                max_tokens,
                format!(
                    "the server takes at most {server_max_tokens} tokens at once; lower it, or raise the server's limits.max_tokens_per_microbatch or the tenant's quota tokens_per_microbatch"
                ),
            );
        }
        if longest > max_tokens {
            return wrong(
                "max-tokens-per-batch",
                max_tokens,
                format!(
                    "the longest {what} has {longest} tokens and must fit into a microbatch; expected at least {longest}, or a lower --max-seq-length"
                ),
            );
        }
    }
    if longest > server_max_tokens {
        return wrong(
            "max-seq-length",
            longest.div_ceil(unit),
            format!(
                "the longest {what} has {longest} tokens and goes to the server as one microbatch, which takes at most {server_max_tokens}; lower it, or raise the server's limits.max_tokens_per_microbatch or the tenant's quota tokens_per_microbatch"
            ),
        );
    }
    Ok(())
}

/// Fisher and Yates, written out: a library's shuffle may change between versions, and with it what
/// a resumed run sees.
fn shuffled(n: usize, seed: u64, epoch: u64) -> Vec<usize> {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..16].copy_from_slice(&epoch.to_le_bytes());
    let mut random = ChaCha8Rng::from_seed(key);
    let mut order: Vec<usize> = (0..n).collect();
    for i in (1..n).rev() {
        order.swap(i, (random.next_u64() % (i as u64 + 1)) as usize);
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Sample;

    /// Samples of these lengths.
    fn data(lengths: impl IntoIterator<Item = usize>) -> DataSet {
        let sample = |n: usize| Sample { ids: vec![1; n], learn: vec![true; n] };
        DataSet::of(&lengths.into_iter().map(sample).collect::<Vec<_>>())
    }

    fn options(size: MicrobatchSize, gradient_accumulation_steps: usize) -> PlanOptions {
        PlanOptions { size, gradient_accumulation_steps, server_max_tokens: 1000, seed: 5 }
    }

    fn by_samples(n: usize, of: usize, accumulate: usize, seed: u64) -> Plan {
        let options = PlanOptions { seed, ..options(MicrobatchSize::Samples(of), accumulate) };
        Plan::new(&data(vec![3; n]), options).unwrap()
    }

    const BUDGET: MicrobatchSize = MicrobatchSize::Tokens { max_tokens: 64, max_samples: None };

    /// Lengths between 2 and 41.
    fn uneven(n: usize) -> impl Iterator<Item = usize> {
        (0..n).map(|i| 2 + i * 29 % 40)
    }

    #[test]
    fn an_epoch_takes_each_sample_once() {
        let plan = by_samples(10, 2, 2, 5);
        assert_eq!(plan.n_steps(1), 3);
        assert_eq!(plan.n_steps(4), 12);
        for epoch in 0..3 {
            let steps = epoch * 3..epoch * 3 + 3;
            let mut seen: Vec<usize> = steps.flat_map(|s| plan.microbatches(s)).flatten().collect();
            seen.sort();
            assert_eq!(seen, (0..10).collect::<Vec<_>>());
        }
        assert_eq!(plan.microbatches(2).concat().len(), 2);
        assert_eq!(plan.place(5), Place { epoch: 1, sample: 8 });
    }

    #[test]
    fn a_step_takes_the_same_samples_whatever_was_asked_before() {
        let straight = by_samples(100, 3, 1, 7);
        let expected: Vec<_> = (0..80).map(|step| straight.microbatches(step)).collect();
        let resumed = by_samples(100, 3, 1, 7);
        assert_eq!(resumed.microbatches(70), expected[70]);
        assert_eq!(resumed.microbatches(2), expected[2]);
        assert_ne!(expected[..33], expected[34..67]);
        assert_ne!(by_samples(100, 3, 1, 8).microbatches(0), expected[0]);
    }

    #[test]
    fn the_order_is_the_one_of_earlier_releases() {
        // Recorded: a change breaks the resumption of runs begun before it.
        assert_eq!(shuffled(8, 42, 0), [3, 6, 0, 4, 5, 2, 1, 7]);
        // And what these made of it: two microbatches of two samples, longest first, parted where
        // the server takes less.
        let plan = |server_max_tokens| {
            let size = MicrobatchSize::Samples(2);
            let options =
                PlanOptions { size, gradient_accumulation_steps: 2, server_max_tokens, seed: 42 };
            Plan::new(&data([2, 3, 4, 5, 6, 7, 8, 9]), options).unwrap()
        };
        assert_eq!(plan(100).microbatches(0), [vec![6, 3], vec![4, 0]]);
        assert_eq!(plan(100).microbatches(1), [vec![5, 2], vec![7, 1]]);
        assert_eq!(plan(10).microbatches(0), [vec![6], vec![3], vec![4, 0]]);
    }

    #[test]
    fn with_a_budget_every_step_is_the_same_whatever_was_asked_before() {
        let data = data(uneven(301));
        let plan = || Plan::new(&data, options(BUDGET, 3)).unwrap();
        let straight = plan();
        let n = straight.n_steps(4);
        let steps: Vec<_> = (0..n).map(|step| straight.microbatches(step)).collect();
        let places: Vec<_> = (0..n).map(|step| straight.place(step)).collect();
        for step in [n - 1, 0, n / 2, n / 3, n - 2] {
            let resumed = plan();
            assert_eq!(resumed.microbatches(step), steps[step as usize]);
            assert_eq!(resumed.place(step), places[step as usize]);
        }
        // Each epoch has every sample once, and ends where `n_steps` says.
        for epoch in 0..4 {
            let of_epoch = straight.n_steps(epoch)..straight.n_steps(epoch + 1);
            assert!(of_epoch.clone().all(|step| places[step as usize].epoch == epoch));
            assert_eq!(places[of_epoch.start as usize].sample, 0);
            let mut seen: Vec<usize> =
                of_epoch.flat_map(|step| steps[step as usize].concat()).collect();
            seen.sort();
            assert_eq!(seen, (0..301).collect::<Vec<_>>());
        }
        assert_ne!(steps[0], steps[straight.n_steps(1) as usize]);
        assert_eq!(plan().place(n), Place { epoch: 4, sample: 0 });
    }

    #[test]
    fn a_budget_is_kept_and_used() {
        let data = data(uneven(301));
        let plan = Plan::new(&data, options(BUDGET, 3)).unwrap();
        let n = plan.n_steps(1);
        for step in 0..n {
            let microbatches = plan.microbatches(step);
            assert!(microbatches.len() == 3 || step == n - 1);
            for samples in microbatches {
                assert!(data.batch(&samples).n_tokens() <= 64);
            }
        }
        let fill = plan.fill().unwrap();
        assert!(fill > 0.9, "{fill}");
        let few = MicrobatchSize::Tokens { max_tokens: 64, max_samples: Some(2) };
        let plan = Plan::new(&data, options(few, 3)).unwrap();
        assert!((0..plan.n_steps(1)).flat_map(|s| plan.microbatches(s)).all(|m| m.len() <= 2));
        assert_eq!(by_samples(9, 2, 2, 5).fill(), None);
    }

    #[test]
    fn pairs_stay_together() {
        let mut pairs = data(uneven(60));
        pairs.unit = 2;
        let size = MicrobatchSize::Tokens { max_tokens: 100, max_samples: None };
        for size in [size, MicrobatchSize::Samples(3)] {
            let plan = Plan::new(&pairs, options(size, 2)).unwrap();
            let mut seen = Vec::new();
            for step in 0..plan.n_steps(1) {
                for samples in plan.microbatches(step) {
                    for pair in samples.chunks(2) {
                        assert!(pair[0] % 2 == 0 && pair[1] == pair[0] + 1, "{samples:?}");
                    }
                    assert!(matches!(size, MicrobatchSize::Tokens { .. }) || samples.len() <= 6);
                    seen.extend(samples);
                }
            }
            seen.sort();
            assert_eq!(seen, (0..60).collect::<Vec<_>>());
            let batches = pairs.in_order(size, 1000).unwrap();
            assert!(batches.iter().all(|b| b.samples.chunks(2).all(|p| p[1] == p[0] + 1)));
        }
    }

    #[test]
    fn what_fits_into_no_microbatch_is_refused() {
        let text = |data: &DataSet, size, server_max_tokens| {
            let options = PlanOptions { server_max_tokens, ..options(size, 1) };
            Plan::new(data, options).unwrap_err().to_string()
        };
        let mut data = data([10, 70]);
        assert_eq!(
            text(&data, BUDGET, 1000),
            "--max-tokens-per-batch = 64: the longest sample has 70 tokens and must fit into a microbatch; expected at least 70, or a lower --max-seq-length"
        );
        assert!(text(&data, BUDGET, 60).contains("the server takes at most 60 tokens"));
        data.unit = 2;
        let error = text(&data, MicrobatchSize::Samples(1), 75);
        assert!(error.contains("the longest preference pair has 80 tokens"), "{error}");
        assert!(data.in_order(MicrobatchSize::Samples(1), 75).is_err());
    }
}
