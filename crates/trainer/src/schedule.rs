use serde::{Deserialize, Serialize};
use std::f64::consts::PI;

/// How the learning rate goes after the warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scheduler {
    /// It stays.
    Constant,
    /// It falls by the same amount in each step.
    Linear,
    /// It falls along half a cosine: slowly, then fast, then slowly.
    #[default]
    Cosine,
}

/// How long the learning rate rises.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Warmup {
    /// Steps; at most a tenth of the run, so that a short run learns at all.
    Steps(u64),
    /// Share of the run's steps, rounded up.
    Ratio(f64),
}

impl Warmup {
    /// Of a run of `n_steps`.
    pub fn n_steps(self, n_steps: u64) -> u64 {
        match self {
            Warmup::Steps(steps) => steps.min(n_steps / 10),
            Warmup::Ratio(ratio) => (ratio * n_steps as f64).ceil() as u64,
        }
    }
}

/// Learning rate by step: it rises linearly over the warm-up and then goes from the base rate to the
/// lowest one.
///
/// The numbers are those of `get_{constant,linear,cosine}_schedule_with_warmup` of Transformers,
/// with one difference: within the warm-up step k of W learns at `(k + 1) / (W + 1)` of the base
/// rate, there at `k / W`, so that the first step learns nothing.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// What follows the warm-up.
    pub scheduler: Scheduler,
    /// Highest rate.
    pub base: f64,
    /// Rate at the end; a constant one never gets there.
    pub lowest: f64,
    /// Steps of the warm-up.
    pub n_warmup: u64,
    /// Steps of the whole run.
    pub n_steps: u64,
}

impl Schedule {
    /// The rate of step `step`, counted from 0.
    pub fn learning_rate(&self, step: u64) -> f64 {
        if step < self.n_warmup {
            return self.base * (step + 1) as f64 / (self.n_warmup + 1) as f64;
        }
        let left = self.n_steps.saturating_sub(self.n_warmup).max(1);
        let progress = ((step - self.n_warmup) as f64 / left as f64).min(1.0);
        let height = match self.scheduler {
            Scheduler::Constant => return self.base,
            Scheduler::Linear => 1.0 - progress,
            Scheduler::Cosine => 0.5 * (1.0 + (PI * progress).cos()),
        };
        self.lowest + (self.base - self.lowest) * height
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    /// Rates that Transformers gave; see make_schedules.py beside the file.
    #[test]
    fn after_the_warm_up_the_rates_are_those_of_transformers() {
        let recorded: Value =
            serde_json::from_str(include_str!("../tests/schedules.json")).unwrap();
        let runs = recorded["runs"].as_array().unwrap();
        assert!(runs.len() >= 7);
        for run in runs {
            let schedule = Schedule {
                scheduler: serde_json::from_value(run["scheduler"].clone()).unwrap(),
                base: run["base"].as_f64().unwrap(),
                lowest: run["lowest"].as_f64().unwrap(),
                n_warmup: run["n_warmup"].as_u64().unwrap(),
                n_steps: run["n_steps"].as_u64().unwrap(),
            };
            let rates: Vec<f64> =
                run["rates"].as_array().unwrap().iter().map(|r| r.as_f64().unwrap()).collect();
            assert_eq!(rates.len() as u64, schedule.n_steps + 1);
            for (step, &theirs) in (0..).zip(&rates) {
                let ours = schedule.learning_rate(step);
                let expected = if step < schedule.n_warmup {
                    // The one difference: theirs is k / W, ours (k + 1) / (W + 1).
                    let w = schedule.n_warmup as f64;
                    assert!((theirs - schedule.base * step as f64 / w).abs() < 1e-15);
                    theirs + (schedule.base - theirs) / (w + 1.0)
                } else {
                    theirs
                };
                assert!(
                    (ours - expected).abs() < 1e-12 * schedule.base,
                    "{schedule:?} step {step}: {ours}, expected {expected}"
                );
            }
        }
    }

    #[test]
    fn a_run_learns_from_its_first_step_on_and_beyond_its_last() {
        let cosine = Schedule {
            scheduler: Scheduler::Cosine,
            base: 2.0,
            lowest: 0.0,
            n_warmup: 4,
            n_steps: 44,
        };
        let rates: Vec<f64> = (0..5).map(|step| cosine.learning_rate(step)).collect();
        assert_eq!(rates, [0.4, 0.8, 1.2, 1.6, 2.0]);
        assert!(cosine.learning_rate(43) > 0.0);
        assert_eq!(cosine.learning_rate(1000), 0.0);
        let linear = Schedule { scheduler: Scheduler::Linear, lowest: 0.5, ..cosine };
        assert_eq!(linear.learning_rate(24), 1.25);
        assert_eq!(linear.learning_rate(1000), 0.5);
        let constant = Schedule { scheduler: Scheduler::Constant, ..cosine };
        assert_eq!(constant.learning_rate(1000), 2.0);
        // No step is left after the warm-up.
        assert_eq!(Schedule { n_warmup: 44, ..cosine }.learning_rate(44), 2.0);
    }

    #[test]
    fn warm_up_steps_are_cut_to_a_tenth_of_the_run_and_a_share_is_not() {
        assert_eq!(Warmup::Steps(100).n_steps(60), 6);
        assert_eq!(Warmup::Steps(100).n_steps(5000), 100);
        assert_eq!(Warmup::Steps(100).n_steps(5), 0);
        assert_eq!(Warmup::Ratio(0.5).n_steps(61), 31);
        assert_eq!(Warmup::Ratio(0.0).n_steps(61), 0);
        assert_eq!(Warmup::Ratio(1.0).n_steps(61), 61);
    }
}
