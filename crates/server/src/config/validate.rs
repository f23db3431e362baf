//! Which values can be, and what is said of those that cannot.

use super::{ListenConfig, ServerConfig, TlsConfig};
use crate::error::Error;
use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;

/// One value that cannot be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mistake {
    /// Such as `limits.max_rank`.
    pub key: &'static str,
    pub found: String,
    pub expected: &'static str,
}

/// All mistakes of a configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mistakes(pub Vec<Mistake>);

impl fmt::Display for Mistakes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, Mistake { key, found, expected }) in self.0.iter().enumerate() {
            let line = if i == 0 { "" } else { "\n" };
            write!(f, "{line}{key} is {found}: expected {expected}")?;
        }
        Ok(())
    }
}

/// Whether only this machine can connect to a listener of this host.
fn is_loopback(host: &str) -> bool {
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

impl ServerConfig {
    /// Whether only tenants get in, and nobody reads their tokens on the way.
    fn keeps_strangers_out(&self) -> bool {
        self.access.tenants.is_some() && self.tls.is_on()
    }

    /// All mistakes at once, or none. Mistakes that only the model shows (split points beyond its
    /// layers, a device that is not there) come when it is loaded.
    pub fn validate(&self) -> Result<(), Error> {
        let mut mistakes = Vec::new();
        let mut check = |key, fine: bool, found: String, expected| {
            if !fine {
                mistakes.push(Mistake { key, found: format!("\"{found}\""), expected });
            }
        };
        let ListenConfig { host, allow_insecure_network, .. } = &self.listen;
        check(
            "listen.host",
            host == "localhost" || host.parse::<IpAddr>().is_ok(),
            host.clone(),
            "an IP address or localhost",
        );
        check(
            "listen.host",
            is_loopback(host) || *allow_insecure_network || self.keeps_strangers_out(),
            host.clone(),
            match &self.access.tenants {
                None => {
                    "a loopback address: without access.tenants whoever reaches this address could \
                     train, export and delete. Name a tenants file (`offshoot tenant add` writes \
                     one; --tenants) and turn TLS on with tls.cert and tls.key (--tls-cert, --tls-key), \
                     or use 127.0.0.1 and a tunnel, or set listen.allow_insecure_network = true \
                     (--allow-insecure-network) in a network that keeps strangers out"
                }
                Some(_) => {
                    "a loopback address: without TLS tokens could be read on their way. Turn it on \
                     with tls.cert and tls.key (--tls-cert, --tls-key), or set \
                     listen.allow_insecure_network = true (--allow-insecure-network) in a network that \
                     nobody listens to"
                }
            },
        );
        let http = &self.http;
        check(
            "http.host",
            http.host == "localhost" || http.host.parse::<IpAddr>().is_ok(),
            http.host.clone(),
            "an IP address or localhost",
        );
        check(
            "http.host",
            http.port.is_none()
                || is_loopback(&http.host)
                || *allow_insecure_network
                || self.keeps_strangers_out(),
            http.host.clone(),
            "a loopback address, unless there are both access.tenants and TLS (--tenants, --tls-cert, \
             --tls-key), or listen.allow_insecure_network = true in a network that keeps strangers out",
        );
        let TlsConfig { cert, key, client_ca } = &self.tls;
        let shown = |path: &Option<PathBuf>| {
            path.as_ref().map_or_else(String::new, |path| path.display().to_string())
        };
        check(
            "tls.cert",
            cert.is_some() || key.is_none(),
            shown(cert),
            "the certificate of tls.key (option --tls-cert)",
        );
        check(
            "tls.key",
            key.is_some() || cert.is_none(),
            shown(key),
            "the key of tls.cert (option --tls-key)",
        );
        check(
            "tls.client_ca",
            client_ca.is_none() || cert.is_some(),
            shown(client_ca),
            "nothing, unless tls.cert and tls.key (--tls-cert, --tls-key) turn TLS on",
        );
        let model = &self.model;
        check(
            "model.name",
            !model.name.is_empty(),
            model.name.clone(),
            "a Hugging Face directory, a GGUF file or a hub name",
        );
        check(
            "model.split_point_2",
            model.split_point_2 > model.split_point_1,
            model.split_point_2.to_string(),
            "a layer behind model.split_point_1 (--split-point-2 LAYER)",
        );
        check(
            "model.device",
            crate::engine::parse_device(&model.device).is_some(),
            model.device.clone(),
            "cpu, cuda or cuda:N",
        );
        check("model.n_threads", model.n_threads != Some(0), "0".into(), "at least 1, or none");
        let limits = &self.limits;
        for (key, value) in [
            ("limits.max_tokens_per_microbatch", limits.max_tokens_per_microbatch),
            ("limits.max_frames_in_flight", limits.max_frames_in_flight),
            ("limits.max_open_microbatches", limits.max_open_microbatches),
            ("limits.max_open_caches", limits.max_open_caches),
            ("limits.max_cache_tokens", limits.max_cache_tokens),
            ("limits.max_rank", limits.max_rank),
            ("limits.max_queued_jobs", limits.max_queued_jobs),
            ("limits.max_tokens_per_batch", limits.max_tokens_per_batch),
            ("limits.max_live_sessions", limits.max_live_sessions),
            ("limits.max_connections", limits.max_connections),
            ("session.n_actor_threads", self.session.n_actor_threads),
            ("store.snapshots_kept", self.store.snapshots_kept),
            ("store.server_snapshots_kept", self.store.server_snapshots_kept),
        ] {
            check(
                key,
                (1..=1 << 30).contains(&value),
                value.to_string(),
                "at least 1, at most 2^30",
            );
        }
        for (key, value) in [
            ("session.lease_seconds", self.session.lease_seconds),
            ("session.idle_seconds", self.session.idle_seconds),
            ("limits.admission_wait_seconds", limits.admission_wait_seconds),
            ("drain.timeout_seconds", self.drain.timeout_seconds),
        ] {
            let fine = value > 0.0 && value <= 1e9;
            check(key, fine, value.to_string(), "more than 0, at most 10^9 seconds");
        }
        let wait = limits.batch_wait_seconds;
        check(
            "limits.batch_wait_seconds",
            (0.0..=10.0).contains(&wait),
            wait.to_string(),
            "0 to 10 seconds",
        );
        let snapshots = self.session.snapshot_seconds;
        check(
            "session.snapshot_seconds",
            (0.0..=1e9).contains(&snapshots),
            snapshots.to_string(),
            "0 to 10^9 seconds; 0 takes none by time",
        );
        let wait = self.store.wait_seconds;
        check(
            "store.wait_seconds",
            (0.0..=1e9).contains(&wait),
            wait.to_string(),
            "0 to 10^9 seconds; 0 does not wait",
        );
        self.telemetry.check(&mut check);
        let turn = self.session.turn_seconds;
        check(
            "session.turn_seconds",
            (0.0..=3600.0).contains(&turn),
            turn.to_string(),
            "0 to 3600 seconds",
        );
        if mistakes.is_empty() { Ok(()) } else { Err(Error::Config(Mistakes(mistakes))) }
    }
}
