//! Calls with one answer: made again while the server is away or too full, and what is said when none
//! comes.

use super::{CONTROL_BYTES, Client, Rpc, Shared};
use crate::options::Retry;
use crate::outage::{Outage, SILENCE};
use crate::pulse::{Pulse, Sign};
use crate::{ClientError, status, tls_failure, trace};
use tonic::{Code, Status};
use tracing::Instrument;

/// How a unary call is made.
pub(super) struct Call {
    pub(super) name: &'static str,
    pub(super) repeat: Repeat,
    pub(super) retry: Retry,
    pub(super) answer_bytes: usize,
    /// Whether a server that has no room for this now is waited for.
    pub(super) waits_for_room: bool,
    /// The first one to this address: what is wrong with the address is wrong for good.
    pub(super) first: bool,
}

/// Whether a call may be repeated when it is unknown how far the first one came.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Repeat {
    Harmless,
    /// Only if the first call certainly did nothing.
    OnlyUnsent,
}

impl Client {
    pub(super) fn call(&self, name: &'static str) -> Call {
        let retry = self.shared.options.retry;
        let (repeat, answer_bytes) = (Repeat::Harmless, CONTROL_BYTES);
        Call { name, repeat, retry, answer_bytes, waits_for_room: true, first: false }
    }

    /// Makes a unary call, again with backoff while the server is away.
    pub(super) async fn unary<Q: Clone, A, F>(
        &self,
        call: Call,
        request: Q,
        ask: impl Fn(Rpc, tonic::Request<Q>) -> F,
    ) -> Result<A, ClientError>
    where
        F: Future<Output = Result<tonic::Response<A>, Status>>,
    {
        let rpc = self.rpc(call.answer_bytes);
        self.unary_of(call, request, |request| ask(rpc.clone(), request)).await
    }

    /// The same for a call of any service.
    pub(super) async fn unary_of<Q: Clone, A, F>(
        &self,
        call: Call,
        request: Q,
        ask: impl Fn(tonic::Request<Q>) -> F,
    ) -> Result<A, ClientError>
    where
        F: Future<Output = Result<tonic::Response<A>, Status>>,
    {
        let span = trace::call(call.name);
        self.repeat(call, request, ask).instrument(span).await
    }

    async fn repeat<Q: Clone, A, F>(
        &self,
        call: Call,
        request: Q,
        ask: impl Fn(tonic::Request<Q>) -> F,
    ) -> Result<A, ClientError>
    where
        F: Future<Output = Result<tonic::Response<A>, Status>>,
    {
        let Call { name, repeat, retry, answer_bytes: _, waits_for_room, first } = call;
        let mut outage = Outage::new(retry);
        let mut cause = String::new();
        let mut refused = None;
        while outage.attempt().await {
            let sent = self.token();
            let asked = ask(self.request(request.clone()));
            let status = match self.watched(asked, retry, &mut outage).await {
                Some(Ok(response)) => {
                    if !first {
                        outage.over(self);
                    }
                    return Ok(response.into_inner());
                }
                Some(Err(status)) => status,
                None => return Err(outage.unreachable(self, SILENCE.to_string())),
            };
            if first {
                self.explain_failure(&status).await?;
            }
            let pushback = status::pushback(&status);
            outage.wait_at_least(pushback.unwrap_or_default());
            if status::is_soon(&status) {
                outage.soon();
            }
            let waits = waits_for_room || status.code() != Code::ResourceExhausted;
            let undone = status::is_unsent(&status) || pushback.is_some();
            let passing = status::is_transport(&status) || status.code() == Code::Unavailable;
            if status.code() == Code::Unauthenticated && self.renews_token(sent.as_ref()) {
                continue;
            }
            if !(waits && undone || passing && repeat == Repeat::Harmless) {
                return Err(self.refused(name, &status));
            }
            cause = self.cause(&status);
            tracing::debug!(call = name, cause, "no answer, will try again");
            match passing {
                true => outage.failed(self, &cause),
                false => outage.put_off(self, &cause),
            }
            refused = (!status::is_transport(&status)).then_some(status);
        }
        // A server that says no to the end can be reached.
        if let Some(status) = refused {
            return Err(self.refused(name, &status));
        }
        let Shared { endpoint, options, uri, .. } = &*self.shared;
        if first && let Some(problem) = tls_failure::explain_closed(uri, &cause, options) {
            return Err(ClientError::Tls { endpoint: endpoint.clone(), problem });
        }
        Err(outage.unreachable(self, cause))
    }

    /// Waits for an answer for as long as the server gives signs of life. None: it was silent for too
    /// long.
    async fn watched<A>(
        &self,
        asked: impl Future<Output = A>,
        retry: Retry,
        outage: &mut Outage,
    ) -> Option<A> {
        let mut asked = std::pin::pin!(asked);
        let mut pulse = Pulse::new(self, retry.max_elapsed);
        pulse.set_waits(true);
        loop {
            tokio::select! {
                biased;
                answer = &mut asked => return Some(answer),
                sign = pulse.next() => match sign {
                    Sign::Silent => {
                        outage.began(pulse.last());
                        outage.silent(self);
                    }
                    Sign::Alive => outage.over(self),
                    Sign::TooLong => return None,
                },
            }
        }
    }

    /// What the server said no with.
    fn refused(&self, call: &'static str, status: &Status) -> ClientError {
        match status.code() {
            Code::Unauthenticated => {
                self.unauthenticated(status.message(), status::request_id(status))
            }
            _ => ClientError::refused(call, status),
        }
    }

    pub(crate) fn unauthenticated(
        &self,
        message: &str,
        request_id: Option<Box<str>>,
    ) -> ClientError {
        ClientError::Unauthenticated {
            endpoint: self.shared.endpoint.clone(),
            message: message.to_string(),
            token_sent: self.token().is_some(),
            request_id,
        }
    }

    /// Why there was no answer, for people.
    pub(crate) fn cause(&self, status: &Status) -> String {
        tls_failure::explain(status, &self.shared.options).unwrap_or_else(|| status::text(status))
    }

    /// An error if trying again cannot help, because one side speaks TLS in a way that the other does
    /// not, or not at all.
    async fn explain_failure(&self, status: &Status) -> Result<(), ClientError> {
        let Shared { endpoint, options, uri, .. } = &*self.shared;
        let problem = if uri.scheme_str() == Some("https") {
            tls_failure::explain(status, options)
        } else if status::is_transport(status)
            && !status::is_unsent(status)
            && tls_failure::speaks_tls(uri, options.connect_timeout).await
        {
            Some("it speaks TLS, and this client does not; use https:// (and --tls-ca for a CA of your own)".into())
        } else {
            None
        };
        match problem {
            Some(problem) => Err(ClientError::Tls { endpoint: endpoint.clone(), problem }),
            None => Ok(()),
        }
    }
}
