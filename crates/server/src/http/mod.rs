//! HTTP beside gRPC: a page for people who look after the server, its data as JSON, Prometheus' page,
//! and two probes.
//!
//! Nothing here decides anything: what a caller may see and do is decided by `operations`, as for the
//! gRPC calls of the same names. Connections are bounded, and none waits for a slow one.
//!
//! Other people's pages cannot act through a visitor's browser. With tenants every request needs a
//! header with a token, which a browser adds by itself to nothing. On an open server there is no
//! token; there every action needs a header that a page of another origin may not send without being
//! asked for (CORS, which nothing here grants), and a server on loopback answers to no name but
//! loopback's, so that no other name can be pointed at it.

mod api;
mod guard;
mod page;
mod probes;
mod refusal;
mod routes;
mod serve;
mod settings;

pub use serve::{Http, HttpParts};
pub use settings::HttpConfig;
