use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tonic::Code;

/// Refusals of one tenant that are answered at once, and how many more in each second.
const BURST: f64 = 200.0;
const PER_SECOND: f64 = 100.0;
/// No answer waits for longer.
const LONGEST: Duration = Duration::from_secs(5);

/// Answers to calls that are refused for what was asked wait for their turn when there are many, each
/// tenant's in a line of its own and one line for whoever has no token. Guessing and asking again
/// without a pause then take none of the machine from those who train, and the audit log grows no
/// faster than a disk can bear. Calls that are answered never wait.
#[derive(Default)]
pub struct Patience(Mutex<HashMap<Arc<str>, Line>>);

#[derive(Clone, Copy)]
struct Line {
    at: Instant,
    /// Refusals that are not paid for yet.
    n: f64,
}

impl Patience {
    /// Waits for the turn of one refusal with this code.
    pub async fn wait(&self, tenant: &str, code: Code) {
        if is_for_what_was_asked(code) {
            let wait = self.note(tenant, Instant::now());
            if !wait.is_zero() {
                tokio::time::sleep(wait).await;
            }
        }
    }

    fn note(&self, tenant: &str, now: Instant) -> Duration {
        let mut lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !lines.contains_key(tenant) {
            lines.insert(tenant.into(), Line { at: now, n: 0.0 });
        }
        let Some(line) = lines.get_mut(tenant) else { return Duration::ZERO };
        let paid = PER_SECOND * now.saturating_duration_since(line.at).as_secs_f64();
        *line = Line { at: now, n: (line.n - paid).max(0.0) + 1.0 };
        let over = (line.n - BURST).max(0.0);
        Duration::from_secs_f64(over / PER_SECOND).min(LONGEST)
    }
}

/// Not what the server has to answer for, such as a drain: who comes back then is welcome at once.
fn is_for_what_was_asked(code: Code) -> bool {
    match code {
        Code::InvalidArgument
        | Code::NotFound
        | Code::AlreadyExists
        | Code::PermissionDenied
        | Code::ResourceExhausted
        | Code::FailedPrecondition
        | Code::OutOfRange
        | Code::Unimplemented
        | Code::Unauthenticated => true,
        Code::Ok
        | Code::Cancelled
        | Code::Unknown
        | Code::DeadlineExceeded
        | Code::Aborted
        | Code::Internal
        | Code::Unavailable
        | Code::DataLoss => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_refusals_waits_and_another_tenants_refusal_does_not() {
        let (patience, begun) = (Patience::default(), Instant::now());
        let waits: Vec<_> = (0..400).map(|_| patience.note("blue", begun)).collect();
        assert!(waits[..200].iter().all(Duration::is_zero));
        assert_eq!(waits[299], Duration::from_secs(1));
        assert_eq!(waits[399], Duration::from_secs(2));
        assert_eq!(patience.note("red", begun), Duration::ZERO);
        // What is paid for by time is forgotten.
        let later = begun + Duration::from_secs(4);
        assert_eq!(patience.note("blue", later), Duration::ZERO);
        let many = (0..10_000).map(|_| patience.note("blue", later)).max();
        assert_eq!(many, Some(LONGEST));
    }
}
