//! Helpers of the claims: a tiny model behind a real server on a free port, the protocol without the
//! SDK, and ways to disturb both.

pub mod child;
pub mod follow;
pub mod heard;
pub mod http;
pub mod memory;
pub mod process;
pub mod proxy;
pub mod raw;
pub mod run;
pub mod together;
pub mod watch;

use offshoot_server::{Error, Faults, LimitsConfig, RunningServer, Server, ServerConfig};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long a drain may take in a test: longer than any should.
const DRAIN: Duration = Duration::from_secs(60);

/// The folder of a fixture, such as `llama`.
pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name)
}

/// Layers 1 and 2 of the four of the tiny llama, in f32, on a free port, with this store.
pub fn server_config(store: &Path) -> ServerConfig {
    let mut config = ServerConfig::default();
    config.listen.port = 0;
    config.model.name = fixture("llama").display().to_string();
    config.model.split_point_1 = 1;
    config.model.split_point_2 = 3;
    config.model.n_threads = Some(1);
    config.store.dir = store.to_path_buf();
    // Each job alone: which jobs meet in a batch depends on the time, and with it the last bits.
    config.limits.max_tokens_per_batch = 1;
    config
}

/// A server in this process, with a store of its own if none is given.
pub struct TestServer {
    server: RunningServer,
    _store: Option<tempfile::TempDir>,
}

impl TestServer {
    /// With the usual settings.
    pub async fn start() -> TestServer {
        TestServer::start_limited(|_| {}).await
    }

    /// With other limits.
    pub async fn start_limited(change: impl FnOnce(&mut LimitsConfig)) -> TestServer {
        let store = tempfile::tempdir().expect("a folder");
        let mut config = server_config(store.path());
        change(&mut config.limits);
        let server = TestServer::start_with(config).await;
        TestServer { _store: Some(store), ..server }
    }

    /// With any settings; see [`server_config`].
    pub async fn start_with(config: ServerConfig) -> TestServer {
        let server = Server::start(config).await.unwrap_or_else(|error| panic!("{error}"));
        TestServer { server, _store: None }
    }

    /// Reads the tenants file again at once.
    pub fn reload(&self) {
        self.server.reload();
    }

    /// Where clients connect.
    pub fn address(&self) -> SocketAddr {
        self.server.local_addr()
    }

    /// Where browsers connect, if [`ServerConfig::http`] has a port.
    pub fn http(&self) -> SocketAddr {
        self.server.http_addr().expect("the test gave http.port")
    }

    /// The same as the SDK takes it.
    pub fn endpoint(&self) -> String {
        self.address().to_string()
    }

    /// Failures that are to come.
    pub fn faults(&self) -> &Faults {
        self.server.faults()
    }

    /// Until it cannot go on.
    pub async fn failed(&mut self) -> Error {
        self.server.failed().await
    }

    /// Ends the server as SIGTERM does. Every session must be durable then.
    pub async fn drain(self) {
        assert_eq!(self.server.drain(DRAIN).await, 0, "sessions were lost");
    }
}
