//! Nothing is lost and nothing is doubled, whatever happens to server, client, wire and disk.

/// Not a claim: the server process that other tests start and kill. See `offshoot_tests::child`.
#[test]
fn child_process() {
    offshoot_tests::child::serve_if_asked();
}
