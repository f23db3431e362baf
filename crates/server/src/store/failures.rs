//! Failed writes in the server's log. Clients hear of them, too, but who can help reads the log.

use crate::error::Error;
use crate::session::SessionId;
use std::collections::HashMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Each kind is said at most so often.
const SAY_AGAIN: Duration = Duration::from_secs(60);

/// Those that were said, and how many since, by the error's label.
#[derive(Default)]
pub(super) struct Failures(Mutex<HashMap<&'static str, Said>>);

struct Said {
    at: Instant,
    since: u64,
}

impl Failures {
    /// Says it, unless its kind was said within the last minute. What is not the store's is not said.
    pub fn note(&self, session: SessionId, error: &Error) {
        let (path, n_bytes, advice) = match error {
            Error::DiskFull { path, n_bytes, .. } => (
                path,
                Some(*n_bytes),
                "no snapshot can be written until there is room on that disk",
            ),
            Error::StoreFile { path, .. } => (
                path,
                None,
                "look whether the disk is there, and the folder and its files writable for the server's user",
            ),
            Error::StoreRecords { path, .. } => (path, None, "the records cannot be written"),
            _ => return,
        };
        let kind = error.label();
        if let Some(unsaid) = self.count(kind, Instant::now()) {
            tracing::error!(
                kind, path = %path.display(), bytes = n_bytes, %session, %error, unsaid,
                "the store could not be written: {advice}; sessions go on, what is not in their last \
                 snapshots a crash would lose"
            );
        }
    }

    /// How many of its kind were not said since the last one that was; none, if this one is not either.
    fn count(&self, kind: &'static str, now: Instant) -> Option<u64> {
        // Counts stay whole even if another thread panicked.
        let mut kinds = self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        match kinds.get_mut(kind) {
            Some(said) if now.duration_since(said.at) < SAY_AGAIN => {
                said.since += 1;
                None
            }
            said => {
                let unsaid = said.map_or(0, |said| said.since);
                kinds.insert(kind, Said { at: now, since: 0 });
                Some(unsaid)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_is_said_once_a_minute_with_the_number_of_those_between() {
        let (failures, begin) = (Failures::default(), Instant::now());
        let at = |seconds| begin + Duration::from_secs(seconds);
        assert_eq!(failures.count("disk_full", at(0)), Some(0));
        assert_eq!(failures.count("disk_full", at(10)), None);
        assert_eq!(failures.count("store_file", at(10)), Some(0));
        assert_eq!(failures.count("disk_full", at(59)), None);
        assert_eq!(failures.count("disk_full", at(60)), Some(2));
        assert_eq!(failures.count("disk_full", at(61)), None);
        assert_eq!(failures.count("disk_full", at(200)), Some(1));
    }
}
