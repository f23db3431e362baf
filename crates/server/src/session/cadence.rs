//! When the server makes a session durable by itself while it trains. It reads no clock.

use std::time::{Duration, Instant};

/// How often. None: not by that.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SnapshotEvery {
    /// At the first Step after so long since the last snapshot.
    pub time: Option<Duration>,
    /// At every so many Steps.
    pub steps: Option<u64>,
}

/// What has happened since the last snapshot.
#[derive(Debug)]
pub(super) struct Cadence {
    every: SnapshotEvery,
    since: Instant,
    n_steps: u64,
    /// The last attempt came to nothing before anything was copied.
    overdue: bool,
}

impl Cadence {
    pub fn new(every: SnapshotEvery, now: Instant) -> Self {
        Cadence { every, since: now, n_steps: 0, overdue: false }
    }

    /// A Step is taken in. Whether a snapshot is due right behind it.
    pub fn step(&mut self, now: Instant) -> bool {
        let Cadence { every: SnapshotEvery { time, steps }, since, overdue, .. } = *self;
        self.n_steps += 1;
        let by_time = time.is_some_and(|time| now.saturating_duration_since(since) >= time);
        let by_steps = steps.is_some_and(|steps| self.n_steps >= steps);
        overdue || by_time || by_steps
    }

    /// A snapshot is being taken, whoever wanted it.
    pub fn taken(&mut self, now: Instant) {
        *self = Cadence::new(self.every, now);
    }

    /// The Step was refused, or its copy failed: the next Step is as good.
    pub fn missed(&mut self) {
        self.overdue = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_snapshot_is_due_by_steps_or_by_time_whichever_comes_first() {
        let begun = Instant::now();
        let every = SnapshotEvery { time: Some(60 * SECOND), steps: Some(3) };
        let mut cadence = Cadence::new(every, begun);
        assert!(!cadence.step(begun));
        assert!(!cadence.step(begun + 59 * SECOND));
        // The third; and it stays due until it is taken.
        assert!(cadence.step(begun + 59 * SECOND));
        assert!(cadence.step(begun + 59 * SECOND));
        cadence.taken(begun + 59 * SECOND);
        assert!(!cadence.step(begun + 118 * SECOND));
        assert!(cadence.step(begun + 119 * SECOND));
        // A clock that goes back is no reason.
        cadence.taken(begun + 119 * SECOND);
        assert!(!cadence.step(begun));
    }

    #[test]
    fn without_settings_none_is_due() {
        let begun = Instant::now();
        let mut cadence = Cadence::new(SnapshotEvery::default(), begun);
        assert!((0..1000).all(|hour| !cadence.step(begun + 3600 * hour * SECOND)));
    }

    #[test]
    fn one_that_was_missed_is_due_again_at_the_next_step() {
        let begun = Instant::now();
        let mut cadence = Cadence::new(SnapshotEvery { time: None, steps: Some(2) }, begun);
        assert!(!cadence.step(begun) && cadence.step(begun));
        cadence.taken(begun);
        cadence.missed();
        assert!(cadence.step(begun));
        cadence.taken(begun);
        assert!(!cadence.step(begun));
    }
}
