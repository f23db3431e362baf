use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// Which samples each optimizer step takes: a pure function of seed and step, so that a resumed run
/// goes on with exactly the samples that an uninterrupted one would have taken. Every epoch goes
/// through all samples once, in an order of its own; its last step may be smaller.
#[derive(Clone, Debug)]
pub struct Order {
    n_samples: usize,
    /// Samples of one full step: sequences in a microbatch times microbatches.
    samples_per_step: usize,
    seed: u64,
    /// The order of the epoch asked for last.
    epoch: Option<(u64, Vec<usize>)>,
}

/// Where in the data a step stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Counted from 0.
    pub epoch: u64,
    /// First sample of the step in the epoch's order.
    pub sample: usize,
}

impl Order {
    /// Panics if there are no samples or a step takes none.
    pub fn new(n_samples: usize, samples_per_step: usize, seed: u64) -> Self {
        assert!(n_samples > 0 && samples_per_step > 0, "a step takes at least one sample");
        Order { n_samples, samples_per_step, seed, epoch: None }
    }

    /// Steps that go through all samples once.
    pub fn steps_per_epoch(&self) -> u64 {
        self.n_samples.div_ceil(self.samples_per_step) as u64
    }

    /// Where step `step`, counted from 0, begins.
    pub fn place(&self, step: u64) -> Place {
        let per_epoch = self.steps_per_epoch();
        Place {
            epoch: step / per_epoch,
            sample: (step % per_epoch) as usize * self.samples_per_step,
        }
    }

    /// The samples of step `step`, counted from 0.
    pub fn samples(&mut self, step: u64) -> Vec<usize> {
        let place = self.place(step);
        let end = (place.sample + self.samples_per_step).min(self.n_samples);
        self.epoch_order(place.epoch)[place.sample..end].to_vec()
    }

    fn epoch_order(&mut self, epoch: u64) -> &[usize] {
        if self.epoch.as_ref().is_none_or(|(known, _)| *known != epoch) {
            self.epoch = Some((epoch, shuffled(self.n_samples, self.seed, epoch)));
        }
        let (_, order) = self.epoch.as_ref().expect("it was just set");
        order
    }
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

    #[test]
    fn an_epoch_takes_each_sample_once() {
        let mut order = Order::new(10, 4, 5);
        assert_eq!(order.steps_per_epoch(), 3);
        for epoch in 0..3 {
            let mut seen: Vec<usize> =
                (epoch * 3..epoch * 3 + 3).flat_map(|step| order.samples(step)).collect();
            seen.sort();
            assert_eq!(seen, (0..10).collect::<Vec<_>>());
        }
        assert_eq!(order.samples(2).len(), 2);
        assert_eq!(order.place(5), Place { epoch: 1, sample: 8 });
    }

    #[test]
    fn a_step_takes_the_same_samples_whatever_was_asked_before() {
        let mut straight = Order::new(100, 3, 7);
        let expected: Vec<_> = (0..80).map(|step| straight.samples(step)).collect();
        let mut resumed = Order::new(100, 3, 7);
        assert_eq!(resumed.samples(70), expected[70]);
        assert_eq!(resumed.samples(2), expected[2]);
        assert_ne!(expected[..33], expected[34..67]);
        assert_ne!(Order::new(100, 3, 8).samples(0), expected[0]);
    }

    #[test]
    fn the_order_is_the_one_of_earlier_releases() {
        // Recorded: a change breaks the resumption of runs begun before it.
        assert_eq!(shuffled(8, 42, 0), [3, 6, 0, 4, 5, 2, 1, 7]);
    }
}
