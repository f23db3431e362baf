//! Who the client is, and how it knows the server: bearer tokens and TLS.

use crate::ClientError;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Certificate, ClientTlsConfig, Identity};

/// What a server with a tenants file knows a client by. It is never shown: not by `Debug`, not in an
/// error.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    bearer: MetadataValue<Ascii>,
    file: Option<PathBuf>,
}

impl Token {
    /// Space around it is left out, as at the end of a file.
    ///
    /// # Errors
    /// If it is empty, or has what no token has: space, control characters or letters beyond ASCII.
    pub fn new(text: &str) -> Result<Token, ClientError> {
        let text = text.trim();
        let bad = |problem: &'static str| Err(ClientError::BadToken { problem });
        if text.is_empty() {
            return bad("it is empty");
        }
        if !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            return bad("it has spaces, line breaks or letters that no token has");
        }
        let Ok(mut bearer) = format!("Bearer {text}").parse::<MetadataValue<Ascii>>() else {
            return bad("it cannot be sent");
        };
        // HTTP/2 does not remember it for compression, and nobody prints it.
        bearer.set_sensitive(true);
        Ok(Token { bearer, file: None })
    }

    /// The file that it was read from. When the server no longer takes the token, it is read again:
    /// tokens are renewed while runs go on.
    pub fn of_file(self, path: PathBuf) -> Token {
        Token { file: Some(path), ..self }
    }

    /// What the file has now, if that is another one.
    pub(crate) fn renewed(&self) -> Option<Token> {
        let path = self.file.clone()?;
        let token = Token::new(&std::fs::read_to_string(&path).ok()?).ok()?.of_file(path);
        (token != *self).then_some(token)
    }

    /// Puts it on a request.
    pub(crate) fn sign<T>(&self, request: &mut tonic::Request<T>) {
        request.metadata_mut().insert("authorization", self.bearer.clone());
    }
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token(...)")
    }
}

/// How the server is known, and what this client shows of itself. Any of it turns TLS on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TlsOptions {
    /// PEM file with the certificates that may have signed the server's. None: those that the system
    /// trusts.
    pub ca: Option<PathBuf>,
    /// PEM file with this client's certificate, and those between it and its CA, for a server that
    /// asks for one.
    pub cert: Option<PathBuf>,
    /// PEM file with the key of `cert`.
    pub key: Option<PathBuf>,
    /// The name in the server's certificate, where it is not the address's.
    pub name: Option<String>,
}

impl TlsOptions {
    /// Whether anything is asked for.
    pub fn is_given(&self) -> bool {
        *self != TlsOptions::default()
    }

    /// Reads the files.
    pub(crate) fn to_config(&self) -> Result<ClientTlsConfig, ClientError> {
        let mut config = ClientTlsConfig::new();
        config = match &self.ca {
            Some(path) => config.ca_certificate(Certificate::from_pem(read(path, "CERTIFICATE")?)),
            None => config.with_native_roots(),
        };
        config = match (&self.cert, &self.key) {
            (Some(cert), Some(key)) => {
                let (cert, key) = (read(cert, "CERTIFICATE")?, read(key, "PRIVATE KEY")?);
                config.identity(Identity::from_pem(cert, key))
            }
            (None, None) => config,
            (Some(path), None) | (None, Some(path)) => {
                return Err(ClientError::TlsFile {
                    path: path.clone(),
                    problem: "a certificate and its key belong together; name both (--tls-cert, --tls-key)".into(),
                });
            }
        };
        Ok(match &self.name {
            Some(name) => config.domain_name(name),
            None => config,
        })
    }
}

/// A PEM file with at least one such section.
fn read(path: &Path, what: &'static str) -> Result<Vec<u8>, ClientError> {
    let wrong = |problem| ClientError::TlsFile { path: path.to_path_buf(), problem };
    let bytes = std::fs::read(path).map_err(|error| wrong(error.to_string()))?;
    let found = String::from_utf8_lossy(&bytes).lines().any(|line| {
        line.starts_with("-----BEGIN ") && line.trim_end().ends_with(&format!("{what}-----"))
    });
    if found {
        return Ok(bytes);
    }
    Err(wrong(format!("there is no {what} in it; expected a PEM file, -----BEGIN {what}-----")))
}

/// Whether what is sent to this host stays on this machine. A name other than `localhost` may mean
/// anything.
pub(crate) fn is_loopback(host: &str) -> bool {
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host.eq_ignore_ascii_case("localhost")
        || host.parse::<IpAddr>().is_ok_and(|address| address.to_canonical().is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_never_shown() {
        let secret = "ofs_t3f9_aaaabbbbccccdddd";
        let token = Token::new(&format!("  {secret}\n")).unwrap();
        let mut request = tonic::Request::new(());
        token.sign(&mut request);
        let sent = request.metadata().get("authorization").unwrap().to_str().unwrap();
        assert_eq!(sent, format!("Bearer {secret}"));
        let options = crate::ClientOptions { token: Some(token), ..Default::default() };
        for text in [format!("{options:?}"), format!("{request:?}")] {
            assert!(!text.contains("aaaa"), "{text}");
        }
        for bad in ["", " \n", "two words", "two\nlines", "fünf"] {
            let error = Token::new(bad).unwrap_err().to_string();
            assert!(error.contains("OFFSHOOT_TOKEN") && error.contains("--token-file"), "{error}");
            assert!(bad.trim().is_empty() || !error.contains(bad), "{error}");
        }
    }

    #[test]
    fn loopback_is_this_machine_only() {
        for here in
            ["localhost", "LOCALHOST", "127.0.0.1", "127.9.9.9", "[::1]", "::ffff:127.0.0.1"]
        {
            assert!(is_loopback(here), "{here}");
        }
        for away in ["trunk.local", "localhost.example", "10.0.0.1", "[fe80::1]", "0.0.0.0", ""] {
            assert!(!is_loopback(away), "{away}");
        }
    }

    #[test]
    fn files_are_named_with_what_is_wrong() {
        let says = |options: TlsOptions, words: &[&str]| {
            let error = options.to_config().unwrap_err().to_string();
            assert!(words.iter().all(|word| error.contains(word)), "{error}");
        };
        let here = PathBuf::from(file!()).file_name().unwrap().to_owned();
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml");
        let missing = PathBuf::from("/nowhere").join(here);
        says(TlsOptions { ca: Some(missing), ..Default::default() }, &["/nowhere", "No such file"]);
        says(
            TlsOptions { ca: Some(source.clone()), ..Default::default() },
            &["Cargo.toml", "no CERTIFICATE in it"],
        );
        says(TlsOptions { cert: Some(source), ..Default::default() }, &["--tls-cert, --tls-key"]);
    }
}
