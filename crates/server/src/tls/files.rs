use crate::config::TlsConfig;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::{self, PemObject};
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::{ServerConfig as RustlsConfig, WebPkiClientVerifier};
use tokio_rustls::rustls::{self, InconsistentKeys, RootCertStore};
use x509_cert::der::Decode;
use x509_cert::ext::pkix::{BasicConstraints, SubjectAltName};
use x509_cert::{Certificate, TbsCertificate, Version};

/// What is wrong with the files of TLS. Their contents are never shown.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("{setting} {path}: {source}; name a PEM file that the server can read")]
    File { setting: &'static str, path: PathBuf, source: io::Error },
    #[error("{setting} {path} is not PEM: {cause}")]
    Pem { setting: &'static str, path: PathBuf, cause: String },
    #[error("{setting} {path} holds no {what}; expected PEM with -----BEGIN {what}-----")]
    Empty { setting: &'static str, path: PathBuf, what: &'static str },
    #[error(
        "tls.key {key} does not belong to the first certificate in tls.cert {cert}; give the key \
         that this certificate was made for, and in tls.cert the server's own certificate first, \
         those of its issuers behind it"
    )]
    Pair { cert: PathBuf, key: PathBuf },
    #[error(
        "tls.cert {cert} is of X.509 version 1, which has no names; make one with a \
         subjectAltName (docs/security.md has the command)"
    )]
    OldVersion { cert: PathBuf },
    #[error("tls.cert {cert} with tls.key {key} cannot be used: {cause}")]
    Unusable { cert: PathBuf, key: PathBuf, cause: String },
    #[error("tls.client_ca {path} cannot be used: {cause}")]
    ClientCa { path: PathBuf, cause: String },
    #[error("the files could not be read, the server ends")]
    Gone,
}

/// Where the files are.
#[derive(Debug, Clone)]
pub struct TlsFiles {
    pub cert: PathBuf,
    key: PathBuf,
    pub client_ca: Option<PathBuf>,
}

/// The files' contents at one time.
pub struct Texts {
    cert: Vec<u8>,
    key: Vec<u8>,
    client_ca: Option<Vec<u8>>,
}

/// What the server shows.
pub struct Identity {
    pub offers: Arc<Offers>,
    /// The first end in the chain.
    not_after: SystemTime,
    /// Why clients refuse the server's own certificate, whatever they trust.
    pub refused_for: Vec<&'static str>,
}

/// What handshakes are made with.
pub struct Offers {
    pub grpc: Arc<RustlsConfig>,
    /// Without client certificates.
    pub http: Arc<RustlsConfig>,
}

impl Texts {
    /// Tells contents apart.
    pub fn mark(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        for part in [Some(&self.cert), Some(&self.key), self.client_ca.as_ref()] {
            let part = part.map_or(&[][..], Vec::as_slice);
            hasher.update(&(part.len() as u64).to_le_bytes()).update(part);
        }
        *hasher.finalize().as_bytes()
    }
}

impl Identity {
    /// Whole days from then on; below 0 it has ended.
    pub fn days_left(&self, now: SystemTime) -> i64 {
        let days = |seconds: u64| (seconds / (24 * 3600)) as i64;
        match self.not_after.duration_since(now) {
            Ok(left) => days(left.as_secs()),
            Err(past) => -1 - days(past.duration().as_secs()),
        }
    }
}

impl TlsFiles {
    /// None: TLS is off. The settings were checked.
    pub fn of(config: &TlsConfig) -> Option<TlsFiles> {
        let TlsConfig { cert, key, client_ca } = config.clone();
        Some(TlsFiles { cert: cert?, key: key?, client_ca })
    }

    /// The contents as they are now.
    pub fn read(&self) -> Result<Texts, TlsError> {
        let client_ca = self.client_ca.as_deref();
        Ok(Texts {
            cert: read("tls.cert", &self.cert)?,
            key: read("tls.key", &self.key)?,
            client_ca: client_ca.map(|path| read("tls.client_ca", path)).transpose()?,
        })
    }

