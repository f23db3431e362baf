//! Older programs and older files against today's server.

#[path = "older/client.rs"]
mod client;
#[path = "older/store.rs"]
mod store;
