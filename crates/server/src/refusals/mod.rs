//! Refusals on their way out. Each gets an id that its user can quote, a line in the log, a place in the
//! list of the last hour, and is counted. Every status and every `FrameError` of this server is made
//! here.

mod pace;
mod recent;

use crate::error::{Class, Error};
use crate::session::SessionId;
use offshoot_proto::v1;
use pace::{Pace, Urgency};
use recent::{Recent, Told};
use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// Names one refusal: what a user quotes, and what the log has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RequestId(u32);

impl RequestId {
    /// Short enough to be read out. Among those of an hour hardly any two are the same.
    fn draw() -> RequestId {
        RequestId(rand::random())
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08x}", self.0)
    }
}

/// A refusal as it is counted.
#[derive(Debug, Clone, Copy)]
pub struct Refused<'a> {
    /// Empty on an open server, and of who is not known.
    pub tenant: &'a str,
    /// [`Error::label`].
    pub label: &'static str,
}

/// Hears of every refusal.
pub type Counter = Box<dyn Fn(&Refused<'_>) + Send + Sync>;

/// See the module's text.
#[derive(Default)]
pub struct Refusals {
    counter: Option<Counter>,
    noted: Mutex<Noted>,
}

#[derive(Default)]
struct Noted {
    pace: Pace,
    recent: Recent,
}

impl fmt::Debug for Refusals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Refusals").finish_non_exhaustive()
    }
}

impl Refusals {
    /// `counter` hears of each.
    pub fn new(counter: Option<Counter>) -> Refusals {
        Refusals { counter, noted: Mutex::default() }
    }

    /// The status that this error is for its caller.
    pub fn status(&self, tenant: &str, session: Option<SessionId>, error: Error) -> tonic::Status {
        let id = self.note(tenant, session, &error);
        error.told_to(tenant).to_status(id)
    }

    /// The answer to a frame that is refused for this error.
    pub fn frame(
        &self,
        tenant: &str,
        session: Option<SessionId>,
        error: &Error,
        sequence: u64,
    ) -> v1::ServerFrame {
        let id = self.note(tenant, session, error);
        error.hidden_from(tenant).as_ref().unwrap_or(error).to_frame(sequence, id)
    }

    /// Notes a refusal and gives it its id. `tenant` is empty on an open server.
    pub fn note(&self, tenant: &str, session: Option<SessionId>, error: &Error) -> RequestId {
        let (id, label) = (RequestId::draw(), error.label());
        if let Some(counter) = &self.counter {
            counter(&Refused { tenant, label });
        }
        let hidden = error.hidden_from(tenant);
        let heard = hidden.as_ref().unwrap_or(error);
        let told = Told { id, label: heard.label(), message: heard.to_string() };
        let urgency = urgency(error);
        let logged = {
            let mut noted = self.lock();
            noted.recent.note((tenant, label), told, now_millis());
            noted.pace.next(tenant, label, urgency, Instant::now())
        };
        if let Some(not_logged) = logged {
            let session = session.map(|id| id.to_string()).unwrap_or_default();
            log(&Line { id, label, tenant, session: &session, not_logged, error });
        }
        id
    }

    /// What was refused in the last hour, the newest first: of this tenant, or everything.
    pub fn last_hour(&self, tenant: Option<&str>) -> Vec<v1::Refusal> {
        self.lock().recent.last_hour(tenant, now_millis())
    }

    fn lock(&self) -> MutexGuard<'_, Noted> {
        // Each use is whole even if another thread panicked.
        self.noted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What clients wait out by themselves is seen by nobody, so that nobody quotes it.
fn urgency(error: &Error) -> Urgency {
    match error.class() {
        Class::Sequence | Class::Unauthenticated => Urgency::Passing,
        _ if error.retry_after().is_some() => Urgency::Passing,
        _ => Urgency::Final,
    }
}

struct Line<'a> {
    id: RequestId,
    label: &'static str,
    tenant: &'a str,
    session: &'a str,
    /// Of this tenant, since the line before.
    not_logged: u64,
    error: &'a Error,
}

fn log(line: &Line<'_>) {
    let Line { id, label, tenant, session, not_logged, error } = *line;
    match error.class() {
        Class::Internal | Class::DataLoss => {
            tracing::warn!(request = %id, label, tenant, session, not_logged, "refused: {error}");
        }
        _ => {
            tracing::info!(request = %id, label, tenant, session, not_logged, "refused: {error}");
        }
    }
}

fn now_millis() -> u64 {
    // Before 1970 nothing was refused.
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};
    use tonic_types::StatusExt;

    #[test]
    fn a_status_and_a_frame_carry_the_id_that_the_list_has() {
        let counted = Arc::new(AtomicU64::new(0));
        let own = counted.clone();
        let refusals = Refusals::new(Some(Box::new(move |refused| {
            assert_eq!((refused.tenant, refused.label), ("blue", "queue_full"));
            own.fetch_add(1, Ordering::Relaxed);
        })));
        let full = || Error::QueueFull { limit: 1234 };
        let status = refusals.status("blue", None, full());
        let id = status.get_details_request_info().unwrap().request_id;
        assert_eq!(id.len(), 8, "{id}");
        assert_eq!(refusals.last_hour(None)[0].request_id, id);
        // With its time to try again, as before.
        assert!(status.get_details_retry_info().unwrap().retry_delay.is_some());

        let session = Some(SessionId::new());
        let frame = refusals.frame("blue", session, &full(), 7);
        let Some(v1::server_frame::Body::Error(error)) = frame.body else { panic!("an error") };
        assert_eq!(refusals.last_hour(Some("blue"))[0].request_id, error.request_id);
        assert_ne!(error.request_id, id);
        assert_eq!(counted.load(Ordering::Relaxed), 2);
        // The tenant hears no total, and the operator learns what it was.
        let of_tenant = &refusals.last_hour(Some("blue"))[0];
        assert!(!of_tenant.message.contains("1234"), "{}", of_tenant.message);
        assert_eq!((of_tenant.label.as_str(), of_tenant.count), ("full", 2));
        assert_eq!(refusals.last_hour(None)[0].label, "queue_full");
        assert!(refusals.last_hour(Some("red")).is_empty());
    }

    #[test]
    fn ids_differ() {
        let ids: BTreeSet<String> = (0..100).map(|_| RequestId::draw().to_string()).collect();
        assert!(ids.len() > 98, "{}", ids.len());
    }
}
