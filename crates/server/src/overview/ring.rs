//! The last hour in samples, of the whole server and of each tenant that did something. Pure.

use offshoot_proto::v1;
use std::collections::VecDeque;
use std::sync::Arc;

/// What one tenant did between two samples.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Done {
    pub tokens_per_second: f64,
    pub steps_per_second: f64,
}

/// One moment.
#[derive(Debug)]
pub(super) struct Tick {
    /// Of the whole server.
    pub all: v1::Sample,
    /// Tenants that did nothing are left out.
    pub tenants: Vec<(Arc<str>, Done)>,
}

/// See the module's text.
#[derive(Debug)]
pub(super) struct Ring {
    ticks: VecDeque<Tick>,
    most: usize,
}

impl Ring {
    /// Of so many moments.
    pub fn new(most: usize) -> Ring {
        Ring { ticks: VecDeque::with_capacity(most), most }
    }

    /// The oldest one makes room.
    pub fn push(&mut self, tick: Tick) {
        if self.ticks.len() == self.most {
            self.ticks.pop_front();
        }
        self.ticks.push_back(tick);
    }

    /// After this moment, the oldest first: of everybody, or what is a tenant's own.
    pub fn since(&self, millis: u64, tenant: Option<&str>) -> Vec<v1::Sample> {
        let after = self.ticks.iter().filter(|tick| tick.all.at_millis > millis);
        let shown = |tick: &Tick| match tenant {
            None => tick.all,
            Some(name) => tick.of(name),
        };
        after.map(shown).collect()
    }
}

impl Tick {
    fn of(&self, name: &str) -> v1::Sample {
        let own = self.tenants.iter().find(|(tenant, _)| **tenant == *name);
        let Done { tokens_per_second, steps_per_second } = own.map(|(_, d)| *d).unwrap_or_default();
        let at_millis = self.all.at_millis;
        v1::Sample { at_millis, tokens_per_second, steps_per_second, ..Default::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tick(at_millis: u64, blue: f64) -> Tick {
        let all = v1::Sample {
            at_millis,
            tokens_per_second: 10.0 * blue,
            queued_jobs: 7,
            adapter_bytes: 99,
            ..Default::default()
        };
        let done = Done { tokens_per_second: blue, steps_per_second: 0.5 };
        Tick { all, tenants: vec![("blue".into(), done)] }
    }

    #[test]
    fn the_ring_holds_the_newest_and_a_tenant_sees_its_own_only() {
        let mut ring = Ring::new(3);
        for at in 1..=5 {
            ring.push(tick(at, at as f64));
        }
        let at = |samples: Vec<v1::Sample>| samples.iter().map(|s| s.at_millis).collect::<Vec<_>>();
        assert_eq!(at(ring.since(0, None)), [3, 4, 5]);
        assert_eq!(at(ring.since(4, None)), [5]);
        assert_eq!(ring.since(4, None)[0].queued_jobs, 7);
        let own = ring.since(4, Some("blue"))[0];
        let expected = v1::Sample {
            at_millis: 5,
            tokens_per_second: 5.0,
            steps_per_second: 0.5,
            ..Default::default()
        };
        assert_eq!(own, expected);
        let other = ring.since(4, Some("red"))[0];
        assert_eq!(other, v1::Sample { at_millis: 5, ..Default::default() });
        assert!(ring.since(5, None).is_empty());
    }
}