    /// What a server with these contents shows, and whom it lets in.
    pub fn identity(&self, texts: &Texts) -> Result<Identity, TlsError> {
        let chain = certificates("tls.cert", &self.cert, &texts.cert)?;
        let parsed = self.parse(&chain)?;
        let ends = parsed.iter().map(|of| of.tbs_certificate.validity.not_after.to_system_time());
        let not_after = ends.min().expect("a chain has at least one certificate");
        let own = &parsed[0].tbs_certificate;
        if own.version == Version::V1 {
            return Err(TlsError::OldVersion { cert: self.cert.clone() });
        }
        let refused_for = refused_for(own);
        let key = PrivateKeyDer::from_pem_slice(&texts.key).map_err(|error| match error {
            pem::Error::NoItemsFound => {
                let (setting, path) = ("tls.key", self.key.clone());
                TlsError::Empty { setting, path, what: "PRIVATE KEY" }
            }
            other => not_pem("tls.key", &self.key, &other),
        })?;
        let provider = Arc::new(ring::default_provider());
        let begin = || {
            RustlsConfig::builder_with_provider(provider.clone())
                .with_safe_default_protocol_versions()
                .map_err(|error| self.unusable(error))
        };
        let http = begin()?.with_no_client_auth();
        let http = http.with_single_cert(chain.clone(), key.clone_key());
        let builder = begin()?;
        let builder = match (&self.client_ca, &texts.client_ca) {
            (Some(path), Some(text)) => {
                let roots = Arc::new(roots(path, text)?);
                let verifier =
                    WebPkiClientVerifier::builder_with_provider(roots, provider.clone()).build();
                let verifier = verifier.map_err(|error| client_ca(path, error.to_string()))?;
                builder.with_client_cert_verifier(verifier)
            }
            _ => builder.with_no_client_auth(),
        };
        let mut grpc =
            builder.with_single_cert(chain, key).map_err(|error| self.unusable(error))?;
        // gRPC is HTTP/2 only.
        grpc.alpn_protocols = vec![b"h2".to_vec()];
        let mut http = http.map_err(|error| self.unusable(error))?;
        http.alpn_protocols = vec![b"http/1.1".to_vec()];
        let offers = Arc::new(Offers { grpc: Arc::new(grpc), http: Arc::new(http) });
        Ok(Identity { offers, not_after, refused_for })
    }

    fn unusable(&self, error: rustls::Error) -> TlsError {
        let (cert, key) = (self.cert.clone(), self.key.clone());
        match error {
            rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => {
                TlsError::Pair { cert, key }
            }
            other => TlsError::Unusable { cert, key, cause: other.to_string() },
        }
    }

    /// One for each.
    fn parse(&self, chain: &[CertificateDer<'_>]) -> Result<Vec<Certificate>, TlsError> {
        let parsed: Result<_, _> = chain.iter().map(|der| Certificate::from_der(der)).collect();
        let (cert, key) = (self.cert.clone(), self.key.clone());
        parsed.map_err(|error| TlsError::Unusable { cert, key, cause: error.to_string() })
    }
}

/// What no client lets pass. An extension that cannot be read is left to rustls.
fn refused_for(own: &TbsCertificate) -> Vec<&'static str> {
    let mut why = Vec::new();
    if let Ok(Some((_, BasicConstraints { ca: true, .. }))) = own.get() {
        why.push(
            "it is a CA's; make it with basicConstraints=critical,CA:FALSE, or let the CA sign \
             another certificate for this server",
        );
    }
    if let Ok(None) = own.get::<SubjectAltName>() {
        why.push("it has no subjectAltName; make it with subjectAltName=DNS:NAME");
    }
    why
}

fn read(setting: &'static str, path: &Path) -> Result<Vec<u8>, TlsError> {
    let file = |source| TlsError::File { setting, path: path.into(), source };
    std::fs::read(path).map_err(file)
}

fn not_pem(setting: &'static str, path: &Path, error: &pem::Error) -> TlsError {
    // Which kind it is, not what stood there: that could be a part of a key.
    let cause = match error {
        pem::Error::MissingSectionEnd { .. } => "a section has no end; is the file cut off?",
        pem::Error::Base64Decode(_) => "a section is not base64",
        _ => "a section's beginning or end is malformed",
    };
    TlsError::Pem { setting, path: path.into(), cause: cause.into() }
}

/// At least one.
fn certificates(
    setting: &'static str,
    path: &Path,
    text: &[u8],
) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(text).collect();
    let all = all.map_err(|error| not_pem(setting, path, &error))?;
    if all.is_empty() {
        return Err(TlsError::Empty { setting, path: path.into(), what: "CERTIFICATE" });
    }
    Ok(all)
}

fn roots(path: &Path, text: &[u8]) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates("tls.client_ca", path, text)? {
        roots.add(certificate).map_err(|error| client_ca(path, error.to_string()))?;
    }
    Ok(roots)
}

fn client_ca(path: &Path, cause: String) -> TlsError {
    TlsError::ClientCa { path: path.into(), cause }
}
