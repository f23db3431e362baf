//! What the page shows and does, as JSON: the messages of `operations.proto` with the names of their
//! fields, enums in lower case.

use super::refusal::Refusal;
use super::serve::Shown;
use crate::access::Caller;
use crate::error::Error;
use crate::session::SessionId;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Path, Query, State as Has};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use http::{StatusCode, header};
use serde::{Deserialize, Serialize};

const JSON: [(header::HeaderName, &str); 1] = [(header::CONTENT_TYPE, "application/json")];
/// Prometheus' text format.
const TEXT: [(header::HeaderName, &str); 1] =
    [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")];

type Answer = Result<Response, Refusal>;

#[derive(Deserialize)]
pub struct Since {
    /// Samples after this moment only, in Unix milliseconds.
    #[serde(default)]
    since: u64,
}

pub async fn overview(
    Has(shown): Has<Shown>,
    Extension(caller): Extension<Caller>,
    since: Result<Query<Since>, QueryRejection>,
) -> Answer {
    let Query(Since { since }) = since.map_err(|error| {
        Refusal::of_request(StatusCode::BAD_REQUEST, "query", error.body_text())
    })?;
    // Many sessions are some milliseconds of work, which is not for the threads that serve frames.
    let _look = shown.looks.clone().acquire_owned().await.map_err(|_| gone())?;
    let made = move || serde_json::to_vec(&shown.operations.overview(&caller, since));
    let json = tokio::task::spawn_blocking(made).await.map_err(|_| gone())?.map_err(|_| gone())?;
    Ok((JSON, json).into_response())
}

pub async fn metrics(Has(shown): Has<Shown>) -> Response {
    (TEXT, shown.metrics.page()).into_response()
}

pub async fn tenants(Has(shown): Has<Shown>, Extension(caller): Extension<Caller>) -> Answer {
    Ok(Json(shown.operations.tenants(&caller)).into_response())
}

pub async fn snapshots(
    Has(shown): Has<Shown>,
    Extension(caller): Extension<Caller>,
    Path(session): Path<String>,
) -> Answer {
    let answer = shown.operations.snapshots(&caller, &session).await;
    told(&shown, &caller, &session, answer)
}

pub async fn evict(
    Has(shown): Has<Shown>,
    Extension(caller): Extension<Caller>,
    Path(session): Path<String>,
) -> Answer {
    let answer = shown.operations.evict(&caller, &session).await;
    told(&shown, &caller, &session, answer)
}

pub async fn pin(
    Has(shown): Has<Shown>,
    Extension(caller): Extension<Caller>,
    Path(session): Path<String>,
) -> Answer {
    let answer = shown.operations.pin(&caller, &session, true).await;
    told(&shown, &caller, &session, answer)
}

pub async fn unpin(
    Has(shown): Has<Shown>,
    Extension(caller): Extension<Caller>,
    Path(session): Path<String>,
) -> Answer {
    let answer = shown.operations.pin(&caller, &session, false).await;
    told(&shown, &caller, &session, answer)
}

pub async fn delete_session(
    Has(shown): Has<Shown>,
    Extension(caller): Extension<Caller>,
    Path(session): Path<String>,
) -> Answer {
    let answer = shown.operations.delete_session(&caller, &session).await;
    told(&shown, &caller, &session, answer)
}

pub async fn delete_snapshot(
    Has(shown): Has<Shown>,
    Extension(caller): Extension<Caller>,
    Path((session, snapshot)): Path<(String, String)>,
) -> Answer {
    let answer = shown.operations.delete_snapshot(&caller, &session, &snapshot).await;
    told(&shown, &caller, &session, answer)
}

fn told<T: Serialize>(
    shown: &Shown,
    caller: &Caller,
    session: &str,
    answer: Result<T, Error>,
) -> Answer {
    match answer {
        Ok(message) => Ok(Json(message).into_response()),
        Err(error) => {
            let (tenant, session) = (&caller.tenant.name, SessionId::parse(session));
            Err(Refusal::noted(&shown.keeper.refusals, tenant, session, error))
        }
    }
}

fn gone() -> Refusal {
    let message = "the answer could not be made; look at the server's log";
    Refusal::of_request(StatusCode::INTERNAL_SERVER_ERROR, "gone", message)
}
