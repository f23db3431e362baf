use crate::metrics::Phases;
use std::time::{Duration, Instant};

/// Where the time of a session's steps goes: from one Step to the next, each moment is spent on the device
/// (execute), waiting for it (queue), or neither (wire). A job that waits while another of its session
/// runs does not wait for others.
#[derive(Debug, Default)]
pub(super) struct StepClock {
    /// The last Step, or the first job on the device.
    began: Option<Instant>,
    /// Up to here it is known where the time went.
    known: Option<Instant>,
    queue: Duration,
    execute: Duration,
}

impl StepClock {
    /// A job came, began and ended then; those of a session end one after the other.
    pub fn ran(&mut self, came: Instant, began: Instant, ended: Instant) {
        self.began.get_or_insert(came);
        let known = self.known.map_or(came, |known| known.max(came));
        self.queue += began.saturating_duration_since(known);
        self.execute += ended.saturating_duration_since(began.max(known));
        self.known = self.known.max(Some(ended));
    }

    /// A Step ended then: where the time since the last one went.
    pub fn step(&mut self, ended: Instant) -> Phases {
        let StepClock { began, queue, execute, .. } = std::mem::take(self);
        (self.began, self.known) = (Some(ended), Some(ended));
        let all = began.map_or(Duration::ZERO, |began| ended.saturating_duration_since(began));
        Phases { wire: all.saturating_sub(queue + execute), queue, execute }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_phases_add_up_to_the_time_from_step_to_step() {
        let zero = Instant::now();
        let at = |millis: u64| zero + Duration::from_millis(millis);
        let phases = |wire, queue, execute| {
            let [wire, queue, execute] = [wire, queue, execute].map(Duration::from_millis);
            Phases { wire, queue, execute }
        };
        let mut clock = StepClock::default();
        // The forward waits 5 and runs 10; the client takes 20; the backward runs at once for 15.
        clock.ran(at(0), at(5), at(15));
        clock.ran(at(35), at(35), at(50));
        clock.ran(at(50), at(51), at(52));
        assert_eq!(clock.step(at(52)), phases(20, 6, 26));
        // Two microbatches in flight: the second waits for the first, which is not the queue's fault.
        clock.ran(at(60), at(60), at(70));
        clock.ran(at(61), at(72), at(80));
        clock.ran(at(80), at(80), at(81));
        assert_eq!(clock.step(at(81)), phases(8, 2, 19));
        assert_eq!(clock.step(at(90)), phases(9, 0, 0));
    }
}
