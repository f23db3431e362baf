//! Who gets in, how much of the server they may take, and what those find who wish it ill: TLS,
//! quotas of tenants, hostile clients. All on real sockets.

#[path = "access.rs"]
mod access;
#[path = "hostile.rs"]
mod hostile;
#[path = "http.rs"]
mod http;
#[path = "isolation.rs"]
mod isolation;
#[path = "strangers/pki.rs"]
mod pki;
#[path = "quotas.rs"]
mod quotas;
#[path = "strangers/tenants.rs"]
mod tenants;
#[path = "tls.rs"]
mod tls;
