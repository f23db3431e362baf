//! How fast a session goes, from what it had used at some moments of the last minute. Pure.

use std::collections::VecDeque;
use std::time::Duration;

/// Tokens are counted over this.
const TOKENS_OVER: Duration = Duration::from_secs(10);
/// The device's time and waits are counted over this.
const SHARE_OVER: Duration = Duration::from_secs(60);
/// Over less than this a rate says nothing.
const LEAST: Duration = Duration::from_millis(500);

/// What a session had used at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Point {
    /// On a clock that only goes forward.
    pub at: Duration,
    pub tokens: u64,
    pub steps: u64,
    pub device_seconds: f64,
    pub n_waits: u64,
    pub waited: Duration,
}

/// How fast it goes.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Rates {
    pub tokens_per_second: f64,
    /// Of the device's time, in [0, 1].
    pub device_share: f64,
    /// Of each frame, on average.
    pub queue_seconds: f64,
}

/// The points of the last minute, the oldest first, and one before.
#[derive(Debug, Default)]
pub(super) struct Points(VecDeque<Point>);

impl Points {
    /// The newest one.
    pub fn last(&self) -> Option<&Point> {
        self.0.back()
    }

    /// Adds one, and lets go of what is not needed any more.
    pub fn push(&mut self, point: Point) {
        while self.0.get(1).is_some_and(|second| point.at.saturating_sub(second.at) >= SHARE_OVER) {
            self.0.pop_front();
        }
        self.0.push_back(point);
    }

    /// The rates up to `now`.
    pub fn rates(&self, now: &Point) -> Rates {
        let mut rates = Rates::default();
        if let Some((before, seconds)) = self.before(now, TOKENS_OVER) {
            rates.tokens_per_second = now.tokens.saturating_sub(before.tokens) as f64 / seconds;
        }
        if let Some((before, seconds)) = self.before(now, SHARE_OVER) {
            let ran = (now.device_seconds - before.device_seconds).max(0.0);
            // A batch counts as a whole when it ends.
            rates.device_share = (ran / seconds).min(1.0);
            let n_waits = now.n_waits.saturating_sub(before.n_waits);
            let waited = now.waited.saturating_sub(before.waited).as_secs_f64();
            rates.queue_seconds = if n_waits == 0 { 0.0 } else { waited / n_waits as f64 };
        }
        rates
    }

    /// The newest point that is so long ago, or else the oldest one, and the seconds since.
    fn before(&self, now: &Point, over: Duration) -> Option<(&Point, f64)> {
        let ago = |point: &&Point| now.at.saturating_sub(point.at) >= over;
        let found = self.0.iter().rev().find(ago).or_else(|| self.0.front())?;
        let since = now.at.saturating_sub(found.at);
        (since >= LEAST).then_some((found, since.as_secs_f64()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 100 tokens, a quarter of the device and two waits of 5 ms in each second.
    fn at(seconds: f64) -> Point {
        let n = seconds as u64;
        Point {
            at: Duration::from_secs_f64(seconds),
            tokens: 100 * n,
            steps: n,
            device_seconds: 0.25 * seconds,
            n_waits: 2 * n,
            waited: Duration::from_millis(10 * n),
        }
    }

    #[test]
    fn rates_are_of_the_last_seconds_and_of_the_last_minute() {
        let mut points = Points::default();
        assert_eq!(points.rates(&at(5.0)), Rates::default());
        for n in 0..100 {
            points.push(at(5.0 * f64::from(n)));
            assert!(points.0.len() <= 14, "{}", points.0.len());
        }
        let busy = Rates { tokens_per_second: 100.0, device_share: 0.25, queue_seconds: 0.005 };
        assert_eq!(points.rates(&at(496.0)), busy);
        // Then it does nothing more: its tokens are soon forgotten, its share of the minute is not.
        let still = |seconds| Point { at: Duration::from_secs(seconds), ..at(495.0) };
        points.push(still(500));
        points.push(still(505));
        points.push(still(510));
        let rates = points.rates(&still(515));
        assert_eq!(rates.tokens_per_second, 0.0);
        assert!(rates.device_share > 0.1 && rates.queue_seconds > 0.004, "{rates:?}");
        for n in 104..120 {
            points.push(still(5 * n));
        }
        assert_eq!(points.rates(&still(600)), Rates::default());
    }

    #[test]
    fn a_moment_is_too_short_for_a_rate() {
        let mut points = Points::default();
        points.push(at(10.0));
        assert_eq!(points.rates(&at(10.2)), Rates::default());
        assert_eq!(points.rates(&at(12.0)).tokens_per_second, 100.0);
        // Counters that began anew are no negative rates.
        assert_eq!(
            points.rates(&Point { at: Duration::from_secs(20), ..at(0.0) }),
            Rates::default()
        );
    }
}
