//! A tenants file with tokens that a test knows.

use offshoot_client::{Client, ClientError, ClientOptions, Token};
use offshoot_server::ServerConfig;
use offshoot_tests::{TestServer, server_config};
use sha2::{Digest, Sha256};
use std::fmt::Write;
use std::path::PathBuf;

/// A tenant: name, weight and quotas as TOML.
pub type Row<'a> = (&'a str, u32, &'a str);

/// A server with a tenants file.
pub struct Shared {
    pub server: TestServer,
    path: PathBuf,
    _dir: tempfile::TempDir,
}

/// As `offshoot tenant add` would have made it, but always the same.
pub fn token(tenant: &str) -> String {
    format!("ofs_{tenant}_{}", "A".repeat(43))
}

fn text(tenants: &[Row]) -> String {
    let mut text = String::new();
    for (name, weight, quotas) in tenants {
        let mut hash = String::new();
        for byte in Sha256::digest(token(name)) {
            write!(hash, "{byte:02x}").unwrap();
        }
        write!(
            text,
            "[[tenants]]\nname = \"{name}\"\nweight = {weight}\n[[tenants.tokens]]\nid = \"{name}\"\n\
             sha256 = \"{hash}\"\n[tenants.quotas]\n{quotas}\n"
        )
        .unwrap();
    }
    text
}

impl Shared {
    pub async fn start(tenants: &[Row<'_>], change: impl FnOnce(&mut ServerConfig)) -> Shared {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tenants.toml");
        std::fs::write(&path, text(tenants)).unwrap();
        let mut config = server_config(&dir.path().join("store"));
        config.access.tenants = Some(path.clone());
        change(&mut config);
        Shared { server: TestServer::start_with(config).await, path, _dir: dir }
    }

    /// The file from now on; the server reads it by itself.
    pub fn change(&self, tenants: &[Row]) {
        let fresh = self.path.with_extension("new");
        std::fs::write(&fresh, text(tenants)).unwrap();
        std::fs::rename(fresh, &self.path).unwrap();
    }

    pub async fn client(&self, tenant: &str) -> Result<Client, ClientError> {
        let token = Some(Token::new(&token(tenant)).unwrap());
        let options = ClientOptions { token, ..ClientOptions::default() };
        Client::connect_with(&self.server.endpoint(), options).await
    }
}
