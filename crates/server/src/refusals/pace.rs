//! How often refusals are logged, so that a flood of them cannot fill a disk. Pure.

use std::collections::HashMap;
use std::time::{Duration, Instant};

/// Final ones of a tenant that are logged one after the other.
const BURST: f64 = 50.0;
/// After them one in so long.
const FINAL_PAUSE: Duration = Duration::from_secs(5);
/// Passing ones of one kind are logged once in so long.
const PASSING_PAUSE: Duration = Duration::from_secs(60);
/// Tenants that are remembered. Those that were removed go when there are more.
const MAX_TENANTS: usize = 4096;

/// Whether a user may ask about a refusal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Urgency {
    /// The client gives up, and its user reads it.
    Final,
    /// The client tries again by itself.
    Passing,
}

/// What was logged lately.
#[derive(Debug, Default)]
pub struct Pace(HashMap<String, OfTenant>);

#[derive(Debug)]
struct OfTenant {
    /// Lines that may be written at once.
    left: f64,
    since: Instant,
    /// When a passing one of this label was logged last.
    passing: HashMap<&'static str, Instant>,
    not_logged: u64,
}

impl Pace {
    /// Whether this one is logged; then how many of its tenant were not since the last that was.
    pub fn next(
        &mut self,
        tenant: &str,
        label: &'static str,
        urgency: Urgency,
        now: Instant,
    ) -> Option<u64> {
        if self.0.len() >= MAX_TENANTS && !self.0.contains_key(tenant) {
            self.0.clear();
        }
        let fresh = || OfTenant { left: BURST, since: now, passing: HashMap::new(), not_logged: 0 };
        // No name is copied for a tenant that is known.
        if !self.0.contains_key(tenant) {
            self.0.insert(tenant.to_string(), fresh());
        }
        let of = self.0.get_mut(tenant)?;
        let is_logged = match urgency {
            Urgency::Passing => of.passes(label, now),
            Urgency::Final => of.takes(now),
        };
        match is_logged {
            true => Some(std::mem::take(&mut of.not_logged)),
            false => {
                of.not_logged += 1;
                None
            }
        }
    }
}

impl OfTenant {
    fn passes(&mut self, label: &'static str, now: Instant) -> bool {
        let last = self.passing.get(label);
        let is_due = last.is_none_or(|last| now.duration_since(*last) >= PASSING_PAUSE);
        if is_due {
            self.passing.insert(label, now);
        }
        is_due
    }

    fn takes(&mut self, now: Instant) -> bool {
        let passed = now.duration_since(self.since).as_secs_f64();
        self.since = now;
        self.left = (self.left + passed / FINAL_PAUSE.as_secs_f64()).min(BURST);
        let may = self.left >= 1.0;
        if may {
            self.left -= 1.0;
        }
        may
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_a_line_now_and_then_and_hides_no_other_tenants_refusals() {
        let (mut pace, begin) = (Pace::default(), Instant::now());
        let mut flood = |seconds: u64| {
            let now = begin + Duration::from_secs(seconds);
            (0..1000).filter_map(|_| pace.next("blue", "shape", Urgency::Final, now)).collect()
        };
        let at_once: Vec<u64> = flood(0);
        assert_eq!(at_once, [0; 50]);
        // The line tells how many there were.
        let later: Vec<u64> = flood(5);
        assert_eq!(later, [950]);
        let n_lines: usize = (6..3606).map(|second| flood(second).len()).sum();
        assert_eq!(n_lines, 720);
        assert_eq!(pace.next("red", "shape", Urgency::Final, begin), Some(0));
    }

    #[test]
    fn what_clients_wait_out_is_logged_once_a_minute_for_each_kind() {
        let (mut pace, begin) = (Pace::default(), Instant::now());
        let mut next = |label, seconds| {
            pace.next("", label, Urgency::Passing, begin + Duration::from_secs(seconds))
        };
        assert_eq!(next("no_room", 0), Some(0));
        assert_eq!(next("no_room", 59), None);
        assert_eq!(next("draining", 59), Some(1));
        assert_eq!(next("no_room", 60), Some(0));
    }
}
