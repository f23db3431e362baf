use std::time::{Duration, Instant};

/// How long to go on measuring.
#[derive(Debug, Clone, Copy)]
pub struct Effort {
    /// At least so many rounds,
    pub n_rounds: usize,
    /// and as many more as fit into this time.
    pub time: Duration,
}

/// The times of several candidates, round by round.
#[derive(Debug, Clone)]
pub struct InTurn {
    /// By candidate, then by round.
    times: Vec<Vec<Duration>>,
}

/// Runs all candidates once to warm up, and then in turn, in another order each round, so that a
/// slow moment of the machine hits all of them. `run` is told which candidate it is, and gives the
/// time that counts.
pub fn in_turn(
    n_candidates: usize,
    effort: Effort,
    mut run: impl FnMut(usize) -> anyhow::Result<Duration>,
) -> anyhow::Result<InTurn> {
    for candidate in 0..n_candidates {
        run(candidate)?;
    }
    let begun = Instant::now();
    let mut times = vec![Vec::new(); n_candidates];
    let mut round = 0;
    while round < effort.n_rounds || begun.elapsed() < effort.time {
        for i in 0..n_candidates {
            // 0 1 2, 1 2 0, 2 0 1, ...
            let candidate = (round + i) % n_candidates;
            times[candidate].push(run(candidate)?);
        }
        round += 1;
    }
    Ok(InTurn { times })
}

impl InTurn {
    /// The median round of a candidate.
    pub fn median(&self, candidate: usize) -> Duration {
        let mut times = self.times[candidate].clone();
        times.sort();
        times[times.len() / 2]
    }

    /// How many times as fast `candidate` is as `than`: the first quartile, the median and the
    /// third over the rounds.
    pub fn speedup(&self, candidate: usize, than: usize) -> [f64; 3] {
        let pairs = self.times[candidate].iter().zip(&self.times[than]);
        let mut ratios: Vec<f64> =
            pairs.map(|(own, than)| than.as_secs_f64() / own.as_secs_f64()).collect();
        ratios.sort_by(f64::total_cmp);
        let n = ratios.len();
        [ratios[n / 4], ratios[n / 2], ratios[n - 1 - n / 4]]
    }

    /// How many there were.
    pub fn n_rounds(&self) -> usize {
        self.times.first().map_or(0, Vec::len)
    }
}
