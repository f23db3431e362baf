//! Between the listener and the handlers: who may connect, for how long, encrypted or not, and what
//! of a request is read before somebody answers for it.

mod body;
mod caught;
mod connections;
mod guard;
mod incoming;
mod io;
mod serve;

use io::Peer;
pub use serve::{Served, Serving, set_health};
