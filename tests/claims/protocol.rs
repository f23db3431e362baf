//! What the protocol promises, on real sockets: a frame counts once, a bad frame changes nothing,
//! and a run that is interrupted ends with the same numbers as one that is not.

#[path = "protocol_breaks.rs"]
mod breaks;
#[path = "protocol_discards.rs"]
mod discards;
#[path = "protocol_liars.rs"]
mod liars;
#[path = "protocol_refusals.rs"]
mod refusals;
#[path = "protocol_sessions.rs"]
mod sessions;
#[path = "protocol_wire.rs"]
mod wire;

/// Not a claim: the server process that other tests start and kill. See `offshoot_tests::child`.
#[test]
fn child_process() {
    offshoot_tests::child::serve_if_asked();
}
