use std::time::{Duration, Instant};

/// Over so long tokens per second are averaged: who sent nothing for a while may send as much at once.
const BURST_SECONDS: f64 = 4.0;

/// Tokens that may be spent: they come in at a rate, up to a few seconds' worth. A microbatch that is
/// larger than all of that runs when the bucket is full, and leaves a debt.
#[derive(Default)]
pub struct Bucket {
    /// When it was looked at, and what was there. None: full.
    seen: Option<(Instant, f64)>,
}

/// There are not enough yet.
#[derive(Debug, PartialEq)]
pub struct Early {
    /// Until there are.
    pub wait: Duration,
    /// What the average would have been.
    pub per_second: u64,
}

impl Bucket {
    /// Spends `n` tokens at a rate of `limit` in a second, or says when it can.
    pub fn take(&mut self, n: u64, limit: u64, now: Instant) -> Result<(), Early> {
        let rate = limit as f64;
        let full = rate * BURST_SECONDS;
        let came = |(at, level): (Instant, f64)| {
            (level + rate * now.saturating_duration_since(at).as_secs_f64()).min(full)
        };
        let level = self.seen.map_or(full, came);
        let n = n as f64;
        let missing = n.min(full) - level;
        if missing <= 0.0 && limit > 0 {
            self.seen = Some((now, level - n));
            return Ok(());
        }
        self.seen = Some((now, level));
        // A limit of 0 is nothing at all, for ever.
        let seconds = if rate > 0.0 { missing / rate } else { 3600.0 };
        let per_second = ((full - level + n) / BURST_SECONDS).ceil() as u64;
        // Not a moment too early.
        Err(Early { wait: Duration::from_secs_f64(seconds) + Duration::from_millis(1), per_second })
    }

    /// Tokens that were spent for nothing.
    pub fn give_back(&mut self, n: u64) {
        if let Some((_, level)) = &mut self.seen {
            *level += n as f64;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_average_keeps_to_the_rate_and_a_pause_is_a_burst_of_seconds() {
        let (mut bucket, begun) = (Bucket::default(), Instant::now());
        let mut now = begun;
        let mut sent = 0;
        while now.duration_since(begun) < Duration::from_secs(100) {
            match bucket.take(70, 100, now) {
                Ok(()) => sent += 70,
                Err(early) => now += early.wait,
            }
        }
        // 100 seconds and the burst at the beginning.
        assert!((10_000..=10_470).contains(&sent), "{sent}");
        now += Duration::from_secs(1000);
        assert_eq!(bucket.take(400, 100, now), Ok(()));
        let early = bucket.take(100, 100, now).unwrap_err();
        assert_eq!(early.wait.as_millis(), 1001);
        assert_eq!(early.per_second, 125);
    }

    #[test]
    fn what_is_larger_than_the_bucket_runs_and_is_paid_for_afterwards() {
        let (mut bucket, now) = (Bucket::default(), Instant::now());
        assert_eq!(bucket.take(1000, 100, now), Ok(()));
        // 600 of debt, and one token.
        let early = bucket.take(1, 100, now).unwrap_err();
        assert_eq!(early.wait.as_millis(), 6011);
        bucket.give_back(1000);
        assert_eq!(bucket.take(1, 100, now), Ok(()));
    }

    #[test]
    fn another_rate_counts_from_the_next_look() {
        let (mut bucket, now) = (Bucket::default(), Instant::now());
        bucket.take(400, 100, now).unwrap();
        assert!(bucket.take(100, 100, now).is_err());
        let later = now + Duration::from_millis(100);
        assert_eq!(bucket.take(100, 1000, later), Ok(()));
        assert!(bucket.take(1, 0, later).unwrap_err().wait > Duration::from_secs(3000));
    }
}
