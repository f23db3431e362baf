//! HTTP for OTLP, by the client that the rest of the program has already.

use crate::TelemetryError;
use crate::background::Background;
use crate::otlp::{CERTIFICATE, Roots};
use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response};
use std::future::Future;
use std::pin::Pin;
use std::time::Duration;
use ureq::tls::{Certificate, RootCerts, TlsConfig};

/// A collector's answer is a few bytes.
const MAX_ANSWER_BYTES: u64 = 1 << 20;

/// Sends requests on the background's threads.
#[derive(Debug)]
pub struct Post {
    agent: ureq::Agent,
    background: Background,
}

impl Post {
    pub fn new(
        roots: Option<&Roots>,
        limit: Duration,
        background: Background,
    ) -> Result<Post, TelemetryError> {
        let mut config =
            ureq::Agent::config_builder().http_status_as_error(false).timeout_global(Some(limit));
        if let Some(Roots { path, pem }) = roots {
            let read = Certificate::from_pem(pem).map_err(|error| TelemetryError::Certificate {
                name: CERTIFICATE,
                path: path.clone(),
                cause: error.to_string(),
            })?;
            let roots = RootCerts::new_with_certs(&[read]);
            config = config.tls_config(TlsConfig::builder().root_certs(roots).build());
        }
        Ok(Post { agent: config.build().into(), background })
    }
}

type Sending<'a> = Pin<Box<dyn Future<Output = Result<Response<Bytes>, HttpError>> + Send + 'a>>;

impl HttpClient for Post {
    fn send_bytes<'life0, 'async_trait>(
        &'life0 self,
        request: Request<Bytes>,
    ) -> Sending<'async_trait>
    where
        'life0: 'async_trait,
        Self: 'async_trait,
    {
        let agent = self.agent.clone();
        let sending = self.background.handle().spawn_blocking(move || send(&agent, request));
        Box::pin(async move { sending.await? })
    }
}

fn send(agent: &ureq::Agent, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
    let answer = agent.run(request.map(|bytes| bytes.to_vec()))?;
    let (parts, mut body) = answer.into_parts();
    let bytes = body.with_config().limit(MAX_ANSWER_BYTES).read_to_vec()?;
    Ok(Response::from_parts(parts, bytes.into()))
}
