use std::f64::consts::PI;

/// Learning rate by step: it rises linearly over the warm-up and falls along half a cosine to zero,
/// as `get_cosine_schedule_with_warmup` of Transformers does, except that the first step already
/// learns a little (there its rate is 0).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    base: f64,
    n_warmup: u64,
    n_steps: u64,
}

impl Schedule {
    /// `n_warmup` is cut to a tenth of the run, so that a short run learns at all.
    pub fn new(base: f64, n_warmup: u64, n_steps: u64) -> Self {
        Schedule { base, n_warmup: n_warmup.min(n_steps / 10), n_steps }
    }

    /// Warm-up steps after the cut.
    pub fn n_warmup(&self) -> u64 {
        self.n_warmup
    }

    /// The rate of step `step`, counted from 0.
    pub fn learning_rate(&self, step: u64) -> f64 {
        if step < self.n_warmup {
            return self.base * (step + 1) as f64 / (self.n_warmup + 1) as f64;
        }
        let left = (self.n_steps - self.n_warmup).max(1);
        let progress = ((step - self.n_warmup) as f64 / left as f64).min(1.0);
        self.base * 0.5 * (1.0 + (PI * progress).cos())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rises_to_the_base_rate_and_falls_to_zero() {
        let schedule = Schedule::new(2.0, 4, 44);
        let rates: Vec<f64> = (0..44).map(|step| schedule.learning_rate(step)).collect();
        assert_eq!(&rates[..5], &[0.4, 0.8, 1.2, 1.6, 2.0]);
        assert!(rates[4..].windows(2).all(|pair| pair[1] < pair[0]));
        // The cosine is halfway down in the middle of what follows the warm-up.
        assert!((schedule.learning_rate(24) - 1.0).abs() < 1e-12);
        assert!(rates[43] > 0.0 && rates[43] < 0.01);
        assert_eq!(schedule.learning_rate(44), 0.0);
        assert_eq!(schedule.learning_rate(1000), 0.0);
    }

    #[test]
    fn the_warm_up_is_at_most_a_tenth_of_the_run() {
        assert_eq!(Schedule::new(1.0, 100, 60).n_warmup(), 6);
        assert_eq!(Schedule::new(1.0, 100, 5000).n_warmup(), 100);
        // A run of five steps has no warm-up and begins at the full rate.
        assert_eq!(Schedule::new(1.0, 100, 5).learning_rate(0), 1.0);
    }
}
