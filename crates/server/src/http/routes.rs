use super::refusal::Refusal;
use super::serve::Shown;
use super::{api, guard, page, probes};
use axum::Router;
use axum::extract::Path;
use axum::middleware::{from_fn, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use http::{HeaderMap, StatusCode};
use tower_http::CompressionLevel;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::compression::CompressionLayer;

/// Everything that is served.
pub fn routes(shown: Shown) -> Router {
    let admit = from_fn_with_state(shown.clone(), guard::admit);
    let admit_scraper = from_fn_with_state(shown.clone(), guard::admit_scraper);
    let check_name = from_fn_with_state(shown.clone(), guard::check_name);
    let data = Router::new()
        .route("/api/overview", get(api::overview))
        .route("/api/tenants", get(api::tenants))
        .route("/api/sessions/{session}", delete(api::delete_session))
        .route("/api/sessions/{session}/evict", post(api::evict))
        .route("/api/sessions/{session}/pin", post(api::pin))
        .route("/api/sessions/{session}/unpin", post(api::unpin))
        .route("/api/sessions/{session}/snapshots", get(api::snapshots))
        .route("/api/sessions/{session}/snapshots/{snapshot}", delete(api::delete_snapshot))
        .route_layer(admit);
    let metrics = Router::new().route("/metrics", get(api::metrics)).route_layer(admit_scraper);
    // The page itself says nothing of the server: it asks for a token.
    let page = Router::new().route("/", get(index)).route("/page/{file}", get(file));
    let gzip = CompressionLayer::new().quality(CompressionLevel::Fastest);
    Router::new()
        .merge(data)
        .merge(metrics)
        .merge(page)
        .route_layer(check_name)
        .route("/healthz", get(probes::healthz))
        .route("/readyz", get(probes::readyz))
        .fallback(nothing)
        .with_state(shown)
        .layer(CatchPanicLayer::custom(guard::panicked))
        .layer(from_fn(guard::harden))
        .layer(gzip)
}

async fn index(headers: HeaderMap) -> Response {
    file(Path("index.html".into()), headers).await
}

async fn file(Path(path): Path<String>, headers: HeaderMap) -> Response {
    match page::find(&path, &headers) {
        Some(found) => found,
        None => nothing().await.into_response(),
    }
}

async fn nothing() -> Refusal {
    Refusal::of_request(StatusCode::NOT_FOUND, "no_page", "there is nothing under this path")
}
