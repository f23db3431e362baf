use serde::{Deserialize, Serialize};

/// The console, `/metrics`, `/healthz` and `/readyz`: HTTP beside gRPC, with the same TLS (without
/// client certificates) and the same tokens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HttpConfig {
    /// An IP address, or `localhost`. What [`ListenConfig`](crate::ListenConfig) says of networks
    /// holds for it, too.
    pub host: String,
    /// 0: a free one. None: nothing is served by HTTP.
    pub port: Option<u16>,
    /// True: `/metrics` needs no token. It says that the network around the server keeps strangers
    /// out: names of tenants are among the labels.
    pub open_metrics: bool,
}

impl Default for HttpConfig {
    fn default() -> Self {
        HttpConfig { host: "127.0.0.1".into(), port: None, open_metrics: false }
    }
}
