use super::serve::Shown;
use axum::Json;
use axum::extract::State as Has;
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use serde_json::json;

/// The process lives and answers, whatever else.
pub async fn healthz() -> &'static str {
    "ok\n"
}

/// Whether work is taken: what gRPC's health service says, with the reason.
pub async fn readyz(Has(shown): Has<Shown>) -> Response {
    let state = shown.health.state();
    let health = state.name();
    match state.reason() {
        None => Json(json!({ "ready": true, "health": health })).into_response(),
        Some(reason) => {
            let told = json!({ "ready": false, "health": health, "reason": reason });
            (StatusCode::SERVICE_UNAVAILABLE, Json(told)).into_response()
        }
    }
}
