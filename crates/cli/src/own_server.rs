use anyhow::Context;
use offshoot_server::{RunningServer, Server, ServerConfig};
use std::net::SocketAddr;

/// A server of this process, on a free port of loopback, with a store that goes away with it.
pub struct OwnServer {
    server: RunningServer,
    _store: tempfile::TempDir,
}

impl OwnServer {
    pub async fn start(mut config: ServerConfig) -> anyhow::Result<Self> {
        let store = tempfile::tempdir().context("a folder for the server's store")?;
        config.listen.host = "127.0.0.1".into();
        config.listen.port = 0;
        config.store.dir = store.path().into();
        Ok(OwnServer { server: Server::start(config).await?, _store: store })
    }

    pub fn address(&self) -> SocketAddr {
        self.server.local_addr()
    }

    /// Saves nothing: the store goes, too.
    pub async fn stop(self) {
        self.server.stop_now().await;
    }
}
