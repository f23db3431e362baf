//! A unary call on its way: who makes it, that it runs to its end, and what the audit log and the
//! caller hear of it.

use crate::access::{Action, Audit, Caller, Subject};
use crate::error::Error;
use crate::session::SessionId;
use tonic::Extensions;
use tracing::{Instrument, Span};

/// Who makes a call. The gate put it there; without a gate nobody gets in.
pub(crate) fn caller(extensions: &Extensions) -> Result<Caller, Error> {
    extensions.get().cloned().ok_or(Error::Unauthenticated)
}

/// What somebody wants done.
pub(crate) struct Deed {
    pub caller: Caller,
    pub audit: Audit,
    pub action: Action,
    pub subject: Subject,
}

impl Subject {
    /// A session as a caller names it; what is no id is not written down.
    pub(crate) fn named(session: &str) -> Subject {
        let session = SessionId::parse(session).map(|id| id.to_string());
        Subject { session, ..Subject::default() }
    }
}

impl Deed {
    /// Does it, even if the caller hangs up: nothing is left half done, and nothing unnoted.
    /// `complete` adds what only the outcome tells.
    pub(crate) async fn run<T: Send + 'static>(
        self,
        call: impl Future<Output = Result<T, Error>> + Send + 'static,
        complete: impl FnOnce(&T, &mut Subject) + Send + 'static,
    ) -> Result<T, Error> {
        let Deed { caller, audit, action, mut subject } = self;
        let run = async move {
            let result = call.await;
            if let Ok(done) = &result {
                complete(done, &mut subject);
            }
            audit.did(&caller, action, subject, &result);
            result
        };
        let gone = |_| Error::Gone { part: "call" };
        tokio::spawn(run.instrument(Span::current())).await.map_err(gone).flatten()
    }
}
