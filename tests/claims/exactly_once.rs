//! Nothing is lost and nothing is doubled, whatever happens to the server, to the connection and to
//! what is under way between them: every number that a disturbed run saw, and the adapter that it
//! ends with, are bit for bit those of a run that nobody disturbed.
//!
//! Faults come at random moments from fixed seeds. The longer loop, with the trainer's process as
//! well, is `benches/kill_loop`.

#[path = "exactly_once/connections.rs"]
mod connections;
#[path = "exactly_once/kills.rs"]
mod kills;

use offshoot_client::{Client, SessionInfo};
use offshoot_server::ServerConfig;
use offshoot_tests::follow::{Follower, PATIENCE, Progress, Undisturbed, open, quick, undisturbed};
use offshoot_tests::server_config;
use std::path::Path;
use std::time::{Duration, Instant};

/// Not a claim: the server process that tests start and kill. See `offshoot_tests::child`.
#[test]
fn child_process() {
    offshoot_tests::child::serve_if_asked();
}

/// With snapshots of the server's own at every second step.
fn every_second_step(store: &Path) -> ServerConfig {
    let mut config = server_config(store);
    (config.session.snapshot_steps, config.session.snapshot_seconds) = (2, 0.0);
    config
}

/// Polls until `is_so`.
async fn until(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let begun = Instant::now();
    while !is_so().await {
        assert!(begun.elapsed() < PATIENCE, "{what}: it never came to that");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// The only session of a server, asked without a proxy.
async fn only_session(endpoint: &str) -> SessionInfo {
    let client = Client::connect(endpoint).await.unwrap();
    let mut sessions = client.list_sessions().await.unwrap();
    assert_eq!(sessions.len(), 1);
    sessions.remove(0)
}
