use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// The log tells of refused calls at most so often.
const PAUSE: Duration = Duration::from_secs(60);

/// Somebody who was not let in.
#[derive(Debug, Clone, Default)]
pub(crate) struct Stranger {
    pub peer: Option<SocketAddr>,
    /// Whose token it was, where its hash is one that is, or was, in the tenants file: it has expired or
    /// was revoked.
    pub tenant: Option<String>,
    /// The id in what was sent, if that has a token's form. Without `tenant` only a claim.
    pub token: Option<String>,
}

/// Refused calls since the log told of some. Pure.
#[derive(Default)]
pub(super) struct Pending {
    n_calls: u64,
    last: Option<Stranger>,
    told: Option<Instant>,
}

/// What the log is to tell.
#[derive(Debug)]
pub(super) struct Told {
    n_calls: u64,
    /// One of them, rather one whose token is known.
    stranger: Stranger,
}

impl Pending {
    pub fn note(&mut self, stranger: &Stranger) {
        self.n_calls += 1;
        let known = |last: &Stranger| last.tenant.is_some();
        if stranger.tenant.is_some() || !self.last.as_ref().is_some_and(known) {
            self.last = Some(stranger.clone());
        }
    }

    /// What there is to tell now, if it is time.
    pub fn take(&mut self, now: Instant) -> Option<Told> {
        if self.told.is_some_and(|told| now.duration_since(told) < PAUSE) {
            return None;
        }
        let stranger = self.last.take()?;
        self.told = Some(now);
        Some(Told { n_calls: std::mem::take(&mut self.n_calls), stranger })
    }
}

impl Told {
    /// Never what was sent: it may be somebody's token with a slip of the pen.
    pub fn log(&self) {
        let Stranger { peer, tenant, token } = &self.stranger;
        let peer = peer.map(|peer| peer.to_string()).unwrap_or_default();
        let n_calls = self.n_calls;
        match (tenant, token) {
            (Some(tenant), Some(token)) => tracing::warn!(
                n_calls,
                peer,
                tenant,
                token,
                "calls were refused; the last known token has expired or was revoked"
            ),
            _ => tracing::warn!(n_calls, peer, "calls without a known token were refused"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_a_line_a_minute_and_a_known_token_is_not_hidden_in_it() {
        let (mut pending, begin) = (Pending::default(), Instant::now());
        assert!(pending.take(begin).is_none());
        let (nobody, blue) =
            (Stranger::default(), Stranger { tenant: Some("blue".into()), ..Stranger::default() });
        pending.note(&nobody);
        assert_eq!(pending.take(begin).unwrap().n_calls, 1);
        for stranger in [&nobody, &blue, &nobody] {
            pending.note(stranger);
            assert!(pending.take(begin + PAUSE / 2).is_none());
        }
        let told = pending.take(begin + PAUSE).unwrap();
        assert_eq!((told.n_calls, told.stranger.tenant.as_deref()), (3, Some("blue")));
        assert!(pending.take(begin + PAUSE * 3).is_none());
    }
}
