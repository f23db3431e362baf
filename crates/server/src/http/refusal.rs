use crate::error::{Class, Error};
use crate::refusals::Refusals;
use crate::session::SessionId;
use axum::Json;
use axum::response::{IntoResponse, Response};
use http::{HeaderValue, StatusCode, header};
use serde::Serialize;

/// Why a request is not answered with what it asked for.
pub struct Refusal {
    pub status: StatusCode,
    pub told: Told,
}

/// What a client is told.
#[derive(Serialize)]
pub struct Told {
    /// The error's label, as in metrics.
    pub label: &'static str,
    pub message: String,
    /// 0: trying again will not help.
    pub retry_after_millis: u64,
    /// What to quote to the operator; empty if nothing is in the server's log.
    pub request_id: String,
}

impl Refusal {
    /// Of the request itself, before anybody looked at what it asks for.
    pub fn of_request(status: StatusCode, label: &'static str, message: impl Into<String>) -> Self {
        let (message, request_id) = (message.into(), String::new());
        Refusal { status, told: Told { label, message, retry_after_millis: 0, request_id } }
    }
}

impl Refusal {
    /// Of this error, which is noted, as its caller may know it.
    pub fn noted(
        refusals: &Refusals,
        tenant: &str,
        session: Option<SessionId>,
        error: Error,
    ) -> Self {
        let request_id = refusals.note(tenant, session, &error).to_string();
        let error = error.told_to(tenant);
        let after = error.retry_after().unwrap_or_default();
        let told = Told {
            label: error.label(),
            message: error.to_string(),
            retry_after_millis: u64::try_from(after.as_millis()).unwrap_or(u64::MAX),
            request_id,
        };
        Refusal { status: status(error.class()), told }
    }
}

fn status(class: Class) -> StatusCode {
    match class {
        Class::Invalid => StatusCode::BAD_REQUEST,
        Class::Precondition => StatusCode::CONFLICT,
        Class::Mismatch | Class::Sequence | Class::Microbatch | Class::Cache | Class::TakenOver => {
            StatusCode::CONFLICT
        }
        Class::Exhausted => StatusCode::TOO_MANY_REQUESTS,
        Class::Draining => StatusCode::SERVICE_UNAVAILABLE,
        Class::NotFound => StatusCode::NOT_FOUND,
        Class::Unauthenticated => StatusCode::UNAUTHORIZED,
        Class::Internal | Class::DataLoss => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let Refusal { status, told } = self;
        let seconds = told.retry_after_millis.div_ceil(1000);
        let mut response = (status, Json(told)).into_response();
        if status == StatusCode::UNAUTHORIZED {
            let scheme = HeaderValue::from_static("Bearer");
            response.headers_mut().insert(header::WWW_AUTHENTICATE, scheme);
        }
        if seconds > 0 {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}
