//! Why TLS did not come about, in words that say what to do.

use crate::{ClientOptions, status};
use rustls::{AlertDescription, CertificateError, Error as Tls};
use std::error::Error;
use std::path::Path;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tonic::Status;
use tonic::transport::Uri;

/// How HTTP/2 begins.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// The first two bytes of a TLS alert: its type, and the major version of all versions.
const ALERT: [u8; 2] = [21, 3];

/// webpki's names of what rustls passes on as it is.
const CA_AS_SERVER: &str = "CaUsedAsEndEntity";
const OLD_VERSION: &str = "UnsupportedCertVersion";

/// How a request fails whose connection ended before it was sent. In TLS 1.3 that is where a refused
/// client certificate shows: the client's handshake is over before the server has looked at it.
const CLOSED: &str = "connection closed";

/// Why no connection can be made at all with the files of `options`: nothing was sent yet.
pub(crate) fn of_own_files(error: &(dyn Error + 'static), options: &ClientOptions) -> String {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let (Some(tls), Some(cert), Some(key)) =
            (as_tls(error), &options.tls.cert, &options.tls.key)
        {
            let text = own_in_words(tls, cert, key);
            return text.unwrap_or_else(|| tls.to_string());
        }
        cause = error.source();
    }
    status::innermost(error)
}

/// None: it may be another file's problem.
fn own_in_words(error: &Tls, cert: &Path, key: &Path) -> Option<String> {
    let (cert, key) = (cert.display(), key.display());
    Some(match error {
        Tls::InconsistentKeys(_) => format!(
            "the key in {key} (--tls-key) does not belong to the first certificate in {cert} (--tls-cert); name the pair that was made together"
        ),
        Tls::InvalidCertificate(problem) if is(problem, OLD_VERSION) => format!(
            "the certificate in {cert} (--tls-cert) is of X.509 version 1, as `openssl x509 -req` makes it without extensions; have it made again with some (docs/security.md has the commands)"
        ),
        _ => return None,
    })
}

/// What went wrong between this client's TLS and the server's, if that is why a call failed.
pub(crate) fn explain(status: &Status, options: &ClientOptions) -> Option<String> {
    let mut cause = status.source();
    while let Some(error) = cause {
        if let Some(tls) = as_tls(error) {
            return Some(in_words(tls, options));
        }
        // Once connected, an alert has gone through layers that keep its text only.
        if error.to_string().contains("received fatal alert") {
            return Some(alert_in_words(&error.to_string(), options));
        }
        cause = error.source();
    }
    None
}

fn as_tls<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a Tls> {
    let inner = || error.downcast_ref::<std::io::Error>()?.get_ref()?.downcast_ref::<Tls>();
    error.downcast_ref::<Tls>().or_else(inner)
}

fn in_words(error: &Tls, options: &ClientOptions) -> String {
    match error {
        Tls::InvalidCertificate(problem) => certificate_in_words(problem, options),
        Tls::AlertReceived(alert) => alert_in_words(&format!("{alert:?}"), options),
        Tls::InvalidMessage(_) => {
            "it answers without TLS; use http://, or give the server its [tls] settings".into()
        }
        other => other.to_string(),
    }
}

/// Whether it is this one of webpki's problems, which rustls has no name for.
fn is(problem: &CertificateError, name: &str) -> bool {
    matches!(problem, CertificateError::Other(other) if format!("{:?}", other.0) == name)
}

fn certificate_in_words(problem: &CertificateError, options: &ClientOptions) -> String {
    match problem {
        // Another issuer of the same name has another key.
        CertificateError::UnknownIssuer | CertificateError::BadSignature => match &options.tls.ca {
            Some(ca) => format!(
                "its certificate is not signed by the CA in {}; --tls-ca takes the file of the one that signed it",
                ca.display()
            ),
            None => "its certificate is signed by no CA that this system trusts; name the file of the one that signed it with --tls-ca".into(),
        },
        CertificateError::NotValidForNameContext { expected, presented } if presented.is_empty() => {
            format!(
                "its certificate holds no name (subjectAltName); it needs one that is made with subjectAltName=DNS:{} (docs/security.md has the command)",
                expected.to_str()
            )
        }
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
            format!("{problem}; use that name as the address, or say it with --tls-name")
        }
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
            format!("{problem}; the server needs a new one, or a clock is wrong")
        }
        CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
            "its certificate is not one for servers; it needs another, without extendedKeyUsage or with serverAuth in it".into()
        }
        other if is(other, CA_AS_SERVER) => "its certificate is a CA's (basicConstraints CA:TRUE), and no server's; it needs one that is made with basicConstraints=critical,CA:FALSE (docs/security.md has the command)".into(),
        other if is(other, OLD_VERSION) => "its certificate is of X.509 version 1; it needs one with extensions, such as a subjectAltName (docs/security.md has the command)".into(),
        other => format!("its certificate is not taken: {other}"),
    }
}

/// What is wrong where every connection of an `https://` address was closed right after the handshake,
/// if that is what the last attempt died of. Which alert it was may not be known: a connection that ends
/// before its first request is sent leaves no reason but this one.
pub(crate) fn explain_closed(uri: &Uri, cause: &str, options: &ClientOptions) -> Option<String> {
    if uri.scheme_str() != Some("https") || !cause.ends_with(CLOSED) {
        return None;
    }
    let alert = match options.tls.cert {
        None => format!("{:?}", AlertDescription::CertificateRequired),
        Some(_) => CLOSED.to_string(),
    };
    Some(alert_in_words(&alert, options))
}

fn alert_in_words(alert: &str, options: &ClientOptions) -> String {
    let is = |one: AlertDescription| alert.contains(&format!("{one:?}"));
    let shows_one = options.tls.cert.is_some();
    if is(AlertDescription::CertificateRequired)
        || is(AlertDescription::HandshakeFailure) && !shows_one
    {
        return "it asks for a client certificate; name one with --tls-cert and --tls-key".into();
    }
    if shows_one {
        return format!(
            "it refuses this client's certificate ({alert}); it must be signed by the CA that the server takes clients from (its --tls-client-ca), be for clients, be no CA's own, and not be expired"
        );
    }
    format!("it ends the TLS handshake: {alert}")
}

/// Whether the server at this address begins to speak TLS when it is spoken to without.
pub(crate) async fn speaks_tls(uri: &Uri, patience: Duration) -> bool {
    let (Some(host), Some(port)) = (uri.host(), uri.port_u16()) else { return false };
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let ask = async {
        let mut stream = TcpStream::connect((host, port)).await?;
        stream.write_all(PREFACE).await?;
        let mut first = [0; 2];
        stream.read_exact(&mut first).await?;
        std::io::Result::Ok(first == ALERT)
    };
    matches!(tokio::time::timeout(patience, ask).await, Ok(Ok(true)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::TlsOptions;

    #[test]
    fn a_connection_that_is_closed_at_once_is_about_the_clients_certificate() {
        let cause = "operation was canceled: connection closed";
        let (with, without) = (Uri::from_static("https://a:1"), Uri::from_static("http://a:1"));
        let mut options = ClientOptions::default();
        let text = explain_closed(&with, cause, &options).unwrap();
        assert!(text.starts_with("it asks for a client certificate"), "{text}");
        assert_eq!(explain_closed(&without, cause, &options), None);
        assert_eq!(explain_closed(&with, "Connection refused", &options), None);
        options.tls = TlsOptions { cert: Some("a.pem".into()), ..TlsOptions::default() };
        let text = explain_closed(&with, cause, &options).unwrap();
        assert!(text.starts_with("it refuses this client's certificate (connection closed)"));
    }
}
