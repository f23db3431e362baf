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

fn hash(name: &str) -> String {
    let mut hash = String::new();
    for byte in Sha256::digest(token(name)) {
        write!(hash, "{byte:02x}").unwrap();
    }
    hash
}

fn text(tenants: &[Row]) -> String {
    let mut text = String::new();
    for (name, weight, quotas) in tenants {
        let hash = hash(name);
        write!(
            text,
            "[[tenants]]\nname = \"{name}\"\nweight = {weight}\n[[tenants.tokens]]\nid = \"{name}\"\n\
             sha256 = \"{hash}\"\n[tenants.quotas]\n{quotas}\n"
        )
        .unwrap();
    }
    text
}

/// A tenant with any tokens: the names that [`token`] takes, and what else stands with each.
pub fn entry(tenant: &str, tokens: &[(&str, &str)]) -> String {
    let mut text = format!("[[tenants]]\nname = \"{tenant}\"\n");
    for (name, more) in tokens {
        let hash = hash(name);
        write!(text, "[[tenants.tokens]]\nid = \"{name}\"\nsha256 = \"{hash}\"\n{more}\n").unwrap();
    }
    text
}

impl Shared {
    pub async fn start(tenants: &[Row<'_>], change: impl FnOnce(&mut ServerConfig)) -> Shared {
        Shared::start_with_text(&text(tenants), change).await
    }

    pub async fn start_with_text(text: &str, change: impl FnOnce(&mut ServerConfig)) -> Shared {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tenants.toml");
        std::fs::write(&path, text).unwrap();
        let mut config = server_config(&dir.path().join("store"));
        config.access.tenants = Some(path.clone());
        change(&mut config);
        Shared { server: TestServer::start_with(config).await, path, _dir: dir }
    }

    /// The file from now on; the server reads it by itself.
    pub fn change(&self, tenants: &[Row]) {
        self.write(&text(tenants));
    }

    /// The same, with any text.
    pub fn write(&self, text: &str) {
        let fresh = self.path.with_extension("new");
        std::fs::write(&fresh, text).unwrap();
        std::fs::rename(fresh, &self.path).unwrap();
    }

    pub async fn client(&self, tenant: &str) -> Result<Client, ClientError> {
        let token = Some(Token::new(&token(tenant)).unwrap());
        let options = ClientOptions { token, ..ClientOptions::default() };
        Client::connect_with(&self.server.endpoint(), options).await
    }
}
