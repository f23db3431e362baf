//! Between the listener and the handlers: who may connect, for how long, encrypted or not, and what
//! of a request is read before somebody answers for it.

mod body;
mod caught;
mod connections;
mod guard;
mod health;
mod incoming;
mod io;
mod serve;

pub use connections::Connections;
pub use health::{Health, State};
pub use incoming::incoming;
pub use io::Io;
use io::Peer;
pub use serve::{Served, Serving};
