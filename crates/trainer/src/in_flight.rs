/// Steps after which one more is tried for the first time; twice as many each time that fails.
const FIRST_PAUSE: u64 = 20;
const LONGEST_PAUSE: u64 = 1280;

/// How many microbatches of a step may be on their way at once: as many as were asked for, fewer
/// while the server has no room for them. It changes no number of a run.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct InFlight {
    asked: usize,
    now: usize,
    /// Steps that follow a refusal before one more is tried.
    pause: u64,
    left: u64,
}

impl InFlight {
    /// At least 1.
    pub fn new(asked: usize) -> Self {
        InFlight { asked, now: asked, pause: 0, left: 0 }
    }

    /// For the next step, by what the server had room for.
    pub fn now(&self) -> usize {
        self.now
    }

    /// As many as were asked for.
    pub fn asked(&self) -> usize {
        self.asked
    }

    /// After a step that was to have `tried` in flight and had room for `had`. Whether this is the
    /// first time that there was less.
    pub fn seen(&mut self, tried: usize, had: usize) -> bool {
        if had < tried {
            let first = self.pause == 0;
            self.now = had;
            self.pause = (2 * self.pause).clamp(FIRST_PAUSE, LONGEST_PAUSE);
            self.left = self.pause;
            return first;
        }
        if self.now < self.asked {
            self.left -= 1;
            if self.left == 0 {
                self.now += 1;
                self.left = self.pause;
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A server with room for `room`; what each of `n` steps had.
    fn steps(in_flight: &mut InFlight, room: usize, n: usize) -> Vec<usize> {
        let step = |_| {
            let tried = in_flight.now();
            let had = tried.min(room);
            in_flight.seen(tried, had);
            had
        };
        (0..n).map(step).collect()
    }

    #[test]
    fn more_are_tried_again_after_a_pause_that_grows() {
        let mut in_flight = InFlight::new(4);
        assert!(in_flight.seen(4, 1));
        assert_eq!(in_flight.now(), 1);
        assert_eq!(steps(&mut in_flight, 4, 19), [1; 19]);
        assert_eq!(steps(&mut in_flight, 4, 2), [1, 2]);
        // There is room again: after 20 steps each one more, up to what was asked for.
        assert_eq!(steps(&mut in_flight, 4, 100).last(), Some(&4));
        assert_eq!(in_flight.now(), 4);
        // Told only once; and the next attempt comes later.
        assert!(!in_flight.seen(4, 3));
        assert_eq!(steps(&mut in_flight, 4, 40), [3; 40]);
        assert_eq!(in_flight.now(), 4);
    }
}
