//! What was released goes on working: contracts that are out there, and what breaks them.
//!
//! [`frozen`] is a client generated from the oldest contract in `proto/compat`; [`breaks`] says what in
//! a contract an older program would stumble over.

mod breaks;

pub use breaks::breaks;

/// Generated from the contract of 0.1.0.
#[allow(clippy::doc_markdown, clippy::doc_lazy_continuation)]
pub mod frozen {
    tonic::include_proto!("offshoot.v1");
}
