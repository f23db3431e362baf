use super::refusal::Refusal;
use super::serve::Shown;
use super::{guard, page, probes};
use axum::Router;
use axum::extract::Path;
use axum::middleware::{from_fn, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use http::{HeaderMap, StatusCode};
use tower_http::CompressionLevel;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::compression::CompressionLayer;

/// Everything that is served.
pub fn routes(shown: Shown) -> Router {
    let check_name = from_fn_with_state(shown.clone(), guard::check_name);
    // The page itself says nothing of the server: it asks for a token.
    let page = Router::new().route("/", get(index)).route("/page/{file}", get(file));
    let gzip = CompressionLayer::new().quality(CompressionLevel::Fastest);
    Router::new()
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
