//! Issuers and certificates of a test, as files.

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair,
};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

static N_ISSUERS: AtomicUsize = AtomicUsize::new(0);

/// Whom a certificate is for.
#[derive(Clone, Copy, PartialEq)]
pub enum For {
    Server,
    Client,
}

/// A certificate and its key, as PEM.
pub struct Pair {
    pub cert: String,
    pub key: String,
    /// The certificate as it is sent.
    pub der: Vec<u8>,
}

/// Whoever makes certificates.
pub struct Ca(CertifiedIssuer<'static, KeyPair>);

impl Ca {
    pub fn new() -> Ca {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        // Each has a name of its own, as issuers have.
        let number = N_ISSUERS.fetch_add(1, Ordering::Relaxed);
        params.distinguished_name.push(DnType::CommonName, format!("issuer {number}"));
        Ca(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    pub fn pem(&self) -> String {
        self.0.pem()
    }

    /// For this machine, valid for a day.
    pub fn make(&self, whom: For) -> Pair {
        self.make_until(whom, SystemTime::now() + Duration::from_secs(24 * 3600))
    }

    pub fn make_until(&self, whom: For, end: SystemTime) -> Pair {
        self.make_with(whom, &["localhost", "127.0.0.1"], |params| params.not_after = end.into())
    }

    /// With these names, and whatever else is odd about it.
    pub fn make_with(
        &self,
        whom: For,
        names: &[&str],
        change: impl FnOnce(&mut CertificateParams),
    ) -> Pair {
        let names: Vec<String> = names.iter().map(|name| name.to_string()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        change(&mut params);
        params.extended_key_usages = vec![match whom {
            For::Server => ExtendedKeyUsagePurpose::ServerAuth,
            For::Client => ExtendedKeyUsagePurpose::ClientAuth,
        }];
        let key = KeyPair::generate().unwrap();
        let cert = params.signed_by(&key, &self.0).unwrap();
        Pair { cert: cert.pem(), key: key.serialize_pem(), der: cert.der().to_vec() }
    }
}

/// Writes a text and says where.
pub fn file(dir: &Path, name: &str, text: &str) -> PathBuf {
    let path = dir.join(name);
    std::fs::write(&path, text).unwrap();
    path
}

/// Writes a pair: the paths of certificate and key.
pub fn pair_files(dir: &Path, name: &str, pair: &Pair) -> (PathBuf, PathBuf) {
    let cert = file(dir, &format!("{name}.pem"), &pair.cert);
    (cert, file(dir, &format!("{name}.key"), &pair.key))
}
