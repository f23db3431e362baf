//! The text that names a server, and the connection that is made for it.

use crate::identity::is_loopback;
use crate::options::ClientOptions;
use crate::{ClientError, tls_failure};
use tonic::transport::Endpoint;

/// What the server may send of one message before it is told that it was read. HTTP/2's own 64 KiB
/// would make every microbatch wait for many round trips; this much is 2 Gbit/s at 64 ms. It is set
/// when the connection is made, before the server has told its limits.
const WINDOW_BYTES: u32 = 16 << 20;
/// Of one HTTP/2 frame. A message of 16 MiB is 1024 of the usual 16 KiB, each with a call of the
/// system at both ends; larger ones than this gain nothing and leave the processor's cache.
const HTTP2_FRAME_BYTES: u32 = 128 << 10;

/// The address with its scheme and with what TLS needs. Nothing is sent yet.
pub(crate) fn to_endpoint(text: &str, options: &ClientOptions) -> Result<Endpoint, ClientError> {
    let bad = |reason: &str| ClientError::BadEndpoint {
        endpoint: text.to_string(),
        reason: reason.to_string(),
    };
    let uri = match text.split_once("://") {
        None if options.tls.is_given() => format!("https://{text}"),
        None => format!("http://{text}"),
        Some(("http", _)) if options.tls.is_given() => {
            return Err(bad(
                "http:// is without TLS, and there are settings for TLS; use https://",
            ));
        }
        Some(("http" | "https", _)) => text.to_string(),
        Some(_) => return Err(bad("the scheme is neither http nor https")),
    };
    let endpoint = Endpoint::from_shared(uri).map_err(|e| bad(&e.to_string()))?;
    let parts = endpoint.uri().clone();
    if parts.port_u16().is_none() {
        return Err(bad("the port is missing"));
    }
    if !matches!(parts.path(), "" | "/") || parts.query().is_some() {
        return Err(bad("there is something behind the port"));
    }
    let endpoint = if parts.scheme_str() == Some("https") {
        let config = options.tls.to_config()?.timeout(options.connect_timeout);
        endpoint.tls_config(config).map_err(|error| ClientError::Tls {
            endpoint: text.to_string(),
            problem: tls_failure::of_own_files(&error, options),
        })?
    } else {
        let stays = options.allow_insecure_token || is_loopback(parts.host().unwrap_or_default());
        if options.token.is_some() && !stays {
            return Err(ClientError::InsecureToken { endpoint: text.to_string() });
        }
        endpoint
    };
    Ok(endpoint
        .connect_timeout(options.connect_timeout)
        .tcp_nodelay(true)
        .initial_stream_window_size(WINDOW_BYTES)
        // Several sessions share a connection.
        .initial_connection_window_size(4 * WINDOW_BYTES)
        .max_frame_size(HTTP2_FRAME_BYTES)
        .http2_keep_alive_interval(options.keepalive_interval)
        .keep_alive_timeout(options.keepalive_timeout)
        .keep_alive_while_idle(true))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{TlsOptions, Token};

    #[test]
    fn addresses_with_and_without_a_scheme() {
        let options = ClientOptions::default();
        for fine in
            ["127.0.0.1:50051", "http://[::1]:7", "http://trunk.local:50051/", "a:1", "https://a:1"]
        {
            assert!(to_endpoint(fine, &options).is_ok(), "{fine}");
        }
        for (text, reason) in [
            ("trunk.local", "port"),
            ("http://trunk.local", "port"),
            ("https://trunk.local", "port"),
            ("ftp://trunk.local:1", "scheme"),
            ("a:1/model", "behind the port"),
            ("", ""),
            ("two words:1", ""),
        ] {
            let error = to_endpoint(text, &options).unwrap_err().to_string();
            assert!(error.contains(reason) && error.contains("host:port"), "{text}: {error}");
        }
    }

    #[test]
    fn settings_for_tls_turn_it_on() {
        let tls = TlsOptions { name: Some("trunk".into()), ..TlsOptions::default() };
        let options = ClientOptions { tls, ..ClientOptions::default() };
        assert_eq!(to_endpoint("a:1", &options).unwrap().uri().scheme_str(), Some("https"));
        let error = to_endpoint("http://a:1", &options).unwrap_err().to_string();
        assert!(error.contains("use https://"), "{error}");
    }

    #[test]
    fn a_token_stays_on_this_machine_or_behind_tls() {
        let token = Some(Token::new("ofs_1_secret").unwrap());
        let mut options = ClientOptions { token, ..ClientOptions::default() };
        for fine in ["127.0.0.1:1", "localhost:1", "[::1]:1", "https://trunk.local:1"] {
            assert!(to_endpoint(fine, &options).is_ok(), "{fine}");
        }
        for open in ["trunk.local:1", "http://10.0.0.1:1"] {
            let error = to_endpoint(open, &options).unwrap_err().to_string();
            assert!(error.contains("--allow-insecure-token"), "{error}");
            assert!(!error.contains("secret"), "{error}");
        }
        options.allow_insecure_token = true;
        assert!(to_endpoint("trunk.local:1", &options).is_ok());
    }
}
