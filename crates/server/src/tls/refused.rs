use std::time::Duration;
use tokio::time::Instant;

/// The log tells of failed handshakes at most so often.
const PAUSE: Duration = Duration::from_secs(60);

/// Failed ones that the log has not told of. Pure.
#[derive(Default)]
pub struct Handshakes {
    n_failed: u64,
    told: Option<Instant>,
}

impl Handshakes {
    /// One more. How many there are to tell of, if it is time.
    pub fn failed(&mut self, now: Instant) -> Option<u64> {
        self.n_failed += 1;
        if self.told.is_some_and(|told| now.duration_since(told) < PAUSE) {
            return None;
        }
        self.told = Some(now);
        Some(std::mem::take(&mut self.n_failed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_a_line_a_minute_with_its_number() {
        let (mut handshakes, begin) = (Handshakes::default(), Instant::now());
        assert_eq!(handshakes.failed(begin), Some(1));
        assert_eq!(handshakes.failed(begin + PAUSE / 2), None);
        assert_eq!(handshakes.failed(begin + PAUSE), Some(2));
        assert_eq!(handshakes.failed(begin + PAUSE), None);
    }
}
