//! Before and behind every handler: who asks, from where, and what a browser may do with the answer.

use super::refusal::Refusal;
use super::serve::Shown;
use axum::extract::{Request, State as Has};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{StatusCode, Uri};
use std::net::IpAddr;
use std::time::Duration;

/// Without a token, whoever acts must send it: a page of another origin may not.
const ACTS: HeaderName = HeaderName::from_static("x-offshoot");
/// For one request. What was begun is carried to its end all the same.
const DEADLINE: Duration = Duration::from_secs(30);

/// What a browser must not do, whatever the page's texts say. Nothing is loaded from elsewhere, no
/// text becomes markup, no other page frames this one.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; \
                      connect-src 'self'; base-uri 'none'; form-action 'none'; \
                      frame-ancestors 'none'; require-trusted-types-for 'script'; \
                      trusted-types 'none'";

const FIXED: [(HeaderName, HeaderValue); 6] = [
    (header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY)),
    (header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
    (header::X_FRAME_OPTIONS, HeaderValue::from_static("DENY")),
    (header::REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
    (
        HeaderName::from_static("cross-origin-opener-policy"),
        HeaderValue::from_static("same-origin"),
    ),
    (
        HeaderName::from_static("cross-origin-resource-policy"),
        HeaderValue::from_static("same-origin"),
    ),
];

/// Around everything.
pub async fn harden(request: Request, next: Next) -> Response {
    let answer = tokio::time::timeout(DEADLINE, next.run(request)).await;
    let mut response = answer.unwrap_or_else(|_| {
        let message = format!(
            "no answer within {} s; what was asked for may still be done, look again",
            DEADLINE.as_secs()
        );
        Refusal::of_request(StatusCode::GATEWAY_TIMEOUT, "deadline", message).into_response()
    });
    let headers = response.headers_mut();
    headers.extend(FIXED);
    headers.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    response
}

/// An open server on loopback answers to loopback's names only: another name that leads here is
/// somebody else's page in the browser of a person at this machine.
pub async fn check_name(
    Has(shown): Has<Shown>,
    request: Request,
    next: Next,
) -> Result<Response, Refusal> {
    if shown.is_local && shown.keeper.access.is_open() {
        let name = name(request.uri(), request.headers());
        if !name.is_none_or(is_own_name) {
            return Err(Refusal::of_request(
                StatusCode::MISDIRECTED_REQUEST,
                "host",
                "this server is open and listens on loopback: ask it by 127.0.0.1 or localhost, or \
                 give it a tenants file",
            ));
        }
    }
    Ok(next.run(request).await)
}

/// The host that was asked for, without its port.
fn name<'a>(uri: &'a Uri, headers: &'a HeaderMap) -> Option<&'a str> {
    let sent = headers.get(header::HOST).map(|host| host.to_str().unwrap_or("?"));
    let host = uri.authority().map(|authority| authority.as_str()).or(sent)?;
    Some(match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    })
}

fn is_own_name(name: &str) -> bool {
    let bare = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
    name.eq_ignore_ascii_case("localhost") || bare.parse::<IpAddr>().is_ok()
}

/// Lets callers in, who then stand in the request's extensions.
pub async fn admit(
    Has(shown): Has<Shown>,
    mut request: Request,
    next: Next,
) -> Result<Response, Refusal> {
    let caller = shown.caller(&request)?;
    let acts = !request.method().is_safe();
    if acts && shown.keeper.access.is_open() && !request.headers().contains_key(ACTS) {
        return Err(Refusal::of_request(
            StatusCode::FORBIDDEN,
            "no_header",
            "on an open server an action needs the header \"x-offshoot: 1\", which another \
             origin's page cannot send",
        ));
    }
    request.extensions_mut().insert(caller);
    Ok(next.run(request).await)
}

/// Metrics name tenants: they are for operators, unless everybody who reaches the port may see them.
pub async fn admit_scraper(
    Has(shown): Has<Shown>,
    request: Request,
    next: Next,
) -> Result<Response, Refusal> {
    if !shown.open_metrics {
        let caller = shown.caller(&request)?;
        if !caller.is_operator() {
            return Err(Refusal::of_request(
                StatusCode::FORBIDDEN,
                "not_operator",
                "metrics are of all tenants: they need the token of a tenant with operator = true, \
                 or http.open_metrics = true on the server",
            ));
        }
    }
    Ok(next.run(request).await)
}

/// A handler that failed is that request's answer; its connection goes on.
pub fn panicked(_: Box<dyn std::any::Any + Send>) -> Response {
    tracing::error!("a request by HTTP panicked");
    let message = "the request failed inside the server; look at its log";
    Refusal::of_request(StatusCode::INTERNAL_SERVER_ERROR, "panic", message).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_loopbacks_names_are_a_local_servers_own() {
        let own = |host: &str, uri: &str| {
            let headers = HeaderMap::from_iter([(header::HOST, host.parse().unwrap())]);
            name(&uri.parse().unwrap(), &headers).is_none_or(is_own_name)
        };
        for host in
            ["127.0.0.1:9464", "localhost", "LOCALHOST:1", "[::1]:9464", "[::1]", "10.0.0.9"]
        {
            assert!(own(host, "/"), "{host}");
        }
        for host in ["rebound.example:9464", "localhost.example", "127.0.0.1.example:80", "", "a:b"]
        {
            assert!(!own(host, "/"), "{host}");
        }
        assert!(!own("127.0.0.1", "http://rebound.example/"));
        assert!(name(&"/".parse().unwrap(), &HeaderMap::new()).is_none_or(is_own_name));
    }
}
